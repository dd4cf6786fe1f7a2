"""Packings kept on disk, so that a run that starts again does not pack again.

In: a dataset, a range and the settings of packing. Out: the `Packing`, from the cache when there is an intact one made
of exactly this data with exactly these settings, else packed anew and written whole or not at all. A cache only saves
time: one that cannot be read or written costs a sentence to the user, never the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megawrap.config import OverlongPolicy
from megawrap.data.format import IndexedDataset
from megawrap.data.packing import Packing, pack
from megawrap.data.samples import Counts, LossOn, select
from megawrap.data.shuffle import make_key
from megawrap.errors import MegawrapError
from megawrap.io import DirectoryLock, atomic_write, explain_write_errors, publish, read_json, sha256_file

PACKING_VERSION = 1  # raise it when the same input packs differently
_ARRAYS = ("row_starts", "document", "start", "length")
_INDEX = "index.json"


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

    Args:
        dataset: the data; its fingerprint is in the key.
        key: settings.
        cache_dirs: where to look, and where to write: the first that can be written. May be empty.
        write: False reads caches but writes nothing (all ranks but one, and dry runs).

    Raises:
        DataError: from `megawrap.data.samples.select`.
    """
    folders = [folder / f"{dataset.prefix.name}.packing" / key.name for folder in cache_dirs]
    reasons = []
    for folder in folders:
        if folder.exists():
            try:
                return _read(folder, key, dataset), f"packing of {dataset.prefix} {key.first}:{key.last} read from {folder}"
            except (MegawrapError, OSError, ValueError, KeyError, TypeError) as problem:
                reasons.append(f"the cache in {folder} is damaged ({problem})")
        elif any(folder.parent.glob(f"{key.name.partition('-')[0]}-*")):
            reasons.append(f"the cache in {folder.parent} is of other data under this name")
    began = time.perf_counter()
    pieces = select(
        dataset, key.first, key.last, seq_length=key.seq_length, overlong=key.overlong, loss_on=key.loss_on
    )  # fmt: skip
    packing = pack(pieces, key.seq_length, key.shuffle)
    said = f"packing of {dataset.prefix} {key.first}:{key.last} built in {time.perf_counter() - began:.2f} s"
    if reasons:
        said += f" because {' and '.join(reasons)}"
    return packing, said + (f"; {_write_first(folders, packing, key)}" if write and folders else "; not written")


def _write_first(folders: Sequence[Path], packing: Packing, key: PackingKey) -> str:
    refusals = []
    for folder in folders:
        try:
            _write(folder, packing, key)
            return f"written to {folder}"
        except (MegawrapError, OSError) as problem:
            refusals.append(str(problem))
    return f"not written ({'; '.join(refusals)})"


def _write(folder: Path, packing: Packing, key: PackingKey) -> None:
    """Write `folder` whole or not at all; what a killed writer left is replaced, a live one is left alone."""
    with explain_write_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.tmp")
    with DirectoryLock(folder.with_name(f".{folder.name}.lock")), explain_write_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
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
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()
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
    packing = Packing(**arrays, counts=Counts(**index["counts"]))
    _check(packing, key, dataset)
    return packing


def _check(packing: Packing, key: PackingKey, dataset: IndexedDataset) -> None:
    """Every window lies inside its document, whatever happened to .idx since."""
    starts = np.append(dataset.pointers, dataset.num_tokens * dataset.dtype.itemsize)
    bounds = starts[dataset.document_indices[key.first : key.last + 1]] // dataset.dtype.itemsize
    document = packing.document - key.first
    if len(document) and (document.min() < 0 or document.max() >= key.last - key.first):
        raise ValueError("it names documents outside its range")
    if (packing.start + packing.length > np.diff(bounds)[document]).any() or int(bounds[-1] - bounds[0]) != packing.counts.tokens:
        raise ValueError(f"it does not fit {dataset.idx_path.name}")
