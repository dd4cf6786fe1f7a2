"""Lines and objects against the standard library: splitting, keys that are there twice, and the check of whole blocks."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megawrap.data.jsonl import LineBlock, LineError, control_positions, count_quotes, line_blocks, parse_object, proven

# ---- lines ----------------------------------------------------------------------------------------------------------


@given(content=st.binary(max_size=60).map(lambda data: data.replace(b"x", b"\n")), size=st.integers(1, 9), limit=st.integers(1, 12))
def test_line_blocks_equal_bytes_split(content: bytes, size: int, limit: int) -> None:
    expected, offset = [], 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        if not (last and not line):
            fits = len(line) <= limit
            expected.append((offset, line if fits else None, fits and not last))
        offset += len(line) + 1
    chunks = (content[first : first + size] for first in range(0, len(content), size))
    found = []
    for block in line_blocks(chunks, limit):
        assert block.body == (b"" if None in block.lines else b"\n".join(block.lines) + b"\n" * block.complete)  # type: ignore[arg-type]
        at = block.offset
        for index, line in enumerate(block.lines):
            ended = index < len(block.lines) - 1 or block.complete
            found.append((at, line, ended and line is not None))
            at += len(content[at:].split(b"\n")[0]) + 1
    assert found == expected


# ---- one line -------------------------------------------------------------------------------------------------------

TRICKY = st.sampled_from(['"', "\\", "\\u0022", "a", "inputs", "é", "😀", "\n", "\t", "{", ":", ","])
STRINGS = st.lists(TRICKY, max_size=4).map("".join)
VALUES = st.recursive(
    STRINGS | st.integers(-5, 5) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(STRINGS, inner), max_size=3).map(dict),
    max_leaves=6,
)


def spell(text: str, how: int) -> str:
    """A JSON string; the bits of `how` choose for each character whether it is written as an escape."""
    units = [
        json.dumps(char)[1:-1] if not how >> place & 1 else "".join(f"\\u{unit:04x}" for unit in utf16(char))
        for place, char in enumerate(text)
    ]
    return '"' + "".join(units) + '"'


def utf16(char: str) -> list[int]:
    data = char.encode("utf-16-be")
    return [int.from_bytes(data[first : first + 2], "big") for first in range(0, len(data), 2)]


def has_duplicates(line: str) -> bool:
    found = []

    def hook(pairs: list[tuple[str, Any]]) -> None:
        found.append(len({key for key, _ in pairs}) < len(pairs))

    json.loads(line, object_pairs_hook=hook)
    return any(found)


@settings(max_examples=1000, deadline=None)
@given(pairs=st.lists(st.tuples(STRINGS, st.integers(0, 15), VALUES, st.booleans()), max_size=4))
@example(pairs=[("a", 0, "x", False), ("a", 1, "y", False)])  # the same key in two spellings
@example(pairs=[("a", 0, {"k": '"'}, False), ("a", 0, '""', True)])
def test_duplicate_keys_are_found_exactly_when_the_exact_parser_finds_them(pairs: list[tuple[str, int, Any, bool]]) -> None:
    line = "{" + ", ".join(f"{spell(key, how)}: {json.dumps(value, ensure_ascii=ascii_)}" for key, how, value, ascii_ in pairs) + "}"
    if has_duplicates(line):
        with pytest.raises(LineError, match="twice") as refused:
            parse_object(line.encode())
        assert refused.value.reason == "duplicate-key"
    else:
        assert parse_object(line.encode()) == json.loads(line)


@settings(max_examples=1000, deadline=None)
@given(objects=st.lists(st.lists(st.tuples(STRINGS, st.integers(0, 15), VALUES, st.booleans()), max_size=4), min_size=1, max_size=3))
@example(objects=[[("a", 0, "x", False), ("a", 0, "y", False)], [('"', 1, 0, False), ('"', 1, "", False)]])  # one too many, one too few
def test_a_block_is_proven_only_when_no_line_has_a_key_twice(objects: list[list[tuple[str, int, Any, bool]]]) -> None:
    lines = [
        "{" + ", ".join(f"{spell(key, how)}: {json.dumps(value, ensure_ascii=ascii_)}" for key, how, value, ascii_ in pairs) + "}"
        for pairs in objects
    ]
    body = "".join(line + "\n" for line in lines).encode()
    quotes = sum(count_quotes(orjson.loads(line)) for line in lines)
    block = LineBlock(0, body.split(b"\n")[:-1], body)
    if proven(block, quotes):
        assert not any(map(has_duplicates, lines))
    elif "\\u0022" not in body.decode():
        assert any(map(has_duplicates, lines))


@given(text=st.text(max_size=80))
def test_control_characters_are_found_by_place(text: str) -> None:
    usual = {9, 10, 13}
    assert control_positions(text.encode()).tolist() == [at for at, byte in enumerate(text.encode()) if byte < 32 and byte not in usual]


def test_what_lies_on_the_border_of_cached_parts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"a": "' + b"x" * 50 + b'\\u0022"}\n'
    for size in range(1, 70):
        monkeypatch.setattr("megawrap.data.jsonl._CACHED", size)
        assert not proven(LineBlock(0, [body[:-1]], body), body.count(b'"'))
        assert control_positions(b"ab\x01cd\x02").tolist() == [2, 5]
