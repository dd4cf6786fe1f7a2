"""Micro-batches of one rank: a global batch cut the same way whatever the number of ranks.

In: an order of rows and this rank's place. Out: for any number of consumed rows, this rank's micro-batches of the
global batch that starts there. Row r of a global batch belongs to micro-batch m and rank d with
r = (m x dp_size + d) x micro_batch_size + j, so the batch as a whole depends on neither. Nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from megawrap.data.blend import Once
from megawrap.data.rows import Row, lengthened
from megawrap.errors import ConfigError

MicroBatch = dict[str, Any]
_JOINED = ("tokens", "labels", "weights", "position_ids", "segment_lengths", "sample_ids")


class RowOrder(Protocol):
    """What a loader reads from: `Blend` or `Once`."""

    def rows(self, numbers: np.ndarray) -> list[Row]:
        """Rows of global row numbers."""

    def describe(self, numbers: np.ndarray) -> list[str]:
        """Where global row numbers come from."""


class UnequalRows(RowOrder, Protocol):
    """What a loader with `RowPadding` reads from."""

    def row_lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Positions of global rows; int64 [n]."""


@dataclass(frozen=True, kw_only=True)
class RowPadding:
    """How rows of unequal length are made equal: packing none."""

    multiple: int = 1
    """Rows are padded to a multiple of this: kernels, or sequence parallelism, which cuts a micro-batch over tp ranks."""
    whole_batch: bool = False
    """All micro-batches of a global batch get one length, not each the length of its longest row: pipeline stages send
    each other messages of one shape."""


def collate(rows: list[Row], row_length: int | None = None) -> MicroBatch:
    """B rows of S positions laid end to end, shorter ones padded to `row_length`.

    Returns:
        tokens, labels, position_ids int64 [B*S], weights float32 [B*S], segment_lengths int32 [sum of k], sample_ids
        int64 [real samples], num_rows B, num_tokens (positions that are not padding), squared_lengths (sum of squares of the
        real segments' lengths, what attention costs). With fill-in-the-middle also fim: samples transformed, kept and
        outgrown, int64 [3].
    """
    real = [row.get("sample_lengths", row["segment_lengths"][: len(row["sample_ids"])]) for row in rows]
    if row_length is not None:
        rows = [lengthened(row, row_length) for row in rows]
    batch: MicroBatch = {name: np.concatenate([row[name] for row in rows]) for name in _JOINED}
    batch["num_rows"] = len(rows)
    lengths = np.concatenate(real).astype(np.int64)
    batch["num_tokens"], batch["squared_lengths"] = int(lengths.sum()), int((lengths * lengths).sum())
    if any("fim" in row for row in rows):
        batch["fim"] = np.sum([row["fim"] for row in rows if "fim" in row], axis=0)
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
        padding: for rows of unequal length; the length of a micro-batch is that of its longest row on any rank, so that all
            ranks agree on it without a word. None: rows are of one length.

    Raises:
        ConfigError: the batch sizes do not divide.
    """

    def __init__(
        self, order: RowOrder, *, dp_rank: int, dp_size: int, micro_batch_size: int, global_batch_size: int,
        prefetch: bool = False, padding: RowPadding | None = None,
    ) -> None:  # fmt: skip
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
        self._padding = padding
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
        rows, size = self.order.rows(consumed_rows + self._mine), self.micro_batch_size
        lengths = self._row_lengths(consumed_rows)
        return [collate(rows[m * size : (m + 1) * size], length) for m, length in enumerate(lengths)]

    def _row_lengths(self, consumed_rows: int) -> list[int | None]:
        """Positions of a row in each micro-batch of a global batch, the same on all ranks; None where rows are of one length."""
        if self._padding is None:
            return [None] * self.num_micro_batches
        numbers = consumed_rows + np.arange(self.global_batch_size)
        longest = cast(UnequalRows, self.order).row_lengths(numbers).reshape(self.num_micro_batches, -1).max(axis=1)
        if self._padding.whole_batch:
            longest[:] = longest.max()
        return (-(-longest // self._padding.multiple) * self._padding.multiple).tolist()


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
