"""The launcher of preprocessing: the exact scripts, a merged dataset from local processes, and what is refused before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import submission
from launch.preprocess import main
from launch.preprocess_jobs import Preprocess
from megawrap.data.format import IndexedWriter
from megawrap.errors import EXIT_OK, EXIT_USAGE
from tests.preprocessing import OUTPUTS, hashes, left, run
from tests.tiny_tokenizer import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Flags for an input of about ten parts."""
    write_tokenizer(tmp_path / "tokenizer")
    for name in "ab":
        lines = [json.dumps({"inputs": f"add {name} {i}", "outputs": f"return {i}"}) for i in range(150)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = ["--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    return [*files, "--output-prefix", str(tmp_path / "out" / "out"), "--part-mib", "0.0015"]


def test_local_processes_give_the_bytes_of_one(tmp_path: Path, given: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "preprocess.py", "--cluster", "local", "--tasks", "3", *given], capture_output=True, text=True
    )
    assert done.returncode == EXIT_OK, done.stderr
    assert "parts, 0 of them finished, shared by 3 processes" in done.stdout
    assert left(tmp_path / "out" / "out") == OUTPUTS
    clean = tmp_path / "clean" / "out"
    assert run(tmp_path / "a.jsonl", tmp_path / "tokenizer", clean, "--input", *given[1:3]) == EXIT_OK
    assert hashes(tmp_path / "out" / "out") == hashes(clean)


def test_output_that_is_there_is_kept(tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*given, "--cluster", "debug"]) == EXIT_OK
    before = hashes(tmp_path / "out" / "out")
    for cluster in ("local", "debug", "slurm"):
        assert main([*given, "--cluster", cluster]) == EXIT_USAGE
        assert "already there, nothing was written" in capsys.readouterr().err
    assert hashes(tmp_path / "out" / "out") == before


def test_jobs_do_not_find_each_other_in_the_way(tmp_path: Path, given: list[str]) -> None:
    """While one holds the prefix, as the job that checks or merges does, others work on parts."""
    prefix = tmp_path / "out" / "out"
    with IndexedWriter(prefix, "uint16"):
        assert Preprocess((*given, "--only-parts", "0/2"))() == EXIT_OK
    assert left(prefix) == {"out.parts"}


def test_what_fails_in_a_process_is_told_and_nothing_is_merged(tmp_path: Path, given: list[str]) -> None:
    with (tmp_path / "b.jsonl").open("a") as stream:
        stream.write("\n[]\n")
    command = [sys.executable, ROOT / "launch" / "preprocess.py", "--cluster", "local", "--tasks", "2", *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == EXIT_USAGE
    assert f"{tmp_path / 'b.jsonl'}:151:1: a list" in done.stderr
    assert left(tmp_path / "out" / "out") == {"out.parts"}


def test_dry_run_shows_the_array_and_the_job_that_merges(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/env/bin/python")
    monkeypatch.setattr(submission, "ROOT", Path("/code"))
    asked = ["--tasks", "4", "--time", "2:00:00", "--mem", "8G", "--partition", "cpu", "--cpus-per-task", "2"]
    assert main([*given, *asked, "--dry-run", "--folder", str(tmp_path / "jobs")]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "#SBATCH --array=0-3%4",
        "#SBATCH --partition=cpu",
        "#SBATCH --mem=8G",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --dependency=afterok:ARRAY_ID",
        "#SBATCH --kill-on-invalid-dep=yes",
        'export PYTHONPATH=/code"${PYTHONPATH:+:$PYTHONPATH}"',
    ):
        assert line in lines
    assert sum(line.startswith("srun ") for line in lines) == 2
    assert not any("MASTER_PORT" in line for line in lines)
    assert not (tmp_path / "jobs").exists()
    assert not (tmp_path / "out").exists()


def test_submission_with_an_sbatch_that_keeps_its_input(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    count = f'n=$(ls "{tmp_path}" | grep -c kept); cp "$1" "{tmp_path}/kept$n"; echo Submitted batch job $((n + 7))'
    (tools / "sbatch").write_text(f"#!/bin/sh\n{count}\n")
    (tools / "srun").write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert main([*given, "--tasks", "2", "--folder", str(tmp_path / "jobs")]) == EXIT_OK
    assert "job 7, 2 task(s), then job 8, which merges" in capsys.readouterr().out
    assert "#SBATCH --array=0-1%2" in (tmp_path / "kept0").read_text()
    assert "#SBATCH --dependency=afterok:7" in (tmp_path / "kept1").read_text()
    assert (tmp_path / "out" / "out.parts" / "plan.json").exists()
    submitted = sorted(path.name for path in (tmp_path / "jobs").rglob("*_submitted.pkl"))
    assert submitted == ["7_0_submitted.pkl", "7_1_submitted.pkl", "8_submitted.pkl"]
    # What the tasks would do, in their order.
    for line in [(*given, "--only-parts", "0/2"), (*given, "--only-parts", "1/2"), tuple(given)]:
        assert Preprocess(line)() == EXIT_OK
    assert left(tmp_path / "out" / "out") == OUTPUTS


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        (["--tasks", "0"], ["--tasks is 0; it must be 1 or more"]),
        (["--nodes", "2", "--time", "x"], ["--nodes 2 x 1 tasks: every job is one process", "--time is 'x'"]),
        (["--limit", "3"], ["--limit is not for jobs that share the input"]),
        (["--only-parts", "0/2"], ["--only-parts is not for jobs that share the input"]),
        (["--max-bad", "-1", "--tasks", "-1"], ["--max-bad -1", "--tasks is -1"]),
        (["--taskss", "1"], ["unknown argument '--taskss'"]),
    ],
)
def test_mistakes_are_told_before_submission(
    tmp_path: Path, given: list[str], more: list[str], facts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main([*given, *more]) == EXIT_USAGE
    message = capsys.readouterr().err
    for fact in facts:
        assert fact in message
    assert sorted(tmp_path.rglob("*")) == before


def test_without_slurm_nothing_is_submitted(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(given) == EXIT_USAGE
    assert "this is not a SLURM machine" in capsys.readouterr().err
