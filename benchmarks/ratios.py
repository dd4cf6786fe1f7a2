"""Ratios of interleaved pairs, their interval, and what they say about a bar.

In: pairs (ours, theirs) measured one right after the other, so that drift of a shared machine hits both. Out: the median
ratio, a distribution-free interval of it, and pass, fail or unresolved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.9


@dataclass(frozen=True)
class Ratio:
    """Median of pairwise ratios with an interval that covers the true median with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float
    pairs: int

    def verdict(self, bar: float | None, *, at_most: bool = False) -> str:
        """pass or fail when the whole interval lies on one side of the bar, else unresolved."""
        if bar is None:
            return ""
        below, above = self.high < bar, self.low > bar
        if self.low == self.high == bar:
            return "pass"
        if not below and not above:
            return "unresolved"
        return "pass" if below == at_most else "fail"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of pairs in the order they were measured.

    The interval is between order statistics k and n + 1 - k, k the largest with a coverage of at least CONFIDENCE:
    1 - 2 P(Binomial(n, 1/2) < k) (the sign test; David and Nagaraja 2003, 7.1). It assumes nothing about the noise.
    """
    values = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    n = len(values)
    rank, coverage = 1, _coverage(n, 1)
    while rank < n - rank and _coverage(n, rank + 1) >= CONFIDENCE:
        rank, coverage = rank + 1, _coverage(n, rank + 1)
    middle = values[n // 2] if n % 2 else (values[n // 2 - 1] + values[n // 2]) / 2
    return Ratio(middle, values[rank - 1], values[n - rank], coverage, n)


def _coverage(n: int, rank: int) -> float:
    return 1 - 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n
