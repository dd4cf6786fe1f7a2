"""Which files are read, in what order, and what their bytes and compression must be."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megawrap.data.fields import extractor
from megawrap.data.inputs import Piece, expand
from megawrap.data.reader import SampleReader
from megawrap.errors import EXIT_CORRUPT, DataError
from tests.data.reading import FIELDS, GOOD, read, unbatch

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


def test_directory_stands_for_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    with pytest.raises(DataError, match=r"data: is a directory without a \.jsonl, .* file; it holds sub"):
        expand([folder])
    (folder / "notes.txt").write_text("no")
    (folder / "sub" / "a.jsonl").write_bytes(GOOD)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(GOOD))
    (folder / "c.jsonl.xz").write_bytes(lzma.compress(GOOD))
    assert expand([folder]) == [str(folder / name) for name in ("b.jsonl.gz", "c.jsonl.xz", "sub/a.jsonl")]
    assert len(read(folder)[0]) == 3


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


def test_xz(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.xz"
    stream = lzma.compress((GOOD + b"\n") * 5000)
    path.write_bytes(stream + stream)
    samples, reader = read(path)
    assert len(samples) == 10_000
    assert reader.sources[0].facts()["sha256"] == hashlib.sha256(stream + stream).hexdigest()
    for damaged in (stream[:-9], stream[:40] + b"\xff" + stream[41:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"data\.jsonl\.xz: damaged") as refused:
            read(path)
        assert refused.value.exit_code == EXIT_CORRUPT
    path.rename(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match=r"data\.jsonl: this is a xz file.*\.xz"):
        expand([tmp_path / "data.jsonl"])


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
    reader = SampleReader([Piece(str(path))], extractor(FIELDS), block_bytes=10 * len(GOOD) + 15)
    sizes = [len(batch.lines) for batch in reader.batches()]
    assert sum(sizes) == 100
    assert set(sizes[:-1]) <= {10, 11}


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(GOOD + b"\n" + GOOD)

    monkeypatch.setattr("sys.stdin", Stdin)
    reader = SampleReader([Piece("-")], extractor(FIELDS))
    assert sum(len(batch.lines) for batch in reader.batches()) == 2
    assert reader.sources[0].facts()["bytes"] == 2 * len(GOOD) + 1
    Stdin.buffer = io.BytesIO()
    with pytest.raises(DataError, match="standard input: empty"):
        list(SampleReader([Piece("-")], extractor(FIELDS)).batches())


def test_named_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    names = expand([pipe])  # must not open it: that would eat the writer's first bytes
    writer = threading.Thread(target=lambda: pipe.write_bytes(GOOD + b"\n" + GOOD))
    writer.start()
    reader = SampleReader([Piece(name) for name in names], extractor(FIELDS))
    assert sum(len(batch.lines) for batch in reader.batches()) == 2
    writer.join()


def test_file_that_goes_away(tmp_path: Path, good: Path) -> None:
    names = expand([good])
    good.unlink()
    with pytest.raises(DataError, match=r"good\.jsonl: cannot be read: No such file"):
        list(SampleReader([Piece(name) for name in names], extractor(FIELDS)).batches())


# ---- ranges of lines ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    newline_at_end=st.booleans(),
    cuts=st.lists(st.integers(0, 600), max_size=5),
    block=st.integers(1, 70),
)
def test_ranges_cover_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], newline_at_end: bool, cuts: list[int], block: int
) -> None:
    """However a file is cut, each line is read by the range it starts in, with its number."""
    lines = [json.dumps({"inputs": str(number), "outputs": "x" * length}) for number, length in enumerate(lengths, start=1)]
    path = tmp_path_factory.mktemp("ranges") / "data.jsonl"
    path.write_text("\n".join(lines) + "\n" * newline_at_end)
    size = path.stat().st_size
    bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
    found, end, digest = [], 0, hashlib.sha256()
    for start, stop in pairwise(bounds):
        reader = SampleReader([Piece(str(path), start, stop)], extractor(FIELDS), block_bytes=block)
        samples = [sample for batch in reader.batches() for sample in unbatch(batch)]
        (source,) = reader.sources
        assert source.first == end
        facts = source.facts()
        digest.update(path.read_bytes()[end : end + facts["bytes"]])
        assert hashlib.sha256(path.read_bytes()[end : end + facts["bytes"]]).hexdigest() == facts["sha256"]
        end += facts["bytes"]
        found += [(int(sample.texts[0]), source.line_number(sample.line)) for sample in samples]
        assert facts["lines_read"] == reader.counts.lines
    assert end == size
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found == [(number, number) for number, length in enumerate(lengths, start=1) if length]


def test_a_bad_line_in_a_range_is_told_by_its_number_and_byte_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes((GOOD + b"\n") * 5 + b'{"inputs": "\xff"}\n')
    with pytest.raises(DataError, match=rf"data\.jsonl:6:.*byte {5 * (len(GOOD) + 1) + 12} of the file"):
        list(SampleReader([Piece(str(path), 3 * (len(GOOD) + 1))], extractor(FIELDS)).batches())
