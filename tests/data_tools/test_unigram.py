"""The unigram entropy against a loop over Python's own counters."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools import unigram
from megawrap.data.format import IndexedWriter

VOCABULARY = 11


def dataset(prefix: Path, samples: list[tuple[list[int], list[int]]], vocab_size: int | None = VOCABULARY) -> Path:
    """Two sequences a document, inputs (mode 0) and outputs (mode 1)."""
    flat = np.array([token for sample in samples for field in sample for token in field], dtype=np.uint16)
    lengths = np.array([len(field) for sample in samples for field in sample], dtype=np.int32)
    writer = IndexedWriter(prefix, np.uint16)
    writer.add(flat, lengths, np.full(len(samples), 2), np.tile(np.array([0, 1], dtype=np.int8), len(samples)))
    writer.commit({"tokenizer": {"vocab_size": vocab_size}} if vocab_size else {})
    return prefix


def samples(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, VOCABULARY, 5).tolist(), draw.integers(0, VOCABULARY - 2, 1 + index % 6).tolist()) for index in range(count)]


def test_equals_a_loop_over_counters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, valid = samples(1, 40), samples(2, 9)
    arguments = ["--train", str(dataset(tmp_path / "t", train)), "--valid", str(dataset(tmp_path / "v", valid))]
    assert unigram.main(arguments) == 0
    counts = Counter(token for _, outputs in train for token in outputs)
    total = sum(counts.values()) + VOCABULARY
    tokens = [token for _, outputs in valid for token in outputs]
    expected = -sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens)
    assert capsys.readouterr().out.startswith(f"{expected:.4f} nats per token over {len(tokens)} supervised tokens: ")


def test_two_training_sets_count_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, valid = samples(1, 40), str(dataset(tmp_path / "v", samples(2, 9)))
    whole = str(dataset(tmp_path / "t", train))
    halves = [str(dataset(tmp_path / "a", train[:13])), str(dataset(tmp_path / "b", train[13:]))]
    unigram.main(["--train", whole, "--valid", valid, "--json"])
    unigram.main(["--train", *halves, "--valid", valid, "--json"])
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]


@pytest.mark.parametrize(("vocab_size", "facts"), [(3, ["outside the vocabulary of 3"]), (None, ["no manifest that tells the vocabulary"])])
def test_mistakes_are_told(vocab_size: int | None, facts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = dataset(tmp_path / "t", samples(1, 40), vocab_size=None)
    given = [] if vocab_size is None else ["--vocab-size", str(vocab_size)]
    assert unigram.main(["--train", str(train), "--valid", str(train), *given]) == 2
    told = capsys.readouterr().err
    assert all(fact in told for fact in facts), told
