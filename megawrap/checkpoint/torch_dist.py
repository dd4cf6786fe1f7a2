"""The bytes of a torch_dist directory, one tensor or one layer at a time, without megatron-core and without a model.

`TorchDistReader` lists and reads `common.pt`, `.metadata` and `.distcp` files of any Megatron checkpoint; it reads only
the bytes that were asked for and runs nothing it reads. `TorchDistWriter` writes tensors as they come and keeps none;
megatron-core loads the result at any tp x pp. torch's own writer holds every tensor until the end, hence this file.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megawrap.checkpoint.manifest import MANIFEST_FILE
from megawrap.checkpoint.untrusted import FilePart, globals_asked_for, load_plain, read_metadata, tensor_record
from megawrap.errors import CheckpointError
from megawrap.io import atomic_write, explain_write_errors, safe_join

COMMON_FILE = "common.pt"
METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_FILE_BYTES = 2 << 30


class TorchDistReader:
    """Tensors of a torch_dist directory by name.

    Args:
        path: directory with `.metadata` and `.distcp` files.
        trust: read it although it has no manifest.json that its bytes could be checked against.

    Attributes:
        shapes: full shape of every tensor, by its name on disk.

    Raises:
        CheckpointError: no torch_dist directory, no manifest and no trust, or a damaged index.
    """

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        self.path = Path(path)
        if not (self.path / METADATA_FILE).is_file():
            raise CheckpointError(f"{self.path} is no torch_dist checkpoint: it has no {METADATA_FILE}", hint="Give an iter_* directory")
        if not trust and not (self.path / MANIFEST_FILE).is_file():
            raise CheckpointError(
                f"{self.path} has no {MANIFEST_FILE}, so its files cannot be checked", hint="Add --trust if you trust its source"
            )
        metadata = read_metadata(self.path / METADATA_FILE)
        self._entries = metadata.state_dict_metadata
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.shapes: dict[str, tuple[int, ...]] = {key: shape for key, (shape, _) in self.keys().items()}
        self._check_places()

    def _check_places(self) -> None:
        sizes: dict[str, int] = {}
        for index, place in self._places.items():
            name = place.relative_path
            if name not in sizes:
                file = safe_join(self.path, name, error=CheckpointError)
                if not file.is_file():
                    raise CheckpointError(f"{file} is missing; {self.path / METADATA_FILE} says it holds {index.fqn}", corrupt=True)
                sizes[name] = file.stat().st_size
            if place.offset < 0 or place.length < 0 or place.offset + place.length > sizes[name]:
                message = f"{self.path / name} is {sizes[name]} bytes, but {index.fqn} ends at byte {place.offset + place.length}"
                raise CheckpointError(message, corrupt=True)

    def keys(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, by its name on disk."""
        tensors = {key: entry for key, entry in self._entries.items() if isinstance(entry, TensorStorageMetadata)}
        return {key: (tuple(entry.size), entry.properties.dtype) for key, entry in tensors.items()}

    def objects(self) -> list[str]:
        """Names of the entries that are not tensors (`_extra_state`, random states)."""
        return [key for key, entry in self._entries.items() if isinstance(entry, BytesStorageMetadata)]

    def common(self) -> dict[str, Any]:
        """The content of common.pt; objects of other projects come back as `untrusted.Foreign`.

        Raises:
            CheckpointError: missing, damaged or asking for more than plain data.
        """
        common = load_plain(self.path / COMMON_FILE)
        if not isinstance(common, dict):
            raise CheckpointError(f"{self.path / COMMON_FILE} holds a {type(common).__name__}, not a dictionary", corrupt=True)
        return common

    def read(self, key: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or one slice of it along its first dimension, on the CPU.

        Args:
            key: name on disk.
            index: position along dimension 0 (the layer of a stacked tensor), which the result then lacks.

        Returns:
            The tensor in the dtype on disk. Only chunks that overlap the slice are opened, and only the rows needed are
            read: memory is the result and at most one chunk's share of it.

        Raises:
            CheckpointError: no such tensor or index, or a damaged file.
        """
        shape = tuple(self._tensor(key).size)
        if index is None:
            return self.read_slice(key, (0,) * len(shape), shape)
        if not (shape and 0 <= index < shape[0]):
            raise CheckpointError(f"tensor {key} of {self.path} has shape {list(shape)}; index {index} is outside its first dimension")
        return self.read_slice(key, (index, *(0 for _ in shape[1:])), (1, *shape[1:]))[0]

    def read_slice(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """The box [offsets, offsets + sizes) of a tensor, on the CPU in the dtype on disk.

        Raises:
            CheckpointError: no such tensor or box, or a damaged file.
        """
        entry = self._tensor(key)
        shape, dtype = tuple(entry.size), entry.properties.dtype
        inside = len(offsets) == len(sizes) == len(shape)
        if not inside or any(o < 0 or s < 0 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(f"tensor {key} of {self.path} has shape {list(shape)}, which has no {list(sizes)} at {list(offsets)}")
        result, filled = torch.empty(tuple(sizes), dtype=dtype), 0
        for chunk in entry.chunks:
            overlap = _overlap(tuple(chunk.offsets), tuple(chunk.sizes), tuple(offsets), tuple(sizes))
            if overlap is None:
                continue
            within, where = overlap
            rows = (within[0].start, within[0].stop) if within else (0, 1)
            data = self._read_rows(key, chunk, dtype, rows)
            data = data[(slice(None), *within[1:])] if within else data
            if filled == 0 and data.shape == result.shape:
                return data
            result[where] = data
            filled += data.numel()
        if filled != result.numel():
            raise CheckpointError(f"{self.path / METADATA_FILE} covers {filled} of {result.numel()} elements of {key}", corrupt=True)
        return result

    def _tensor(self, key: str) -> TensorStorageMetadata:
        entry = self._entries.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.path} has no tensor {key}")
        return entry

    def _read_rows(self, key: str, chunk: ChunkStorageMetadata, dtype: torch.dtype, rows: tuple[int, int]) -> torch.Tensor:
        """Rows [begin, end) of a chunk along its first dimension."""
        place = self._places.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            raise CheckpointError(f"{self.path / METADATA_FILE} does not say where {key} at {list(chunk.offsets)} is", corrupt=True)
        path = safe_join(self.path, place.relative_path, error=CheckpointError)
        sizes = tuple(chunk.sizes)
        try:
            with open(path, "rb", buffering=0) as file:
                record = tensor_record(io.BufferedReader(FilePart(file, place.offset, place.length)))
                if record is None:
                    file.seek(place.offset)
                    tensor = load_plain(file.read(place.length), f"{path} at byte {place.offset}")
                    self._check_chunk(path, key, sizes, dtype, tuple(tensor.shape), tensor.dtype)
                    return tensor[rows[0] : rows[1]] if sizes else tensor
                self._check_chunk(path, key, sizes, dtype, record.shape, record.dtype)
                result = torch.empty((rows[1] - rows[0], *sizes[1:]) if sizes else (), dtype=dtype)
                row_bytes = result.nbytes // (rows[1] - rows[0])
                _read_into(file, place.offset + record.position + rows[0] * row_bytes, result)
                return result
        except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, KeyError, EOFError, OSError, AttributeError) as problem:
            raise CheckpointError(f"{path} is damaged where {key} should be: {problem}", corrupt=True) from problem

    @staticmethod
    def _check_chunk(
        path: Path, key: str, sizes: tuple[int, ...], dtype: torch.dtype, found: tuple[int, ...], found_dtype: torch.dtype
    ) -> None:
        if sizes != found or dtype != found_dtype:
            raise CheckpointError(f"{path} holds {list(found)} {found_dtype} where {key} should be {list(sizes)} {dtype}", corrupt=True)


def _overlap(
    begin: tuple[int, ...], sizes: tuple[int, ...], wanted: tuple[int, ...], wanted_sizes: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes overlap: slices within the first, slices within the second; None when they do not."""
    within, where = [], []
    for b, s, w, n in zip(begin, sizes, wanted, wanted_sizes, strict=True):
        low, high = max(b, w), min(b + s, w + n)
        if low >= high:
            return None
        within.append(slice(low - b, high - b))
        where.append(slice(low - w, high - w))
    return tuple(within), tuple(where)


def _read_into(file: IO[bytes], position: int, tensor: torch.Tensor) -> None:
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(bytearray())
    file.seek(position)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"it ends {len(view) - done} bytes early")
        done += count


def common_bytes(common: dict[str, Any]) -> bytes:
    """common.pt as bytes, the same for the same content.

    Raises:
        TypeError: it holds something other than plain types, tensors and an `argparse.Namespace`, which readers refuse.
    """
    buffer = io.BytesIO()
    torch.save(common, buffer)
    asked = set(globals_asked_for(buffer.getvalue())) - {"argparse.Namespace"}
    if asked:
        raise TypeError(f"common.pt may hold plain types only, not {sorted(asked)}")
    return buffer.getvalue()


def write_common(directory: Path, common: dict[str, Any]) -> None:
    """Write common.pt and metadata.json, the two files beside the tensors."""
    atomic_write(directory / COMMON_FILE, common_bytes(common))
    atomic_write(directory / FORMAT_FILE, json.dumps(FORMAT).encode())


@dataclass(frozen=True)
class Entry:
    """One chunk that was written: what the index says of it. `dtype` is None for an entry that is not a tensor."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int


class TorchDistWriter:
    """Writes tensors one at a time into a new torch_dist directory.

    `with TorchDistWriter(directory) as writer: writer.write(...); writer.finish(common)`. The same calls give the same
    bytes. The directory is a checkpoint only when it is committed, for instance by `Store.save`. When several ranks write
    into one directory each has a writer of its own, and rank 0 calls `write_index` with the entries of all.

    Args:
        path: existing directory.
        rank: of the writer among those of this directory; part of the file names.
        file_bytes: start another `.distcp` file after this many bytes, so that hashing can be spread.

    Attributes:
        entries: what was written.
        files: names of the files that were written.
    """

    def __init__(self, path: Path, *, rank: int = 0, file_bytes: int = _FILE_BYTES) -> None:
        self.path = Path(path)
        self.rank = rank
        self.file_bytes = file_bytes
        self.entries: list[Entry] = []
        self.files: list[str] = []
        self._chunks: dict[str, tuple[tuple[int, ...], torch.dtype, set[tuple[int, ...]]]] = {}
        self._file: IO[bytes] | None = None

    def write(self, key: str, tensor: torch.Tensor, index: int | None = None, num_layers: int | None = None) -> None:
        """Append one tensor, or one layer of a stacked tensor.

        Args:
            key: name on disk.
            tensor: any device and layout; its numbers are written in its own dtype.
            index: position of this tensor along a new first dimension of length `num_layers`.
            num_layers: length of that dimension.

        Raises:
            CheckpointError: the disk is full, naming path and sizes.
            ValueError: written twice, or shapes or dtypes of one stacked tensor differ.
        """
        if index is None:
            self.write_chunk(key, tensor, (0,) * tensor.dim(), tuple(tensor.shape))
        else:
            self.write_chunk(key, tensor.unsqueeze(0), (index, *(0 for _ in tensor.shape)), (num_layers or 0, *tensor.shape))

    def write_chunk(self, key: str, tensor: torch.Tensor, offsets: Sequence[int], shape: Sequence[int]) -> None:
        """Append the part of a tensor of `shape` that begins at `offsets`.

        Raises:
            As `write`.
        """
        offsets, shape, sizes = tuple(offsets), tuple(shape), tuple(tensor.shape)
        known_shape, dtype, seen = self._chunks.setdefault(key, (shape, tensor.dtype, set()))
        inside = len(offsets) == len(shape) == len(sizes) and all(0 <= o <= n - s for o, s, n in zip(offsets, sizes, shape, strict=True))
        if offsets in seen or known_shape != shape or dtype != tensor.dtype or not inside:
            raise ValueError(
                f"{key} {sizes} {tensor.dtype} at {offsets} of {shape} does not fit {known_shape} {dtype}, or is there already"
            )
        data = tensor.detach().cpu().contiguous()
        if data.untyped_storage().nbytes() != data.nbytes:
            data = data.clone()
        place = self._append(data, data.nbytes)
        seen.add(offsets)
        self.entries.append(Entry(key, shape, dtype, offsets, sizes, *place))

    def write_empty(self, key: str) -> None:
        """Append an entry without data, as megatron-core asks for beside every parallel linear layer (`_extra_state`)."""
        self.write_object(key, None)

    def write_object(self, key: str, value: Any) -> None:
        """Append an entry that is not a tensor; plain types only, or readers will refuse it."""
        self.entries.append(Entry(key, (), None, (), (), *self._append([value], None)))

    def _append(self, data: Any, num_bytes: int | None) -> tuple[str, int, int]:
        """File name, position and length of what was appended."""
        if self._file is not None and self._file.tell() >= self.file_bytes:
            self.close()
        name = self.files[-1] if self._file is not None else f"__{self.rank}_{len(self.files)}.distcp"
        with explain_write_errors(self.path / name, num_bytes, error=CheckpointError):
            if self._file is None:
                self._file = open(self.path / name, "wb")  # noqa: SIM115 (stays open for the next tensor; close)
                self.files.append(name)
            position = self._file.tell()
            save_object(data, self._file)
            return name, position, self._file.tell() - position

    def close(self) -> None:
        """Close the file being written; harmless when there is none."""
        if self._file is not None:
            file, self._file = self._file, None
            with explain_write_errors(self.path, error=CheckpointError):
                file.close()

    def finish(self, common: dict[str, Any]) -> None:
        """Write the index, common.pt and metadata.json of a directory that this writer wrote alone.

        Args:
            common: plain types, tensors and an `argparse.Namespace` (`args`).

        Raises:
            ValueError: layers of a stacked tensor were not written.
        """
        self.close()
        write_index(self.path, self.entries)
        write_common(self.path, common)

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_index(directory: Path, entries: Iterable[Entry]) -> None:
    """Write `.metadata` for what the writers of a directory wrote.

    Raises:
        ValueError: a tensor is not covered exactly, or its parts disagree.
    """
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    covered: dict[str, int] = {}
    for entry in entries:
        info = _StorageInfo(entry.file, entry.position, entry.length)
        if entry.dtype is None:
            tensors[entry.key] = BytesStorageMetadata()
            places[MetadataIndex(entry.key)] = info
            continue
        new = TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(entry.shape), [])
        known = tensors.setdefault(entry.key, new)
        index = MetadataIndex(entry.key, entry.offsets)
        if not isinstance(known, TensorStorageMetadata) or known.size != new.size or known.properties != new.properties or index in places:
            raise ValueError(f"{entry.key} at {entry.offsets} was written twice or with other shapes")
        places[MetadataIndex(entry.key, entry.offsets, len(known.chunks))] = info
        known.chunks.append(ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.sizes)))
        covered[entry.key] = covered.get(entry.key, 0) + math.prod(entry.sizes)
    short = [key for key, count in covered.items() if count != math.prod(tensors[key].size)]  # type: ignore[union-attr]
    if short:
        raise ValueError(f"not every part of {', '.join(short)} was written, or some twice")
    metadata = Metadata(tensors, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")
    atomic_write(directory / METADATA_FILE, pickle.dumps(metadata))


def save_object(tensor: Any, file: IO[bytes]) -> None:
    """`torch.save` that lets the operating system's own error through when a write fails."""
    guard = _Remembering(file)
    try:
        torch.save(tensor, guard)
    except RuntimeError:
        if guard.problem is not None:
            raise guard.problem from None
        raise


class _Remembering(io.RawIOBase):
    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as problem:
            self.problem = self.problem or problem
            raise
