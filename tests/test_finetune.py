"""The fine-tuning command as a user runs it: real processes, real signals, real files.

Where a run starts, what it says, what it refuses before anything is written, and that stopping costs nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megawrap import preprocess
from tests.tiny_tokenizer import TEXT, write_tokenizer

pytestmark = pytest.mark.dist

RECIPE = {
    "model": {"family": "gpt_bigcode", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "hidden_dropout": 0.1},
    "data": {"seq_length": 64},
    "optim": {"lr": 1e-3, "min_lr": 1e-4},
    "train": {"iterations": 6, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
    "eval": {"interval": 3},
    "checkpoint": {"interval": 2},
    "log": {"interval": 1, "plots": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a space in its name that holds a tokenizer and a dataset."""
    path = tmp_path_factory.mktemp("a run")
    write_tokenizer(path / "tokenizer")
    lines = [{"inputs": f"{number}: {TEXT[number % 3]}", "outputs": TEXT[(number + 1) % 3] * (1 + number % 3)} for number in range(120)]
    (path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--input", str(path / "data.jsonl"), "--tokenizer", str(path / "tokenizer"), "--output-prefix", str(path / "data")]
    assert preprocess.main(argv) == 0
    recipe = {
        **RECIPE,
        "data": {
            **RECIPE["data"],
            "tokenizer": str(path / "tokenizer"),
            "splits": [f'train: 1 0:0.8 "{path / "data"}"', f'valid_a: 1 0.8:0.9 "{path / "data"}"', f'valid_b: 1 0.9:1 "{path / "data"}"'],
        },
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


def _command(folder: Path, run: str, *flags: str, nproc: int | None = None) -> list[str]:
    ranks = ["--nproc", str(nproc)] if nproc else []
    recipe = ["--config", str(folder / "recipe.yaml"), "--run", str(folder / run)]
    return [sys.executable, "-m", "megawrap.cli", "finetune", *ranks, *recipe, *flags]


def _start(command: list[str]) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def _finetune(folder: Path, run: str, *flags: str, nproc: int | None = None) -> tuple[int, str]:
    process = _start(_command(folder, run, *flags, nproc=nproc))
    output, _ = process.communicate(timeout=280)
    return process.returncode, output


def _records(folder: Path, run: str) -> list[dict[str, object]]:
    lines = (folder / run / "logs" / "metrics.jsonl").read_text().splitlines()
    skip = {"time", "seconds", "tokens_per_s", "useful_tokens_per_s", "target_tokens_per_s", "flops_per_s", "peak_share", "memory_mib"}
    skip |= {"tokens", "useful_tokens", "target_tokens"}  # of an interval, which a stop cuts
    return [{key: value for key, value in json.loads(line).items() if key not in skip} for line in lines]


@pytest.fixture(scope="module")
def whole(folder: Path) -> str:
    """An uninterrupted run on two ranks."""
    code, output = _finetune(folder, "whole", "--parallel.tp", "2", nproc=2)
    assert code == 0, output
    return output


def test_a_run_says_what_it_does_and_leaves_its_folder(folder: Path, whole: str) -> None:
    said = (
        "tp2 pp1 dp1: 2 rank(s)",
        "fresh weights, seed 1234",
        "valid_a",
        "valid_b",
        "of positions are trained on",
        "finished 6 iterations",
    )
    for fact in said:
        assert fact in whole
    run = folder / "whole"
    assert {"config.yaml", "environment.json", "logs", "checkpoints", "plots"} <= {path.name for path in run.iterdir()}
    assert sorted(path.name for path in (run / "checkpoints").glob("iter_*")) == ["iter_0000004", "iter_0000006"]
    groups = [(record["iteration"], record["group"]) for record in _records(folder, "whole") if record["phase"] == "eval"]
    assert groups == [(iteration, group) for iteration in (0, 3, 6) for group in ("valid_a", "valid_b")]


@pytest.mark.fault
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT", "SIGHUP"])
def test_a_signal_saves_and_the_same_command_ends_with_the_same_weights(folder: Path, whole: str, name: str) -> None:
    process = _start(_command(folder, name, "--parallel.tp", "2", nproc=2))
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("iteration 1/6 | loss"):
            process.send_signal(getattr(signal, name))
            break
    lines += process.stdout.readlines()
    output = "".join(lines)
    assert process.wait(timeout=120) == 75, output
    assert f"stopped by {name}" in output and "the same command goes on" in output
    code, output = _finetune(folder, name, "--parallel.tp", "2", nproc=2)
    assert code == 0 and "resumes" in output
    assert _records(folder, name) == _records(folder, "whole")
    diff = [sys.executable, "-m", "conversion.diff", str(folder / "whole" / "checkpoints"), str(folder / name / "checkpoints")]
    assert subprocess.run(diff, capture_output=True, check=False).returncode == 0


def test_finished_run_has_nothing_to_do(folder: Path, whole: str) -> None:
    def written() -> list[tuple[Path, int]]:
        files = (folder / "whole" / "checkpoints").rglob("*")
        return sorted((path, path.stat().st_mtime_ns) for path in files if path.is_file() and path.name != ".lock")

    before = written()
    code, output = _finetune(folder, "whole", "--parallel.tp", "2", nproc=2)
    assert code == 0 and "finished 6 iterations" in output
    assert written() == before


def test_start_flags_apply_to_init_from_and_not_to_progress(folder: Path, whole: str) -> None:
    source = str(folder / "whole" / "checkpoints")
    first = {}
    for run, flags in {
        "continued": [], "finetuned": ["--finetune"], "reset": ["--reset-progress"], "no_optim": ["--no-load-optim"],
    }.items():  # fmt: skip
        code, output = _finetune(folder, run, "--load", source, *flags, "--train.iterations", "7", "--eval.interval", "0")
        assert code == 0, output
        trained = [record for record in _records(folder, run) if record["phase"] == "train"]
        first[run] = (trained[0]["iteration"], trained[0]["loss"])
    assert first["continued"][0] == 7 and first["no_optim"][0] == 7
    assert first["finetuned"][0] == 1 and first["reset"][0] == 1
    assert first["continued"][1] == pytest.approx(first["no_optim"][1], rel=0.05)
    code, output = _finetune(folder, "reset", "--load", source, "--reset-progress", "--train.iterations", "8", "--eval.interval", "0")
    assert code == 0 and "resumes" in output and "--reset-progress" in output and "ignored" in output
    assert [record["iteration"] for record in _records(folder, "reset")] == list(range(1, 9))
    code, output = _finetune(folder, "reset", "--allow-restart", "--train.iterations", "1", "--eval.interval", "0")
    assert code == 0 and "set aside" in output
    assert [record["iteration"] for record in _records(folder, "reset")] == [1]
    assert list((folder / "reset").glob("checkpoints.aside-*"))


def test_dry_run_tells_everything_and_writes_nothing(folder: Path) -> None:
    code, output = _finetune(folder, "dry", "--parallel.tp", "2", "--parallel.pp", "2", "--train.global_batch_size", "8", "--dry-run")
    assert code == 0, output
    for fact in ("tp2 pp2 dp1: 4 rank(s)", "stage 1:", "MiB per rank", "global batch 8 rows"):
        assert fact in output
    assert not (folder / "dry").exists()


REFUSALS = {
    "heads against tp": (["--parallel.tp", "8", "--dry-run"], ["4 attention heads cannot be split over tp 8"]),
    "layers against pp": (["--parallel.pp", "4", "--dry-run"], ["2 layers cannot be split evenly over 4 pipeline stages"]),
    "all together": (
        ["--parallel.tp", "8", "--parallel.pp", "4", "--train.micro_batch_size", "3", "--dry-run"],
        ["tp 8", "4 pipeline stages", "global_batch_size 4 is not a multiple of micro_batch_size 3"],
    ),
    "ranks": (["--parallel.tp", "2"], ["tp 2 x parallel.pp 1 = 2 does not divide 1 rank(s)"]),
    "positions": (["--model.max_position_embeddings", "32"], ["data.seq_length 64 is above the model's 32 positions"]),
    "schedule": (["--schedule.warmup", "9"], ["schedule.warmup 9", "train.iterations 6"]),
    "objective": (["--objective.name", "sftt"], ["sftt", "sft"]),
    "gpu kernel": (["--train.attention", "varlen"], ["train.attention is varlen", "no GPU"]),
    "init_from": (["--model.init_from", "/nowhere"], ["/nowhere"]),
    "vocabulary": (["--model.vocab_size", "40"], ["40"]),
    "rows": (["--train.global_batch_size", "4000"], ["4,000"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_input_is_refused_before_anything_is_written(folder: Path, name: str) -> None:
    flags, facts = REFUSALS[name]
    code, output = _finetune(folder, "refused", *flags)
    assert code == 2, output
    assert "Traceback" not in output and output.count("megawrap: error:") == 1
    for fact in facts:
        assert fact in output or fact.replace(",", "") in output, output
    assert not (folder / "refused").exists()


def test_other_data_or_another_model_is_not_resumed(folder: Path, whole: str) -> None:
    code, output = _finetune(folder, "whole", "--data.seed", "7", "--train.iterations", "8", "--parallel.tp", "2", nproc=2)
    assert code == 2 and "trained on other rows" in output
    code, output = _finetune(folder, "whole", "--model.num_layers", "4", "--train.iterations", "8")
    assert code == 2 and "model.num_layers is 4, there it is 2" in output
