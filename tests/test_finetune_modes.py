"""The fine-tuning command with every way to make rows: the same losses at the start, an account of fill-in-the-middle, and an
exact resume in the middle of an epoch in which segments have traded places."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megawrap.data.tokenizer import Tokenizer
from tests.data.fim_tokenizer import write_fim_tokenizer, write_texts
from tests.tiny_tokenizer import TEXT

pytestmark = pytest.mark.dist

RECIPE: dict[str, Any] = {
    "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
    "data": {"seq_length": 160},
    "optim": {"lr": 1e-3, "min_lr": 1e-4},
    "train": {"iterations": 24, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
    "eval": {"interval": 24},
    "checkpoint": {"interval": 12, "keep": 0},
    "log": {"interval": 1, "plots": False},
}
FIM = ["--data.fim.rate", "0.6", "--data.fim.loss", "middle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with sentinels, and pairs of a few different lengths, so that many segments are of one size."""
    path = tmp_path_factory.mktemp("modes")
    tokenizer = Tokenizer(write_fim_tokenizer(path / "tokenizer"))
    write_texts(path / "data", tokenizer, [(f"{n % 7}: {TEXT[n % 3]}", TEXT[(n + 1) % 3] * (1 + n % 2)) for n in range(120)])
    data = {
        **RECIPE["data"],
        "tokenizer": str(path / "tokenizer"),
        "splits": [f"train: 1 0:0.9 {path}/data", f"valid: 1 0.9:1 {path}/data"],
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "data": data}))
    return path


def finetune(folder: Path, run: str, *flags: str, nproc: int | None = None) -> str:
    ranks = ["--nproc", str(nproc)] if nproc else []
    command = [
        sys.executable,
        "-m",
        "megawrap.cli",
        "finetune",
        *ranks,
        "--config",
        str(folder / "recipe.yaml"),
        "--run",
        str(folder / run),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=env, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(folder: Path, run: str, phase: str = "train") -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / run / "logs" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["phase"] == phase]


def test_every_mode_starts_from_the_same_loss(folder: Path) -> None:
    said = {mode: finetune(folder, mode, "--data.packing", mode, "--train.iterations", "3") for mode in ("best_fit", "none", "concat")}
    start = {mode: records(folder, mode, "eval")[0] for mode in said}
    assert start["none"]["target_tokens"] == start["best_fit"]["target_tokens"] <= start["concat"]["target_tokens"]
    assert start["none"]["loss"] == pytest.approx(start["best_fit"]["loss"], abs=1e-5)
    assert "micro-batches are padded to their longest row" in said["none"] and "rows x 160 positions" in said["concat"]
    assert all(record["tokens"] < 4 * 160 for record in records(folder, "none"))
    assert all(record["tokens"] == 4 * 160 for mode in ("best_fit", "concat") for record in records(folder, mode))
    assert not any("fim" in record for mode in said for record in records(folder, mode))


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, Any]]:
    """An uninterrupted run of 24 iterations, more than an epoch."""
    said = finetune(folder, "whole", *FIM)
    assert "fill-in-the-middle: 60% of the training samples" in said
    return records(folder, "whole")


def test_the_account_of_fill_in_the_middle_is_logged(folder: Path, whole: list[dict[str, Any]]) -> None:
    total = {kind: sum(record["fim"][kind] for record in whole) for kind in ("transformed", "kept", "outgrown")}
    assert 0.4 < total["transformed"] / sum(total.values()) < 0.65
    assert sum(total.values()) > 108, "the second epoch has begun"


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("iteration", "loss", "grad_norm", "lr", "tokens", "useful_tokens", "target_tokens", "fim")}


def test_a_resume_goes_on_exactly(folder: Path, whole: list[dict[str, Any]]) -> None:
    shutil.copytree(folder / "whole", folder / "again")
    checkpoints = folder / "again" / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000024")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("12")
    assert "iter_0000012" in finetune(folder, "again", *FIM)
    assert list(map(comparable, records(folder, "again"))) == list(map(comparable, whole))


def test_two_data_parallel_ranks_train_on_the_same_rows(folder: Path, whole: list[dict[str, Any]]) -> None:
    finetune(folder, "dp2", *FIM, nproc=2)
    for mine, theirs in zip(records(folder, "dp2"), whole, strict=True):
        mine, theirs = comparable(mine), comparable(theirs)
        assert mine.pop("loss") == pytest.approx(theirs.pop("loss"), abs=1e-5)
        assert mine.pop("grad_norm") == pytest.approx(theirs.pop("grad_norm"), abs=1e-4)
        assert mine == theirs
