"""Rows of tokens, labels, weights and segments: the only owner of the label shift.

In: an indexed dataset and a packing of a range of it. Out: one dictionary of numpy arrays per row. A window of n tokens
becomes a segment of n - 1 positions with tokens x[0..n-2] and labels x[1..n-1], so no label ever comes from another
sample; a position is trained on when its label is supervised. Padding is known by position, never by id.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from megawrap.data.fim import Fim, Sample
from megawrap.data.format import IndexedDataset
from megawrap.data.packing import Exchange, Packing
from megawrap.data.samples import LossOn
from megawrap.errors import DataError

Normalize = Literal["token", "target"]
Row = dict[str, np.ndarray]
"""`tokens`, `labels`, `position_ids` int64 [S]; `weights` float32 [S]; `segment_lengths` int32 [k or k + 1] summing to S;
`sample_ids` int64. Where padding is not only at the end, also `sample_lengths` int32: positions of each segment that
are not padding. With fill-in-the-middle also `fim` int64 [3]: samples transformed, kept and outgrown."""


def empty_row(seq_length: int) -> Row:
    """A row of padding: nothing in it is trained on."""
    return {
        "tokens": np.zeros(seq_length, dtype=np.int64),
        "labels": np.zeros(seq_length, dtype=np.int64),
        "weights": np.zeros(seq_length, dtype=np.float32),
        "position_ids": np.arange(seq_length, dtype=np.int64),
        "segment_lengths": np.array([seq_length], dtype=np.int32),
        "sample_ids": np.zeros(0, dtype=np.int64),
    }


def lengthened(row: Row, length: int) -> Row:
    """The row with a segment of padding at its end that makes it `length` positions long."""
    padding = length - len(row["tokens"])
    if padding == 0:
        return row
    more = empty_row(padding)
    names = ("tokens", "labels", "weights", "position_ids", "segment_lengths")
    return {**row, **{name: np.concatenate([row[name], more[name]]) for name in names}}


class RowDataset:
    """The packed rows of a range of documents.

    Args:
        dataset: kept open as long as the rows are.
        packing: which windows of which documents each row holds.
        seq_length: positions of a row, S; with packing none, of the longest.
        loss_on: supervise the sequences with mode 1, or everything but the first token of a window.
        normalize: weigh every supervised token 1, or make each consecutive supervised run of a segment sum to 1.
        vocab_size: token ids must be below; None checks nothing.
        seed: segments of equal size trade places from epoch to epoch by this; None keeps every row as it is.
        fim: rearranges samples; None leaves all as they are.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        packing: Packing,
        *,
        seq_length: int,
        loss_on: LossOn = "outputs",
        normalize: Normalize = "token",
        vocab_size: int | None = None,
        seed: int | None = None,
        fim: Fim | None = None,
    ) -> None:
        self.dataset = dataset
        self.packing = packing
        self.seq_length = seq_length
        self.loss_on = loss_on
        self.normalize = normalize
        self.vocab_size = vocab_size
        self.fim = fim
        self._exchange = Exchange(packing, seed, dataset.fingerprint) if seed is not None and packing.mode == "best_fit" else None
        self._plain = packing.plain and fim is None  # no padding but at the end of a row
        self._tokens = np.asarray(dataset.tokens)  # the same bytes without the cost of a memmap object per access

    def __len__(self) -> int:
        return self.packing.num_rows

    @property
    def fingerprint(self) -> str:
        """Of the data the rows are made of."""
        return self.dataset.fingerprint

    @property
    def total_positions(self) -> int:
        """Positions of all rows together."""
        packing = self.packing
        return int(packing.places(packing.length).sum()) if packing.mode == "none" else len(self) * self.seq_length

    def row_lengths(self, indices: np.ndarray) -> np.ndarray:
        """Positions of rows; int64 [n]."""
        if self.packing.mode != "none":
            return np.full(len(indices), self.seq_length, dtype=np.int64)
        return self.packing.places(self.packing.length[self.packing.windows[indices]])

    def sample_ids(self, index: int, epoch: int = 0) -> np.ndarray:
        """Documents of a row without reading their tokens; int64 [k]."""
        return self.packing.document[self._windows(index, epoch)[0]].astype(np.int64)

    def _windows(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows of a row in an epoch, and their places; int64 [k] each."""
        first, last = self.packing.row_starts[index : index + 2]
        windows = self.packing.windows[first:last]
        places = self.packing.places(self.packing.length[windows])
        return (windows if self._exchange is None else self._exchange(windows, places, epoch)), places

    def row(self, index: int, epoch: int = 0) -> Row:
        """One row of S positions.

        Args:
            index: below the number of rows.
            epoch: the pass over all rows that this is part of.

        Returns:
            tokens int64 [S], labels int64 [S], weights float32 [S] (0 is not trained on), position_ids int64 [S]
            restarting per segment, segment_lengths int32 [k or k + 1] summing to S (a last one for padding), sample_ids
            int64 [k]: the document of each real segment (packing concat: of every document in the one segment).
            See `Row` for what else there can be.

        Raises:
            DataError: a token id is negative or not below vocab_size, naming file and document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        windows, places = self._windows(index, epoch)
        documents = self.packing.document[windows].astype(np.int64)
        counts = self.packing.length[windows].astype(np.int64)  # tokens
        sequences = self.dataset.document_indices[documents]
        begins = self.dataset.pointers[sequences] // self.dataset.dtype.itemsize + self.packing.start[windows]
        if self.packing.mode == "concat":
            return self._one_segment(documents, begins, counts)
        lengths, ends = counts - 1, np.cumsum(places)
        row, filled = self._padding(places, ends), int(ends[-1])
        where = np.arange(filled) + np.repeat(begins - (ends - places), places)
        for name in ("tokens", "labels"):  # padding inside a place reads on, maybe past the end, and is emptied below
            row[name][:filled] = self._tokens.take(where, mode="raise" if self._plain else "clip")
            where += 1
        values, runs = self._weights(documents, begins, lengths)
        if not self._plain:
            inside = places - lengths
            empty = np.arange(inside.sum()) + np.repeat(ends - np.cumsum(inside), inside)
            row["tokens"][empty] = row["labels"][empty] = 0
            behind = np.searchsorted(np.cumsum(runs), np.cumsum(lengths)) + 1  # after the last run of each segment
            values, runs = np.insert(values, behind, 0), np.insert(runs, behind, inside)
            row["sample_lengths"] = lengths.astype(np.int32)
        for name in ("tokens", "labels"):
            self._check_ids(row[name], documents, ends)
        row["weights"][:filled] = np.repeat(values, runs)
        row["sample_ids"] = documents
        if self.fim is not None:
            self._rearrange(row, epoch, documents, begins, ends - places, places)
        return row

    def _padding(self, places: np.ndarray, ends: np.ndarray) -> Row:
        """A row of segments of these places, all of it padding so far."""
        size = self.seq_length if self.packing.mode == "best_fit" else int(ends[-1])
        padding = size - int(ends[-1])
        segment_lengths = np.append(places, padding) if padding else places
        row = empty_row(size)
        row["position_ids"] -= np.repeat(np.append(ends - places, ends[-1])[: len(segment_lengths)], segment_lengths)
        row["segment_lengths"] = segment_lengths.astype(np.int32)
        return row

    def _one_segment(self, documents: np.ndarray, begins: np.ndarray, counts: np.ndarray) -> Row:
        """A row of packing concat: its windows end to end, one segment."""
        ends = np.cumsum(counts)
        stream = self._tokens[np.arange(ends[-1]) + np.repeat(begins - (ends - counts), counts)]
        self._check_ids(stream, documents, ends)
        size = len(stream) - 1
        row = empty_row(size)
        row["tokens"][:], row["labels"][:] = stream[:-1], stream[1:]
        labelled = counts.copy()
        labelled[0] -= 1  # the first token of the row is no label
        own = labelled > 0
        row["weights"][:] = np.repeat(*self._weights(documents[own], (begins - (np.arange(len(begins)) > 0))[own], labelled[own]))
        row["sample_ids"], row["sample_lengths"] = documents, np.array([size], dtype=np.int32)
        return lengthened(row, self.seq_length)

    def _weights(self, documents: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the labels of windows as runs: float32 [r] and int64 [r], which sums to sum(lengths).

        Args:
            documents: int64 [k].
            begins: int64 [k], offset in .bin of the token before each window's first label.
            lengths: int64 [k], labels of each window.
        """
        if self.loss_on == "all":
            segments, supervised, counts = np.arange(len(lengths)), np.ones(len(lengths), dtype=bool), lengths
        else:
            segments, supervised, counts = self._runs(documents, begins, lengths)
        values = supervised.astype(np.float32)
        return (values if self.normalize == "token" else values / _consecutive_totals(segments, supervised, counts)), counts

    def _runs(self, documents: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every sequence's share of the labels of every segment, in order: segment, supervised or not, labels."""
        assert self.dataset.modes is not None  # select() refuses data without modes
        first = self.dataset.document_indices[documents]
        number = self.dataset.document_indices[documents + 1] - first
        segments = np.repeat(np.arange(len(documents)), number)
        sequences = np.arange(len(segments)) + np.repeat(first - (np.cumsum(number) - number), number)
        starts = self.dataset.pointers[sequences] // self.dataset.dtype.itemsize
        ends = starts + self.dataset.lengths[sequences]
        label_begin = (begins + 1)[segments]
        counts = np.minimum(ends, label_begin + lengths[segments]) - np.maximum(starts, label_begin)
        held = counts > 0
        return segments[held], self.dataset.modes[sequences[held]] == 1, counts[held]

    def _rearrange(
        self, row: Row, epoch: int, documents: np.ndarray, begins: np.ndarray, starts: np.ndarray, places: np.ndarray
    ) -> None:  # fmt: skip
        """Fill-in-the-middle of the samples of a row that are drawn for it, in place; those that outgrow their place stay."""
        assert self.fim is not None
        drawn, transformed, outgrown = self.fim.drawn(self.fingerprint, epoch, documents), 0, 0
        samples = [self._sample(int(documents[j]), int(begins[j]), int(row["sample_lengths"][j]) + 1) for j in drawn]
        made = self.fim.rearrange(samples, documents[drawn], self.fingerprint, epoch)
        for j, sample, new in zip(drawn, samples, made, strict=True):
            if new is None or sample is None:
                continue
            tokens, trained = sample.with_text(new, everything=self.loss_on == "all", middle_only=self.fim.middle_only)
            filled, place = len(tokens) - 1, int(places[j])
            if filled > place:
                outgrown += 1
                continue
            transformed += 1
            spot = slice(int(starts[j]), int(starts[j]) + place)
            for name in ("tokens", "labels", "weights"):
                row[name][spot] = 0
            spot = slice(spot.start, spot.start + filled)
            row["tokens"][spot], row["labels"][spot] = tokens[:-1], tokens[1:]
            row["weights"][spot] = _spread(trained[1:]) if self.normalize == "target" else trained[1:]
            row["sample_lengths"][j] = filled
        row["fim"] = np.array([transformed, len(documents) - transformed - outgrown, outgrown], dtype=np.int64)

    def _sample(self, document: int, begin: int, count: int) -> Sample | None:
        assert self.fim is not None
        return self.fim.text_of(self.dataset, self._tokens[begin : begin + count], document, begin)

    def _check_ids(self, ids: np.ndarray, documents: np.ndarray, ends: np.ndarray) -> None:
        """Refuse a token id outside the vocabulary; document j ends before position ends[j] of `ids`."""
        if self.vocab_size is None:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            at = int(ids.argmin() if low < 0 else ids.argmax())
            document = documents[int(np.searchsorted(ends, at, side="right"))]
            raise DataError(
                f"{self.dataset.bin_path}: token id {ids[at]} in document {document}, the model knows 0 to {self.vocab_size - 1}",
                hint="The data was made with another tokenizer, or is damaged; preprocess it with the model's",
            )


def _consecutive_totals(segments: np.ndarray, supervised: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each run the labels of the stretch of equal supervision in one segment that it belongs to; float32."""
    stretch = np.zeros(len(counts), dtype=np.int64)
    np.cumsum((segments[1:] != segments[:-1]) | (supervised[1:] != supervised[:-1]), out=stretch[1:])
    return np.bincount(stretch, weights=counts)[stretch].astype(np.float32)


def _spread(supervised: np.ndarray) -> np.ndarray:
    """Weights that make each stretch of supervised labels of one segment sum to 1; float32 [n]."""
    ones = np.ones(len(supervised), dtype=np.int64)
    return supervised / _consecutive_totals(np.zeros_like(ones), supervised, ones)
