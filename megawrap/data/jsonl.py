"""JSON lines to samples, a block at a time: every line is a sample, is counted, or is refused by file, line and column.

In: files (plain, .gz, .zst), globs, `-` for standard input. Out: batches of `Sample` in input order, and `Counts` that
add up to the lines read. Memory is bounded by the batch and the longest line allowed, whatever the input.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, NamedTuple, cast

import orjson

from megawrap.errors import DataError

OnBadLine = Literal["refuse", "skip"]
STDIN = "-"
BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 64 << 20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_READ_BYTES = 1 << 20
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_RAW_CONTROL = bytes(range(32))
_KIND = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}


class Sample(NamedTuple):
    """One line: its fields in the order asked for, and where it stands."""

    texts: tuple[str, ...]
    source: str
    line: int


class LineError(Exception):
    """Why a line is not a sample.

    Args:
        reason: short name it is counted under.
        message: what is wrong, for a reader.
        column: 1-based, when known.
        byte: offset in the line, when the line is not text.
    """

    def __init__(self, reason: str, message: str, *, column: int | None = None, byte: int | None = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.column, self.byte = reason, message, column, byte


@dataclass
class Counts:
    """What became of the lines read: lines = samples + blank + empty + bad, always."""

    lines: int = 0
    samples: int = 0
    blank: int = 0
    empty: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    control_characters: int = 0
    """Samples (already counted) whose text holds control characters."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a manifest."""
        return {
            "lines": self.lines,
            "samples": self.samples,
            "blank": self.blank,
            "empty_outputs": self.empty,
            "bad": dict(sorted(self.bad.items())),
            "samples_with_control_characters": self.control_characters,
        }


class BadLines:
    """What happens to bad lines: the first is refused, or each is skipped, counted and noted up to a cap.

    Args:
        policy: `refuse` or `skip`.
        max_bad: skip: more bad lines than this are refused.
    """

    def __init__(self, policy: OnBadLine = "refuse", max_bad: int = 1000) -> None:
        self.policy, self.max_bad, self.total = policy, max_bad, 0
        self._notes: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the run, has no name

    def add(self, source: str, line: int, offset: int, problem: LineError, counts: Counts) -> None:
        """Count and note a bad line, or raise.

        Raises:
            DataError: policy `refuse`, or the cap is exceeded.
        """
        place = f"{source}:{line}" + (f":{problem.column}" if problem.column is not None else "")
        byte = None if problem.byte is None else offset + problem.byte
        message = problem.message if byte is None else f"{problem.message} (byte {byte} of the file)"
        if self.policy == "refuse":
            raise DataError(
                f"{place}: {message}", hint="Correct the line, or pass --on-bad-line skip to leave such lines out and count them"
            )
        self.total += 1
        counts.bad[problem.reason] += 1
        if self.total > self.max_bad:
            reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(counts.bad.items()))
            raise DataError(
                f"{place}: {message}; this is bad line {self.total}, --max-bad allows {self.max_bad} ({reasons})",
                hint="Look at the data, or raise --max-bad",
            )
        note = {"file": source, "line": line, "column": problem.column, "byte": byte, "reason": problem.reason, "message": problem.message}
        self._notes.write(orjson.dumps(note) + b"\n")

    def copy_to(self, stream: BinaryIO) -> None:
        """Write the notes, a JSON object a line."""
        self._notes.seek(0)
        while block := self._notes.read(_READ_BYTES):
            stream.write(block)


def expand(patterns: Sequence[str | Path]) -> list[str]:
    """Files named by paths, globs and `-`, checked before any work starts.

    Raises:
        DataError: a path or glob that names no file, a directory, an empty file, a file twice, a compressed file whose
            name does not say so.
    """
    names: list[str] = []
    for pattern in map(str, patterns):
        if pattern == STDIN or os.path.lexists(pattern):
            names.append(pattern)
            continue
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


def _check_file(name: str) -> object:
    """What identifies the file; refuses what could not be read later."""
    if name == STDIN:
        return STDIN
    if os.path.isdir(name):
        raise DataError(f"{name}: is a directory", hint=f"Name its files, for example '{name.rstrip('/')}/*.jsonl'")
    try:
        status = os.stat(name)
        if stat.S_ISREG(status.st_mode):  # a pipe can be opened only once, later
            with open(name, "rb") as stream:
                _check_start(name, stream.read(4))
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    return status.st_dev, status.st_ino


def _check_start(name: str, start: bytes) -> None:
    if not start:
        raise DataError(f"{name}: the file is empty (0 bytes)", hint="Remove it from --input, or write the data again")
    for suffix, magic, kind in ((".gz", _GZIP, "gzip"), (".zst", _ZSTD, "zstandard")):
        if start.startswith(magic) and not name.endswith(suffix):
            raise DataError(f"{name}: this is a {kind} file, not text", hint=f"Rename it to end in {suffix}")
        if name.endswith(suffix) and not start.startswith(magic):
            raise DataError(f"{name}: the name ends in {suffix} but the file is not {kind}: it starts with {start.hex(' ')}", corrupt=True)
    if start.startswith(_UTF16):
        raise DataError(f"{name}: not UTF-8: the file starts like UTF-16 (byte 0)", hint="Convert it: iconv -f UTF-16 -t UTF-8")


class Source:
    """One input file while it is read: hashes the bytes of the file and counts them, and unpacks them.

    Attributes:
        name: as given.
        raw_bytes: bytes of the file read so far (compressed ones, where it is compressed).
        finished: the end was reached, so that `sha256` is the file's.
    """

    def __init__(self, name: str) -> None:
        self.name, self.raw_bytes, self.lines, self.finished = name, 0, 0, False
        self._digest = hashlib.sha256()
        try:
            self._raw: IO[bytes] = sys.stdin.buffer if name == STDIN else open(name, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror}") from error
        self._stream: Any = self
        if name.endswith(".gz"):
            self._stream = gzip.GzipFile(fileobj=cast(Any, self), mode="rb")
        elif name.endswith(".zst"):
            try:
                import zstandard
            except ImportError as error:
                raise DataError(f"{name}: reading .zst needs the zstandard package", hint="pip install 'megawrap[zstd]'") from error
            self._stream = _ZstdStream(self, zstandard.ZstdDecompressor())

    def read(self, size: int = -1) -> bytes:
        """Raw bytes, hashed on the way; what the decompressors call."""
        block = self._raw.read(size)
        self._digest.update(block)
        self.raw_bytes += len(block)
        self.finished = self.finished or not block
        return block

    def chunks(self) -> Iterator[bytes]:
        """Unpacked bytes, up to 1 MiB at a time.

        Raises:
            DataError: the compressed file is damaged.
        """
        while True:
            try:
                block = self._stream.read(_READ_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{self.name}: damaged after {self.raw_bytes} bytes: {error}", corrupt=True) from error
            except Exception as error:
                if type(error).__module__.startswith(("zstandard", "zstd")):
                    raise DataError(f"{self.name}: damaged after {self.raw_bytes} bytes: {error}", corrupt=True) from error
                raise
            if not block:
                return
            yield block

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

    def read(self, _size: int) -> bytes:
        """The next unpacked bytes; 4 KiB of input at a time bounds what a hostile file can unfold to."""
        while True:
            block = self._left or self._source.read(4096)
            self._left = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the file is cut in the middle of a frame")
                return b""
            self._frame = self._frame or self._decompressor.decompressobj()
            unpacked = self._frame.decompress(block)
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
            if unpacked:
                return bytes(unpacked)


def split_lines(chunks: Iterator[bytes], max_line_bytes: int) -> Iterator[tuple[int, bytes | None, bool]]:
    """Lines without their newline.

    Args:
        chunks: blocks of the file in order.
        max_line_bytes: a longer line is given as None as soon as that is known, its rest is passed over unread.

    Yields:
        (byte offset of the line, its bytes or None, whether a newline ends it).
    """
    pending: list[bytes] = []
    held = offset = 0  # bytes pending; where the pending line starts
    skipping = False
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        pending.append(first)
        held += len(first)
        if held > max_line_bytes and not skipping:
            yield offset, None, False
            skipping = True
        if skipping:
            pending.clear()
        for following in rest:
            if not skipping:
                yield offset, b"".join(pending), True
            offset += held + 1
            pending, held, skipping = [following], len(following), False
            if held > max_line_bytes:
                yield offset, None, False
                skipping = True
                pending.clear()
    if held and not skipping:
        yield offset, b"".join(pending), False


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


def _quotes(value: Any) -> int:
    """Double quotes a JSON text of `value` has when none of them is written as \\u0022."""
    if isinstance(value, str):
        return 2 + value.count('"')
    if isinstance(value, dict):
        return sum(_quotes(key) + _quotes(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(_quotes, value))
    return 0


def parse_object(line: bytes, *, complete: bool = True) -> dict[str, Any]:
    """The JSON object of a line, keys unique at every level.

    A key written twice is found without a second parse: orjson drops the first, so the text has more quotes than the
    object accounts for. Only where a quote is spelled \\u0022 or quotes are left over does the exact parser decide.

    Args:
        line: without its newline.
        complete: a newline ended it; without, a line that is not JSON is called cut.

    Raises:
        LineError: naming the reason and, where there is one, the column.
    """
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        value = _parse_carefully(line, error, complete)
    if not isinstance(value, dict):
        raise LineError("not-an-object", f"{_KIND[type(value)]}, but every line must be an object like {{...}}", column=1)
    if b"\\u0022" in line or line.count(b'"') != _quotes(value):
        try:
            json.loads(line.decode(), object_pairs_hook=_unique, strict=False)
        except _DuplicateKeyError as error:
            column = line.decode().rfind(json.dumps(error.key, ensure_ascii=False)) + 1
            raise LineError("duplicate-key", f"the key {error.key!r} is there twice", column=column or None) from error
    return value


def _parse_carefully(line: bytes, error: orjson.JSONDecodeError, complete: bool) -> Any:
    """Say why orjson refused a line; bare control characters inside strings are the one thing accepted."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as problem:
        if not complete and problem.end == len(line) and "unexpected end" in problem.reason:
            raise LineError(
                "cut-last-line", "the last line is cut: no newline, and it ends inside a character", byte=problem.start
            ) from problem
        raise LineError("not-utf8", "not UTF-8", column=problem.start + 1, byte=problem.start) from problem
    constants: list[str] = []

    def constant(name: str) -> None:
        constants.append(name)

    try:
        value = json.loads(text, strict=False, parse_constant=constant)
        encoded = orjson.dumps(value)  # refuses lone surrogates
    except (ValueError, RecursionError, TypeError) as problem:
        if "surrogate" in str(error) or "surrogate" in str(problem):
            raise LineError("lone-surrogate", f"half of a surrogate pair, which is not text: {error.msg}", column=error.colno) from error
        if not complete:
            raise LineError("cut-last-line", f"the last line is cut: no newline, and not JSON: {error.msg}", column=error.colno) from error
        raise LineError("invalid-json", f"not JSON: {error.msg}", column=error.colno) from error
    if constants:
        raise LineError("nan-literal", f"{constants[0]} is not JSON", column=error.colno)
    if not _has_raw_control(line):
        raise LineError("invalid-json", f"not JSON: {error.msg}", column=error.colno)
    return orjson.loads(encoded)


def _has_raw_control(line: bytes) -> bool:
    return len(line.translate(None, _RAW_CONTROL)) != len(line)


def _may_have_controls(line: bytes) -> bool:
    """False only when no string of the line can hold a control character, by any spelling; cheap."""
    return b"\\u00" in line or b"\\b" in line or b"\\f" in line or _has_raw_control(line)


def pick_fields(value: dict[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    """The strings under `fields`.

    Raises:
        LineError: a key is missing (keys seen, nearest suggestion) or its value is not a string.
    """
    try:
        texts = tuple(value[name] for name in fields)
    except KeyError as error:
        missing, seen = error.args[0], [repr(key) for key in list(value)[:10]]
        near = difflib.get_close_matches(missing, list(value), n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        raise LineError("missing-key", f"no key {missing!r}, the keys are {', '.join(seen) or 'none'}{suggestion}") from error
    for name, text in zip(fields, texts, strict=True):
        if not isinstance(text, str):
            raise LineError("wrong-type", f"{name!r} is {_KIND[type(text)]}, it must be a string")
    return texts


class JsonlReader:
    """Read samples from files, in order.

    Args:
        names: what `expand` returned.
        fields: keys to read; the last is what is trained, and a sample where it is empty is dropped.
        bad_lines: policy for lines that are not samples.
        strict: an empty last field is a bad line instead.
        check: extra check of the texts of a sample; raises LineError.
        max_line_bytes: a longer line is a bad line.
        limit: read only this many lines.
    """

    def __init__(
        self,
        names: Sequence[str],
        fields: Sequence[str],
        *,
        bad_lines: BadLines | None = None,
        strict: bool = False,
        check: Callable[[tuple[str, ...]], None] | None = None,
        max_line_bytes: int = MAX_LINE_BYTES,
        limit: int | None = None,
    ) -> None:
        self.names, self.fields, self.counts = list(names), tuple(fields), Counts()
        self.sources: list[Source] = []
        self.bad_lines = bad_lines or BadLines()
        self._strict, self._check, self._max_line_bytes, self._limit = strict, check, max_line_bytes, limit

    @property
    def raw_bytes(self) -> int:
        """Bytes of the files read so far."""
        return sum(source.raw_bytes for source in self.sources)

    def batches(self, batch_bytes: int = 16 << 20) -> Iterator[list[Sample]]:
        """Samples in input order, about `batch_bytes` of lines at a time.

        Raises:
            DataError: a bad line under policy `refuse`, too many of them, a damaged or empty file.
        """
        batch: list[Sample] = []
        held = 0
        for name in self.names:
            if self._limit is not None and self.counts.lines >= self._limit:
                break
            source = Source(name)
            self.sources.append(source)
            try:
                for offset, line, complete in split_lines(source.chunks(), self._max_line_bytes):
                    if self._limit is not None and self.counts.lines >= self._limit:
                        break
                    source.lines += 1
                    self.counts.lines += 1
                    sample = self._sample(source, offset, line, complete)
                    if sample is not None:
                        batch.append(sample)
                        held += len(line or b"")
                    if held >= batch_bytes:
                        yield batch
                        batch, held = [], 0
            finally:
                source.close()
            if source.lines == 0:
                raise DataError(f"{'standard input' if name == STDIN else name}: empty: there is no line in it")
        if batch:
            yield batch

    def _sample(self, source: Source, offset: int, line: bytes | None, complete: bool) -> Sample | None:
        if line is not None and offset == 0 and line.startswith(BOM):
            line, offset = line[len(BOM) :], len(BOM)
        if line is not None and not line.strip():
            self.counts.blank += 1
            return None
        try:
            texts = self._parse(line, complete)
            if texts[-1] and self._check is not None:
                self._check(texts)
        except LineError as problem:
            self.bad_lines.add(source.name, source.lines, offset, problem, self.counts)
            return None
        if not texts[-1]:
            self.counts.empty += 1
            return None
        if _may_have_controls(line or b"") and any(map(_CONTROL.search, texts)):
            self.counts.control_characters += 1
        self.counts.samples += 1
        return Sample(texts, source.name, source.lines)

    def _parse(self, line: bytes | None, complete: bool) -> tuple[str, ...]:
        if line is None:
            limit = self._max_line_bytes
            raise LineError("line-too-long", f"longer than {limit} bytes ({limit / 2**20:g} MiB), the most --max-line-mib allows")
        texts = pick_fields(parse_object(line, complete=complete), self.fields)
        if self._strict and not texts[-1]:
            raise LineError("empty-outputs", f"{self.fields[-1]!r} is empty, which --strict refuses")
        return texts
