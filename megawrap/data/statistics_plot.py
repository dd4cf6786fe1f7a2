"""Statistics as a picture: how long the samples are, how much of them is trained on, and where they come from.

In: the `Account` of one or more datasets. Out: one PNG. matplotlib is an extra (megawrap[plots]), imported when something
is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megawrap.data.statistics_table import Account
from megawrap.errors import DataError
from megawrap.io import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINED, CONTEXT, PADDING = "#00798c", "#c9ced6", "#f3f4f6"


def draw(accounts: Sequence[Account], path: Path) -> None:
    """Write the picture, atomically.

    Args:
        accounts: one row of panels each.
        path: of the PNG; its directory must exist.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(f"{path} cannot be drawn: matplotlib is not installed", hint="pip install 'megawrap[plots]'") from error
    figure = Figure(figsize=(9.5, 2.9 * len(accounts)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(accounts), 3)
    for row, account in enumerate(accounts):
        _lengths(figure.add_subplot(grid[row, :2]), account)
        _shares(figure.add_subplot(grid[row, 2]), account)
    atomic_write(path, lambda out: figure.savefig(out, format="png", dpi=110))


def _lengths(axes: Axes, account: Account) -> None:
    """Documents by length; the bars double in width, so they are drawn at equal width."""
    statistics = account.statistics
    bars = statistics.histogram()
    axes.bar(range(len(bars)), [bar["documents"] for bar in bars], width=0.9, color=TRAINED)
    step = -(-len(bars) // 12)
    axes.set_xticks(range(0, len(bars), step), [f"{bar['from']:,}" for bar in bars[::step]], fontsize=8)
    axes.set_xlabel("tokens of a document, from", fontsize=9)
    summary = statistics.lengths.summary()
    title = f"{statistics.name}: {statistics.documents:,} documents, median {summary['p50']:,}, longest {summary['max']:,} tokens"
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=10)  # a name is text, not a formula
    axes.grid(True, axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _shares(axes: Axes, account: Account) -> None:
    """What is trained on: of the tokens, and of the positions of packed rows."""
    statistics, packed = account.statistics, account.packed
    bars = [("tokens", *_parts(1.0, statistics.trained_share))]
    if packed is not None:
        bars.append((f"rows of\n{packed.seq_length:,}", *_parts(packed.fill, packed.trained)))
    for place, (_, trained, context, padding) in enumerate(bars):
        left = 0.0
        for share, colour, name in ((trained, TRAINED, "trained"), (context, CONTEXT, "context"), (padding, PADDING, "padding")):
            axes.barh(place, 100 * share, left=100 * left, height=0.6, color=colour, label=name if place == 0 else None)
            if share > 0.08:
                colour = "white" if name == "trained" else "#2e4057"
                axes.text(100 * (left + share / 2), place, f"{100 * share:.1f}", ha="center", va="center", fontsize=8, color=colour)
            left += share
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=8)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_title("% trained, context, padding", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), handlelength=1, columnspacing=1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _parts(filled: float, trained: float | None) -> tuple[float, float, float]:
    """Shares of trained, context and padding; everything is shown as context where it is not known."""
    return trained or 0.0, filled - (trained or 0.0), 1.0 - filled
