"""Working ahead in a thread: the same items, the same error at the same place, and no thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from megawrap.data.ahead import ahead


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("depth", [1, 3])
def test_same_items_in_order(depth: int) -> None:
    assert list(ahead(range(100), depth)) == list(range(100))
    assert list(ahead([], depth)) == []
    assert list(ahead([None, 0, ()], depth)) == [None, 0, ()]
    assert "read-ahead" not in names()


def test_an_error_comes_after_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("three")

    seen = []
    with pytest.raises(KeyError, match="three"):
        for item in ahead(failing()):
            seen.append(item)
    assert seen == [1, 2]
    assert "read-ahead" not in names()


def test_a_consumer_that_stops_early_ends_the_thread_and_bounds_what_waits() -> None:
    made = []

    def endless() -> Iterator[int]:
        number = 0
        while True:
            made.append(number)
            yield number
            number += 1

    items = ahead(endless())
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    items.close()  # type: ignore[attr-defined]
    assert "read-ahead" not in names()
    assert len(made) <= 5 + 1 + 1 + 1  # taken, waiting, held by the thread, being made
