"""R4: the global sample sequence is the same for every number of ranks, nothing lost or repeated over two epochs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megawrap.data.blend import Blend, Once
from megawrap.data.loader import EvalLoader, Loader, collate
from megawrap.data.packing import pack
from megawrap.data.rows import RowDataset, empty_row
from megawrap.data.samples import select
from megawrap.errors import ConfigError
from tests import ranks
from tests.data.documents import samples, write

SEQ = 24
GLOBAL = 16


def rows_of(prefix: Path, seed: int = 1, number: int = 200) -> RowDataset:
    dataset = write(prefix, samples(seed, number)) if not prefix.with_name(prefix.name + ".idx").exists() else None
    from megawrap.data.format import IndexedDataset

    dataset = dataset or IndexedDataset(prefix)
    return RowDataset(dataset, pack(select(dataset, 0, number, seq_length=SEQ, overlong="split"), SEQ, 3), seq_length=SEQ)


def row_ids(batch: dict) -> list[tuple]:
    """Every row of a micro-batch by its content."""
    tokens = batch["tokens"].reshape(batch["num_rows"], -1)
    return [tuple(row.tolist()) for row in tokens]


def global_sequence(order: object, dp_size: int, micro: int, consumed: range) -> list[list[tuple]]:
    """Rows of each global batch, put together from all ranks in the order of the rule."""
    loaders = [
        Loader(order, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro, global_batch_size=GLOBAL)  # type: ignore[arg-type]
        for rank in range(dp_size)
    ]
    batches = []
    for start in consumed:
        by_rank = [loader.micro_batches(start) for loader in loaders]
        batches.append([row for m in range(len(by_rank[0])) for rank in range(dp_size) for row in row_ids(by_rank[rank][m])])
    return batches


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_r4_ranks_do_not_change_the_order(tmp_path: Path, dp_size: int) -> None:
    rows = rows_of(tmp_path / "d")
    order = Blend([rows], [1], seed=9)
    two_epochs = range(0, 2 * len(rows), GLOBAL)
    found = global_sequence(order, dp_size, 1, two_epochs)
    assert found == global_sequence(order, dp_size, 2, two_epochs)
    assert found == global_sequence(order, 1, 1, two_epochs)
    flat = [row for batch in found for row in batch]
    everything = sorted(tuple(rows.row(i)["tokens"].tolist()) for i in range(len(rows)))
    assert sorted(flat[: len(rows)]) == everything
    assert sorted(flat[len(rows) : 2 * len(rows)]) == everything
    assert flat[: len(rows)] != flat[len(rows) : 2 * len(rows)]


def test_resuming_anywhere_continues_the_same_sequence(tmp_path: Path) -> None:
    order = Blend([rows_of(tmp_path / "d"), rows_of(tmp_path / "e", 2, 50)], [0.7, 0.3], seed=9)
    whole = [row for batch in global_sequence(order, 2, 2, range(0, 20 * GLOBAL, GLOBAL)) for row in batch]
    again = Blend(order.sources, [0.7, 0.3], seed=9)
    assert global_sequence(again, 4, 1, range(7 * GLOBAL, 8 * GLOBAL, GLOBAL)) == [whole[7 * GLOBAL : 8 * GLOBAL]]
    odd = [row for batch in global_sequence(again, 1, 4, range(5, 5 + 3 * GLOBAL, GLOBAL)) for row in batch]
    assert odd == whole[5 : 5 + 3 * GLOBAL]  # also after a change of the global batch size


def _sequence_of_this_rank(prefix: Path, micro: int, num_batches: int) -> list[tuple[int, list]]:
    import torch.distributed as dist

    loader = Loader(
        Blend([rows_of(prefix)], [1], seed=9),
        dp_rank=dist.get_rank(),
        dp_size=dist.get_world_size(),
        micro_batch_size=micro,
        global_batch_size=GLOBAL,
    )
    mine = [[row_ids(batch) for batch in loader.micro_batches(number * GLOBAL)] for number in range(num_batches)]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return [row for number in range(num_batches) for m in range(len(mine[0])) for rank in gathered for row in rank[number][m]]


@pytest.mark.dist
def test_real_ranks_see_one_sequence(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d")
    num_batches = -(-2 * len(rows) // GLOBAL)
    wanted = [row for batch in global_sequence(Blend([rows], [1], seed=9), 1, 1, range(0, num_batches * GLOBAL, GLOBAL)) for row in batch]
    for world in (1, 2, 4):
        for sequence in ranks.run(world, _sequence_of_this_rank, tmp_path / "d", 2, num_batches):
            assert sequence == wanted


def test_a_micro_batch_is_its_rows_end_to_end(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d")
    one, two = rows.row(0), rows.row(1)
    batch = collate([one, empty_row(SEQ), two])
    assert batch["num_rows"] == 3
    for name in ("tokens", "labels", "weights", "position_ids"):
        assert batch[name].shape == (3 * SEQ,) and batch[name].dtype == one[name].dtype
        assert (batch[name][:SEQ] == one[name]).all() and (batch[name][2 * SEQ :] == two[name]).all()
    assert batch["segment_lengths"].tolist() == [*one["segment_lengths"], SEQ, *two["segment_lengths"]]
    assert batch["sample_ids"].tolist() == [*one["sample_ids"], *two["sample_ids"]]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_evaluation_runs_once_in_equal_steps(tmp_path: Path, dp_size: int) -> None:
    rows = rows_of(tmp_path / "d")
    order = Once([rows])
    options = {"dp_size": dp_size, "micro_batch_size": 2, "global_batch_size": 8}
    loaders = [EvalLoader(order, dp_rank=rank, **options) for rank in range(dp_size)]
    passes = [list(loader) for loader in loaders]
    assert {len(batches) for batches in passes} == {-(-len(rows) // 8)} == {len(loader) for loader in loaders}
    assert {len(micro) for batches in passes for micro in batches} == {8 // (2 * dp_size)}
    found = [row for n in range(len(passes[0])) for m in range(len(passes[0][0])) for batches in passes for row in row_ids(batches[n][m])]
    assert found[: len(rows)] == [tuple(rows.row(i)["tokens"].tolist()) for i in range(len(rows))]
    assert len(rows) % 8 and set(found[len(rows) :]) == {tuple([0] * SEQ)}
    weights = sum(float(micro["weights"].sum()) for batches in passes for batch in batches for micro in batch)
    assert weights == rows.packing.counts.supervised
    limited = EvalLoader(order, dp_rank=0, batches=3, **options)
    assert len(limited) == 3 and row_ids(list(limited)[2][0]) == row_ids(passes[0][2][0])
    assert len(EvalLoader(order, dp_rank=0, batches=10**6, **options)) == len(loaders[0])


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    order = Blend([rows_of(tmp_path / "d")], [1], seed=9)
    options = {"dp_rank": 1, "dp_size": 2, "micro_batch_size": 2, "global_batch_size": GLOBAL}
    plain, ahead = Loader(order, **options), Loader(order, prefetch=True, **options)  # type: ignore[arg-type]
    for consumed in (0, GLOBAL, 2 * GLOBAL, 7 * GLOBAL, 8 * GLOBAL, 8 * GLOBAL, 0):
        for one, other in zip(plain.micro_batches(consumed), ahead.micro_batches(consumed), strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in one)
    ahead.close()
    ahead.close()
    assert row_ids(ahead.micro_batches(0)[0]) == row_ids(plain.micro_batches(0)[0])


def test_every_row_of_a_batch_is_described(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d")
    loader = Loader(Blend([rows], [1], seed=9), dp_rank=0, dp_size=2, micro_batch_size=2, global_batch_size=GLOBAL)
    assert len(loader.describe(5)) == GLOBAL
    mine = loader.micro_batches(5)[0]["sample_ids"].tolist()
    named = [int(number) for text in loader.describe(5)[:2] for number in text.partition("documents ")[2].split(", ")]
    assert named == mine


def test_batch_sizes_must_divide(tmp_path: Path) -> None:
    order = Once([rows_of(tmp_path / "d")])
    with pytest.raises(ConfigError, match=r"global_batch_size 12 is not a multiple of train.micro_batch_size 4 x 2 data-parallel ranks"):
        Loader(order, dp_rank=0, dp_size=2, micro_batch_size=4, global_batch_size=12)
