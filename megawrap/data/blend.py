"""The order of rows: which row of which source is global row number n.

In: rows of several sources and their weights. Out: `Blend` for training, endless, every prefix of which holds each
source's share to within one row, and `Once` for evaluation, every row exactly one time. Both are functions of n alone:
how long a run is, how many ranks it has and where it was resumed cannot change them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megawrap.data.rows import Row, RowDataset, empty_row
from megawrap.data.shuffle import make_key, permute

MAX_CYCLE = 1 << 16


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights as integers without a common factor, their sum at most 65,536.

    Decimals as people write them come out exact (0.3 and 1.0 become 3 and 10). Others are rounded to the nearest
    multiple of 1/65,536 by largest remainder, no source below one multiple.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) <= MAX_CYCLE:
        return whole
    shares = [Fraction(weight * MAX_CYCLE, sum(whole)) for weight in whole]
    rounded = [max(1, math.floor(share)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (rounded[k] - shares[k], k))
    for k in by_remainder[: max(0, MAX_CYCLE - sum(rounded))]:
        rounded[k] += 1
    return rounded


def fair_cycle(weights: Sequence[int]) -> np.ndarray:
    """A cycle of sum(weights) turns in which source k has weights[k], spread so that no prefix is a whole turn off.

    Turn by turn, of the sources whose share so far allows another turn, the one that would first fall too far behind
    (Tijdeman 1980, "The chairman assignment problem"): the deviation is at most 1 - 1 / (2 K - 2) for K sources.

    Returns:
        uint16 [sum(weights)], the source of each turn.
    """
    num_sources, period = len(weights), sum(weights)
    cycle = np.zeros(period, dtype=np.uint16)
    if num_sources == 1:
        return cycle
    slack = 2 * num_sources - 2
    # In units of 1 / (slack x weight) turns: turn number `taken` of a source may come when its share exceeds what it has
    # by 1 / slack, and must come before it does by 1 - 1 / slack.
    taken = [0] * num_sources
    waiting = [(_release(0, weight, period, slack), k) for k, weight in enumerate(weights)]
    heapq.heapify(waiting)
    ready: list[tuple[Fraction, int]] = []
    for turn in range(period):
        while waiting and waiting[0][0] <= turn + 1:
            _, k = heapq.heappop(waiting)
            heapq.heappush(ready, (Fraction((taken[k] * slack + slack - 1) * period, weights[k]), k))
        _, k = heapq.heappop(ready)
        cycle[turn] = k
        taken[k] += 1
        heapq.heappush(waiting, (_release(taken[k], weights[k], period, slack), k))
    return cycle


def _release(taken: int, weight: int, period: int, slack: int) -> int:
    """First turn (from 1) at which weight / period x turn - taken >= 1 / slack."""
    return -(-(taken * slack + 1) * period // (weight * slack))


class Blend:
    """Endless training rows of several sources, drawn in the ratio of their weights.

    The j-th row drawn from a source of R rows is row j mod R of its epoch j // R; the order of an epoch, and which segments
    have traded places in it, depend only on seed, epoch and the source's fingerprint.

    Args:
        sources: rows of each source, none empty, all of one seq_length.
        weights: probabilities of a row, any positive scale.
        seed: of the orders.
    """

    def __init__(self, sources: Sequence[RowDataset], weights: Sequence[float], seed: int) -> None:
        if not sources or len(sources) != len(weights) or any(len(source) == 0 for source in sources):
            raise ValueError("a blend needs sources with rows, and a weight for each")
        self.sources = list(sources)
        self.seed = seed
        self.weights = integer_weights(weights)
        self.seq_length = sources[0].seq_length
        self._cycle = fair_cycle(self.weights)
        self._rank = _rank_within(self._cycle)

    @property
    def shares(self) -> list[float]:
        """Share of rows of each source, as drawn."""
        return [weight / sum(self.weights) for weight in self.weights]

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, epoch and row of global row numbers.

        Args:
            numbers: integer [n] of 0 or more.

        Returns:
            Source index, epoch of that source, and index into its rows; int64 [n] each.
        """
        numbers = np.asarray(numbers, dtype=np.int64)
        cycles, turns = np.divmod(numbers, len(self._cycle))
        source = self._cycle[turns].astype(np.int64)
        drawn = cycles * np.array(self.weights)[source] + self._rank[turns]
        epoch, row = np.divmod(drawn, np.array([len(rows) for rows in self.sources])[source])
        for k, e in np.unique(np.stack([source, epoch], axis=1), axis=0).tolist():
            mine = (source == k) & (epoch == e)
            rows = self.sources[k]
            key = make_key("epoch", self.seed, e, rows.fingerprint)
            row[mine] = permute(row[mine], len(rows), key)
        return source, epoch, row

    def rows(self, numbers: np.ndarray) -> list[Row]:
        """The rows of global row numbers."""
        return [self.sources[k].row(i, e) for k, e, i in zip(*(found.tolist() for found in self.locate(numbers)), strict=True)]

    def row_lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Positions of global rows; int64 [n]."""
        source, _, row = self.locate(numbers)
        return _row_lengths(self.sources, source, row)

    def describe(self, numbers: np.ndarray) -> list[str]:
        """For each global row its dataset and documents, for messages about a batch."""
        found = zip(*(found.tolist() for found in self.locate(numbers)), strict=True)
        return [_describe(self.sources[k], i, f"epoch {e}", e) for k, e, i in found]


class Once:
    """Every row of one or more sources one time, sources spread evenly, then padding; for evaluation.

    Weights play no part: each row counts once. The order is the same in every evaluation of every run.

    Args:
        sources: rows of each source, all of one seq_length.
    """

    def __init__(self, sources: Sequence[RowDataset]) -> None:
        self.sources = list(sources)
        self.seq_length = sources[0].seq_length
        self._empty = 1 if sources[0].packing.mode == "none" else self.seq_length
        counts = [len(source) for source in self.sources]
        source = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
        when = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        order = np.lexsort((source, when))
        self._source = source[order]
        self._row = _rank_within(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and row of global row numbers below len(self); int64 [n] each."""
        return self._source[numbers].astype(np.int64), self._row[numbers]

    def rows(self, numbers: np.ndarray) -> list[Row]:
        """The rows of global row numbers; past the end, rows of padding."""
        numbers = np.asarray(numbers)
        source, row = self.locate(numbers[numbers < len(self)])
        inside = iter([self.sources[k].row(i) for k, i in zip(source.tolist(), row.tolist(), strict=True)])
        return [next(inside) if number < len(self) else empty_row(self._empty) for number in numbers.tolist()]

    def row_lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Positions of global rows; int64 [n]. Rows past the end are as short as rows can be."""
        numbers = np.asarray(numbers)
        lengths = np.full(len(numbers), self._empty, dtype=np.int64)
        inside = numbers < len(self)
        lengths[inside] = _row_lengths(self.sources, *self.locate(numbers[inside]))
        return lengths

    def describe(self, numbers: np.ndarray) -> list[str]:
        """For each global row its dataset and documents, for messages about a batch."""
        numbers = np.asarray(numbers)
        source, row = self.locate(numbers[numbers < len(self)])
        return [_describe(self.sources[k], i, f"row {i}") for k, i in zip(source.tolist(), row.tolist(), strict=True)]


def _rank_within(source: np.ndarray) -> np.ndarray:
    """For each turn, how many turns its source had before; int64 [n]."""
    order = np.argsort(source, kind="stable")
    counts = np.bincount(source)
    rank = np.empty(len(source), dtype=np.int64)
    rank[order] = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def _row_lengths(sources: Sequence[RowDataset], source: np.ndarray, row: np.ndarray) -> np.ndarray:
    lengths = np.empty(len(row), dtype=np.int64)
    for k in np.unique(source).tolist():
        lengths[source == k] = sources[k].row_lengths(row[source == k])
    return lengths


def _describe(rows: RowDataset, index: int, what: str, epoch: int = 0) -> str:
    return f"{rows.dataset.prefix} {what}: documents {', '.join(map(str, rows.sample_ids(index, epoch).tolist()))}"
