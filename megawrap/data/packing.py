"""Packing: whole samples into rows of `seq_length` positions, with hardly a position left over.

In: sizes of segments. Out: for every row the segments it holds. Best-fit-decreasing over a histogram: all segments of
one size and all rows with the same room left are moved at once, so the work in Python grows with the number of
different sizes, not with the number of segments, and the number of rows is exactly that of the textbook algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megawrap.data.samples import Counts, Pieces
from megawrap.data.shuffle import shuffled_order


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Rows of segments.

    Attributes:
        row_starts: int64 [rows + 1], first segment of each row, then the number of segments.
        document: int32 or int64 [segments], document of the dataset.
        start: int32 [segments], first token of the segment's window in the document.
        length: int32 [segments], tokens of the window; it fills one position fewer.
        counts: the account of the range the segments come from.
    """

    row_starts: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    counts: Counts

    @property
    def num_rows(self) -> int:
        """Rows, each of `seq_length` positions."""
        return len(self.row_starts) - 1


def pack(pieces: Pieces, seq_length: int, key: int) -> Packing:
    """Pack pieces into rows, the rows in an order that says nothing about the length of their samples."""
    row_starts, order = best_fit_decreasing(pieces.length - 1, seq_length, key)
    return Packing(
        row_starts=row_starts,
        document=pieces.document.astype(np.int32 if pieces.document.max(initial=0) < 2**31 else np.int64)[order],
        start=pieces.start[order],
        length=pieces.length[order],
        counts=pieces.counts,
    )


def best_fit_decreasing(sizes: np.ndarray, capacity: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign items to as few bins as best-fit-decreasing does: the largest item first, into the fullest bin with room.

    Items of equal size are shuffled, and so are the bins.

    Args:
        sizes: integer [n], each in 1..capacity.
        capacity: room of an empty bin.
        key: of the shuffles.

    Returns:
        bin_starts int64 [bins + 1] and items int64 [n]: bin b holds items[bin_starts[b] : bin_starts[b + 1]], largest first.
    """
    num_items = len(sizes)
    if num_items == 0:
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if sizes.min() < 1 or sizes.max() > capacity:
        raise ValueError(f"sizes from {sizes.min()} to {sizes.max()}, allowed are 1 to {capacity}")
    by_size = shuffled_order(capacity - sizes, capacity, key)  # largest first
    bin_of, slot_of, filled = _Bins(num_items, capacity).fill(np.bincount(sizes, minlength=capacity + 1))
    shuffled = shuffled_order(np.zeros(len(filled), dtype=np.int64), 0, key + 1)
    bin_starts = np.zeros(len(filled) + 1, dtype=np.int64)
    np.cumsum(filled[shuffled], out=bin_starts[1:])
    first_slot = np.empty(len(filled), dtype=np.int64)
    first_slot[shuffled] = bin_starts[:-1]
    target = first_slot[bin_of]
    target += slot_of
    items = np.empty(num_items, dtype=np.int64)
    items[target] = by_size
    return bin_starts, items


class _Bins:
    """Bins grouped by the room left in them, and the place of every item in order of decreasing size."""

    def __init__(self, num_items: int, capacity: int) -> None:
        self.capacity = capacity
        self.bin_of = np.empty(num_items, dtype=np.int32)
        self.slot_of = np.empty(num_items, dtype=np.int32)
        self.filled = np.zeros(num_items, dtype=np.int32)  # items in each bin; there are at most as many bins as items
        self.by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self.rooms = 0  # bit r is set when a bin has room r > 0: finds the tightest fit by two machine-word scans
        self.num_bins = 0
        self.placed = 0

    def fill(self, histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Place all items; returns bin of each item, its slot in the bin, and items per bin."""
        for size in np.flatnonzero(histogram)[::-1].tolist():
            left = int(histogram[size])
            while left and (wide := self.rooms >> size):
                room = size + (wide & -wide).bit_length() - 1
                left -= self._place(self._take(room), room, size, left)
            if left:
                per_bin = self.capacity // size
                opened = np.arange(self.num_bins, self.num_bins - (-left // per_bin), dtype=np.int32)
                self.num_bins += len(opened)
                self._place(opened, self.capacity, size, left)
        return self.bin_of, self.slot_of, self.filled[: self.num_bins]

    def _take(self, room: int) -> np.ndarray:
        groups, self.by_room[room] = self.by_room[room], []
        self.rooms &= ~(1 << room)
        return groups[0] if len(groups) == 1 else np.concatenate(groups)

    def _put(self, bins: np.ndarray, room: int) -> None:
        if len(bins) and room:
            self.by_room[room].append(bins)
            self.rooms |= 1 << room

    def _place(self, bins: np.ndarray, room: int, size: int, left: int) -> int:
        """Put up to `left` items into bins with equal room, each bin as many as fit, the last one what is left."""
        per_bin = room // size
        full = min(len(bins), left // per_bin)
        self._assign(bins[:full], per_bin)
        self._put(bins[:full], room - per_bin * size)
        placed, rest = full * per_bin, 0
        if full < len(bins):
            rest = left - placed
            if rest:
                self._assign(bins[full : full + 1], rest)
                self._put(bins[full : full + 1], room - rest * size)
                full += 1
            self._put(bins[full:], room)
        return placed + rest

    def _assign(self, bins: np.ndarray, each: int) -> None:
        """The next len(bins) x each items go to these bins."""
        span = slice(self.placed, self.placed + len(bins) * each)
        if each == 1:
            self.bin_of[span] = bins
            self.slot_of[span] = self.filled[bins]
        else:
            self.bin_of[span] = np.repeat(bins, each)
            self.slot_of[span] = (self.filled[bins][:, None] + np.arange(each, dtype=np.int32)).ravel()
        self.filled[bins] += each
        self.placed = span.stop
