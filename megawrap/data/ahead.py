"""An iterator that works ahead in a thread, so that parsing and tokenizing share the cores.

In: an iterator. Out: the same items in the same order; at most `depth` of them wait, which bounds memory.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """Yield `items`, made in a thread of their own; what they raise is raised here, after the items before it.

    When the consumer stops early, the thread ends at its next item.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: object) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((_END, None))
        except BaseException as error:  # whatever it is, the consumer must see it instead of waiting for ever
            put((_END, error))

    worker = threading.Thread(target=work, daemon=True, name="read-ahead")
    worker.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        worker.join()
