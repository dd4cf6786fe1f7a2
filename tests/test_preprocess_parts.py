"""Preprocessing in parts: the same bytes as in one go, continued after a stop, and refused when something changed meanwhile."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from megawrap.data.format import IndexedDataset
from megawrap.data.inputs import Piece
from megawrap.data.parts import divide
from megawrap.errors import EXIT_CORRUPT, EXIT_OK, EXIT_USAGE
from tests.preprocessing import OUTPUTS, hashes, left, random_text, run
from tests.tiny_tokenizer import PAD, write_tokenizer

SMALL = ("--part-mib", "0.002")  # about 2 KiB


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "out"


def dirty_line(rng: random.Random, texts: list[str]) -> tuple[str, str]:
    """A line of a random kind, and what must become of it."""
    a, b = rng.choice(texts), rng.choice(texts)
    good = json.dumps({"inputs": a, "outputs": b})
    kind = rng.choice(["sample"] * 12 + ["blank", "empty", "invalid-json", "not-an-object", "missing-key", "wrong-type", "duplicate-key"])
    lines = {
        "sample": good,
        "blank": rng.choice(["", "  ", "\t"]),
        "empty": json.dumps({"inputs": a, "outputs": ""}),
        "invalid-json": good[:-1],
        "not-an-object": json.dumps([a, b]),
        "missing-key": json.dumps({"inputs": a, "output": b}),
        "wrong-type": json.dumps({"inputs": a, "outputs": None}),
        "duplicate-key": good[:-1] + ', "inputs": "x"}',
    }
    return lines[kind], "empty" if kind == "sample" and not b else kind


def write_dirty(folder: Path, seed: int) -> tuple[list[Path], dict[str, int]]:
    """Three files of about 60 lines each, one of them compressed, and the counts they must give."""
    rng = random.Random(seed)
    texts = [random_text(rng) for _ in range(40)]
    wanted: dict[str, int] = {}
    paths = []
    for number in range(3):
        lines = []
        for _ in range(rng.randint(1, 60)):
            line, fate = dirty_line(rng, texts)
            lines.append(line)
            wanted[fate] = wanted.get(fate, 0) + 1
        lines.append('{"inputs": "a", "outputs": "b"}')
        wanted["sample"] = wanted.get("sample", 0) + 1
        content = ("\n".join(lines) + "\n" * rng.randint(0, 1)).encode()
        path = folder / f"{number}.jsonl"
        if number == 1:
            path, content = folder / "1.jsonl.gz", gzip.compress(content)
        path.write_bytes(content)
        paths.append(path)
    return paths, wanted


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("flags", [(), ("--dedup", "exact"), ("--twin-files", "targets", "--dedup", "exact")], ids=["", "dedup", "twins"])
def test_parts_give_the_bytes_of_one_go_and_counts_add_up(tmp_path: Path, tokenizer: Path, seed: int, flags: tuple[str, ...]) -> None:
    """R15 for files: with dirty lines, blank lines and duplicates in several files, every line is accounted for."""
    data = tmp_path / "data"
    data.mkdir()
    paths, wanted = write_dirty(data, seed)
    outs = [tmp_path / name / "out" for name in ("whole", "parts")]
    for out, size in zip(outs, ((), SMALL), strict=True):
        assert run(data, tokenizer, out, "--on-bad-line", "skip", *flags, *size) == EXIT_OK
    assert hashes(outs[0]) == hashes(outs[1])
    manifest = json.loads(next(outs[0].parent.glob("out*.manifest.json")).read_text())
    counts = manifest["lines"]
    assert counts["samples"] + counts["duplicates"] == wanted.pop("sample")
    assert counts["empty_outputs"] == wanted.pop("empty", 0)
    assert counts["blank"] == wanted.pop("blank", 0)
    assert counts["bad"] == dict(sorted(wanted.items()))
    content = [gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in paths]
    by_file = {str(path): text.split(b"\n") for path, text in zip(paths, content, strict=True)}
    assert counts["lines"] == sum(len(lines) - (lines[-1] == b"") for lines in by_file.values())
    if not flags:
        samples = [
            (value["inputs"], value["outputs"])
            for lines in by_file.values()
            for value in map(plain_sample, lines)
            if value is not None
        ]  # fmt: skip
        assert IndexedDataset(outs[0]).num_documents == len(samples) == counts["samples"]
    side_file = outs[0].with_name("out.bad.jsonl")
    notes = [json.loads(line) for line in side_file.read_text().splitlines()] if side_file.exists() else []
    assert len(notes) == sum(wanted.values())
    for note in notes:
        assert plain_sample(by_file[note["file"]][note["line"] - 1]) is None


def plain_sample(line: bytes) -> dict[str, Any] | None:
    """The standard library's opinion of a line."""
    keys: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys.extend(key for key, _ in pairs)
        return dict(pairs)

    try:
        value = json.loads(line, object_pairs_hook=collect)
    except ValueError:
        return None
    fits = isinstance(value, dict) and isinstance(value.get("inputs"), str) and isinstance(value.get("outputs"), str)
    return value if fits and value["outputs"] and len(set(keys)) == len(keys) else None


def write_many(path: Path, number: int = 300, seed: int = 5) -> Path:
    rng = random.Random(seed)
    path.write_text("".join(json.dumps({"inputs": random_text(rng), "outputs": random_text(rng) + "z"}) + "\n" for _ in range(number)))
    return path


def test_jobs_that_share_the_parts(tmp_path: Path, tokenizer: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_many(tmp_path / "data.jsonl")
    assert run(source, tokenizer, tmp_path / "clean" / "out") == EXIT_OK
    assert run(source, tokenizer, out, *SMALL, "--plan") == EXIT_OK
    parts = len(json.loads(out.with_name("out.parts").joinpath("plan.json").read_text())["parts"])
    assert parts > 10
    assert f"{parts} parts, 0 of them finished" in capsys.readouterr().out
    for job in (2, 0):
        assert run(source, tokenizer, out, *SMALL, "--only-parts", f"{job}/3") == EXIT_OK
    assert left(out) == {"out.parts"}
    assert run(source, tokenizer, out, *SMALL) == EXIT_OK  # does what is missing, and merges
    assert hashes(out) == hashes(tmp_path / "clean" / "out")
    assert left(out) == OUTPUTS


@pytest.fixture
def begun(tmp_path: Path, tokenizer: Path, out: Path) -> Path:
    """A run in parts of which a third is done; returns its input."""
    source = write_many(tmp_path / "data.jsonl")
    assert run(source, tokenizer, out, *SMALL, "--only-parts", "0/3") == EXIT_OK
    return source


def test_a_changed_option_is_refused_with_the_difference(
    begun: Path, tokenizer: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(out.with_name("out.parts").iterdir())
    assert run(begun, tokenizer, out, *SMALL, "--no-append-eod", "--dedup", "exact") == EXIT_USAGE
    message = capsys.readouterr().err
    assert 'options.append_eod was true, is false; options.dedup was none, is "exact"' in message
    assert "--restart" in message
    assert run(begun, tokenizer, out, "--part-mib", "0.003") == EXIT_USAGE
    assert "parts.number was" in capsys.readouterr().err
    assert sorted(out.with_name("out.parts").iterdir()) == before
    assert run(begun, tokenizer, out, *SMALL, "--no-append-eod", "--restart") == EXIT_OK
    assert left(out) == OUTPUTS


def test_a_changed_tokenizer_is_refused(tmp_path: Path, begun: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_tokenizer(tmp_path / "other", vocab_size=310)
    assert run(begun, other, out, *SMALL) == EXIT_USAGE
    assert "tokenizer.sha256 was" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["longer", "same size", "another file"])
def test_a_changed_input_is_refused(begun: Path, tokenizer: Path, out: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    content = begun.read_bytes()
    if change == "longer":
        begun.write_bytes(content + b'{"inputs": "a", "outputs": "b"}\n')
    elif change == "same size":
        begun.write_bytes(content.replace(b"z", b"y", 1))
    else:
        begun = write_many(begun.with_name("other.jsonl"))
    assert run(begun, tokenizer, out, *SMALL) == EXIT_USAGE
    message = capsys.readouterr().err
    facts = {
        "longer": f"data.jsonl.bytes was {len(content)}, is {len(content) + 32}",
        "same size": "mtime_ns was",
        "another file": "other.jsonl",
    }
    assert facts[change] in message
    assert left(out) == {"out.parts"}


def test_a_touched_input_is_not_a_changed_one(tmp_path: Path, begun: Path, tokenizer: Path, out: Path) -> None:
    os.utime(begun, (1, 1))
    assert run(begun, tokenizer, out, *SMALL) == EXIT_OK
    assert run(begun, tokenizer, tmp_path / "clean" / "out") == EXIT_OK
    assert hashes(out) == hashes(tmp_path / "clean" / "out")


def test_a_damaged_part_is_named(begun: Path, tokenizer: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = out.with_name("out.parts") / "part-00000.bin"
    part.write_bytes(bytes([part.read_bytes()[0] ^ 1]) + part.read_bytes()[1:])
    assert run(begun, tokenizer, out, *SMALL) == EXIT_CORRUPT
    assert "part-00000.bin: sha256" in capsys.readouterr().err
    assert left(out) == {"out.parts"}


def test_lines_are_numbered_by_file(tmp_path: Path, tokenizer: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_many(tmp_path / "data.jsonl")
    lines = source.read_text().splitlines()
    for number in (100, 200, 290):
        lines[number - 1] = "[]"
    source.write_text("\n".join(lines))
    assert run(source, tokenizer, out, *SMALL) == EXIT_USAGE
    assert f"{source}:100:1: a list" in capsys.readouterr().err
    assert run(source, tokenizer, out, *SMALL, "--restart", "--on-bad-line", "skip", "--max-bad", "2") == EXIT_USAGE
    assert f"{source}:290:1: a list, but every line must be an object like {{...}}; this is bad line" in capsys.readouterr().err
    assert run(source, tokenizer, out, *SMALL, "--on-bad-line", "skip") == EXIT_OK
    notes = map(json.loads, out.with_name("out.bad.jsonl").read_text().splitlines())
    assert [note["line"] for note in notes] == [100, 200, 290]


def test_parts_without_a_sample(tmp_path: Path, tokenizer: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "data.jsonl"
    source.write_text('{"inputs": "a", "outputs": ""}\n' * 300)
    assert run(source, tokenizer, out, *SMALL) == EXIT_USAGE
    assert "no sample in 300 lines" in capsys.readouterr().err
    assert run(source, tokenizer, out, "--part-mib", "0.002", "--strict") == EXIT_USAGE
    assert "options.strict was false, is true" in capsys.readouterr().err
    assert run(source, tokenizer, out, "--part-mib", "0.002", "--strict", "--restart") == EXIT_USAGE
    assert f"{source}:1: 'outputs' is empty" in capsys.readouterr().err
    assert left(out) == set()  # no part was finished
    with source.open("a") as stream:
        stream.write(json.dumps({"inputs": PAD, "outputs": "b"}))
    assert run(source, tokenizer, out, *SMALL) == EXIT_OK
    assert IndexedDataset(out).num_documents == 1
    assert run(source, tokenizer, out, *SMALL) == EXIT_USAGE
    assert "already there" in capsys.readouterr().err
    assert left(out) == OUTPUTS


def test_how_input_is_divided(tmp_path: Path) -> None:
    names = []
    for name, size in (("a", 10), ("b", 20), ("c", 100), ("d.gz", 9), ("e", 1)):
        (tmp_path / name).write_bytes(b"x" * size)
        names.append(str(tmp_path / name))
    a, b, c, d, e = names
    assert divide(names, 40) == (
        (Piece(a), Piece(b)), (Piece(c, 0, 33),), (Piece(c, 33, 66),), (Piece(c, 66, 100),), (Piece(d), Piece(e)),
    )  # fmt: skip
    assert divide(names, 1000) == ((Piece(a), Piece(b), Piece(c), Piece(d), Piece(e)),)
    assert divide([a, "-"], 5) == ((Piece(a), Piece("-")),)  # standard input can be read only once
