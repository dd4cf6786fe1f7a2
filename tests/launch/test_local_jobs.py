"""Real jobs on this machine: submitit's local executor with one process per rank, and the debug executor."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megawrap import preprocess
from tests.tiny_tokenizer import TEXT, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a job")
    write_tokenizer(folder / "tokenizer")
    lines = [{"inputs": f"{number}", "outputs": TEXT[number % 3]} for number in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--input", str(folder / "data.jsonl"), "--tokenizer", str(folder / "tokenizer"), "--output-prefix", str(folder / "data")]
    assert preprocess.main(argv) == 0
    text = f"""
run: {folder / "run"}
model: {{family: gpt_bigcode, num_layers: 2, hidden_size: 32, num_attention_heads: 4}}
data: {{splits: ['train: 1 0:1 "{folder / "data"}"'], tokenizer: {folder / "tokenizer"}, seq_length: 64}}
parallel: {{tp: 2}}
train: {{iterations: 2, micro_batch_size: 1, global_batch_size: 2, precision: fp32}}
eval: {{interval: 0}}
log: {{interval: 1, plots: false}}
"""
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def launch(recipe: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "finetune.py"), "--config", str(recipe), "--tasks-per-node", "2", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, timeout=280, env=environment)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_local_and_debug_jobs_train_the_same_run(recipe: Path) -> None:
    """Both end with 0 and the same losses; the local one leaves a log for each rank, for its owner alone."""
    folder = recipe.parent / "jobs" / "one"
    local = launch(recipe, "--cluster", "local", "--folder", str(folder), "--run", str(recipe.parent / "local"))
    assert local.returncode == 0, local.stdout + local.stderr
    assert "2 rank(s), logs in " in local.stdout and "finished 2 iterations" in local.stdout
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [(folder / f"exit_code.{rank}").read_text() for rank in range(2)] == ["0", "0"]
    assert len(list(folder.glob("*_log.out"))) == 2

    debug = launch(recipe, "--cluster", "debug", "--run", str(recipe.parent / "debug"))
    assert debug.returncode == 0 and "finished 2 iterations" in debug.stdout, debug.stdout + debug.stderr
    assert losses(recipe.parent / "local") == losses(recipe.parent / "debug")


def test_what_a_local_job_finds_wrong_is_told(recipe: Path) -> None:
    """A mistake that only the job can find: exit code 2 and the sentence, not a traceback."""
    folder = recipe.parent / "jobs" / "two"
    done = launch(
        recipe, "--cluster", "local", "--folder", str(folder), "--run", str(recipe.parent / "wrong"), "--model.init_from", "/no/such"
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "/no/such" in done.stderr and "failed first, exit code 2" in done.stderr and "Traceback" not in done.stderr
