"""Packing concat against a stream joined token by token: nothing lost, borders only where a row ends, runs kept apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megawrap.data.blend import Blend
from megawrap.data.rows import RowDataset
from megawrap.data.samples import UNSUPERVISED, LossOn
from megawrap.data.stream import EMPTY, cut_stream
from megawrap.errors import DataError
from tests.data.documents import END, Document, flat, samples, write

DOCUMENTS = [*samples(41, 60, longest=9), [(0, []), (1, [])], [(1, [END])], [(0, [7, 8, 9])], [(0, []), (1, [5] * 70)]]


def rows_of(prefix: Path, seq_length: int, *, span: tuple[int, int] | None = None, key: int = 3, loss_on: LossOn = "outputs", **options):
    dataset = write(prefix, options.pop("documents", DOCUMENTS), modes=options.pop("modes", True))
    packing = cut_stream(dataset, *(span or (0, dataset.num_documents)), seq_length=seq_length, loss_on=loss_on, key=key)
    return RowDataset(dataset, packing, seq_length=seq_length, loss_on=loss_on, **options)


def document_order(rows: RowDataset) -> list[int]:
    """Documents in the order they are met."""
    met = [document for index in range(len(rows)) for document in rows.row(index)["sample_ids"].tolist()]
    return [document for number, document in enumerate(met) if number == 0 or document != met[number - 1]]


@pytest.mark.parametrize("loss_on", ["outputs", "all"])
@pytest.mark.parametrize("seq_length", [1, 2, 7, 16, 1000])
def test_rows_are_the_stream_cut_apart(tmp_path: Path, seq_length: int, loss_on: LossOn) -> None:
    for number, (first, last) in enumerate([(0, len(DOCUMENTS)), (11, 40)]):
        rows = rows_of(tmp_path / f"d{number}", seq_length, span=(first, last), loss_on=loss_on)
        order = document_order(rows)
        assert sorted(order) == [d for d in range(first, last) if flat(DOCUMENTS[d])[0]]
        stream = [token for d in order for token in flat(DOCUMENTS[d])[0]]
        modes = [mode for d in order for mode in flat(DOCUMENTS[d])[1]]
        assert len(rows) == -(-(len(stream) - 1) // seq_length)
        for index in range(len(rows)):
            row, at = rows.row(index), index * seq_length
            filled = min(seq_length, len(stream) - 1 - at)
            assert row["tokens"].tolist() == stream[at : at + filled] + [0] * (seq_length - filled)
            assert row["labels"].tolist() == stream[at + 1 : at + 1 + filled] + [0] * (seq_length - filled)
            weights = [float(loss_on == "all" or mode) for mode in modes[at + 1 : at + 1 + filled]]
            assert row["weights"].tolist() == weights + [0.0] * (seq_length - filled)
            assert row["segment_lengths"].tolist() == [filled] + [seq_length - filled] * (filled < seq_length)
            assert row["position_ids"].tolist() == [*range(filled), *range(seq_length - filled)]
            assert row["sample_lengths"].tolist() == [filled]
        counts = rows.packing.counts
        assert counts.kept_tokens == counts.tokens == len(stream) and counts.positions == len(stream) - 1
        assert counts.supervised == sum(loss_on == "all" or mode for mode in modes[1:])
        assert counts.documents == last - first == counts.samples + sum(counts.dropped_documents.values())
        assert counts.dropped_documents == ({EMPTY: 1} if number == 0 else {})


def test_every_weight_sums_to_the_counts(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d", 13)
    assert sum(float(rows.row(index)["weights"].sum()) for index in range(len(rows))) == rows.packing.counts.supervised


def test_supervised_runs_of_two_documents_do_not_merge(tmp_path: Path) -> None:
    documents: list[Document] = [[(1, [10 * d + 1, 10 * d + 2, 10 * d + 3, END])] for d in range(1, 9)]
    row = rows_of(tmp_path / "d", 64, documents=documents, normalize="target").row(0)
    weights = row["weights"][:31].tolist()
    assert weights[:3] == pytest.approx([1 / 3] * 3) and weights[3:] == pytest.approx([1 / 4] * 28)


def test_documents_are_shuffled_by_the_key(tmp_path: Path) -> None:
    one, again, other = (document_order(rows_of(tmp_path / name, 16, key=key)) for name, key in (("a", 1), ("b", 1), ("c", 2)))
    assert one == again != other and one != sorted(one)


def test_nothing_to_train_on_gives_no_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d", 8, span=(62, 63))
    assert len(rows) == 0 and rows.packing.counts.dropped_documents == {UNSUPERVISED: 1}
    with pytest.raises(DataError, match="does not say which sequences are outputs"):
        rows_of(tmp_path / "e", 8, modes=False)
    assert len(rows_of(tmp_path / "f", 8, modes=False, loss_on="all")) > 10


def test_rows_stay_what_they_are_from_epoch_to_epoch(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "d", 8, seed=1)
    assert all(np.array_equal(rows.row(0, epoch)["tokens"], rows.row(0)["tokens"]) for epoch in range(4))
    blend = Blend([rows], [1], seed=5)
    assert blend.row_lengths(np.arange(3)).tolist() == [8, 8, 8]


def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    documents: list[Document] = [[(1, [1, END])], [(1, [500])], [(1, [2, END])]]
    rows = rows_of(tmp_path / "d", 4, documents=documents, vocab_size=500)
    with pytest.raises(DataError, match="token id 500 in document 1"):
        for index in range(len(rows)):
            rows.row(index)
