"""The checkpoint benchmark measures and cleans up."""

from __future__ import annotations

from pathlib import Path

from benchmarks.checkpoint import measure


def test_it_measures_every_step_and_leaves_nothing(tmp_path: Path) -> None:
    found = measure(tmp_path, 1 << 16, rounds=1)
    assert found["bytes"] == 1 << 16
    assert all(found[f"{name}_gb_per_s"] > 0 for name in ("save", "verify", "hashlib", "read"))
    assert list(tmp_path.iterdir()) == []
