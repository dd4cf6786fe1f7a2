"""The launcher without a cluster: the exact script, what is refused before submission, and the environment of a task."""

from __future__ import annotations

import difflib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch import job, submission
from launch.finetune import main
from launch.resources import Resources, parse_time
from megawrap.errors import LaunchError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden.sbatch")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run: {tmp_path / 'run'}\n"
        "model: {family: gpt_bigcode, num_layers: 2, hidden_size: 64, num_attention_heads: 4}\n"
        'data: {splits: ["train: 1.0 0:1 corpus"], seq_length: 256}\n'
        "parallel: {tp: 2}\n"
    )
    return path


def arguments(recipe: Path, *more: str) -> list[str]:
    return ["--config", str(recipe), "--nodes", "2", "--gpus-per-node", "4", *more]


def test_golden_script(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Regenerate on purpose: the file is what `--dry-run` prints for an interpreter and a checkout at these paths."""
    monkeypatch.setattr(sys, "executable", "/env/bin/python")
    monkeypatch.setattr(submission, "ROOT", Path("/code"))
    folder = "/shared/run's folder/jobs/1"
    given = ["--partition", "gpu", "--time", "1-00:00:00", "--mem", "64G", "--cpus-per-task", "8", "--account", "team", "--dry-run"]
    assert main(arguments(recipe, *given, "--folder", folder)) == 0
    found = capsys.readouterr().out
    difference = difflib.unified_diff(GOLDEN.read_text().splitlines(), found.splitlines(), "golden", "found", lineterm="")
    assert found == GOLDEN.read_text(), "\n".join(difference)


def test_script_is_what_is_submitted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an sbatch that keeps its input: the same bytes as --dry-run, in a folder of its owner alone."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/sh\ncp "$1" "{tmp_path}/kept"\necho Submitted batch job 7\n')
    (tools / "srun").write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "jobs" / "one"
    assert main(arguments(recipe, "--folder", str(folder))) == 0
    assert capsys.readouterr().out.startswith("job 7, 8 rank(s) on 2 node(s)")
    assert main(arguments(recipe, "--folder", str(folder), "--dry-run")) == 0
    assert capsys.readouterr().out == (tmp_path / "kept").read_text()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "7_submitted.pkl").exists()
    assert main(arguments(recipe, "--folder", str(folder))) == 2
    assert "exists; each submission needs its own" in capsys.readouterr().err


def test_what_sbatch_says_is_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'invalid partition specified: gpu' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "jobs" / "one"
    assert main(arguments(recipe, "--folder", str(folder))) == 2
    assert "invalid partition specified: gpu" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        (["--partition", "gpu;id"], ["--partition is 'gpu;id'"]),
        (["--partition", "gpu\n#SBATCH --exclusive"], ["--partition is"]),
        (["--time", "60;id"], ["--time is '60;id'"]),
        (["--time", "0"], ["--time is '0'"]),
        (["--time", "2", "--signal-lead", "120"], ["120 s", "--signal-lead"]),
        (["--mem", "64G;id"], ["--mem is '64G;id'"]),
        (["--account", "$(id)"], ["--account is '$(id)'"]),
        (["--job-name", "a b"], ["--job-name is 'a b'"]),
        (["--nodes", "0"], ["--nodes is 0; it must be 1 or more"]),
        (["--cluster", "local"], ["--nodes is 2; --cluster local is this machine alone"]),
        (["--parallel.tp", "3"], ["parallel.tp 3", "8 rank(s)"]),
        (["--global-batch-size", "6"], ["train.global_batch_size 6 is not a multiple", "dp 4 = 4"]),
        (["--optim.lrr", "1"], ["unknown argument --optim.lrr; did you mean --optim.lr?"]),
        (["--nodess", "1"], ["unknown argument --nodess"]),
        (["--optim.lr", "fast", "--mem", "x"], ["optim.lr is 'fast'", "--mem is 'x'"]),
        (["--cluster", "cloud"], ["invalid choice: 'cloud'", "slurm", "local", "debug"]),
    ],
)
def test_mistakes_are_told_before_submission(
    given: list[str], facts: list[str], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments(recipe, "--dry-run", *given)) == 2
    told = capsys.readouterr().err
    assert all(fact in told for fact in facts), told
    assert sorted(tmp_path.rglob("*")) == before


def test_no_slurm_is_told(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(arguments(recipe)) == 2
    assert "sbatch and srun not found" in capsys.readouterr().err


def test_world_writable_place_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(LaunchError, match="writable by everyone"):
        submission.make_folder(place / "jobs" / "one")
    assert not list(place.iterdir())


def test_runs_as_a_script_from_anywhere(recipe: Path, tmp_path: Path) -> None:
    """Python puts launch/ on the path, where finetune.py would hide; and no torch is needed to submit."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch" / "finetune.py"), *arguments(recipe, "--dry-run")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("#!/bin/bash\n")
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "submitit" in modules and not modules & {"torch", "transformers", "megatron"}


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30:00", 90), ("1-12:00:00", 2160), ("1-0", 1440), ("30:30", 31), ("0:0:1", 1), ("", None), ("1h", None), ("-5", None),
     ("0", None), ("1:99", None)],
)  # fmt: skip
def test_time_is_read_as_slurm_reads_it(text: str, minutes: int | None) -> None:
    assert parse_time(text) == minutes


def test_environment_of_a_slurm_task() -> None:
    given = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "6"}
    assert job.rank_environment(given) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "OMP_NUM_THREADS": "6"}
    two_devices = job.rank_environment({**given, "CUDA_VISIBLE_DEVICES": "2,3", "OMP_NUM_THREADS": "1"})
    assert two_devices == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, "SLURM's devices and the user's threads are kept"
    own_device = job.rank_environment({**given, "CUDA_VISIBLE_DEVICES": "3"})
    assert own_device["LOCAL_RANK"] == "0", "a task that was given one device counts it from 0"


def test_environment_outside_a_job_is_refused() -> None:
    with pytest.raises(LaunchError, match="not a task of a job"):
        job.rank_environment({"RANK": "0"})


def test_port_does_not_come_from_the_job_id() -> None:
    """The batch script asks for a free port each time it runs; two starts of the same job get different ones."""
    script = "\n".join(job.setup_lines(sys.executable, ROOT)) + '\necho "$MASTER_ADDR $MASTER_PORT"\n'
    environment = {**os.environ, "SLURM_JOB_ID": "42"}
    found = [
        subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=60).stdout.split() for _ in range(3)
    ]
    assert all(len(one) == 2 and 1024 < int(one[1]) < 65536 for one in found)
    assert len({one[1] for one in found}) > 1


def test_resources_world() -> None:
    assert Resources(nodes=3, gpus_per_node=8).world == 24
    assert Resources(nodes=2, tasks_per_node=4).world == 8
    assert Resources(cluster="local").world == 1
