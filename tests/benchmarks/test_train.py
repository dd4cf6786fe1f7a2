"""The whole training benchmark on a tiny model: every contender that is installed, every ratio, in one command."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.dist
def test_quick_run_reports_every_pair(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "train.py"), "--quick", "--threads", "2", "--json", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (case,) = json.loads(out.read_text())["cases"]
    names = {(row["ours"], row["theirs"], row["quantity"]) for row in case["ratios"]}
    assert ("megawrap bf16", "GEMM bf16", "flops_per_s") in names
    assert ("megawrap bf16 tp2", "megawrap bf16", "tokens_per_s") in names
    assert ("megawrap bf16", "HF packed bf16", "peak_mib") in names
    assert all(row["pairs"] >= 5 and row["low"] <= row["median"] <= row["high"] for row in case["ratios"])
    if importlib.util.find_spec("accelerate") is None:
        assert "not installed: accelerate" in case["missing"]["HF Trainer bf16, padded"]
    assert all(row["at"] is None and row["verdict"] == "" for row in case["ratios"])
    assert "targets/s" in finished.stdout


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["--pairs", "3"], "--pairs is 3; a ratio needs at least 5"), (["--device", "cuda"], "--device is cuda, but there is no GPU here")],
)
def test_what_cannot_be_measured_is_refused(flags: list[str], sentence: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "train.py"), *flags]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert refused.returncode == 2 and sentence in refused.stderr
