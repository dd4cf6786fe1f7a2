"""Which texts a sample has and which are trained: keys, presets, loss flags, spans."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megawrap.data.build import Encoder, Options
from megawrap.data.fields import Batch, FieldTexts, SpanTexts, extractor
from megawrap.data.format import IndexedDataset
from megawrap.data.jsonl import LineError
from megawrap.data.tokenizer import Tokenizer
from megawrap.errors import EXIT_OK, EXIT_USAGE, DataError
from tests.preprocessing import run
from tests.tiny_tokenizer import END, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def decoded(prefix: Path, tokenizer: Path) -> list[list[tuple[str, int]]]:
    """(text, mode) of every sequence of every document."""
    data, decoder = IndexedDataset(prefix), Tokenizer(tokenizer)
    assert data.modes is not None
    bounds = data.document_indices.tolist()
    return [
        [(decoder.decode(data.sequence(index).tolist()), int(data.modes[index])) for index in range(first, stop)]
        for first, stop in pairwise(bounds)
    ]


CASES: dict[str, tuple[list[str], dict[str, Any], list[tuple[str, int]]]] = {
    "default": ([], {"inputs": "a", "outputs": "b"}, [("a", 0), (f"b{END}", 1)]),
    "prompt": (["--fields", "prompt/completion"], {"completion": "b", "prompt": "a"}, [("a", 0), (f"b{END}", 1)]),
    "instruction": (
        ["--fields", "instruction/input/output"],
        {"instruction": "a", "input": "", "output": "c"},
        [("a", 0), ("", 0), (f"c{END}", 1)],
    ),
    "text": (["--fields", "text"], {"text": "a b", "id": 3}, [(f"a b{END}", 1)]),
    "any key": (["--fields", "content"], {"content": "x"}, [(f"x{END}", 1)]),
    "flags": (["--fields", "a", "b", "c", "--loss", "1", "1", "0"], {"a": "1", "b": "2", "c": "3"}, [("1", 1), (f"2{END}", 1), ("3", 0)]),
    "spans": (["--fields", "spans"], {"spans": ["a", "", "b"]}, [("a", 1), ("", 1), (f"b{END}", 1)]),
    "spans with flags": (
        ["--fields", "spans"],
        {"spans": ["a", "b", "c"], "loss": [0, 1, 0]},
        [("a", 0), (f"b{END}", 1), ("c", 0)],
    ),
    "no end": (["--no-append-eod"], {"inputs": "a", "outputs": "b"}, [("a", 0), ("b", 1)]),
}


@pytest.mark.parametrize("name", CASES)
def test_sequences_and_what_is_trained(tmp_path: Path, tokenizer: Path, name: str) -> None:
    flags, line, expected = CASES[name]
    source = write(tmp_path / "data.jsonl", line, line)
    assert run(source, tokenizer, tmp_path / "out", *flags) == EXIT_OK
    assert decoded(tmp_path / "out", tokenizer) == [expected, expected]


def test_an_empty_field_never_shifts_a_pair(tmp_path: Path, tokenizer: Path) -> None:
    """The defect of two passes, each skipping the empty texts of its own field: every later pair is shifted."""
    lines = [{"inputs": "" if i % 3 == 0 else f"{i}", "outputs": "" if i % 5 == 0 else f"={i}"} for i in range(60)]
    for twins in ((), ("--twin-files", "targets")):
        out = tmp_path / f"out{len(twins)}"
        assert run(write(tmp_path / "data.jsonl", *lines), tokenizer, out, "--no-append-eod", *twins) == EXIT_OK
        pairs = [(a, b) for (a, _), (b, _) in decoded(out, tokenizer)]
        assert pairs == [(line["inputs"], line["outputs"]) for line in lines if line["outputs"]]
        skipped_by_each = zip((x["inputs"] for x in lines if x["inputs"]), (x["outputs"] for x in lines if x["outputs"]), strict=False)
        assert pairs != list(skipped_by_each)  # what the defective rule gives: this test would see it


def test_samples_over_a_number_of_tokens(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "data.jsonl", *({"inputs": "0" * i, "outputs": "1"} for i in range(6)))
    assert run(source, tokenizer, tmp_path / "out", "--max-tokens", "4") == EXIT_OK
    assert [int(n) for n in IndexedDataset(tmp_path / "out").lengths[::2]] == [0, 1, 2]
    assert "6 lines = 3 samples + 0 blank + 0 with empty outputs + 0 bad + 3 too long" in capsys.readouterr().out


BAD_SPANS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"span": ["a"]}, "no key 'spans', the keys are 'span'; did you mean 'span'"),
    "a string": ({"spans": "a"}, "'spans' is a string, it must be a list of strings"),
    "empty": ({"spans": []}, "an empty list"),
    "a number inside": ({"spans": ["a", 1]}, "a list of other things"),
    "too few flags": ({"spans": ["a", "b"], "loss": [1]}, "a 0 or 1 for each of the 2 spans"),
    "other flags": ({"spans": ["a"], "loss": [2]}, "a 0 or 1 for each of the 1 spans"),
}


@pytest.mark.parametrize("name", BAD_SPANS)
def test_bad_spans(name: str) -> None:
    value, fact = BAD_SPANS[name]
    with pytest.raises(LineError, match=fact):
        SpanTexts().pick(value)


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        (["--fields", "a", "a"], "a key is there twice"),
        (["--fields", "messages", "inputs"], "messages is a whole sample and stands alone"),
        (["--fields", "spans", "--loss", "1"], "with spans the data say what is trained"),
        (["--loss", "1"], "--loss 1: give a 0 or 1 for each of the 2 --fields"),
        (["--loss", "0", "0"], "at least one of them 1"),
        (["--loss", "0", "2"], "--loss 0 2"),
        (["--twin-files", "targets", "--loss", "1", "1"], "--twin-files needs --loss 0 1"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--part-mib", "0"], "--part-mib 0"),
        (["--only-parts", "3/3"], "K below N"),
        (["--only-parts", "0/3", "--restart"], "would discard each other's"),
    ],
)
def test_flags_that_cannot_be(tmp_path: Path, tokenizer: Path, flags: list[str], fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "data.jsonl", {"inputs": "a", "outputs": "b"})
    assert run(source, tokenizer, tmp_path / "out", *flags) == EXIT_USAGE
    assert fact in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_flags_are_checked_where_they_are_used() -> None:
    with pytest.raises(DataError, match="--loss"):
        extractor(["a"], [0])


def test_batches_of_blocks_and_of_single_samples_join(tokenizer: Path) -> None:
    """A batch read whole, one read line by line, and their selection give the ids of each sample alone."""
    fields = FieldTexts(("a", "b"))
    values = [{"a": "x" * i, "b": f"{i} fox"} for i in range(7)]
    columns = fields.columns(values[:4])
    assert columns is not None
    whole = Batch(None, columns, np.full(4, 2), np.tile([False, True], 4), range(1, 5))
    single = Batch.of([fields.pick(value) for value in values[4:]], [5, 6, 7], lambda text: "5" in text)
    joined = Batch.join([whole, single])
    assert joined.controls is not None
    assert joined.controls.tolist() == [False] * 5 + [True, False]
    keep = np.array([True, False, True, True, False, True, True])
    joined.select(keep)
    assert list(joined.lines) == [1, 3, 4, 6, 7]
    block, kept = Encoder(Tokenizer(tokenizer), Options(fields=("a", "b"))).encode(joined)
    assert kept.all()
    reader = Tokenizer(tokenizer)
    expected = [reader.encode([value["a"], value["b"] + END], escape_special=False)[0].tolist() for value in np.array(values)[keep]]
    ends = np.cumsum(block.lengths)[1::2][:-1]
    assert [part.tolist() for part in np.split(block.tokens, ends)] == expected
