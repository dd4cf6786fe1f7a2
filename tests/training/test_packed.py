"""A packed row gives every sample the losses it has alone in a row, in any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megawrap import parallel
from megawrap.models.batch import Batch
from tests import ranks
from tests.training import tiny_layout
from tests.training.tiny_layout import SEQ_LENGTH, SeededRows

pytestmark = pytest.mark.dist


def _alone(row: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Each real segment of a row at the start of a row of its own, padding behind it."""
    rows, begin = [], 0
    for number, length in enumerate(row["segment_lengths"][:-1].tolist()):
        part = slice(begin, begin + length)
        begin += length
        padded = {name: np.zeros(SEQ_LENGTH, row[name].dtype) for name in ("tokens", "labels", "weights")}
        for name, array in padded.items():
            array[:length] = row[name][part]
        rows.append({
            **padded,
            "position_ids": np.concatenate([np.arange(length), np.arange(SEQ_LENGTH - length)]),
            "segment_lengths": np.array([length, SEQ_LENGTH - length], np.int32),
            "sample_ids": np.array([number]),
        })  # fmt: skip
    return rows


class _Listed(SeededRows):
    """Rows given one by one."""

    def __init__(self, rows: list[dict[str, np.ndarray]]) -> None:
        super().__init__()
        self.listed = rows

    def rows(self, numbers: np.ndarray) -> list[dict[str, np.ndarray]]:
        return [self.listed[int(number) % len(self.listed)] for number in numbers]


def _losses(family: str, args: tuple[Any, ...], packed: bool, options: dict[str, Any]) -> list[float]:
    """Losses of the trained positions of twelve samples, in order, from the last stage."""
    whole = SeededRows(masked_every=10**6).rows(np.arange(1, 5))
    rows = whole if packed else [alone for row in whole for alone in _alone(row)]
    trainer = tiny_layout.build(family, *args, rows=_Listed(rows), global_batch_size=len(rows), **options)
    seen: list[float] = []
    compute = trainer.objective.loss

    def listen(output: Any, batch: Batch) -> Any:
        seen.extend(output[1][batch.weights > 0].tolist())
        return compute(output, batch)

    trainer.objective.loss = listen  # type: ignore[method-assign]
    for chunk in trainer.chunks:
        chunk.eval()
    with torch.no_grad():
        trainer._run([Batch.of(arrays, torch.device("cpu")) for arrays in trainer.train_loader.micro_batches(0)], forward_only=True)
    return seen if parallel.is_last_stage() else []


@pytest.mark.parametrize("family", ["gpt_bigcode", "llama"])
@pytest.mark.parametrize(
    ("args", "options"),
    [((), {}), ((), {"micro_batch_size": 2}), ((2, 1), {"sequence_parallel": True}), ((1, 3), {}), ((1, 2, 3), {})],
    ids=["single", "two-rows", "tp2-sp", "pp3", "pp2-vpp3"],
)
def test_packed_equals_unpacked_sample_by_sample(family: str, args: tuple[int, ...], options: dict[str, Any]) -> None:
    world = int(np.prod(args[:2])) if args else 1
    packed = max(ranks.run(world, _losses, family, args, True, options), key=len)
    alone = max(ranks.run(world, _losses, family, args, False, options), key=len)
    assert len(packed) == len(alone) > 20
    assert packed == pytest.approx(alone, abs=1e-5)
