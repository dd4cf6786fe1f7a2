"""curves.png of a run, drawn from its metrics.jsonl alone.

In: the path of a metrics.jsonl. Out: one PNG with the training loss beside every evaluated group, learning rate, gradient
norm and speed over iterations. matplotlib is an extra (megawrap[plots]), imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megawrap.errors import DataError
from megawrap.io import atomic_write
from megawrap.training.loggers import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#8a8f98"
COLOURS = ("#d1495b", "#00798c", "#edae49", "#66a182", "#6a4c93", "#2e4057")  # evaluated groups, in the order they appear
SIDE_PANELS = (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("useful_tokens_per_s", "useful tokens/s"))


def draw_curves(metrics_path: Path, png_path: Path) -> str:
    """Draw the curves of a run.

    Args:
        metrics_path: RUN/logs/metrics.jsonl.
        png_path: where the picture goes; its directory is made.

    Returns:
        A sentence for the console: where the picture is, or why none was drawn.

    Raises:
        DataError: the file is missing, damaged or has no lines.
    """
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError:
        return f"{Path(png_path).name} was not drawn: matplotlib is not installed (pip install 'megawrap[plots]')"
    records = read_records(metrics_path)
    if not records:
        raise DataError(f"{metrics_path} has no lines yet", hint="Draw after the first log interval.")
    figure = curves(records)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(png_path), lambda out: figure.savefig(out, format="png", dpi=130))
    return f"curves: {png_path}"


def curves(records: Sequence[dict[str, Any]]) -> Figure:
    """The figure of a run's records: loss at the left, what drives it at the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(SIDE_PANELS), 5)
    train = [record for record in records if record["phase"] == "train"]
    _loss(figure.add_subplot(grid[:, :3]), train, [record for record in records if record["phase"] == "eval"])
    for place, (name, title) in enumerate(SIDE_PANELS):
        axes = figure.add_subplot(grid[place, 3:])
        axes.plot(*_series(train, name), color=COLOURS[1], linewidth=1.4)
        axes.set_ylim(bottom=0)
        _style(axes, title, last=place == len(SIDE_PANELS) - 1)
    return figure


def _loss(axes: Axes, train: Sequence[dict[str, Any]], evaluated: Sequence[dict[str, Any]]) -> None:
    """Training loss as a thin grey line, each evaluated group with its points and its last value in the legend."""
    if train:
        axes.plot(*_series(train, "loss"), color=GREY, linewidth=1.2, label="train")
    groups = list(dict.fromkeys(record["group"] for record in evaluated))
    for place, group in enumerate(groups):
        iterations, losses = _series([record for record in evaluated if record["group"] == group], "loss")
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(iterations, losses, color=colour, marker="o", markersize=4, linewidth=1.6, label=f"{group}: {losses[-1]:.3f}")
    if train or groups:
        axes.legend(frameon=False, loc="upper right")
    _style(axes, "loss (nats per trained token)", last=True)


def _series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(iterations, values) of the records that have the field; a value that was not finite is a gap."""
    having = [record for record in records if name in record]
    return [record["iteration"] for record in having], [float("nan") if record[name] is None else record[name] for record in having]


def _style(axes: Axes, title: str, *, last: bool) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, labelbottom=last)
    if last:
        axes.set_xlabel("iteration", fontsize=9)
