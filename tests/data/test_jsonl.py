"""Reading JSON lines against the standard library's parser, and every kind of bad line by the facts in its message."""

from __future__ import annotations

import gzip
import io
import json
import os
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megawrap.data import jsonl
from megawrap.data.jsonl import BadLines, JsonlReader, LineError, Sample, expand, parse_object, split_lines
from megawrap.errors import EXIT_CORRUPT, EXIT_USAGE, DataError

FIELDS = ("inputs", "outputs")
GOOD = b'{"inputs": "a", "outputs": "b"}'


def read(*paths: Path, **options: Any) -> tuple[list[Sample], JsonlReader]:
    reader = JsonlReader(expand(list(paths)), FIELDS, **options)
    return [sample for batch in reader.batches() for sample in batch], reader


def added_up(reader: JsonlReader) -> int:
    counts = reader.counts
    return counts.samples + counts.blank + counts.empty + sum(counts.bad.values())


# ---- lines ----------------------------------------------------------------------------------------------------------


@given(content=st.binary(max_size=60).map(lambda data: data.replace(b"x", b"\n")), size=st.integers(1, 9), limit=st.integers(1, 12))
def test_split_lines_equals_bytes_split(content: bytes, size: int, limit: int) -> None:
    expected, offset = [], 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        if not (last and not line):
            expected.append((offset, line if len(line) <= limit else None, len(line) <= limit and not last))
        offset += len(line) + 1
    chunks = (content[first : first + size] for first in range(0, len(content), size))
    assert list(split_lines(chunks, limit)) == expected


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


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.jsonl"
    path.write_bytes(GOOD + b"\n")
    return path


def test_empty_file(tmp_path: Path, good: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: the file is empty \(0 bytes\)"):
        read(good, tmp_path / "empty.jsonl")
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"empty\.jsonl\.gz: empty"):
        read(good, tmp_path / "empty.jsonl.gz")


def test_missing_file_and_empty_glob(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: no such file"):
        expand([tmp_path / "no.jsonl"])
    with pytest.raises(DataError, match=r"\*\.jsonl: this glob matches no file"):
        expand([tmp_path / "*.jsonl"])


def test_globs_are_sorted_and_a_literal_name_wins(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "[x].jsonl", "sub"):
        (tmp_path / name).mkdir() if name == "sub" else (tmp_path / name).write_bytes(GOOD)
    assert [Path(name).name for name in expand([tmp_path / "*"])] == ["[x].jsonl", "a.jsonl", "b.jsonl"]
    assert expand([tmp_path / "[x].jsonl"]) == [str(tmp_path / "[x].jsonl")]


def test_same_file_twice(tmp_path: Path, good: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(good)
    for second in (good, tmp_path / "link.jsonl", tmp_path / "good*"):
        with pytest.raises(DataError, match=r"the same file twice \(first as .*good\.jsonl\)"):
            expand([good, second])
    with pytest.raises(DataError, match="twice"):
        expand(["-", "-"])


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a directory.*\*\.jsonl"):
        expand([tmp_path])


def test_compression_must_match_the_name(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(gzip.compress(GOOD))
    with pytest.raises(DataError, match=r"data\.jsonl: this is a gzip file.*\.gz"):
        expand([path])
    path.write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(DataError, match=r"data\.jsonl: this is a zstandard file.*\.zst"):
        expand([path])
    (tmp_path / "data.jsonl.gz").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"ends in \.gz but the file is not gzip") as refused:
        expand([tmp_path / "data.jsonl.gz"])
    assert refused.value.exit_code == EXIT_CORRUPT
    path.write_bytes(GOOD.decode().encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        expand([path])


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b"\n") + gzip.compress(GOOD + b"\n"))  # two members, as `cat a.gz b.gz` makes them
    samples, reader = read(path)
    assert len(samples) == 2
    assert reader.sources[0].facts()["bytes"] == path.stat().st_size
    for damage in (path.read_bytes()[:-4], path.read_bytes()[:30] + b"\0\0\0" + path.read_bytes()[33:]):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=r"data\.jsonl\.gz: damaged") as refused:
            read(path)
        assert refused.value.exit_code == EXIT_CORRUPT


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "data.jsonl.zst"
    frame = zstandard.ZstdCompressor(write_checksum=True).compress((GOOD + b"\n") * 5000)
    path.write_bytes(frame + frame)
    samples, reader = read(path)
    assert len(samples) == 10_000
    assert reader.sources[0].facts()["sha256"]
    path.write_bytes(frame + frame[:-3])
    with pytest.raises(DataError, match=r"data\.jsonl\.zst: damaged.*cut") as refused:
        read(path)
    assert refused.value.exit_code == EXIT_CORRUPT
    path.write_bytes(frame[:20] + b"\xff\xff\xff" + frame[23:])
    with pytest.raises(DataError, match=r"data\.jsonl\.zst: damaged"):
        read(path)


def test_zstandard_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    path = tmp_path / "data.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(DataError, match=r"zstandard package.*megawrap\[zstd\]"):
        read(path)


def test_several_files_keep_their_order_and_lines(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"inputs": name, "outputs": str(i)}) + "\n" for i in range(3)))
    samples, reader = read(tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    assert [(Path(sample.source).name, sample.line, *sample.texts) for sample in samples] == [
        (f"{name}.jsonl", i + 1, name, str(i)) for name in "ba" for i in range(3)
    ]
    assert [source.facts()["lines_read"] for source in reader.sources] == [3, 3]


def test_limit_reads_that_many_lines(tmp_path: Path, good: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes((GOOD + b"\n") * 5)
    samples, reader = read(path, good, limit=4)
    assert len(samples) == reader.counts.lines == 4
    assert [source.facts()["sha256"] for source in reader.sources] == [None]  # the file was not read whole
    samples, reader = read(path, good, limit=6)
    assert len(samples) == 6


def test_batches_hold_about_the_asked_bytes(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes((GOOD + b"\n") * 100)
    reader = JsonlReader(expand([path]), FIELDS)
    sizes = [len(batch) for batch in reader.batches(batch_bytes=10 * len(GOOD))]
    assert sizes == [10] * 10


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(GOOD + b"\n" + GOOD)

    monkeypatch.setattr("sys.stdin", Stdin)
    reader = JsonlReader(expand(["-"]), FIELDS)
    assert sum(map(len, reader.batches())) == 2
    assert reader.sources[0].facts()["bytes"] == 2 * len(GOOD) + 1
    Stdin.buffer = io.BytesIO()
    with pytest.raises(DataError, match="standard input: empty"):
        list(JsonlReader(expand(["-"]), FIELDS).batches())


def test_named_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    names = expand([pipe])  # must not open it: that would eat the writer's first bytes
    writer = threading.Thread(target=lambda: pipe.write_bytes(GOOD + b"\n" + GOOD))
    writer.start()
    assert sum(map(len, JsonlReader(names, FIELDS).batches())) == 2
    writer.join()


def test_file_that_goes_away(tmp_path: Path, good: Path) -> None:
    names = expand([good])
    good.unlink()
    with pytest.raises(DataError, match=r"good\.jsonl: cannot be read: No such file"):
        list(JsonlReader(names, FIELDS).batches())


def test_extra_check_is_a_line_problem(good: Path) -> None:
    def check(texts: tuple[str, ...]) -> Iterator[None]:
        raise LineError("mine", f"saw {texts}")

    with pytest.raises(DataError, match=r"good\.jsonl:1: saw \('a', 'b'\)"):
        read(good, check=check)
