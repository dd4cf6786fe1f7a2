"""metrics.jsonl: one line per record, flushed; resume never repeats an iteration and says what it removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megawrap.errors import DataError
from megawrap.training.loggers import PHASES, MetricsWriter, Record, console_line, read_records


def train(iteration: int, loss: float = 2.0) -> Record:
    return Record(iteration=iteration, phase="train", time=0.0, loss=loss)


def write(path: Path, iterations: range, resumed: int | None = None) -> MetricsWriter:
    with MetricsWriter(path, resumed_iteration=resumed) as writer:
        for iteration in iterations:
            assert writer.write(train(iteration, 10.0 - iteration))
    return writer


def on_disk(path: Path) -> list[tuple[int, str, str | None]]:
    """Read with the standard library, not with what is under test."""
    return [(v["iteration"], v["phase"], v.get("group")) for v in map(json.loads, path.read_text().splitlines())]


def test_a_line_is_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(train(1))
        assert on_disk(path) == [(1, "train", None)]
        writer.write(Record(iteration=1, phase="eval", group="valid a", loss=1.5, seconds={"eval": 0.25}))
        assert json.loads(path.read_text().splitlines()[1])["seconds"] == {"eval": 0.25}


def test_values_survive_bit_for_bit_and_unset_fields_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    loss = 0.1 + 0.2
    with MetricsWriter(path) as writer:
        writer.write(Record(iteration=7, phase="train", time=1.5, loss=loss, lr=1e-5 / 3, grad_norm=float("nan")))
    values = json.loads(path.read_text())
    assert values == {"iteration": 7, "phase": "train", "time": 1.5, "loss": loss, "lr": 1e-5 / 3, "grad_norm": None}


def test_resume_removes_exactly_the_lines_past_it_and_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert write(path, range(1, 11)).notice == ""
    resumed = write(path, range(7, 11), resumed=6)
    assert resumed.removed == 4 and "4 line(s) past iteration 6" in resumed.notice
    assert on_disk(path) == [(i, "train", None) for i in range(1, 11)]
    assert write(path, range(11, 13), resumed=10).removed == 0
    assert [v["iteration"] for v in read_records(path)] == list(range(1, 13))


def test_what_stands_at_the_resumed_iteration_is_not_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(train(5))
        writer.write(Record(iteration=5, phase="eval", group="a", loss=1.0))
    with MetricsWriter(path, resumed_iteration=5) as writer:
        assert not writer.write(train(5)) and not writer.write(Record(iteration=5, phase="eval", group="a", loss=9.0))
        assert writer.write(Record(iteration=5, phase="eval", group="b", loss=2.0))
        assert writer.write(train(6))
    assert on_disk(path) == [(5, "train", None), (5, "eval", "a"), (5, "eval", "b"), (6, "train", None)]


def test_a_fresh_run_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    assert write(path, range(2)).notice == "metrics.jsonl: took out 3 line(s) of an earlier run"
    assert len(on_disk(path)) == 2


@pytest.mark.fault
def test_a_torn_last_line_is_removed_at_resume_and_ignored_by_readers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        assert [v["iteration"] for v in read_records(path)] == [1, 2]
        with MetricsWriter(path, resumed_iteration=3) as writer:
            assert writer.removed == 1 and "1 incomplete line(s)" in writer.notice
        assert on_disk(path) == [(1, "train", None), (2, "train", None)]


@pytest.mark.fault
def test_a_killed_writer_leaves_only_whole_lines_and_the_next_continues(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = (
        "import sys; from pathlib import Path; from megawrap.training.loggers import MetricsWriter, Record\n"
        "w = MetricsWriter(Path(sys.argv[1]))\n"
        "for i in range(1, 10**9):\n    w.write(Record(iteration=i, phase='train', loss=1.0))\n    print(i, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(20)][-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    write(path, range(said + 1, said + 3), resumed=said)
    assert [i for i, *_ in on_disk(path)] == list(range(1, said + 3))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + lines[2])
    with pytest.raises(DataError, match=r"metrics\.jsonl:2") as refused:
        read_records(path)
    assert refused.value.exit_code == 3
    with pytest.raises(DataError, match="is not a file"):
        read_records(tmp_path / "none.jsonl")


def test_console_lines_show_the_figures() -> None:
    line = console_line(
        Record(
            iteration=20, phase="train", loss=2.34567, grad_norm=0.5, lr=5e-5, useful_tokens_per_s=12345.0, target_tokens_per_s=6100.0,
            flops_per_s=1.84e11, peak_share=0.4251, memory_mib=1536, seconds=dict(zip(PHASES, (0.01, 2.5, 0.3, 0.0, 0.0), strict=True)),
        ),
        1000,
    )  # fmt: skip
    expected = [
        "  20/1000", "loss 2.3457", "grad norm 0.500", "lr 5.00e-05", "12.3 k tokens/s", "6.1 k targets",
        "184 GFLOP/s 43% of peak", "1.50 GiB", "data 0.01s forward 2.50s optimizer 0.30s",
    ]  # fmt: skip
    for shown in expected:
        assert shown in line
    assert "\n" not in line and "checkpoint" not in line
    line = console_line(Record(iteration=20, phase="eval", group="unseen", loss=float("nan"), metrics={"accuracy": 0.51239}))
    assert line == "iteration 20 | eval unseen | loss nan | accuracy 0.5124"
