"""Packings kept on disk, so that no two ranks and no two runs pack the same data.

In: a dataset, a range and the settings of packing. Out: the `Packing`, mapped from the cache when there is an intact one
made of exactly this data with exactly these settings, else packed anew and written whole or not at all, by one process
under a lock while the others wait. A cache only saves time: one that cannot be read or written costs a sentence to the
user, never the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megawrap.config import OverlongPolicy, PackingMode
from megawrap.data.format import IndexedDataset
from megawrap.data.packing import Packing, one_a_row, pack
from megawrap.data.samples import Counts, LossOn, select
from megawrap.data.shuffle import make_key
from megawrap.data.stream import cut_stream
from megawrap.errors import MegawrapError
from megawrap.io import DirectoryLock, atomic_write, explain_write_errors, publish, read_json, sha256_file

PACKING_VERSION = 2  # raise it when the same input packs differently
_ARRAYS = ("row_starts", "windows", "document", "start", "length")
_INDEX = "index.json"
LOG_SECONDS = 5.0
WAIT_SECONDS = 600.0
"""A writer on another host cannot be asked whether it lives: after this long its packing is not waited for any longer."""


@dataclass(frozen=True, kw_only=True)
class PackingKey:
    """Everything a packing follows from; a change of any field is another packing."""

    fingerprint: str
    first: int
    last: int
    seq_length: int
    overlong: OverlongPolicy
    loss_on: LossOn
    seed: int
    packing: PackingMode = "best_fit"
    pad_to_multiple: int = 1
    reserve: int = 0
    version: int = PACKING_VERSION

    @property
    def name(self) -> str:
        """Directory of this packing: settings, then data."""
        settings = dataclasses.asdict(self) | {"fingerprint": ""}
        return f"{hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]}-{self.fingerprint[:16]}"

    @property
    def shuffle(self) -> int:
        """Key of the order of samples and rows."""
        return make_key("packing", *(str(value) for value in dataclasses.astuple(self)))


def load_or_pack(dataset: IndexedDataset, key: PackingKey, cache_dirs: Sequence[Path], *, write: bool) -> tuple[Packing, str]:
    """The packing of a key, and a sentence that says where it comes from.

    Any number of processes may call this at once: the first to get the lock of a cache directory packs, the others wait and
    map what it wrote. The lock of a process that was killed is taken over.

    Args:
        dataset: the data; its fingerprint is in the key.
        key: settings.
        cache_dirs: where to look, and where to write: the first that can be written. May be empty.
        write: False reads caches but writes and waits for nothing (dry runs).

    Raises:
        DataError: from `megawrap.data.samples.select`.
    """
    folders = [folder / f"{dataset.prefix.name}.packing" / key.name for folder in cache_dirs]
    report = _Report(f"{dataset.prefix} {key.first}:{key.last}")
    packing, reasons = _find(folders, key, dataset)
    if packing is not None:
        return packing, f"packing of {report.what} read from {reasons[0]}"
    refusals: list[str] = []
    packed: Packing | None = None
    began = time.perf_counter()
    for folder in folders if write else []:
        try:
            with _turn(folder, report):
                packing, found = _find([folder], key, dataset)  # written while this process waited
                if packing is not None:
                    return packing, f"packing of {report.what} read from {found[0]}"
                began = time.perf_counter()
                packed = packed or _pack(dataset, key, report)
                said = _said(report.what, time.perf_counter() - began, reasons, f"written to {folder}")
                _write(folder, packed, key)
                return _find([folder], key, dataset)[0] or packed, said  # mapped: what was packed need not stay in memory
        except _WriteError as problem:
            refusals.append(str(problem))
    packed = packed or _pack(dataset, key, report)
    outcome = f"not written ({'; '.join(refusals)})" if refusals else "not written"
    return packed, _said(report.what, time.perf_counter() - began, reasons, outcome)


class _WriteError(MegawrapError):
    """A cache directory that cannot be used; the next one is tried."""


def _said(what: str, seconds: float, reasons: list[str], outcome: str) -> str:
    because = f" because {' and '.join(reasons)}" if reasons else ""
    return f"packing of {what} built in {seconds:.2f} s{because}; {outcome}"


def _find(folders: Sequence[Path], key: PackingKey, dataset: IndexedDataset) -> tuple[Packing | None, list[str]]:
    """The packing and where it is, or None and why those that are there were not taken."""
    reasons = []
    for folder in folders:
        if folder.exists():
            try:
                return _read(folder, key, dataset), [str(folder)]
            except (MegawrapError, OSError, ValueError, KeyError, TypeError) as problem:
                reasons.append(f"the cache in {folder} is damaged ({problem})")
        elif any(folder.parent.glob(f"{key.name.partition('-')[0]}-*")):
            reasons.append(f"the cache in {folder.parent} is of other data under this name")
    return None, reasons


def _pack(dataset: IndexedDataset, key: PackingKey, report: _Report) -> Packing:
    """Pack, whatever is on disk."""
    report(0.0)
    if key.packing == "concat":
        return cut_stream(dataset, key.first, key.last, seq_length=key.seq_length, loss_on=key.loss_on, key=key.shuffle)
    pieces = select(
        dataset, key.first, key.last, seq_length=key.seq_length, overlong=key.overlong, loss_on=key.loss_on
    )  # fmt: skip
    if key.packing == "none":
        return one_a_row(pieces, key.seq_length, key.shuffle, reserve=key.reserve, multiple=key.pad_to_multiple)
    return pack(pieces, key.seq_length, key.shuffle, reserve=key.reserve, multiple=key.pad_to_multiple, progress=report)


class _Report:
    """Progress on standard error, once work or a wait takes longer than a few seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._began = self._last = time.monotonic()

    def __call__(self, share: float) -> None:
        self.say(f"packing {self.what}: {share:.0%}")

    def say(self, sentence: str) -> None:
        """Print the sentence unless another was printed a moment ago."""
        now = time.monotonic()
        if now - self._last >= LOG_SECONDS:
            self._last = now
            print(f"{sentence}, {now - self._began:.0f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _turn(folder: Path, report: _Report) -> Iterator[None]:
    """Hold the lock of a packing, waiting while another process that lives holds it.

    Raises:
        _WriteError: the directory cannot be written, or its holder does not end.
    """
    lock, deadline = DirectoryLock(folder.with_name(f".{folder.name}.lock")), time.monotonic() + WAIT_SECONDS
    while True:
        try:
            with explain_write_errors(folder.parent):
                folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            break
        except FileNotFoundError:  # the one before has just removed the empty directory
            continue
        except OSError as problem:
            raise _WriteError(f"cannot write {folder}: {problem.strerror}") from problem
        except MegawrapError as problem:
            held = problem.__cause__ is None or isinstance(problem.__cause__, BlockingIOError)
            if not held or time.monotonic() > deadline:
                raise _WriteError(f"{problem} (waited {WAIT_SECONDS:.0f} s)" if held else str(problem)) from problem
            report.say(f"waiting for the packing of {report.what}: {problem.message}")
            time.sleep(0.1)
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # when nothing was written


def _write(folder: Path, packing: Packing, key: PackingKey) -> None:
    """Write `folder` whole or not at all, replacing what a killed writer left; the lock is held.

    Raises:
        _WriteError: the disk refuses.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        with explain_write_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for name in _ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(packing, name), allow_pickle=False)
            index = {
                "key": dataclasses.asdict(key),
                "sha256": {name: sha256_file(temporary / f"{name}.npy") for name in _ARRAYS},
                "counts": dataclasses.asdict(packing.counts),
            }
            atomic_write(temporary / _INDEX, json.dumps(index, indent=1).encode())
            shutil.rmtree(folder, ignore_errors=True)  # only a damaged one can be there
            publish(temporary, folder)
    except (MegawrapError, OSError) as problem:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _WriteError(str(problem)) from problem
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _read(folder: Path, key: PackingKey, dataset: IndexedDataset) -> Packing:
    index: dict[str, Any] = read_json(folder / _INDEX)
    if index["key"] != dataclasses.asdict(key):
        raise ValueError("it was made with other settings")
    arrays = {}
    for name in _ARRAYS:
        path = folder / f"{name}.npy"
        if sha256_file(path) != index["sha256"][name]:
            raise ValueError(f"{path.name} changed after it was written")
        arrays[name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    packing = Packing(
        **arrays, counts=Counts(**index["counts"]), mode=key.packing, seq_length=key.seq_length, reserve=key.reserve,
        multiple=key.pad_to_multiple,
    )  # fmt: skip
    _check(packing, key, dataset)
    return packing


def _check(packing: Packing, key: PackingKey, dataset: IndexedDataset) -> None:
    """Every window lies inside its document, whatever happened to .idx since."""
    starts = np.append(dataset.pointers, dataset.num_tokens * dataset.dtype.itemsize)
    bounds = starts[dataset.document_indices[key.first : key.last + 1]] // dataset.dtype.itemsize
    document = packing.document - key.first
    if len(packing.windows) and (packing.windows.min() < 0 or packing.windows.max() >= len(document)):
        raise ValueError("it names windows that it does not have")
    if len(document) and (document.min() < 0 or document.max() >= key.last - key.first):
        raise ValueError("it names documents outside its range")
    if (packing.start + packing.length > np.diff(bounds)[document]).any() or int(bounds[-1] - bounds[0]) != packing.counts.tokens:
        raise ValueError(f"it does not fit {dataset.idx_path.name}")
