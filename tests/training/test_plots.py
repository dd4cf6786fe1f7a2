"""curves.png holds what metrics.jsonl says, and its absence is explained."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from megawrap.errors import DataError
from megawrap.training.loggers import MetricsWriter, Record, read_records
from megawrap.training.plots import curves, draw_curves

matplotlib_image = pytest.importorskip("matplotlib.image")


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for i in range(0, 201, 10):
            loss = 2 + 7 * math.exp(-i / 60) + 0.1 * math.sin(i)
            speed, norm = 1200 + 60 * math.sin(i / 7), 0.4 + 2 * math.exp(-i / 30)
            lr = 5e-4 * min(1, (i + 1) / 20)
            if i:
                writer.write(Record(iteration=i, phase="train", loss=loss, grad_norm=norm, lr=lr, useful_tokens_per_s=speed))
            if i % 50 == 0:
                writer.write(Record(iteration=i, phase="eval", group="unseen files", loss=loss + 0.2))
                writer.write(Record(iteration=i, phase="eval", group="unseen packages", loss=loss + 0.5))
    return path


def test_lines_are_the_records(metrics: Path) -> None:
    records = read_records(metrics)
    axes = curves(records).axes
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes[0].lines}
    assert lines["train"] == [(r["iteration"], r["loss"]) for r in records if r["phase"] == "train"]
    files = [(r["iteration"], r["loss"]) for r in records if r.get("group") == "unseen files"]
    assert lines[f"unseen files: {files[-1][1]:.3f}"] == files and len(files) == 5
    assert len(lines) == 3
    assert [axis.get_title(loc="left") for axis in axes[1:]] == ["learning rate", "gradient norm", "useful tokens/s"]
    assert list(axes[1].lines[0].get_ydata()) == [r["lr"] for r in records if "lr" in r]


def test_png_is_written_and_not_blank(metrics: Path, tmp_path: Path) -> None:
    png = tmp_path / "plots" / "curves.png"
    assert str(png) in draw_curves(metrics, png)
    pixels = matplotlib_image.imread(png)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000 and pixels.std() > 0.02
    assert [path.name for path in png.parent.iterdir()] == ["curves.png"]


def test_values_that_were_not_finite_are_gaps_and_one_phase_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for i, loss in enumerate([3.0, float("nan"), 2.0]):
            writer.write(Record(iteration=i, phase="train", loss=loss))
    assert str(curves(read_records(path)).axes[0].lines[0].get_ydata()) == "[ 3. nan  2.]"
    only_eval = [{"iteration": 0, "phase": "eval", "group": "a", "loss": 1.0}]
    assert [line.get_label() for line in curves(only_eval).axes[0].lines] == ["a: 1.000"]


def test_without_matplotlib_a_notice_names_the_extra(metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    notice = draw_curves(metrics, tmp_path / "plots" / "curves.png")
    assert "matplotlib is not installed" in notice and "megawrap[plots]" in notice
    assert not (tmp_path / "plots").exists()


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DataError, match="has no lines"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with pytest.raises(DataError, match="is not a file"):
        draw_curves(tmp_path / "none.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
