"""R4: the global sample sequence is the same for every number of ranks, nothing lost or repeated over two epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megawrap.data.blend import Blend, Once
from megawrap.data.loader import EvalLoader, Loader, RowPadding, collate
from megawrap.data.packing import one_a_row, pack
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


def single_rows(prefix: Path, **options: Any) -> RowDataset:
    """Packing none."""
    dataset = write(prefix, samples(5, 150))
    return RowDataset(dataset, one_a_row(select(dataset, 0, 150, seq_length=SEQ, overlong="split"), SEQ, 3, **options), seq_length=SEQ)


@pytest.mark.parametrize("whole_batch", [False, True])
@pytest.mark.parametrize(("dp_size", "micro", "multiple"), [(1, 1, 1), (1, 4, 1), (2, 2, 2), (4, 2, 8), (8, 1, 3)])
def test_single_rows_are_padded_to_one_length_on_all_ranks(
    tmp_path: Path, dp_size: int, micro: int, multiple: int, whole_batch: bool
) -> None:
    rows = single_rows(tmp_path / "d")
    order, padding = Blend([rows], [1], seed=9), RowPadding(multiple=multiple, whole_batch=whole_batch)
    options = {"dp_size": dp_size, "micro_batch_size": micro, "global_batch_size": GLOBAL, "padding": padding}
    loaders = [Loader(order, dp_rank=rank, **options) for rank in range(dp_size)]  # type: ignore[arg-type]
    for start in (0, GLOBAL, 10 * GLOBAL, 5):
        plain = order.rows(start + np.arange(GLOBAL))
        by_rank = [loader.micro_batches(start) for loader in loaders]
        shapes = [[len(batch["tokens"]) // micro for batch in batches] for batches in by_rank]
        assert all(shape == shapes[0] for shape in shapes)
        for m, length in enumerate(shapes[0]):
            members = plain if whole_batch else plain[m * dp_size * micro : (m + 1) * dp_size * micro]
            longest = max(len(row["tokens"]) for row in members)
            assert length % multiple == 0 and longest <= length < longest + multiple
            for rank in range(dp_size):
                batch = by_rank[rank][m]
                for j in range(micro):
                    row, spot = plain[(m * dp_size + rank) * micro + j], slice(j * length, (j + 1) * length)
                    filled = len(row["tokens"])
                    for name in ("tokens", "labels", "weights"):
                        assert batch[name][spot].tolist() == row[name].tolist() + [0] * (length - filled)
                    assert batch["position_ids"][spot].tolist() == [*range(filled), *range(length - filled)]
                mine = [plain[(m * dp_size + rank) * micro + j] for j in range(micro)]
                lengths = [len(row["tokens"]) for row in mine]
                assert batch["segment_lengths"].tolist() == [n for x in lengths for n in (x, length - x) if n]
                assert batch["sample_ids"].tolist() == [int(row["sample_ids"][0]) for row in mine]
                assert (batch["num_tokens"], batch["squared_lengths"]) == (sum(lengths), sum(x * x for x in lengths))


def test_evaluation_of_single_rows_ends_with_rows_of_padding(tmp_path: Path) -> None:
    rows = single_rows(tmp_path / "d", multiple=4)
    loader = EvalLoader(
        Once([rows]), dp_rank=0, dp_size=1, micro_batch_size=4, global_batch_size=16, padding=RowPadding(multiple=8)
    )  # fmt: skip
    batches = [micro for batch in loader for micro in batch]
    assert len(rows) % 16 and {len(batch["tokens"]) % 32 for batch in batches} == {0}
    assert len(batches[-1]["sample_ids"]) == 0 and len(batches[-1]["tokens"]) == 4 * 8 and not batches[-1]["weights"].any()
    assert sum(float(batch["weights"].sum()) for batch in batches) == rows.packing.counts.supervised
    assert sum(batch["num_tokens"] for batch in batches) == rows.packing.counts.positions


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
