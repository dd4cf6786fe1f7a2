"""Doing something on every rank so that a failure on one is a failure on all.

Comes in: a function to run here. Goes out: what it returned on every rank, or an error on every rank that names the rank
where it happened, so that nobody waits for a rank that gave up. Works in a single process without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from megawrap.errors import EXIT_CORRUPT, CheckpointError, MegawrapError

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    message: str
    hint: str
    corrupt: bool
    expected: bool


class Collective:
    """The ranks of torch.distributed's default group, or this process alone when it was not started.

    Attributes:
        rank: place of this process.
        size: number of processes.
    """

    def __init__(self) -> None:
        module = sys.modules.get("torch.distributed")  # not imported: certainly not started
        started = module is not None and module.is_available() and module.is_initialized()
        self._dist: Any = module if started else None
        self.rank: int = self._dist.get_rank() if self._dist else 0
        self.size: int = self._dist.get_world_size() if self._dist else 1

    def gather(self, action: Callable[[], T], *, everywhere: bool = True) -> list[T]:
        """Run `action` on every rank and collect what it returns.

        Args:
            action: runs here; all ranks have to call `gather` with theirs.
            everywhere: give the results to every rank; else to rank 0, and an empty list to the others.

        Returns:
            Results in rank order.

        Raises:
            MegawrapError: the action raised one here, or on another rank (which is then named).
            RuntimeError: another rank failed in an unexpected way; on that rank its own exception is raised.
        """
        if self._dist is None:
            return [action()]
        result: T | None = None
        failure: _Failure | None = None
        raised: Exception | None = None
        try:
            result = action()
        except Exception as problem:
            raised, failure = problem, _describe(problem)
        failures: list[Any] = [None] * self.size
        self._dist.all_gather_object(failures, failure)
        if raised is not None:
            raise raised
        for rank, other in enumerate(failures):
            if other is not None:
                if not other.expected:
                    raise RuntimeError(f"rank {rank} failed: {other.message}")
                raise CheckpointError(f"rank {rank}: {other.message}", hint=other.hint, corrupt=other.corrupt)
        results: list[Any] = [None] * self.size
        if everywhere:
            self._dist.all_gather_object(results, result)
            return results
        self._dist.gather_object(result, results if self.rank == 0 else None, dst=0)
        return results if self.rank == 0 else []

    def first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone and give its result to every rank.

        Raises:
            As `gather`.
        """
        return self.gather(action if self.rank == 0 else _nothing)[0]  # type: ignore[arg-type, return-value]


def _nothing() -> None:
    return None


def _describe(problem: Exception) -> _Failure:
    if isinstance(problem, MegawrapError):
        return _Failure(problem.message, problem.hint, problem.exit_code == EXIT_CORRUPT, True)
    return _Failure(f"{type(problem).__name__}: {problem}", "", False, False)
