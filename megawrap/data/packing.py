"""Packing: whole samples into rows of `seq_length` positions, with hardly a position left over.

In: sizes of segments. Out: for every row the segments it holds. Best-fit-decreasing over a histogram: all segments of
one size and all rows with the same room left are moved at once, so the work in Python grows with the number of
different sizes, not with the number of segments, and the number of rows is exactly that of the textbook algorithm.
Segments of one size may trade places between rows from epoch to epoch (`Exchange`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megawrap.config import PackingMode
from megawrap.data.samples import Counts, Pieces
from megawrap.data.shuffle import make_key, mixed, shuffled_order

Progress = Callable[[float], None]
"""Is told the share of the work that is done."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Rows of segments, and the windows of documents that fill them.

    Attributes:
        row_starts: int64 [rows + 1], first segment of each row, then the number of segments.
        windows: int32 or int64 [segments], the window that fills each segment, before any exchange.
        document: int32 or int64 [segments], by window: document of the dataset. With best_fit windows stand in order of
            falling place.
        start: int32 [segments], by window: its first token in the document.
        length: int32 [segments], by window: its tokens; they fill one position fewer.
        counts: the account of the range the segments come from.
        mode: best_fit and none: a window is a segment of its own; concat: the windows of a row are one segment.
        seq_length: positions of a row; of the longest when mode is none.
        reserve: positions a segment is given beyond those it fills, where the row allows it.
        multiple: segments are given a multiple of this.
    """

    row_starts: np.ndarray
    windows: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    counts: Counts
    mode: PackingMode = "best_fit"
    seq_length: int
    reserve: int = 0
    multiple: int = 1

    @property
    def num_rows(self) -> int:
        """Rows, each of `seq_length` positions unless mode is none."""
        return len(self.row_starts) - 1

    @property
    def plain(self) -> bool:
        """Every segment is given exactly the positions it fills."""
        return self.mode == "concat" or (self.reserve == 0 and self.multiple == 1)

    def places(self, length: np.ndarray) -> np.ndarray:
        """Positions that windows of `length` tokens are given in a row; int64 [n]."""
        return places(length, seq_length=self.seq_length, reserve=self.reserve, multiple=self.multiple)


def places(length: np.ndarray, *, seq_length: int, reserve: int = 0, multiple: int = 1) -> np.ndarray:
    """Positions that windows of `length` tokens are given: those they fill and the reserve, as a multiple, at most a row.

    Args:
        length: integer [n], tokens, at most seq_length + 1.
        seq_length: positions of a row, a multiple of `multiple`.
        reserve: positions kept free at the end of a segment.
        multiple: what the result is rounded up to.

    Returns:
        int64 [n].
    """
    wanted = length.astype(np.int64) + (reserve + multiple - 2)
    return np.minimum(wanted // multiple * multiple, seq_length)


def pack(
    pieces: Pieces, seq_length: int, key: int, *, reserve: int = 0, multiple: int = 1, progress: Progress | None = None
) -> Packing:  # fmt: skip
    """Pack pieces into rows, the rows in an order that says nothing about the length of their samples.

    Args:
        pieces: what is packed.
        seq_length: positions of a row.
        key: of the shuffles.
        reserve: see `Packing`.
        multiple: see `Packing`.
        progress: is told how far it is.
    """
    sizes = places(pieces.length, seq_length=seq_length, reserve=reserve, multiple=multiple)
    row_starts, slots, by_size = _bins_of_sorted(sizes, seq_length, key, progress)
    return _packing(pieces, by_size, row_starts, slots, seq_length=seq_length, reserve=reserve, multiple=multiple)


def one_a_row(pieces: Pieces, seq_length: int, key: int, *, reserve: int = 0, multiple: int = 1) -> Packing:
    """Every piece in a row of its own, in a shuffled order; arguments as for `pack`."""
    number = len(pieces.length)
    in_order = np.arange(number + 1, dtype=np.int64)
    order = shuffled_order(np.zeros(number, dtype=np.int64), 0, key) if number else in_order[:0]
    return _packing(pieces, in_order[:-1], in_order, order, seq_length=seq_length, reserve=reserve, multiple=multiple, mode="none")


def _packing(
    pieces: Pieces, by_size: np.ndarray, row_starts: np.ndarray, slots: np.ndarray, *, seq_length: int, reserve: int, multiple: int,
    mode: PackingMode = "best_fit",
) -> Packing:  # fmt: skip
    small = np.int32 if max(int(pieces.document.max(initial=0)), len(slots)) < 2**31 else np.int64
    return Packing(
        row_starts=row_starts,
        windows=slots.astype(small),
        document=pieces.document.astype(small)[by_size],
        start=pieces.start[by_size],
        length=pieces.length[by_size],
        counts=pieces.counts,
        mode=mode,
        seq_length=seq_length,
        reserve=reserve,
        multiple=multiple,
    )


class Exchange:
    """Which window fills a segment in an epoch: windows of equal place trade places, so that no two epochs have the same rows.

    The windows of one place were shuffled when they were packed. In epoch e > 0 window i of n goes to a x i + b mod n, with a
    prime to n, and then a keyed half of them to c - i mod n, twice (a round of Hoang, Morris and Rogaway's swap-or-not
    shuffle), which leaves nothing of the regular steps. Epoch 0 is the packing as it is. A handful of products a row and a
    table an epoch: a row can be read in any epoch without those before it.

    Args:
        packing: of mode best_fit.
        seed: of the exchange.
        fingerprint: of the data.
    """

    ROUNDS = 2

    def __init__(self, packing: Packing, seed: int, fingerprint: str) -> None:
        self._key = (seed, fingerprint)
        self._number = np.bincount(packing.places(packing.length), minlength=packing.seq_length + 1)  # windows by place
        self._first = np.cumsum(self._number[::-1])[::-1] - self._number  # larger places stand before smaller ones
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, windows: np.ndarray, places: np.ndarray, epoch: int) -> np.ndarray:
        """The windows that take the places of `windows` in an epoch; int64 [k].

        Args:
            windows: integer [k].
            places: int64 [k], their places.
            epoch: 0 or more.
        """
        if epoch == 0:
            return windows.astype(np.int64)
        table, multipliers = self._table(epoch)
        first, number = self._first[places], self._number[places]
        factor, shift, *mirrors = table[:, places]
        index = ((windows - first) * factor + shift) % number
        for mirror, multiplier in zip(mirrors, multipliers, strict=True):
            other = (mirror - index) % number
            swap = np.maximum(index, other).astype(np.uint64) * multiplier >> np.uint64(63)
            index = np.where(swap, other, index)
        return first + index

    def _table(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """a, b and each round's c for every place, int64 [2 + ROUNDS, places]; a multiplier for the halves of each round, uint64."""
        found = self._tables.get(epoch)
        if found is None:
            key, number = make_key("exchange", *self._key, epoch), np.maximum(self._number, 1)
            counters = np.arange(1, 1 + (2 + self.ROUNDS) * len(number)).reshape(-1, len(number))
            table = (mixed(key, counters) >> np.uint64(1)).astype(np.int64) % number
            while (common := np.gcd(table[0], number) > 1).any():
                table[0, common] = (table[0, common] + 1) % number[common]
            found = table, mixed(key + 1, np.arange(1, 1 + self.ROUNDS)) | np.uint64(1)
            self._tables = {**dict(list(self._tables.items())[-3:]), epoch: found}  # replaced whole: another thread may read it
        return found


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
    bin_starts, slots, by_size = _bins_of_sorted(sizes, capacity, key)
    return bin_starts, by_size[slots]


def _bins_of_sorted(
    sizes: np.ndarray, capacity: int, key: int, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bin_starts int64 [bins + 1], numbers in order of size of the items of every bin int64 [n], and that order int64 [n]."""
    num_items = len(sizes)
    if num_items == 0:
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if sizes.min() < 1 or sizes.max() > capacity:
        raise ValueError(f"sizes from {sizes.min()} to {sizes.max()}, allowed are 1 to {capacity}")
    by_size = shuffled_order(capacity - sizes, capacity, key)  # largest first
    bin_of, slot_of, filled = _Bins(num_items, capacity).fill(np.bincount(sizes, minlength=capacity + 1), progress)
    shuffled = shuffled_order(np.zeros(len(filled), dtype=np.int64), 0, key + 1)
    bin_starts = np.zeros(len(filled) + 1, dtype=np.int64)
    np.cumsum(filled[shuffled], out=bin_starts[1:])
    first_slot = np.empty(len(filled), dtype=np.int64)
    first_slot[shuffled] = bin_starts[:-1]
    target = first_slot[bin_of]
    target += slot_of
    slots = np.empty(num_items, dtype=np.int64)
    slots[target] = np.arange(num_items)
    return bin_starts, slots, by_size


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

    def fill(self, histogram: np.ndarray, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Place all items; returns bin of each item, its slot in the bin, and items per bin."""
        for size in np.flatnonzero(histogram)[::-1].tolist():
            if progress is not None:
                progress(self.placed / len(self.bin_of))
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
