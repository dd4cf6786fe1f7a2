"""Every kind of line by what becomes of it: samples, blank, empty, and every kind of bad line by the facts in its message."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megawrap.data import jsonl
from megawrap.data.counts import BadLines
from megawrap.errors import EXIT_USAGE, DataError
from tests.data.reading import GOOD, added_up, read

# ---- the bad lines, R17 ---------------------------------------------------------------------------------------------

BAD: dict[str, tuple[bytes, str, list[str]]] = {
    # name: (line, reason, what the message must say besides file and line)
    "invalid JSON": (b'{"inputs": "a", "outputs" "b"}', "invalid-json", [":2:27:", "not JSON"]),
    "not an object": (b'["a", "b"]', "not-an-object", [":2:1:", "a list", "object"]),
    "bare string": (b'"a"', "not-an-object", ["a string", "object"]),
    "missing key": (b'{"inputs": "a", "output": "b"}', "missing-key", ["'outputs'", "'inputs', 'output'", "did you mean 'output'"]),
    "null": (b'{"inputs": "a", "outputs": null}', "wrong-type", ["'outputs' is null", "must be a string"]),
    "number": (b'{"inputs": 3, "outputs": "b"}', "wrong-type", ["'inputs' is a number"]),
    "list": (b'{"inputs": ["a"], "outputs": "b"}', "wrong-type", ["'inputs' is a list"]),
    "duplicate key": (b'{"inputs": "a", "outputs": "b", "inputs": "c"}', "duplicate-key", [":2:33:", "'inputs'", "twice"]),
    "duplicate key, escaped": (b'{"inputs": "a", "outputs": "b", "in\\u0070uts": "c"}', "duplicate-key", ["'inputs'", "twice"]),
    "not UTF-8": (b'{"inputs": "a\xff", "outputs": "b"}', "not-utf8", [":2:14:", "not UTF-8", "byte 45 of the file"]),
    "lone surrogate": (b'{"inputs": "\\ud83d", "outputs": "b"}', "lone-surrogate", ["surrogate"]),
    "NaN": (b'{"inputs": "a", "outputs": "b", "score": NaN}', "nan-literal", [":2:42:", "NaN is not JSON"]),
    "-Infinity": (b'{"inputs": "a", "outputs": "b", "score": -Infinity}', "nan-literal", ["-Infinity is not JSON"]),
    "too long": (b'{"inputs": "' + b"a" * 500 + b'", "outputs": "b"}', "line-too-long", ["longer than 400 bytes"]),
    "utf-16 text": ('{"inputs"'.encode("utf-16-le"), "invalid-json", ["not JSON"]),
    "trailing garbage": (GOOD + b"}", "invalid-json", ["not JSON"]),
    "two objects": (GOOD + GOOD, "invalid-json", ["not JSON"]),
    "python dict": (b"{'inputs': 'a', 'outputs': 'b'}", "invalid-json", [":2:2:", "not JSON"]),
    "gzip member": (gzip.compress(GOOD, mtime=0).replace(b"\n", b""), "not-utf8", ["not UTF-8"]),
    "strict empty outputs": (b'{"inputs": "a", "outputs": ""}', "empty-outputs", ["'outputs' is empty", "--strict"]),
}


def with_bad_line(tmp_path: Path, line: bytes) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    return path


@pytest.mark.parametrize("name", BAD)
def test_r17_bad_line_is_refused_by_file_and_line(tmp_path: Path, name: str) -> None:
    line, _, facts = BAD[name]
    path = with_bad_line(tmp_path, line)
    with pytest.raises(DataError) as refused:
        read(path, max_line_bytes=400, strict=True)
    message = str(refused.value)
    assert message.startswith(f"{path}:2:")
    for fact in facts:
        assert fact in message
    assert "--on-bad-line skip" in message
    assert refused.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("name", BAD)
def test_r17_bad_line_is_skipped_and_counted(tmp_path: Path, name: str) -> None:
    line, reason, _ = BAD[name]
    bad = BadLines("skip")
    samples, reader = read(with_bad_line(tmp_path, line), max_line_bytes=400, strict=True, bad_lines=bad)
    assert [(sample.texts, sample.line) for sample in samples] == [(("a", "b"), 1), (("a", "b"), 3)]
    assert dict(reader.counts.bad) == {reason: 1}
    assert reader.counts.lines == 3 == added_up(reader)
    notes = io.BytesIO()
    bad.copy_to(notes)
    (note,) = map(json.loads, notes.getvalue().splitlines())
    assert (note["file"], note["line"], note["reason"]) == (str(tmp_path / "data.jsonl"), 2, reason)


def test_at_least_twenty_kinds() -> None:
    assert len(BAD) >= 20


def test_nesting(tmp_path: Path) -> None:
    deep = b'{"inputs": "a", "outputs": "b", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    with pytest.raises(DataError, match=r":2:.*not JSON"):
        read(with_bad_line(tmp_path, deep))


def test_cap_on_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"[]", b"{", b"[]", GOOD]) + b"\n")
    with pytest.raises(DataError) as refused:
        read(path, bad_lines=BadLines("skip", max_bad=2))
    for fact in (f"{path}:4:", "bad line 3", "--max-bad allows 2", "invalid-json 1", "not-an-object 2"):
        assert fact in str(refused.value)
    _, reader = read(path, bad_lines=BadLines("skip", max_bad=3))
    assert reader.counts.samples == 2


@pytest.mark.parametrize("cut", [GOOD[:-1], GOOD[:20], b'{"inputs": "\xc3'])
def test_cut_last_line(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\n" + cut)
    with pytest.raises(DataError, match=r":2:.*the last line is cut"):
        read(path)
    path.write_bytes(GOOD + b"\n" + GOOD)  # whole, only without its newline
    assert len(read(path)[0]) == 2


def test_blank_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n  \n" + GOOD + b"\n\r\n\t\n" + GOOD + b"\n\n")
    samples, reader = read(path)
    assert [sample.line for sample in samples] == [3, 6]
    assert (reader.counts.blank, reader.counts.lines) == (5, 7)


def test_empty_outputs_are_dropped_and_counted(tmp_path: Path) -> None:
    path = with_bad_line(tmp_path, b'{"inputs": "a", "outputs": ""}')
    samples, reader = read(path)
    assert len(samples) == 2
    assert (reader.counts.empty, added_up(reader)) == (1, 3)
    # An empty input is a sample: pairs must not shift.
    path = with_bad_line(tmp_path, b'{"inputs": "", "outputs": "b"}')
    assert [sample.texts for sample in read(path)[0]] == [("a", "b"), ("", "b"), ("a", "b")]


def test_bom_and_crlf_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl.BOM + GOOD + b"\r\n" + GOOD + b"\r\n")
    assert [sample.texts for sample in read(path)[0]] == [("a", "b")] * 2
    path.write_bytes(jsonl.BOM + b'{"inputs": "\xff"}\n')
    with pytest.raises(DataError, match="byte 15 of the file"):
        read(path)


@pytest.mark.parametrize("spelling", [b"\\u0000", b"\\u001b", b"\\b", b"\\f", b"\x01", b"\x00"])
def test_control_characters_are_accepted_and_counted(tmp_path: Path, spelling: bytes) -> None:
    line = b'{"inputs": "a' + spelling + b'", "outputs": "b"}'
    samples, reader = read(with_bad_line(tmp_path, line))
    assert samples[1].texts[0] == json.loads(line, strict=False)["inputs"]
    assert reader.counts.control_characters == 1
    assert reader.counts.samples == 3
    samples, reader = read(with_bad_line(tmp_path, b'{"inputs": "tab\\tand\\nnewline \\\\bar", "outputs": "b"}'))
    assert reader.counts.control_characters == 0


def test_huge_line_is_refused_without_being_loaded(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as stream:
        stream.write(GOOD + b'\n{"inputs": "')
        stream.seek(200 << 20, 1)  # a hole: takes no disk
        stream.write(b'", "outputs": "b"}\n' + GOOD + b"\n")
    tracemalloc.start()
    with pytest.raises(DataError, match=r":2:.*longer than 8388608 bytes \(8 MiB\), the most --max-line-mib allows"):
        read(path, max_line_bytes=8 << 20)
    samples, reader = read(path, max_line_bytes=8 << 20, bad_lines=BadLines("skip"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [sample.line for sample in samples] == [1, 3]
    assert dict(reader.counts.bad) == {"line-too-long": 1}
    assert peak < 24 << 20


def test_default_limit_refuses_a_100_mb_line() -> None:
    assert jsonl.MAX_LINE_BYTES == 64 << 20


# ---- whole blocks against single lines ------------------------------------------------------------------------------

PIECES = st.sampled_from(["<|a|>", "<|a", "|>", "<x>", "<", "a", "é", "😀", "\x01", "\x7f", "\n", '"', "\\", "\u0022", "x>"])
TEXTS = st.lists(PIECES, max_size=4).map("".join)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.lists(st.tuples(TEXTS, TEXTS, st.booleans(), st.sampled_from(["", "[]", "  ", "bare"])), min_size=1, max_size=30),
    block=st.integers(20, 3000),
)
def test_a_block_read_whole_gives_what_its_lines_give(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[str, str, bool, str]], block: int
) -> None:
    """Texts, lines, counts of control characters and of special tokens, with words cut across the borders of texts."""
    words = ["<|a|>", "<x>"]
    lines, wanted = [], []
    for inputs, outputs, ascii_, before in samples:
        lines += [before] * (before != "")
        lines.append(json.dumps({"inputs": inputs, "outputs": outputs, "more": [inputs]}, ensure_ascii=ascii_))
        if outputs:
            wanted.append(((inputs, outputs), len(lines)))
    path = tmp_path_factory.mktemp("blocks") / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def special(texts: Sequence[str]) -> list[tuple[int, str]]:
        return [(place, word) for place, text in enumerate(texts) for word in words if word in text]

    for known in (words, None):
        found, reader = read(path, special=special, special_words=known, block_bytes=block, bad_lines=BadLines("skip"))
        assert [(sample.texts, sample.line) for sample in found] == wanted
        assert reader.counts.special_texts == sum(any(word in text for word in words for text in texts) for texts, _ in wanted)
        assert reader.counts.control_characters == sum(any("\x01" in text for text in texts) for texts, _ in wanted)
        assert reader.counts.lines == len(lines) == added_up(reader)
        assert sum(reader.counts.bad.values()) == sum(line in ("[]", "bare") for line in lines)
