"""Packing concat: the documents of a range as one stream of tokens, cut into rows.

In: an indexed dataset, a range of its documents and a row length. Out: a `Packing` whose rows are one segment each, made
of windows of documents. Row r holds the tokens r x S to (r + 1) x S of the stream, both included: the last token of a row
is the first of the next, so every pair of a token and its next is in exactly one row, and none is lost at the end.
"""

from __future__ import annotations

import numpy as np

from megawrap.data.format import IndexedDataset
from megawrap.data.packing import Packing
from megawrap.data.samples import UNSUPERVISED, Counts, LossOn, Supervision
from megawrap.data.shuffle import shuffled_order

EMPTY = "no token"


def cut_stream(dataset: IndexedDataset, first: int, last: int, *, seq_length: int, loss_on: LossOn, key: int) -> Packing:
    """Rows of seq_length positions of the documents first..last-1, one after another in a shuffled order.

    A document may see those before it in its row; the end token marks the border. The first token of a document is a
    label too, predicted from the end of the one before; only the first of the stream is none.

    Args:
        dataset: what is read.
        first: first document.
        last: the one after the last.
        seq_length: positions of a row, S.
        loss_on: what is supervised, see `Supervision`.
        key: of the order of documents.

    Raises:
        DataError: `loss_on` outputs of a dataset without modes.
    """
    supervision = Supervision(dataset, first, last, loss_on)
    bounds = supervision.token_bounds
    lengths = np.diff(bounds)
    counts = Counts(documents=last - first, tokens=int(lengths.sum()))
    held = np.flatnonzero(lengths)
    labels = supervision.before(bounds[1:]) - supervision.before(bounds[:-1])
    order = held[shuffled_order(np.zeros(len(held), dtype=np.int64), 0, key)] if len(held) else held
    supervised = int(labels.sum())
    if len(order):
        begin = bounds[order[:1]]
        supervised -= int((supervision.before(begin + 1) - supervision.before(begin))[0])
    if supervised == 0:
        counts.drop(UNSUPERVISED, len(held), counts.tokens)
        order = order[:0]
    counts.drop(EMPTY, counts.documents - len(held), 0)
    row_starts, document, start, length = _cut(lengths[order], seq_length)
    counts.samples, counts.pieces = len(order), len(document)
    if len(order):
        counts.kept_tokens, counts.positions, counts.supervised = counts.tokens, counts.tokens - 1, supervised
    small = np.int32 if max(last, len(document)) < 2**31 else np.int64
    return Packing(
        row_starts=row_starts,
        windows=np.arange(len(document), dtype=small),
        document=(order[document] + first).astype(small),
        start=start.astype(np.int32),
        length=length.astype(np.int32),
        counts=counts,
        mode="concat",
        seq_length=seq_length,
    )


def _cut(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First window of each row and the end; and of each window its document (by order), first token and tokens.

    Args:
        lengths: int64 [documents], above 0, in the order of the stream.
        seq_length: positions of a row.
    """
    borders = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=borders[1:])
    total = int(borders[-1])
    begins = np.arange(0, max(total - 1, 0), seq_length, dtype=np.int64)
    ends = np.minimum(begins + seq_length + 1, total)
    first = np.searchsorted(borders, begins, side="right") - 1
    number = np.searchsorted(borders, ends - 1, side="right") - first
    row_starts = np.zeros(len(begins) + 1, dtype=np.int64)
    np.cumsum(number, out=row_starts[1:])
    document = np.repeat(first - row_starts[:-1], number) + np.arange(row_starts[-1])
    start = np.maximum(np.repeat(begins, number) - borders[document], 0)
    length = np.minimum(np.repeat(ends, number), borders[document + 1]) - borders[document] - start
    return row_starts, document, start, length
