"""Statistics of datasets for a terminal: counts, quantiles, a histogram in characters, and what packing makes of them.

In: `Statistics`, and where rows were packed the `Packed` facts of a plan. Out: text, or plain types for JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megawrap.data.statistics import Statistics
from megawrap.data.view_text import Style, visible

_BAR_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What packing makes of the samples.

    Attributes:
        seq_length: positions of a row; with packing none, of the longest.
        packing: how samples become rows.
        rows: of all samples.
        fill: share of positions that hold a sample.
        trained: share of positions that are trained on.
        overlong: documents longer than a row.
        lost_tokens: tokens that are in no row.
        losses: what was left out, a sentence each.
    """

    seq_length: int
    packing: str
    rows: int
    fill: float
    trained: float
    overlong: int
    lost_tokens: int
    losses: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A source of the mix.

    Attributes:
        name: of the file or dataset.
        numbers: what is known of it, by column.
    """

    name: str
    numbers: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Account:
    """Statistics of one dataset and what a recipe makes of it."""

    statistics: Statistics
    packed: Packed | None
    mix: list[Part]

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        from dataclasses import asdict

        return {
            **self.statistics.to_dict(),
            "packed": None if self.packed is None else asdict(self.packed),
            "mix": [{"name": part.name, **part.numbers} for part in self.mix],
        }


def facts(account: Account) -> list[tuple[str, str]]:
    """Name and value of every number that is not in the histogram or the mix."""
    statistics, packed = account.statistics, account.packed
    rows = [
        ("documents", f"{statistics.documents:,} ({statistics.sequences:,} sequences)"),
        ("tokens", f"{statistics.tokens:,}"),
    ]
    if statistics.trained_tokens is None:
        rows.append(("trained tokens", "unknown: no sequence modes; usable with loss_on all, which trains on every token"))
    else:
        rows.append(("trained tokens", f"{statistics.trained_tokens:,}, {100 * (statistics.trained_share or 0):.1f} %"))
    rows.append(("tokens a document", _quantiles(statistics.lengths.summary())))
    if statistics.trained_lengths is not None:
        rows.append(("trained of them", _quantiles(statistics.trained_lengths.summary())))
    if packed is not None:
        rows += [
            (
                f"rows of {packed.seq_length:,}",
                f"{packed.rows:,} by {packed.packing}, {100 * packed.fill:.2f} % filled, {100 * packed.trained:.1f} % trained",
            ),
            ("over-long", f"{packed.overlong:,} documents, {packed.lost_tokens:,} tokens in no row"),
            *(("", loss) for loss in packed.losses),
        ]
    if statistics.lines:
        known = {name: value for name, value in statistics.lines.items() if isinstance(value, int)}
        rows.append(("input lines", ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in known.items())))
    return rows


def _quantiles(summary: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.1f}" if name == "mean" else f"{name} {value:,}" for name, value in summary.items())


def render(account: Account, style: Style) -> str:
    """An account as a table, a histogram and the mix."""
    rows = facts(account)
    width = max(len(name) for name, _ in rows)
    lines = [f"statistics of {visible(account.statistics.name, style)}", *(f"{name:<{width}}  {value}".rstrip() for name, value in rows)]
    return "\n".join([*lines, "", *_histogram(account.statistics, style), *_mix(account.mix, style)])


def _histogram(statistics: Statistics, style: Style) -> list[str]:
    bars = statistics.histogram()
    most = max(bar["documents"] for bar in bars)
    labels = [f"{bar['from']:,}-{bar['below'] - 1:,}" for bar in bars]
    width = max(12, *map(len, labels))
    block = "#" if style.rule == "-" else "█"
    lines = [f"{'tokens':>{width}}  documents"]
    for label, bar in zip(labels, bars, strict=True):
        filled = -(-_BAR_WIDTH * bar["documents"] // most) if bar["documents"] else 0
        lines.append(f"{label:>{width}}  {block * filled}{' ' * bool(filled)}{bar['documents']:,}")
    return lines


def _mix(mix: Sequence[Part], style: Style) -> list[str]:
    """A table of the sources; nothing when there is none."""
    if not mix:
        return []
    columns = list(dict.fromkeys(name for part in mix for name in part.numbers))
    table = [("source", *columns), *((visible(part.name, style), *(part.numbers.get(column, "") for column in columns)) for part in mix)]
    widths = [max(len(line[column]) for line in table) for column in range(len(columns) + 1)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip() for line in table
    ]
    return ["", *text]
