"""Lines and the JSON objects in them: blocks of a file to whole lines, a line to an object or to the reason it is none.

In: bytes of a file in order. Out: `LineBlock`s, and objects whose keys are unique at every level; `LineError` says what
is wrong with a line and where. `proven` checks a whole block of parsed lines at once, at the speed of memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import orjson

BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 64 << 20
_RAW_CONTROL = bytes(range(32))
_CACHED = 1 << 18  # bytes compared at once: they and the result stay in the cache
KIND = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}


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


class LineBlock(NamedTuple):
    """Lines that follow each other in a file, without their newlines."""

    offset: int
    """Of the first line, in bytes from where reading started."""
    lines: list[bytes | None]
    """None for a line longer than allowed; its rest is passed over unread."""
    body: bytes
    """The bytes of the lines with their newlines; empty where a line is None."""
    complete: bool = True
    """The last line ended with a newline."""

    def position(self, index: int) -> int:
        """Offset of a line, in bytes from where reading started."""
        return self.offset + sum(len(line or b"") + 1 for line in self.lines[:index])


def line_blocks(chunks: Iterable[bytes], max_line_bytes: int) -> Iterator[LineBlock]:
    """Blocks of whole lines, one per chunk that ends a line.

    Args:
        chunks: blocks of the file in order.
        max_line_bytes: a longer line is given as None as soon as that is known.
    """
    pending: list[bytes] = []  # the start of a line whose end was not read yet
    held = offset = 0
    skipping = False
    for chunk in chunks:
        if skipping:
            end = chunk.find(b"\n") + 1
            offset += end or len(chunk)
            if not end:
                continue
            chunk, skipping = chunk[end:], False
        cut = chunk.rfind(b"\n") + 1
        if cut:
            body = b"".join((*pending, memoryview(chunk)[:cut]))
            yield _bounded(LineBlock(offset, body.split(b"\n")[:-1], body), max_line_bytes)  # type: ignore[arg-type]
            offset += len(body)
            pending, held = [], 0
        if cut < len(chunk):
            pending.append(chunk[cut:])
            held += len(chunk) - cut
        if held > max_line_bytes:
            yield LineBlock(offset, [None], b"", complete=False)
            offset += held
            pending, held, skipping = [], 0, True
    if held:
        body = b"".join(pending)
        yield LineBlock(offset, [body], body, complete=False)


def _bounded(block: LineBlock, max_line_bytes: int) -> LineBlock:
    """The block with None for lines that are too long; each such line stands in a block that is not proven."""
    if len(block.body) <= max_line_bytes or max(map(len, block.lines)) <= max_line_bytes:  # type: ignore[arg-type]
        return block
    return block._replace(lines=[line if len(line or b"") <= max_line_bytes else None for line in block.lines], body=b"")


def proven(block: LineBlock, num_quotes: int) -> bool:
    """Whether no line of a block whose every line orjson accepted can have a key twice.

    orjson keeps the last of two equal keys, so a line with one has more double quotes than its object accounts for, and
    no line has fewer, as long as none is spelled \\u0022: when the whole block is even, each of its lines is.

    Args:
        block: whose lines were parsed.
        num_quotes: what `count_quotes` says of all objects of the block together.
    """
    return count_byte(block.body, 34) == num_quotes and not _has_escaped_quote(block.body)


def count_byte(data: bytes, value: int) -> int:
    """How often a byte occurs."""
    array, found = np.frombuffer(data, dtype=np.uint8), 0
    for first in range(0, len(array), _CACHED):
        found += int(np.count_nonzero(array[first : first + _CACHED] == value))
    return found


def _has_escaped_quote(data: bytes) -> bool:
    """Whether \\u0022 occurs; five times as fast as `in` where backslashes are many and \\u are few."""
    array = np.frombuffer(data, dtype=np.uint8)
    for first in range(0, len(array), _CACHED):
        part = array[first : first + _CACHED + 5]
        found = part[:-1] == 92
        found &= part[1:] == 117
        if found.any() and b"\\u0022" in part.tobytes():
            return True
    return False


def control_positions(data: bytes) -> np.ndarray:
    """Where text (UTF-8) holds control characters other than tab, newline and carriage return; int64, bytes."""
    array, positions = np.frombuffer(data, dtype=np.uint8), []
    for first in range(0, len(array), _CACHED):
        part = array[first : first + _CACHED]
        found = part < 32
        for usual in (9, 10, 13):
            found &= part != usual
        if found.any():
            positions.append(np.flatnonzero(found) + first)
    return np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64)


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


def count_quotes(value: Any) -> int:
    """Double quotes a JSON text of `value` has when none of them is written as \\u0022."""
    if isinstance(value, str):
        return 2 + value.count('"')
    if isinstance(value, dict):
        return sum(count_quotes(key) + count_quotes(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(count_quotes, value))
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
        raise LineError("not-an-object", f"{KIND[type(value)]}, but every line must be an object like {{...}}", column=1)
    try:
        even = b"\\u0022" not in line and line.count(b'"') == count_quotes(value)
    except RecursionError as error:
        raise LineError("invalid-json", "nested too deeply") from error
    if not even:
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
