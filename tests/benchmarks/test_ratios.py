"""Intervals against enumeration of every sign pattern, and what is called a pass."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.ratios import CONFIDENCE, ratio


@pytest.mark.parametrize("n", [5, 6, 7, 9, 12])
def test_coverage_equals_enumeration(n: int) -> None:
    """Each of n ratios lies above the true median or not; the interval misses it when too few do or too many."""
    values = [float(i + 1) for i in range(n)]
    found = ratio(values, [1.0] * n)
    rank = int(found.low)
    assert found.high == n + 1 - rank
    inside = sum(rank <= sum(signs) <= n - rank for signs in itertools.product((0, 1), repeat=n))
    assert found.coverage == pytest.approx(inside / 2**n)
    narrower = sum(rank + 1 <= sum(signs) <= n - rank - 1 for signs in itertools.product((0, 1), repeat=n)) / 2**n
    assert found.coverage >= CONFIDENCE > narrower


def test_median_is_of_the_pairs_and_not_of_the_sides() -> None:
    """A machine that slows down by half in the middle changes both sides of a pair, and no ratio."""
    theirs = [10.0, 10.0, 5.0, 5.0, 4.0, 10.0]
    found = ratio([2 * value for value in theirs], theirs)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    assert ratio([1, 2, 3, 4], [1, 1, 1, 1]).median == 2.5


@pytest.mark.parametrize(
    ("values", "bar", "at_most", "verdict"),
    [
        ([1.9, 2.0, 2.1, 2.0, 2.2], 1.8, False, "pass"),
        ([1.9, 2.0, 2.1, 2.0, 2.2], 2.3, False, "fail"),
        ([1.9, 2.0, 2.1, 2.0, 2.2], 2.05, False, "unresolved"),
        ([0.7, 0.8, 0.75, 0.7, 0.7], 0.9, True, "pass"),
        ([0.7, 0.95, 0.75, 0.7, 0.7], 0.9, True, "unresolved"),
        ([0.95, 0.95, 0.95, 0.95, 0.95], 0.9, True, "fail"),
        ([0.9, 0.9, 0.9, 0.9, 0.9], 0.9, True, "pass"),
        ([1.0, 1.0, 1.0, 1.0, 1.0], None, False, ""),
    ],
)
def test_a_bar_inside_the_interval_is_unresolved(values: list[float], bar: float | None, at_most: bool, verdict: str) -> None:
    assert ratio(values, [1.0] * len(values)).verdict(bar, at_most=at_most) == verdict
