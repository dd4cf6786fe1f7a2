"""Rows against a token-by-token oracle: labels, weights, positions, segments; the mask laws; bad token ids."""

from __future__ import annotations

import random
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from megawrap.config import OverlongPolicy
from megawrap.data.packing import one_a_row, pack
from megawrap.data.rows import Row, RowDataset, empty_row
from megawrap.data.samples import select
from megawrap.data.stream import cut_stream
from megawrap.errors import EXIT_USAGE, DataError
from tests.data.documents import END, Document, flat, sample, samples, segment, windows, write

POLICIES = [policy for policy in get_args(OverlongPolicy) if policy != "error"]
DTYPES = {
    "tokens": np.int64, "labels": np.int64, "weights": np.float32, "position_ids": np.int64, "segment_lengths": np.int32,
    "sample_ids": np.int64,
}  # fmt: skip


def rows_of(
    prefix: Path, documents: list[Document], seq_length: int, *, overlong: str = "truncate-inputs-left", loss_on: str = "outputs", **options
) -> RowDataset:
    dataset = write(prefix, documents, modes=options.pop("modes", True))
    span = options.pop("span", (0, len(documents)))
    pieces = select(dataset, *span, seq_length=seq_length, overlong=overlong, loss_on=loss_on)  # type: ignore[arg-type]
    return RowDataset(dataset, pack(pieces, seq_length, 5), seq_length=seq_length, loss_on=loss_on, **options)  # type: ignore[arg-type]


def cut_apart(row: Row, seq_length: int) -> list[tuple[int | None, list[tuple[int, int, int, float]]]]:
    """(document, positions) of every segment; document None for padding."""
    assert {name: array.dtype for name, array in row.items()} == DTYPES
    assert all(len(row[name]) == seq_length for name in ("tokens", "labels", "weights", "position_ids"))
    lengths, ids = row["segment_lengths"].tolist(), row["sample_ids"].tolist()
    assert sum(lengths) == seq_length and min(lengths) > 0
    assert len(lengths) in (len(ids), len(ids) + 1)
    found, at = [], 0
    for number, length in enumerate(lengths):
        columns = [row[name][at : at + length].tolist() for name in ("tokens", "labels", "position_ids", "weights")]
        found.append((ids[number] if number < len(ids) else None, list(zip(*columns, strict=True))))
        at += length
    return found


@pytest.mark.parametrize("normalize", ["token", "target"])
@pytest.mark.parametrize("loss_on", ["outputs", "all"])
@pytest.mark.parametrize("overlong", POLICIES)
@pytest.mark.parametrize("chat", [False, True])
def test_rows_equal_the_oracle(tmp_path: Path, overlong: str, loss_on: str, normalize: str, chat: bool) -> None:
    documents = samples(11, 120, longest=15, chat=chat)
    documents += [[(1, [3, 4]), (1, [5, END])], [(0, [1]), (1, []), (1, [2, END]), (0, [8]), (1, [9, END])]]
    for seq_length, span in ((7, (0, len(documents))), (40, (13, 90))):
        rows = rows_of(
            tmp_path / f"d{seq_length}", documents, seq_length, overlong=overlong, loss_on=loss_on, normalize=normalize, span=span
        )
        wanted = sorted(
            (d, segment(documents[d], start, length, loss_on, normalize))
            for d in range(*span)
            for start, length in windows(documents[d], seq_length, overlong, loss_on)
        )
        found = []
        for index in range(len(rows)):
            row = rows.row(index)
            assert rows.sample_ids(index).tolist() == row["sample_ids"].tolist()
            for document, positions in cut_apart(row, seq_length):
                if document is None:
                    assert all(weight == 0 and place == i for i, (_, _, place, weight) in enumerate(positions))
                else:
                    found.append((document, positions))
        assert [(d, [p[:3] for p in ps]) for d, ps in sorted(found)] == [(d, [p[:3] for p in ps]) for d, ps in wanted]
        for (_, one), (_, other) in zip(sorted(found), wanted, strict=True):
            assert [p[3] for p in one] == pytest.approx([p[3] for p in other], rel=1e-6)


def sample_set(seed: int) -> tuple[list[Document], int]:
    """Random samples that fit a row, and the length of the row."""
    rng = random.Random(seed)
    seq_length, longest, chat = rng.randint(4, 40), rng.randint(1, 30), rng.random() < 0.5
    documents = [sample(rng, longest=longest, chat=chat) for _ in range(rng.randint(1, 8))]
    documents = [document for document in documents if 2 <= len(flat(document)[0]) <= seq_length + 1]
    return [*documents, [(0, [1]), (1, [2, END])]], seq_length


@pytest.mark.parametrize("seed", range(0, 1000, 100))
def test_r15_mask_laws(seed: int, record_property: Any) -> None:
    """R15: the mask holds every output token and the end token once and nothing else, though padding looks like the end."""
    sets = [sample_set(seed + number) for number in range(100)]
    with tempfile.TemporaryDirectory() as folder:
        dataset = write(Path(folder) / "d", [document for documents, _ in sets for document in documents])
        first = 0
        for documents, seq_length in sets:
            pieces = select(dataset, first, first + len(documents), seq_length=seq_length, overlong="error")
            rows = RowDataset(dataset, pack(pieces, seq_length, seed), seq_length=seq_length)
            check_mask(documents, first, [rows.row(index) for index in range(len(rows))], seq_length)
            first += len(documents)
    record_property("R15", (len(sets), len(sets)))


def check_mask(documents: list[Document], first: int, rows: list[Row], seq_length: int) -> None:
    supervised, ends = [], 0
    for number, document in enumerate(documents):
        tokens, modes = flat(document)
        supervised += [(first + number, i, tokens[i]) for i in range(1, len(tokens)) if modes[i]]
        ends += sum(tokens[i] == END for i in range(1, len(tokens)))
    found = []
    for row in rows:
        for document_number, positions in cut_apart(row, seq_length):
            found += [(document_number, place + 1, label) for _, label, place, weight in positions if weight]
            assert {weight for *_, weight in positions} <= {0.0, 1.0}
    assert sorted(found, key=str) == sorted(supervised, key=str)
    assert sum(row["weights"].sum() for row in rows) == len(supervised)
    assert sum(label == END for _, _, label in found) == ends


def test_targets_weigh_one_each(tmp_path: Path) -> None:
    documents = samples(12, 80, longest=9, chat=True)
    rows = rows_of(tmp_path / "d", documents, 100, normalize="target")
    total = sum(float(rows.row(index)["weights"].sum()) for index in range(len(rows)))
    runs = 0
    for document in documents:
        modes = flat(document)[1][1:]
        runs += sum(mode == 1 and (i == 0 or modes[i - 1] == 0) for i, mode in enumerate(modes))
    assert total == pytest.approx(runs, rel=1e-5)


def test_no_label_comes_from_the_next_sample(tmp_path: Path) -> None:
    documents = [[(0, [10 * d + 1, 10 * d + 2]), (1, [10 * d + 3])] for d in range(1, 31)]
    rows = rows_of(tmp_path / "d", documents, 64, loss_on="all", modes=False)
    for index in range(len(rows)):
        row = rows.row(index)
        real = row["weights"] > 0
        assert (row["tokens"][real] // 10 == row["labels"][real] // 10).all()
        assert (row["labels"][real] == row["tokens"][real] + 1).all()


@pytest.mark.parametrize("normalize", ["token", "target"])
@pytest.mark.parametrize("multiple", [2, 4, 8])
@pytest.mark.parametrize("reserve", [0, 3])
def test_places_hold_a_sample_and_empty_positions(tmp_path: Path, multiple: int, reserve: int, normalize: str) -> None:
    """Segment by segment the row is the oracle's sample, then padding up to its place; also at the end of the file."""
    documents, seq_length = samples(15, 90, longest=15), 40
    dataset = write(tmp_path / "d", documents)
    pieces = select(dataset, 0, len(documents), seq_length=seq_length, overlong="split")
    for make in (pack, one_a_row):
        packing = make(pieces, seq_length, 5, reserve=reserve, multiple=multiple)
        rows = RowDataset(dataset, packing, seq_length=seq_length, normalize=normalize, seed=2)  # type: ignore[arg-type]
        wanted = sorted(
            (d, segment(documents[d], start, length, "outputs", normalize))
            for d in range(len(documents))
            for start, length in windows(documents[d], seq_length, "split", "outputs")
        )
        for epoch in (0, 1, 2):
            found, lengths = [], rows.row_lengths(np.arange(len(rows)))
            for index in range(len(rows)):
                row, at = rows.row(index, epoch), 0
                assert rows.sample_ids(index, epoch).tolist() == row["sample_ids"].tolist()
                assert len(row["tokens"]) == lengths[index] == row["segment_lengths"].sum()
                assert make is one_a_row or lengths[index] == seq_length
                real = row["sample_lengths"].tolist()
                for document, place, filled in zip(row["sample_ids"].tolist(), row["segment_lengths"].tolist(), real, strict=False):
                    assert place == min(-(-(filled + reserve) // multiple) * multiple, seq_length)
                    names = ("tokens", "labels", "position_ids", "weights")
                    positions = list(zip(*(row[name][at : at + place].tolist() for name in names), strict=True))
                    assert positions[filled:] == [(0, 0, filled + i, 0.0) for i in range(place - filled)]
                    found.append((document, positions[:filled]))
                    at += place
                assert not row["weights"][at:].any() and not row["tokens"][at:].any()
            assert [(d, [p[:3] for p in ps]) for d, ps in sorted(found)] == [(d, [p[:3] for p in ps]) for d, ps in wanted]
            for (_, one), (_, other) in zip(sorted(found), wanted, strict=True):
                assert [p[3] for p in one] == pytest.approx([p[3] for p in other], rel=1e-6)


def test_an_epoch_holds_every_sample_once_in_other_company(tmp_path: Path) -> None:
    documents = samples(16, 150, longest=9)
    dataset = write(tmp_path / "d", documents)
    packing = pack(select(dataset, 0, 150, seq_length=40, overlong="split"), 40, 5)
    rows, still = (RowDataset(dataset, packing, seq_length=40, seed=seed) for seed in (2, None))
    company = []
    for epoch in range(3):
        contents = [rows.row(index, epoch) for index in range(len(rows))]
        assert sorted(d for row in contents for d in row["sample_ids"].tolist()) == sorted(packing.document.tolist())
        assert [row["segment_lengths"].tolist() for row in contents] == [
            still.row(index)["segment_lengths"].tolist() for index in range(len(rows))
        ]  # fmt: skip
        company.append({tuple(sorted(row["sample_ids"].tolist())) for row in contents})
        assert all(np.array_equal(still.row(0, epoch)[name], still.row(0)[name]) for name in DTYPES)
    assert len(company[0] & company[1]) < 0.1 * len(rows) and len(company[1] & company[2]) < 0.1 * len(rows)
    again = RowDataset(dataset, packing, seq_length=40, seed=2)
    assert again.row(4, 2)["tokens"].tolist() == contents[4]["tokens"].tolist()


def test_no_array_of_a_row_grows_with_its_square(tmp_path: Path) -> None:
    """The largest array that is made while a row of 8192 is read, whatever holds it: a mask would have 67 million elements."""
    rng = np.random.default_rng(1)
    documents: list[Document] = [
        [(0, rng.integers(1, 9, n).tolist()), (1, rng.integers(1, 9, n).tolist())] for n in (4000, 300, 2000, 90) * 3
    ]
    dataset = write(tmp_path / "d", documents)
    pieces = select(dataset, 0, len(documents), seq_length=8192, overlong="split")
    for packing in (
        pack(pieces, 8192, 1),
        pack(pieces, 8192, 1, multiple=64),
        cut_stream(dataset, 0, 12, seq_length=8192, loss_on="all", key=1),
    ):
        rows = RowDataset(dataset, packing, seq_length=8192, vocab_size=9, seed=1, loss_on="all" if packing.mode == "concat" else "outputs")
        rows.row(0, 1)
        tracemalloc.start()
        try:
            rows.row(0, 1)
            largest = tracemalloc.get_traced_memory()[1]
            mask = np.ones((8192, 8192), dtype=bool)
            assert tracemalloc.get_traced_memory()[1] >= mask.nbytes, "numpy's arrays are seen"
        finally:
            tracemalloc.stop()
        assert largest < 16 * 8192 * 8


def test_an_empty_row_trains_nothing() -> None:
    row = empty_row(9)
    assert [(document, len(positions)) for document, positions in cut_apart(row, 9)] == [(None, 9)]
    assert row["weights"].sum() == 0 and row["position_ids"].tolist() == list(range(9))


def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    documents: list[Document] = [[(0, [1, 2]), (1, [3, END])] for _ in range(9)]
    documents[6] = [(0, [1, 2]), (1, [500, END])]
    rows = rows_of(tmp_path / "d", documents, 12, vocab_size=500)
    with pytest.raises(DataError, match=r"d\.bin: token id 500 in document 6, the model knows 0 to 499") as caught:
        for index in range(len(rows)):
            rows.row(index)
    assert caught.value.exit_code == EXIT_USAGE
    rows.vocab_size = 501
    assert sum(len(rows.row(index)["sample_ids"]) for index in range(len(rows))) == 9


def test_the_last_token_of_a_row_is_checked_too(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d", [[(0, [1, 2]), (1, [3, 700])]], 3, vocab_size=600)
    with pytest.raises(DataError, match="token id 700 in document 0"):
        rows.row(0)


def test_rows_outside_are_refused(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d", samples(13, 5), 64)
    for index in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows.row(index)


def test_rows_keep_their_data_open(tmp_path: Path) -> None:
    """Arrays stay valid after the dataset object is gone."""
    row = rows_of(tmp_path / "d", samples(14, 5), 64).row(0)
    assert row["tokens"].base is None and int(row["tokens"].sum()) > 0
