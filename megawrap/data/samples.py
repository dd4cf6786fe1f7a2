"""Which tokens of which documents are trained on: over-long policies, and an account in which nothing is missing.

In: an indexed dataset, a range of its documents and a row length. Out: `Pieces`, contiguous windows of documents that
each become a segment of a row, and `Counts`, which adds up to every document and token of the range.
A window of n tokens fills n - 1 positions of a row: inputs x[0..n-2], labels x[1..n-1] (the shift itself is in rows.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megawrap.config import OverlongPolicy
from megawrap.data.format import IndexedDataset
from megawrap.errors import DataError

LossOn = Literal["outputs", "all"]
TOO_SHORT, UNSUPERVISED, OVERLONG = "fewer than 2 tokens", "no supervised token", "over-long"


@dataclass(kw_only=True)
class Counts:
    """The account of a range of documents; `documents == samples + sum(dropped_documents)`, and so for tokens.

    Attributes:
        documents: in the range.
        tokens: in the range.
        samples: documents of which something is trained on.
        pieces: segments they became; more than `samples` only under the policy split.
        kept_tokens: tokens of the pieces, the one where two pieces of a sample meet counted once.
        positions: row positions of the pieces.
        supervised: positions whose label is trained on.
        overlong: documents longer than a row.
        shortened: samples that lost tokens to a truncation.
        cut_tokens: tokens they lost.
        cut_supervised: supervised labels of the range that are in no piece, because cut or dropped.
        dropped_documents: by reason.
        dropped_tokens: by reason.
    """

    documents: int = 0
    tokens: int = 0
    samples: int = 0
    pieces: int = 0
    kept_tokens: int = 0
    positions: int = 0
    supervised: int = 0
    overlong: int = 0
    shortened: int = 0
    cut_tokens: int = 0
    cut_supervised: int = 0
    dropped_documents: dict[str, int] = field(default_factory=dict)
    dropped_tokens: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, documents: int, tokens: int) -> None:
        """Account for documents of which nothing is kept."""
        if documents:
            self.dropped_documents[reason] = self.dropped_documents.get(reason, 0) + documents
            self.dropped_tokens[reason] = self.dropped_tokens.get(reason, 0) + tokens


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Windows of documents.

    Attributes:
        document: int64 [p], number in the dataset.
        start: int32 [p], first token of the window in its document.
        length: int32 [p], tokens, from 2 to seq_length + 1.
        counts: the account of the range.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    counts: Counts


class Supervision:
    """Number of supervised tokens before any token of a range of documents.

    Attributes:
        token_bounds: int64 [documents + 1], offset in .bin of each document and of the end.
    """

    def __init__(self, dataset: IndexedDataset, first: int, last: int, loss_on: LossOn) -> None:
        if loss_on == "outputs" and dataset.modes is None:
            raise DataError(
                f"{dataset.prefix} does not say which sequences are outputs (no sequence modes), and objective.loss_on is outputs",
                hint="Preprocess it with megawrap, or set objective.loss_on to all",
            )
        self.everything = loss_on == "all"
        bounds = np.asarray(dataset.document_indices[first : last + 1])
        sequences = slice(int(bounds[0]), int(bounds[-1]))
        lengths = np.asarray(dataset.lengths[sequences])
        self.first_sequences = bounds - bounds[0]
        begin = int(dataset.pointers[sequences.start]) // dataset.dtype.itemsize if len(lengths) else 0
        self.sequence_starts = np.empty(len(lengths) + 1, dtype=np.int64)
        self.sequence_starts[0] = begin
        np.cumsum(lengths, out=self.sequence_starts[1:])
        self.sequence_starts[1:] += begin
        self.token_bounds = self.sequence_starts[self.first_sequences]
        self.modes = None if dataset.modes is None else np.append(dataset.modes[sequences], np.int8(0))
        if self.modes is not None:
            self.before_sequence = np.zeros(len(lengths) + 1, dtype=np.int64)
            np.cumsum(lengths * self.modes[:-1], out=self.before_sequence[1:])

    def before(self, offsets: np.ndarray) -> np.ndarray:
        """Supervised tokens of the range before each token offset; int64 [n]."""
        return offsets - self.token_bounds[0] if self.everything else self._outputs_before(offsets)

    def _outputs_before(self, offsets: np.ndarray) -> np.ndarray:
        assert self.modes is not None
        sequence = np.searchsorted(self.sequence_starts, offsets, side="right") - 1
        return self.before_sequence[sequence] + self.modes[sequence] * (offsets - self.sequence_starts[sequence])

    def whole_documents(self) -> np.ndarray:
        """Supervised labels of each document, its first token being no label; int64 [documents]."""
        lengths = np.diff(self.token_bounds)
        if self.everything:
            return np.maximum(lengths - 1, 0)
        assert self.modes is not None
        first = self.first_sequences[:-1]
        total = np.diff(self.before_sequence[self.first_sequences])
        begins_with_output = self.modes[first].astype(np.int64)
        unclear = np.flatnonzero(self.sequence_starts[np.minimum(first + 1, len(self.modes) - 1)] == self.token_bounds[:-1])
        starts = self.token_bounds[unclear]  # documents whose first sequence is empty
        begins_with_output[unclear] = np.where(lengths[unclear] > 0, self._outputs_before(starts + 1) - self._outputs_before(starts), 0)
        return total - begins_with_output

    def first_output(self, documents: np.ndarray) -> np.ndarray:
        """Offset in its document of the first output token; the document's length when it has none; 0 without modes."""
        starts, ends = self.token_bounds[documents], self.token_bounds[documents + 1]
        if self.modes is None:
            return np.zeros(len(documents), dtype=np.int64)
        outputs = np.flatnonzero((self.modes[:-1] == 1) & (np.diff(self.sequence_starts) > 0))
        at = np.searchsorted(outputs, self.first_sequences[documents])
        first = self.sequence_starts[np.append(outputs, len(self.modes) - 1)[at]]
        return np.minimum(first, ends) - starts


def select(
    dataset: IndexedDataset, first: int, last: int, *, seq_length: int, overlong: OverlongPolicy, loss_on: LossOn = "outputs"
) -> Pieces:
    """Cut the documents first..last-1 to windows that fit a row.

    Over-long documents (more than seq_length + 1 tokens):

    * truncate-inputs-left: the window ends at the document's end and loses the left part of the inputs, but begins no
      later than one token before the first output, so that every output token it holds is predicted from something.
      Outputs that are too long even then lose their end, and with it the end token: a model must not learn to stop
      where a row happens to be full. In a chat the first output counts, so later turns are cut before earlier ones.
    * truncate-outputs: the window begins at the document's start.
    * split: windows of seq_length + 1 tokens, each beginning with the last token of the one before, so that every pair
      of a token and its next is in exactly one window. No token is lost, also where a window has nothing to predict.
    * drop: left out and counted. error: refused, naming the first.

    Raises:
        DataError: over-long documents under the policy error, or `loss_on` outputs of a dataset without modes.
    """
    supervision = Supervision(dataset, first, last, loss_on)
    lengths, labels = np.diff(supervision.token_bounds), supervision.whole_documents()
    is_long, is_short = lengths > seq_length + 1, lengths < 2
    counts = Counts(documents=last - first, tokens=int(lengths.sum()), overlong=int(is_long.sum()))
    counts.drop(TOO_SHORT, int(is_short.sum()), int(lengths[is_short].sum()))
    unsupervised = ~is_short & (labels == 0)
    counts.drop(UNSUPERVISED, int(unsupervised.sum()), int(lengths[unsupervised].sum()))
    usable = ~is_short & ~unsupervised
    whole, long = np.flatnonzero(usable & ~is_long), np.flatnonzero(usable & is_long)
    if len(long) and overlong == "error":
        raise DataError(
            f"{dataset.prefix}: {len(long)} of {last - first} documents do not fit a row of {seq_length} positions;"
            f" the first, document {first + int(long[0])}, has {lengths[long[0]]} tokens, allowed are {seq_length + 1}",
            hint="Raise data.seq_length, or choose another data.overlong policy",
        )
    cut = _cut(supervision, long, lengths[long], seq_length, overlong)
    document, start, length = (
        np.concatenate([part, other]) for part, other in zip((whole, np.zeros_like(whole), lengths[whole]), cut[:3], strict=True)
    )
    _account(counts, labels, lengths, whole, long, cut, overlong)
    return Pieces(document=document + first, start=start.astype(np.int32), length=length.astype(np.int32), counts=counts)


_Cut = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # document, start, length, supervised labels of each window


def _cut(supervision: Supervision, long: np.ndarray, lengths: np.ndarray, seq_length: int, overlong: OverlongPolicy) -> _Cut:
    """Windows of the over-long documents; a truncated one that holds no supervised label is left out."""
    if overlong == "drop":
        long, lengths = long[:0], lengths[:0]
    if overlong == "split":
        windows = -(-(lengths - 1) // seq_length)
        document = np.repeat(long, windows)
        start = (np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)) * seq_length
        length = np.minimum(np.repeat(lengths, windows) - start, seq_length + 1)
    else:
        document, length = long, np.full(len(long), seq_length + 1)
        start = np.zeros(len(long), dtype=np.int64)
        if overlong == "truncate-inputs-left":
            start = np.minimum(lengths - seq_length - 1, np.maximum(supervision.first_output(long) - 1, 0))
    begin = supervision.token_bounds[document] + start
    labels = supervision.before(begin + length) - supervision.before(begin + 1)
    kept = labels > 0 if overlong != "split" else slice(None)
    return document[kept], start[kept], length[kept], labels[kept]


def _account(
    counts: Counts,
    labels: np.ndarray,
    lengths: np.ndarray,
    whole: np.ndarray,
    long: np.ndarray,
    cut: _Cut,
    overlong: OverlongPolicy,
) -> None:
    """Fill in what was kept, cut and dropped."""
    document, start, length, cut_labels = cut
    survivors, kept = np.unique(document), np.zeros(len(lengths), dtype=np.int64)
    owned = length - (start > 0) if overlong == "split" else length  # the token where two windows meet belongs to the first
    np.add.at(kept, document, owned)
    lost = np.setdiff1d(long, survivors, assume_unique=True)
    counts.drop(OVERLONG if overlong == "drop" else UNSUPERVISED, len(lost), int(lengths[lost].sum()))
    counts.samples = len(whole) + len(survivors)
    counts.pieces = len(whole) + len(document)
    counts.kept_tokens = int(lengths[whole].sum()) + int(owned.sum())
    counts.positions = int(lengths[whole].sum()) - len(whole) + int(length.sum()) - len(length)
    counts.supervised = int(labels[whole].sum()) + int(cut_labels.sum())
    counts.shortened = int((kept[survivors] < lengths[survivors]).sum())
    counts.cut_tokens = int((lengths[survivors] - kept[survivors]).sum())
    counts.cut_supervised = int(labels.sum()) - counts.supervised
