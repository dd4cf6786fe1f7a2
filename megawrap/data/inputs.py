"""Which files are read, and their bytes: paths, globs, directories and standard input to checked names and hashed streams.

In: what the user named. Out: `expand`, a list of readable files in a fixed order, and `Source`, the unpacked bytes of
one of them (plain, .gz, .xz, .zst) or of a range of lines of an uncompressed one. Nothing is loaded whole.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from megawrap.errors import DataError
from megawrap.io import read_json, safe_join

STDIN = "-"
TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
TABLE_SUFFIXES = (".parquet", ".arrow")
_COMPRESSED = {
    ".gz": (b"\x1f\x8b", "gzip"),
    ".xz": (b"\xfd7zXZ\x00", "xz"),
    ".zst": (b"\x28\xb5\x2f\xfd", "zstandard"),
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SCAN_BYTES = 1 << 16


class Piece(NamedTuple):
    """What is read in one go: a file, or the lines of an uncompressed one that start in a range of bytes."""

    name: str
    start: int = 0
    stop: int | None = None
    """None: to the end."""


def is_table(name: str) -> bool:
    """Whether a file is read through pyarrow instead of line by line."""
    return name.endswith(TABLE_SUFFIXES)


def is_plain(name: str) -> bool:
    """Whether a file can be read in ranges of lines: regular, not compressed, not a table."""
    return name != STDIN and not is_table(name) and not name.endswith(tuple(_COMPRESSED)) and os.path.isfile(name)


def expand(patterns: Sequence[str | Path]) -> list[str]:
    """Files named by paths, globs, directories and `-`, checked before any work starts.

    A directory stands for its .jsonl (also .gz, .xz, .zst) and .parquet files at any depth, sorted; one that
    `datasets` saved to disk for the Arrow files its state.json names.

    Raises:
        DataError: a path, glob or directory that names no file, an empty file, a file twice, a compressed file whose
            name does not say so.
    """
    names: list[str] = []
    for pattern in map(str, patterns):
        if pattern == STDIN:
            names.append(pattern)
        elif os.path.isdir(pattern):
            names += _in_directory(Path(pattern))
        elif os.path.lexists(pattern):
            names.append(pattern)
        else:
            found = sorted(glob.glob(pattern, recursive=True))
            if not found:
                what = "this glob matches no file" if glob.has_magic(pattern) else "no such file"
                raise DataError(f"{pattern}: {what}", hint=f"Paths are relative to {Path.cwd()}")
            names += [name for name in found if not os.path.isdir(name)]
    seen: dict[object, str] = {}
    for name in names:
        identity = _check_file(name)
        if identity in seen:
            raise DataError(f"{name}: the same file twice (first as {seen[identity]})", hint="Name every input once")
        seen[identity] = name
    return names


def _in_directory(folder: Path) -> list[str]:
    state = folder / "state.json"
    if state.is_file():
        return _saved_dataset(folder, read_json(state, error=DataError))
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        listed = read_json(splits, error=DataError)
        known = listed.get("splits") if isinstance(listed, dict) else None
        named = ", ".join(str(folder / str(split)) for split in known) if isinstance(known, list) else "one of its splits"
        raise DataError(f"{folder}: a saved dataset with several splits", hint=f"Name the split: {named}")
    found = sorted(str(path) for path in folder.rglob("*") if path.name.endswith((*TEXT_SUFFIXES, ".parquet")) and path.is_file())
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10])
        wanted = f"{', '.join(TEXT_SUFFIXES)} or .parquet"
        raise DataError(f"{folder}: is a directory without a {wanted} file; it holds {there or 'nothing'}", hint="Name the files")
    return found


def _saved_dataset(folder: Path, state: Any) -> list[str]:
    """Arrow files of a directory that `datasets` saved, as its state.json lists them."""
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("no file is listed")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'state.json'}: not written by datasets.save_to_disk ({error})", corrupt=True) from error
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: holds an indices mapping, which selects rows", hint="Save it again: dataset.flatten_indices()")
    return [str(safe_join(folder, name, error=DataError)) for name in names]


def _check_file(name: str) -> object:
    """What identifies the file; refuses what could not be read later."""
    if name == STDIN:
        return STDIN
    try:
        status = os.stat(name)
        if stat.S_ISREG(status.st_mode):  # a pipe can be opened only once, later
            with open(name, "rb") as stream:
                _check_start(name, stream.read(6))
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    return status.st_dev, status.st_ino


def _check_start(name: str, start: bytes) -> None:
    if not start:
        raise DataError(f"{name}: the file is empty (0 bytes)", hint="Remove it from --input, or write the data again")
    if name.endswith(".parquet") != start.startswith(b"PAR1"):
        if name.endswith(".parquet"):
            raise DataError(f"{name}: not parquet: it starts with {start.hex(' ')}", corrupt=True)
        raise DataError(f"{name}: this is a parquet file, not text", hint="Rename it to end in .parquet")
    for suffix, (magic, kind) in _COMPRESSED.items():
        if start.startswith(magic) and not name.endswith(suffix):
            raise DataError(f"{name}: this is a {kind} file, not text", hint=f"Rename it to end in {suffix}")
        if name.endswith(suffix) and not start.startswith(magic):
            raise DataError(f"{name}: the name ends in {suffix} but the file is not {kind}: it starts with {start.hex(' ')}", corrupt=True)
    if start.startswith(_UTF16):
        raise DataError(f"{name}: not UTF-8: the file starts like UTF-16 (byte 0)", hint="Convert it: iconv -f UTF-16 -t UTF-8")


class Source:
    """One input while it is read: hashes the bytes of the file and counts them, and unpacks them.

    Args:
        piece: a range is widened to whole lines: those that start in it.

    Attributes:
        name: as given.
        first: byte offset of the first line read; 0 for a whole file.
        raw_bytes: bytes of the file read so far (compressed ones, where it is compressed).
        lines: lines read so far, counted by who splits them.
        finished: the end was reached, so that `sha256` is that of the bytes from `first` on.
    """

    def __init__(self, piece: Piece) -> None:
        self.name = name = piece.name
        self.first = self.raw_bytes = self.lines = 0
        self.finished = False
        self._left: int | None = None
        self._digest = hashlib.sha256()
        try:
            self._raw: IO[bytes] = sys.stdin.buffer if name == STDIN else open(name, "rb", buffering=0)  # noqa: SIM115 - closed by close()
            if piece.start or piece.stop is not None:
                self.first = line_start(self._raw, piece.start)
                if piece.stop is not None:
                    self._left = max(0, line_start(self._raw, piece.stop) - self.first)
                self._raw.seek(self.first)
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror}") from error
        self._stream: Any = self
        if name.endswith(".gz"):
            self._stream = gzip.GzipFile(fileobj=cast(Any, self), mode="rb")
        elif name.endswith(".xz"):
            self._stream = lzma.LZMAFile(cast(Any, self), mode="rb")  # noqa: SIM115 - does not own the file
        elif name.endswith(".zst"):
            try:
                import zstandard
            except ImportError as error:
                raise DataError(f"{name}: reading .zst needs the zstandard package", hint="pip install 'megawrap[zstd]'") from error
            self._stream = _ZstdStream(self, zstandard.ZstdDecompressor())

    def read(self, size: int = -1) -> bytes:
        """Raw bytes, hashed on the way; what the decompressors call."""
        if self._left is not None:
            size = min(size, self._left) if size >= 0 else self._left
        block = self._raw.read(size)
        self._digest.update(block)
        self.raw_bytes += len(block)
        if self._left is not None:
            self._left -= len(block)
        self.finished = self.finished or not block
        return block

    def chunks(self, size: int) -> Iterator[bytes]:
        """Unpacked bytes, up to `size` at a time.

        Raises:
            DataError: the compressed file is damaged.
        """
        while True:
            try:
                block = self._stream.read(size)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise DataError(f"{self.name}: damaged after {self.raw_bytes} bytes: {error}", corrupt=True) from error
            except Exception as error:
                if type(error).__module__.startswith(("zstandard", "zstd")):
                    raise DataError(f"{self.name}: damaged after {self.raw_bytes} bytes: {error}", corrupt=True) from error
                raise
            if not block:
                return
            yield block

    def line_number(self, line: int) -> int:
        """Number in the file of a line counted from `first`; reads what stands before `first` once more."""
        return line + count_newlines(self.name, self.first) if self.first else line

    def facts(self) -> dict[str, Any]:
        """For the manifest; no sha256 when reading stopped before the end (--limit)."""
        return {
            "path": self.name,
            "bytes": self.raw_bytes if self.finished or self.name == STDIN else os.stat(self.name).st_size,
            "lines_read": self.lines,
            "sha256": self._digest.hexdigest() if self.finished else None,
        }

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self.name != STDIN:
            self._raw.close()


class _ZstdStream:
    """Frames back to back, unpacked; zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, source: Source, decompressor: Any) -> None:
        self._source, self._decompressor = source, decompressor
        self._frame: Any = None
        self._left = b""

    def read(self, size: int) -> bytes:
        """Unpacked bytes, `size` or a little more; 4 KiB of input at a time bounds what a hostile file can unfold to."""
        unpacked: list[bytes] = []
        held = 0
        while held < size:
            block = self._left or self._source.read(4096)
            self._left = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the file is cut in the middle of a frame")
                break
            self._frame = self._frame or self._decompressor.decompressobj()
            unpacked.append(self._frame.decompress(block))
            held += len(unpacked[-1])
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        return b"".join(unpacked)


def line_start(stream: IO[bytes], at: int) -> int:
    """Offset of the first line that starts at byte `at` or after it; the size of the file when there is none."""
    if at == 0:
        return 0
    stream.seek(at - 1)
    position = at - 1
    while block := stream.read(_SCAN_BYTES):
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(block)
    return position


def count_newlines(name: str, stop: int) -> int:
    """Newlines in the first `stop` bytes of a file."""
    found = position = 0
    with open(name, "rb", buffering=0) as stream:
        while position < stop and (block := stream.read(min(1 << 20, stop - position))):
            found += block.count(b"\n")
            position += len(block)
    return found
