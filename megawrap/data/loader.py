"""Micro-batches of one rank: a global batch cut the same way whatever the number of ranks.

In: an order of rows and this rank's place. Out: for any number of consumed rows, this rank's micro-batches of the
global batch that starts there. Row r of a global batch belongs to micro-batch m and rank d with
r = (m x dp_size + d) x micro_batch_size + j, so the batch as a whole depends on neither. Nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from megawrap.data.blend import Once
from megawrap.data.rows import Row
from megawrap.errors import ConfigError

MicroBatch = dict[str, Any]
_JOINED = ("tokens", "labels", "weights", "position_ids", "segment_lengths", "sample_ids")


class RowOrder(Protocol):
    """What a loader reads from: `Blend` or `Once`."""

    def rows(self, numbers: np.ndarray) -> list[Row]:
        """Rows of global row numbers."""

    def describe(self, numbers: np.ndarray) -> list[str]:
        """Where global row numbers come from."""


def collate(rows: list[Row]) -> MicroBatch:
    """B rows of S positions laid end to end.

    Returns:
        tokens, labels, position_ids int64 [B*S], weights float32 [B*S], segment_lengths int32 [sum of k], sample_ids
        int64 [real samples], num_rows B, num_tokens (positions that are not padding), squared_lengths (sum of squares of the
        real segments' lengths, what attention costs).
    """
    batch: MicroBatch = {name: np.concatenate([row[name] for row in rows]) for name in _JOINED}
    batch["num_rows"] = len(rows)
    real = np.concatenate([row["segment_lengths"][: len(row["sample_ids"])] for row in rows]).astype(np.int64)
    batch["num_tokens"], batch["squared_lengths"] = int(real.sum()), int((real * real).sum())
    return batch


class Loader:
    """This rank's micro-batches of any global batch.

    Args:
        order: which row is global row number n.
        dp_rank: data-parallel rank.
        dp_size: data-parallel ranks.
        micro_batch_size: rows of a micro-batch.
        global_batch_size: rows of a global batch, a multiple of micro_batch_size x dp_size.
        prefetch: read the next global batch in a thread while this one is computed on.

    Raises:
        ConfigError: the batch sizes do not divide.
    """

    def __init__(
        self, order: RowOrder, *, dp_rank: int, dp_size: int, micro_batch_size: int, global_batch_size: int, prefetch: bool = False
    ) -> None:
        if min(dp_size, micro_batch_size, global_batch_size) < 1 or global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of"
                f" train.micro_batch_size {micro_batch_size} x {dp_size} data-parallel ranks",
                hint=f"Choose a multiple of {micro_batch_size * dp_size}",
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} of {dp_size}")
        self.order = order
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = global_batch_size // (micro_batch_size * dp_size)
        rows = np.arange(global_batch_size).reshape(self.num_micro_batches, dp_size, micro_batch_size)
        self._mine = rows[:, dp_rank].ravel()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if prefetch else None
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def micro_batches(self, consumed_rows: int) -> list[MicroBatch]:
        """The micro-batches, in order, of the global batch that starts after `consumed_rows` rows; see `collate`."""
        if self._thread is None:
            return self._read(consumed_rows)
        at, future = self._ahead or (-1, None)
        batches = future.result() if future is not None and at == consumed_rows else self._read(consumed_rows)
        following = consumed_rows + self.global_batch_size
        self._ahead = following, self._thread.submit(self._read, following)
        return batches

    def describe(self, consumed_rows: int) -> list[str]:
        """Dataset and documents of every row of a global batch, over all ranks; for messages about that batch."""
        return self.order.describe(consumed_rows + np.arange(self.global_batch_size))

    def close(self) -> None:
        """End the thread, when there is one."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread, self._ahead = None, None

    def _read(self, consumed_rows: int) -> list[MicroBatch]:
        rows = self.order.rows(consumed_rows + self._mine)
        size = self.micro_batch_size
        return [collate(rows[first : first + size]) for first in range(0, len(rows), size)]


class EvalLoader(Loader):
    """One pass over a group, in order; every rank runs the same number of global batches, the last padded by empty rows.

    Args:
        order: the group.
        batches: stop after this many global batches; None runs the whole group.
        options: as for `Loader`.
    """

    def __init__(self, order: Once, *, batches: int | None = None, **options: Any) -> None:
        super().__init__(order, **options)
        whole = -(-len(order) // self.global_batch_size)
        self.num_batches = whole if batches is None else min(whole, batches)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for number in range(self.num_batches):
            yield self.micro_batches(number * self.global_batch_size)
