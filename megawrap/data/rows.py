"""Rows of tokens, labels, weights and segments: the only owner of the label shift.

In: an indexed dataset and a packing of a range of it. Out: one dictionary of numpy arrays per row. A window of n tokens
becomes a segment of n - 1 positions with tokens x[0..n-2] and labels x[1..n-1], so no label ever comes from another
sample; a position is trained on when its label is supervised. Padding is known by position, never by id.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from megawrap.data.format import IndexedDataset
from megawrap.data.packing import Packing
from megawrap.data.samples import LossOn
from megawrap.errors import DataError

Normalize = Literal["token", "target"]
Row = dict[str, np.ndarray]


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


class RowDataset:
    """The packed rows of a range of documents.

    Args:
        dataset: kept open as long as the rows are.
        packing: which windows of which documents each row holds.
        seq_length: positions of a row, S.
        loss_on: supervise the sequences with mode 1, or everything but the first token of a window.
        normalize: weigh every supervised token 1, or make each consecutive supervised run of a segment sum to 1.
        vocab_size: token ids must be below; None checks nothing.
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
    ) -> None:
        self.dataset = dataset
        self.packing = packing
        self.seq_length = seq_length
        self.loss_on = loss_on
        self.normalize = normalize
        self.vocab_size = vocab_size
        self._tokens = np.asarray(dataset.tokens)  # the same bytes without the cost of a memmap object per access

    def __len__(self) -> int:
        return self.packing.num_rows

    @property
    def fingerprint(self) -> str:
        """Of the data the rows are made of."""
        return self.dataset.fingerprint

    def sample_ids(self, index: int) -> np.ndarray:
        """Documents of a row without reading their tokens; int64 [k]."""
        first, last = self.packing.row_starts[index : index + 2]
        return self.packing.document[first:last].astype(np.int64)

    def row(self, index: int) -> Row:
        """One row of S positions.

        Returns:
            tokens int64 [S], labels int64 [S], weights float32 [S] (0 is not trained on), position_ids int64 [S]
            restarting per segment, segment_lengths int32 [k or k + 1] summing to S (a last one for padding), sample_ids
            int64 [k]: the document of each real segment.

        Raises:
            DataError: a token id is negative or not below vocab_size, naming file and document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first, last = (int(bound) for bound in self.packing.row_starts[index : index + 2])
        documents = self.packing.document[first:last].astype(np.int64)
        lengths = self.packing.length[first:last].astype(np.int64) - 1  # positions
        sequences = self.dataset.document_indices[documents]
        begins = self.dataset.pointers[sequences] // self.dataset.dtype.itemsize + self.packing.start[first:last]
        ends = np.cumsum(lengths)
        filled, padding = int(ends[-1]), self.seq_length - int(ends[-1])
        segment_lengths = np.append(lengths, padding) if padding else lengths
        row_starts = np.append(ends - lengths, filled) if padding else ends - lengths
        position_ids = np.arange(self.seq_length, dtype=np.int64)
        where = position_ids[:filled] + np.repeat(begins - row_starts[: len(lengths)], lengths)
        position_ids -= np.repeat(row_starts, segment_lengths)
        tokens, labels, weights = (np.zeros(self.seq_length, dtype=kind) for kind in (np.int64, np.int64, np.float32))
        tokens[:filled] = self._tokens[where]
        where += 1
        labels[:filled] = self._tokens[where]
        self._check_ids(tokens, labels, documents, ends)
        weights[:filled] = self._weights(documents, begins, lengths)
        return {
            "tokens": tokens,
            "labels": labels,
            "weights": weights,
            "position_ids": position_ids,
            "segment_lengths": segment_lengths.astype(np.int32),
            "sample_ids": documents,
        }

    def _weights(self, documents: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Weights of the filled positions, float32 [sum(lengths)], from runs of equal supervision."""
        if self.loss_on == "all":
            segments, supervised, counts = np.arange(len(lengths)), np.ones(len(lengths), dtype=bool), lengths
        else:
            segments, supervised, counts = self._runs(documents, begins, lengths)
        values = supervised.astype(np.float32)
        if self.normalize == "target":
            values = values / _consecutive_totals(segments, supervised, counts)
        return np.repeat(values, counts)

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

    def _check_ids(self, tokens: np.ndarray, labels: np.ndarray, documents: np.ndarray, ends: np.ndarray) -> None:
        if self.vocab_size is None:
            return
        for ids in (tokens, labels):
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
