"""The data plan as text for a terminal.

In: a `Plan`. Out: one table row per source, then what was dropped or cut and why, then the arithmetic of the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megawrap.data.plan import Plan, SourcePlan

_HEAD = ("group", "source", "documents", "weight %", "used", "rows", "tokens", "fill %", "trained", "in row %", "share %", "epochs")


def render(plan: Plan) -> str:
    """A table of groups and sources, the account of what is not trained on, and the size of a global batch.

    `in row %` is the part of all row positions that is trained on, `share %` the source's part of its group's trained
    tokens.
    """
    lines: list[tuple[str, ...]] = [_HEAD]
    names = _short_names({source.prefix for group in plan.report for source in group.sources})
    for group in plan.report:
        for number, source in enumerate(group.sources):
            lines.append((group.name if number == 0 else "", names[source.prefix], *_cells(source)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    table = [
        "  ".join(_aligned(cell, width, column) for column, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in lines
    ]
    table.insert(1, "-" * len(table[0]))
    return "\n".join([*(line.rstrip() for line in table), *_losses(plan, names), *_arithmetic(plan)])


def _short_names(prefixes: set[Path]) -> dict[Path, str]:
    """As many last parts of every path as tell it from the others."""
    names = {}
    for prefix in prefixes:
        parts, number = prefix.parts, 1
        while number < len(parts) and any(other != prefix and other.parts[-number:] == parts[-number:] for other in prefixes):
            number += 1
        names[prefix] = str(Path(*parts[-number:]))
    return names


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _cells(source: SourcePlan) -> tuple[str, ...]:
    counts = source.counts
    return (
        f"{source.range[0]:,}:{source.range[1]:,}",
        f"{100 * source.share:.2f}",
        f"{counts.samples:,}",
        f"{source.rows:,}",
        f"{counts.kept_tokens:,}",
        f"{100 * source.fill:.2f}",
        f"{counts.supervised:,}",
        f"{100 * source.trained:.1f}",
        f"{100 * source.trained_share:.2f}",
        f"{source.epochs:.2f}",
    )


def _losses(plan: Plan, names: dict[Path, str]) -> list[str]:
    """A line for every reason for which a source lost something; empty when nothing was."""
    lines = []
    for group in plan.report:
        for source in group.sources:
            counts, name = source.counts, f"{group.name} {names[source.prefix]}"
            for reason, number in counts.dropped_documents.items():
                lines.append(f"{name}: dropped {number:,} documents, {counts.dropped_tokens[reason]:,} tokens: {reason}")
            if counts.shortened:
                kind = "tokens" if counts.cut_supervised else "tokens of inputs"
                lines.append(f"{name}: {counts.shortened:,} of {counts.overlong:,} over-long documents lost {counts.cut_tokens:,} {kind}")
            if counts.cut_supervised:
                lines.append(f"{name}: {counts.cut_supervised:,} supervised tokens are not trained on")
            if counts.pieces > counts.samples:
                lines.append(f"{name}: {counts.samples:,} samples became {counts.pieces:,} segments")
    return lines


def _arithmetic(plan: Plan) -> list[str]:
    batch, rows = plan.global_batch_size, plan.global_batch_size * plan.iterations
    trained, positions = plan.trained_tokens_per_iteration, plan.positions_per_iteration
    if plan.packing == "none":
        size = f"{batch:,} rows of at most {plan.seq_length:,} and on average {positions / batch:,.1f} positions = about {positions:,.0f}"
        padding = "; micro-batches are padded to their longest row"
    else:
        size, padding = f"{batch:,} rows x {plan.seq_length:,} positions = {batch * plan.seq_length:,}", ""
    return [
        f"global batch: {size}, of which about {trained:,.0f} ({100 * trained / positions:.1f} %) are trained on{padding}",
        f"run: {plan.iterations:,} iterations = {rows:,} rows, about {trained * plan.iterations:,.0f} trained tokens",
    ]
