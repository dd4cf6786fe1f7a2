"""Rows of parquet files and of the Arrow files of a saved `datasets` directory, as objects like those of JSON lines.

In: a .parquet or .arrow file and the keys wanted. Out: rows in order, a bounded number of bytes at a time; a column that
is missing or of the wrong type is refused before any row is read. Needs pyarrow, imported when the first table is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

from megawrap.data.fields import Extractor, require_key
from megawrap.data.jsonl import LineError
from megawrap.errors import DataError
from megawrap.io import sha256_file

_ROWS = 256  # decoded at once: rows of text are 1 to 100 KB


class TableSource:
    """A table while it is read; the counterpart of `inputs.Source`, with rows in place of lines.

    Attributes:
        name: as given.
        first: 0; a table is always read whole.
        lines: rows read so far, counted by the reader.
        raw_bytes: estimate of the bytes of the file behind the rows read so far.
    """

    first = 0

    def __init__(self, name: str, extractor: Extractor) -> None:
        self.name, self.lines, self.finished, self._optional = name, 0, False, getattr(extractor, "optional", ())
        self._size, self._done = os.stat(name).st_size, 0
        self._digest = ""
        try:
            import pyarrow
        except ImportError as error:
            raise DataError(f"{name}: reading tables needs the pyarrow package", hint="pip install 'megawrap[parquet]'") from error
        self._pyarrow = pyarrow
        self._hasher = threading.Thread(target=self._hash, daemon=True)
        self._hasher.start()
        with _explained(self):
            self._open(extractor)

    def _hash(self) -> None:
        self._digest = sha256_file(self.name)  # type: ignore[arg-type]

    def _open(self, extractor: Extractor) -> None:
        if self.name.endswith(".parquet"):
            from pyarrow import parquet

            self._file = parquet.ParquetFile(self.name, pre_buffer=False)
            self._schema, self._num_rows = self._file.schema_arrow, self._file.metadata.num_rows
        else:
            self._file = self._pyarrow.ipc.open_stream(self._pyarrow.memory_map(self.name))
            self._schema, self._num_rows = self._file.schema, None
        try:
            for name in extractor.fields:
                require_key(dict.fromkeys(self._schema.names), name)
        except LineError as error:
            raise DataError(f"{self.name}: {error.message.replace('key', 'column')}") from error
        if extractor.width is not None:
            for name in extractor.fields:
                self._require_text(name)
        self._columns = [name for name in (*extractor.fields, *self._optional) if name in self._schema.names]

    def _require_text(self, name: str) -> None:
        types, kind = self._pyarrow.types, self._schema.field(name).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value) or types.is_null(value)):
            raise DataError(f"{self.name}: column {name!r} holds {kind}, it must hold strings", hint="Name another column with --fields")

    def _record_batches(self) -> Iterator[Any]:
        if self._num_rows is not None:
            yield from self._file.iter_batches(batch_size=_ROWS, columns=self._columns)
            return
        for batch in self._file:
            for first in range(0, batch.num_rows, _ROWS):
                yield batch.slice(first, _ROWS).select(self._columns)

    def rows(self, block_bytes: int) -> Iterator[list[dict[str, Any]]]:
        """Rows in order, about `block_bytes` of text at a time; absent values are None, absent keys of structs left out.

        Raises:
            DataError: the file is damaged.
        """
        held: list[dict[str, Any]] = []
        size = 0
        batches = self._record_batches()
        while True:
            with _explained(self):
                batch = next(batches, None)
                if batch is None:
                    break
                held += [_without_absent(row) for row in batch.to_pylist()]
                size += batch.nbytes
                self._done += batch.num_rows
            if size >= block_bytes:
                yield held
                held, size = [], 0
        if self._num_rows is not None and self._done != self._num_rows:
            raise DataError(f"{self.name}: damaged: {self._done} rows, {self._num_rows} by its footer", corrupt=True)
        self.finished = True
        if held:
            yield held

    @property
    def raw_bytes(self) -> int:
        """Bytes of the file behind the rows decoded so far, for progress."""
        return self._size if self.finished else int(self._size * self._done / self._num_rows) if self._num_rows else 0

    def line_number(self, line: int) -> int:
        """Rows count from 1, as lines do."""
        return line

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        self._hasher.join()
        return {"path": self.name, "bytes": self._size, "lines_read": self.lines, "sha256": self._digest if self.finished else None}

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _without_absent(value: Any) -> Any:
    """A row as JSON would have it: Arrow gives every struct of a column all keys of any, None where there was none."""
    if isinstance(value, dict):
        return {key: _inner(item) for key, item in value.items()}
    return value


def _inner(value: Any) -> Any:
    if isinstance(value, list):
        return [_inner(item) for item in value]
    if isinstance(value, dict):
        return {key: _inner(item) for key, item in value.items() if item is not None}
    return value


class _explained:  # noqa: N801 - used like a function
    """Turns pyarrow's errors about the file into one that names it."""

    def __init__(self, source: TableSource) -> None:
        self._source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (self._source._pyarrow.ArrowException, OSError, UnicodeDecodeError)) and not isinstance(error, DataError):
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{self._source.name}: damaged after row {self._source._done}: {first}", corrupt=True) from error
