"""A pool of real ranks over gloo, started once and kept for the whole test session.

`run(world, function, *args)` calls `function(*args)` on ranks 0..world-1, each in a process of its own with a fresh
default process group, and returns their results in rank order. Starting a process and importing torch and
megatron-core costs seconds, a task in a running one costs milliseconds. Functions must live at the top level of a
module; a failure on any rank raises `RankError` with that rank's traceback and the pool starts anew.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240


class RankError(AssertionError):
    """The first failing rank and its traceback."""


def _serve(rank: int, connection: Any) -> None:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    import torch
    import torch.distributed as dist

    from megawrap import device

    torch.set_num_threads(1)
    device.adapt()
    while (task := connection.recv()) is not None:
        world, store_path, function, args = task
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
            dist.init_process_group("gloo", store=dist.FileStore(store_path, world), rank=rank, world_size=world)
            result = (True, function(*args))
        except BaseException:
            result = (False, traceback.format_exc())
        finally:
            from megawrap import parallel

            parallel.stop()
        connection.send(result)


class _Pool:
    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[tuple[Any, Any]] = []
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.tasks = 0

    def grow(self, world: int) -> None:
        while len(self.workers) < world:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(len(self.workers), there), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def stop(self) -> None:
        for process, _ in self.workers:
            process.kill()
        for process, _ in self.workers:
            process.join()
        self.workers = []


_POOL = _Pool()
atexit.register(_POOL.stop)


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of `function(*args)` on each of `world` ranks.

    Raises:
        RankError: a rank raised or did not answer in time; every rank is then replaced.
    """
    _POOL.grow(world)
    _POOL.tasks += 1
    store = str(Path(_POOL.folder.name) / f"store-{_POOL.tasks}")
    for _, connection in _POOL.workers[:world]:
        connection.send((world, store, function, args))
    results, waiting = {}, {connection: rank for rank, (_, connection) in enumerate(_POOL.workers[:world])}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=TIMEOUT_SECONDS)
        if not ready:
            _POOL.stop()
            raise RankError(f"ranks {sorted(waiting.values())} did not answer within {TIMEOUT_SECONDS} s")
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[index]
            try:
                good, value = connection.recv()  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                good, value = False, "the process died"
            if not good:
                _POOL.stop()
                raise RankError(f"rank {rank} of {world}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(world)]
