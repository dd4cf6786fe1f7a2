"""A packed row gives every sample the losses it has alone in a row, in any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megawrap import parallel
from megawrap.data.loader import RowPadding
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


def _single(row: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The same rows without padding: packing none, before the loader makes them equal."""
    rows = []
    for alone in _alone(row):
        length = int(alone["segment_lengths"][0])
        rows.append({
            **{name: alone[name][:length] for name in ("tokens", "labels", "weights", "position_ids")},
            "segment_lengths": alone["segment_lengths"][:1], "sample_ids": alone["sample_ids"],
        })  # fmt: skip
    return rows


class _Listed(SeededRows):
    """Rows given one by one."""

    def row_lengths(self, numbers: np.ndarray) -> np.ndarray:
        """See `megawrap.data.loader.UnequalRows`."""
        return np.array([len(row["tokens"]) for row in self.rows(numbers)])

    def __init__(self, rows: list[dict[str, np.ndarray]]) -> None:
        super().__init__()
        self.listed = rows

    def rows(self, numbers: np.ndarray) -> list[dict[str, np.ndarray]]:
        return [self.listed[int(number) % len(self.listed)] for number in numbers]


def _losses(family: str, args: tuple[Any, ...], how: str, options: dict[str, Any]) -> list[float]:
    """Losses of the trained positions of twelve samples, in order, from the last stage."""
    whole = SeededRows(masked_every=10**6).rows(np.arange(1, 5))
    apart = {"packed": lambda row: [row], "alone": _alone, "none": _single}[how]
    rows = [part for row in whole for part in apart(row)]
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
    packed = max(ranks.run(world, _losses, family, args, "packed", options), key=len)
    alone = max(ranks.run(world, _losses, family, args, "alone", options), key=len)
    assert len(packed) == len(alone) > 20
    assert packed == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt_bigcode", "llama"])
@pytest.mark.parametrize(
    ("args", "options", "padding"),
    [
        ((), {}, RowPadding()),
        ((), {"micro_batch_size": 2}, RowPadding(multiple=8)),
        ((2, 1), {"sequence_parallel": True}, RowPadding(multiple=2)),
        ((1, 2), {"micro_batch_size": 3}, RowPadding(whole_batch=True)),
        ((1, 2, 3), {}, RowPadding(whole_batch=True)),
        ((2, 2), {"sequence_parallel": True, "micro_batch_size": 2}, RowPadding(multiple=2, whole_batch=True)),
    ],
    ids=["single", "two-rows", "tp2-sp", "pp2-three-rows", "pp2-vpp3", "tp2-sp-pp2"],
)
def test_packing_none_equals_packed_sample_by_sample(
    family: str, args: tuple[int, ...], options: dict[str, Any], padding: RowPadding
) -> None:
    packed = ranks.run(1, _losses, family, (), "packed", {})[0]
    world = int(np.prod(args[:2])) if args else 1
    none = max(ranks.run(world, _losses, family, args, "none", {**options, "padding": padding}), key=len)
    assert len(packed) == len(none) > 20
    assert none == pytest.approx(packed, abs=1e-5)


@pytest.mark.parametrize("layout", [(1, 1, None, 2), (2, 1, None, 1), (1, 2, None, 1), (1, 2, 2, 2)], ids=str)
def test_packing_none_trains_alike_in_every_layout(layout: tuple[Any, ...]) -> None:
    """Losses and gradient norms of three steps over micro-batches of different length against the single process."""
    tp, pp, vpp, dp = layout
    single = ranks.run(1, _steps, (), RowPadding())[0]
    got = ranks.run(tp * pp * dp, _steps, (tp, pp, vpp, dp), RowPadding(multiple=tp, whole_batch=pp > 1))
    for rank in got:
        for mine, theirs in zip(rank, single, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)


def _steps(args: tuple[Any, ...], padding: RowPadding) -> list[tuple[float, float]]:
    rows = [single for row in SeededRows(masked_every=10**6).rows(np.arange(1, 9)) for single in _single(row)]
    options = {
        "layers": 4,
        "rows": _Listed(rows),
        "global_batch_size": 8,
        "padding": padding,
        "sequence_parallel": bool(args) and args[0] > 1,
    }
    return tiny_layout.losses(3, "llama", *args, options=options)
