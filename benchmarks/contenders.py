"""Everything that a training benchmark can measure, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import gemm, ours, peers
from benchmarks.worker import Port

CONTENDERS: dict[str, Callable[[dict[str, Any], Port], None]] = {
    "megawrap": ours.run,
    "hf-padded": peers.trainer,
    "hf-grouped": peers.trainer,
    "hf-packed": peers.packed,
    "trl-packing": peers.trl_packing,
    "gemm": gemm.run,
}


def get(name: str) -> Callable[[dict[str, Any], Port], None]:
    """What serves the windows of a contender."""
    return CONTENDERS[name]
