"""Writing a safetensors file one tensor at a time: the header comes first, made from names, dtypes and shapes alone.

In: the list of tensors, then each tensor in any order. Out: a file that the safetensors library reads. Own code because
that library writes whole dictionaries only, which would hold the model in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

from megawrap.errors import ConversionError
from megawrap.io import explain_write_errors

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class SafetensorsFile:
    """A safetensors file of tensors known by name, dtype and shape, filled in any order.

    Args:
        path: file to create.
        tensors: (dtype, shape) of every tensor, in file order.

    Raises:
        ConversionError: the disk is full, naming path and sizes.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path = Path(path)
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        # The format asks for no holes; larger items first keep every tensor aligned to its dtype.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._places[name] = (begin, dtype, shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self.num_bytes = self._start + end
        self._missing = set(tensors)
        with explain_write_errors(self.path, self.num_bytes, error=ConversionError):
            self._file: IO[bytes] = open(self.path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
            self._write(0, memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: not announced, written before, or of another dtype or shape.
            ConversionError: the disk is full.
        """
        begin, dtype, shape = self._places[name]
        if name not in self._missing or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} does not fit {dtype} {shape}, or was written before")
        with explain_write_errors(self.path, self.num_bytes, error=ConversionError):
            self._write(self._start + begin, memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))
        self._missing.discard(name)

    def _write(self, position: int, data: memoryview) -> None:
        self._file.seek(position)
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Close the file.

        Raises:
            ValueError: announced tensors were not written.
        """
        self._file.close()
        if self._missing:
            raise ValueError(f"{self.path} misses {sorted(self._missing)}")

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
