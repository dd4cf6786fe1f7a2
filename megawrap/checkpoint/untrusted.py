"""Opening pickled files of a checkpoint without running what they say.

Comes in: `.metadata`, `common.pt` and the tensor entries of `.distcp` files, possibly crafted. Goes out: plain data,
metadata objects and tensors, or a `CheckpointError` naming the file and the global it asked for. Nothing is called
that is not listed here.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import importlib
import io
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megawrap.errors import CheckpointError

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_PLANNER_MODULE = "torch.distributed.checkpoint.planner"
_FILESYSTEM_MODULE = "torch.distributed.checkpoint.filesystem"
_METADATA_GLOBALS = {
    *((_METADATA_MODULE, name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    *((_METADATA_MODULE, name) for name in ("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_PLANNER_MODULE, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    *((_FILESYSTEM_MODULE, name) for name in ("_StorageInfo", "_StoragePrefix")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}
_GETATTR = ("builtins", "getattr")
_PATHS = re.compile(r"^pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path$")
_NUMPY = re.compile(r"^numpy(\.ndarray|\.dtype|\.dtypes\.\w+DType|\.(core|_core)\.multiarray\.(_reconstruct|scalar))$")
_STORAGES: dict[str, torch.dtype] = torch.storage._storage_type_to_dtype_map()
_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError),
    *(ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError, ArithmeticError, MemoryError),
)


class Foreign:
    """Stands in for an object of another project (an enumeration, a configuration) met in a checkpoint.

    Attributes:
        name: qualified name of its class.
        values: what it was made from.
        state: its attributes, when it had any.
    """

    name = ""

    def __init__(self, *values: Any, **named: Any) -> None:
        self.values = values
        self.state: Any = named

    def __setstate__(self, state: Any) -> None:
        self.values = getattr(self, "values", ())
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.name} {', '.join(map(repr, self.values))}>"


def _foreign_class(name: str) -> type[Foreign]:
    return type("Foreign", (Foreign,), {"name": name})


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_GLOBALS:
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if _PATHS.match(f"{module}.{name}"):
            return _foreign_class(f"{module}.{name}")  # a path in storage_meta: nothing here follows it
        if (module, name) == _GETATTR:
            return _enumeration_member
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name in ("MCoreMetadata", "MCoreSavePlan"):
            return _foreign_class(f"{module}.{name}")
        raise CheckpointError(
            f"{self.path} asks to load {module}.{name}, which no checkpoint needs",
            hint="The file is crafted or damaged; it was not run",
            corrupt=True,
        )


def read_metadata(path: Path) -> Metadata:
    """The index of a torch_dist directory: tensors, their shapes and where their chunks lie.

    Args:
        path: the `.metadata` file.

    Raises:
        CheckpointError: missing, damaged, or asking for anything but metadata classes.
    """
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file, path).load()
        found = metadata.state_dict_metadata, metadata.storage_data
    except OSError as problem:
        raise CheckpointError(f"cannot read {path}: {problem.strerror}", corrupt=isinstance(problem, FileNotFoundError)) from problem
    except _DAMAGE as problem:
        raise CheckpointError(f"{path} is damaged: {problem}", corrupt=True) from problem
    if not isinstance(metadata, Metadata) or not all(isinstance(part, dict) for part in found):
        raise CheckpointError(f"{path} holds no torch_dist metadata", corrupt=True)
    return metadata


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode` as pickle uses it for bytes, for that encoding only."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in encoding {encoding}")
    return text.encode("latin1")


def _enumeration_member(kind: Any, name: str) -> Any:
    """`getattr` as Python 3.11.0 to 3.11.3 pickle a member of an enumeration, for that alone."""
    if isinstance(kind, type) and issubclass(kind, Foreign):
        return kind(name)
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for attribute {name!r} of {kind!r}, which is no enumeration's")


def _allowed(name: str) -> tuple[Any, str] | None:
    if name == "argparse.Namespace":
        return Namespace, name
    if name == "_codecs.encode":
        return _latin1, name
    if name == ".".join(_GETATTR):
        return _enumeration_member, name
    if name.startswith("megatron.") or _PATHS.match(name) or name in ("signal.Signals", "types.SimpleNamespace"):
        return _foreign_class(name), name
    if _NUMPY.match(name):
        module, _, attribute = name.replace("numpy.core.", "numpy._core.").rpartition(".")
        return getattr(importlib.import_module(module), attribute), name
    return None


@contextlib.contextmanager
def _no_other_globals() -> Iterator[None]:
    """torch's process-wide list of allowed globals, to which importing megatron-core adds, is emptied for a while."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def globals_asked_for(content: bytes) -> list[str]:
    """Names of the globals, beyond torch's own plain ones, that loading this `torch.save` archive would need."""
    with _no_other_globals():
        return torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))


def load_plain(source: Path | bytes, name: str | None = None) -> Any:
    """What `torch.save` wrote, if it is plain types, tensors, numpy arrays and an `argparse.Namespace`.

    Objects of `megatron.*` come back as `Foreign`, so that another project's checkpoint can be read without it.

    Args:
        source: file, or its bytes.
        name: what to call it in errors; default the path.

    Raises:
        CheckpointError: damaged, or it asks for a global that is not plain data; nothing of it was run.
    """
    name = name or str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        allowed = {wanted: _allowed(wanted) for wanted in globals_asked_for(content)}
        refused = sorted(wanted for wanted, found in allowed.items() if found is None)
        if refused:
            message = f"{name} asks to load {', '.join(refused)}, which is not plain data"
            raise CheckpointError(message, hint="The file is crafted or damaged; it was not run", corrupt=True)
        with _no_other_globals():
            torch.serialization.add_safe_globals([found for found in allowed.values() if found is not None])
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as problem:
        raise CheckpointError(f"cannot read {name}: {problem.strerror}", corrupt=isinstance(problem, FileNotFoundError)) from problem
    except _DAMAGE as problem:
        reason = str(problem).split("\n")[0]
        raise CheckpointError(f"{name} is damaged: {reason}", corrupt=True) from problem


@dataclass(frozen=True)
class TensorRecord:
    """Where the numbers of one saved tensor lie in its archive: contiguous, at `position`, little endian."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int


class FilePart(io.RawIOBase):
    """Bytes [offset, offset + length) of a file as a file (torch's own view seeks wrongly from the end)."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise ValueError("a position before the start")
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.position)]
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(view)  # type: ignore[attr-defined]
        self.position += count
        return count


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of a tensor (not its numbers); anything unusual raises UnpicklingError."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a {kind}")
        return dtype, key, numel


def tensor_record(archive: IO[bytes]) -> TensorRecord | None:
    """The layout of the one tensor in a `torch.save` archive, so that parts of it can be read without the rest.

    Args:
        archive: seekable file of exactly the archive.

    Returns:
        The record; None when the tensor is not plain, contiguous and little endian (then load it whole).

    Raises:
        zipfile.BadZipFile, ValueError, KeyError, EOFError: damaged.
    """
    with zipfile.ZipFile(archive) as members:
        names = {member.filename.partition("/")[2]: member for member in members.infolist()}
        if "byteorder" in names and members.read(names["byteorder"]) != b"little":
            return None
        try:
            (dtype, key, numel), offset, shape, stride = _TensorUnpickler(io.BytesIO(members.read(names["data.pkl"]))).load()
        except (pickle.UnpicklingError, TypeError):
            return None
        data = names[f"data/{key}"]
        expected, contiguous = 1, True
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            contiguous &= size == 1 or step == expected
            expected *= size
        if not contiguous or data.compress_type != zipfile.ZIP_STORED or expected == 0 or offset + expected > numel:
            return None
        archive.seek(data.header_offset + 26)
        lengths = archive.read(4)
        start = data.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        if (offset + expected) * dtype.itemsize > data.file_size:
            raise ValueError("a tensor longer than its record")
        return TensorRecord(dtype, shape, start + offset * dtype.itemsize)
