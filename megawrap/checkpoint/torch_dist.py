"""The bytes of a torch_dist directory, one tensor or one layer at a time, without megatron-core and without a model.

`TorchDistReader` lists and reads `common.pt`, `.metadata` and `.distcp` files of any Megatron checkpoint; it reads only
the bytes that were asked for and runs nothing it reads. `TorchDistWriter` writes tensors as they come and keeps none;
megatron-core loads the result at any tp x pp. torch's own writer holds every tensor until the end, hence this file.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from argparse import Namespace
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

from megawrap.checkpoint.untrusted import FilePart, load_plain, read_metadata, tensor_record
from megawrap.errors import CheckpointError
from megawrap.io import atomic_write, explain_write_errors, safe_join

COMMON_FILE = "common.pt"
METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
MANIFEST_FILE = "manifest.json"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_FILE_BYTES = 2 << 30


class TorchDistReader:
    """Tensors of a torch_dist directory by name.

    Args:
        path: directory with `.metadata` and `.distcp` files.
        trust: read it although it has no manifest.json that its bytes could be checked against.

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
        entry = self._entries.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.path} has no tensor {key}")
        shape = tuple(entry.size)
        if index is not None and not (shape and 0 <= index < shape[0]):
            raise CheckpointError(f"tensor {key} of {self.path} has shape {list(shape)}; index {index} is outside its first dimension")
        first, last = (0, shape[0] if shape else 1) if index is None else (index, index + 1)
        result = torch.empty((last - first, *shape[1:]) if shape else (), dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            begin, end = (max(first, offsets[0]), min(last, offsets[0] + sizes[0])) if shape else (0, 1)
            if begin >= end or 0 in sizes:
                continue
            rows = (begin - offsets[0], end - offsets[0]) if shape else (0, 1)
            data = self._read_rows(key, chunk, entry.properties.dtype, rows)
            where = (slice(begin - first, end - first), *(slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True)))
            result[where if shape else ()] = data
            filled += data.numel()
        if filled != result.numel():
            raise CheckpointError(f"{self.path / METADATA_FILE} covers {filled} of the {result.numel()} elements of {key}", corrupt=True)
        return result if index is None else result[0]

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
    with torch.serialization.safe_globals([Namespace]):
        asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(buffer.getvalue()))) - {"argparse.Namespace"}
    if asked:
        raise TypeError(f"common.pt may hold plain types only, not {sorted(asked)}")
    return buffer.getvalue()


def write_common(directory: Path, common: dict[str, Any]) -> None:
    """Write common.pt and metadata.json, the two files beside the tensors."""
    atomic_write(directory / COMMON_FILE, common_bytes(common))
    atomic_write(directory / FORMAT_FILE, json.dumps(FORMAT).encode())


class TorchDistWriter:
    """Writes tensors one at a time into a new torch_dist directory.

    `with TorchDistWriter(directory) as writer: writer.write(...); writer.finish(common)`. The same calls give the same
    bytes. The directory is a checkpoint only when it is committed, for instance by `Store.save`.

    Args:
        path: existing directory.
        file_bytes: start another `.distcp` file after this many bytes, so that hashing can be spread.
    """

    def __init__(self, path: Path, *, file_bytes: int = _FILE_BYTES) -> None:
        self.path = Path(path)
        self.file_bytes = file_bytes
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._empty: dict[str, BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: IO[bytes] | None = None
        self._num_files = 0

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
        tensor = tensor.detach().cpu().contiguous()
        sizes = tuple(tensor.shape) if index is None else (1, *tensor.shape)
        shape = sizes if index is None else (num_layers or 0, *tensor.shape)
        offsets = (0,) * len(sizes) if index is None else (index, *(0 for _ in tensor.shape))
        entry = self._tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(shape), []))
        place = MetadataIndex(key, offsets, len(entry.chunks))
        inside = index is None or 0 <= index < shape[0]
        if place in self._places or tuple(entry.size) != shape or entry.properties.dtype != tensor.dtype or not inside:
            raise ValueError(f"{key} [{index} of {num_layers}] {sizes} {tensor.dtype} does not fit {entry.size} {entry.properties.dtype}")
        data = tensor.view(sizes)
        if data.untyped_storage().nbytes() != data.nbytes:
            data = data.clone()
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        self._places[place] = self._append(data)

    def write_empty(self, key: str) -> None:
        """Append an entry without data, as megatron-core asks for beside every parallel linear layer (`_extra_state`)."""
        self._empty[key] = BytesStorageMetadata()
        self._places[MetadataIndex(key)] = self._append([None])

    def _append(self, data: torch.Tensor | list[None]) -> _StorageInfo:
        if self._file is not None and self._file.tell() >= self.file_bytes:
            self._close()
        path = self.path / (self._name() if self._file is None else Path(self._file.name).name)
        with explain_write_errors(path, getattr(data, "nbytes", None), error=CheckpointError):
            if self._file is None:
                self._file = open(path, "wb")  # noqa: SIM115 (stays open for the next tensor; _close)
                self._num_files += 1
            offset = self._file.tell()
            save_tensor(data, self._file)
            return _StorageInfo(path.name, offset, self._file.tell() - offset)

    def _name(self) -> str:
        return f"__0_{self._num_files}.distcp"

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with explain_write_errors(self.path, error=CheckpointError):
                file.close()

    def finish(self, common: dict[str, Any]) -> None:
        """Write the index, common.pt and metadata.json.

        Args:
            common: plain types, tensors and an `argparse.Namespace` (`args`).

        Raises:
            ValueError: layers of a stacked tensor were not written.
        """
        self._close()
        for key, entry in self._tensors.items():
            if sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks) != entry.size.numel():
                raise ValueError(f"{key} has {len(entry.chunks)} of {entry.size[0]} layers")
        metadata = Metadata({**self._tensors, **self._empty}, storage_data=self._places, storage_meta=StorageMeta(), version="1.0.0")
        atomic_write(self.path / METADATA_FILE, pickle.dumps(metadata))
        write_common(self.path, common)

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._close()


def save_tensor(tensor: torch.Tensor | list[None], file: IO[bytes]) -> None:
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
