"""Statistics against counting one by one in Python, whatever the block size; tables, JSON and pictures of them."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import numpy as np
import pytest

from megawrap.data import statistics as counted
from megawrap.data.format import IndexedDataset
from megawrap.data.statistics_plot import draw
from megawrap.data.statistics_table import Account, Packed, Part, render
from megawrap.data.view_text import Style
from tests.data import documents
from tests.data.test_interchange import theirs


def at_share(numbers: list[int], share: float) -> int:
    """The smallest number that at least this share of the numbers do not exceed."""
    return next(n for n in sorted(numbers) if sum(m <= n for m in numbers) >= share * len(numbers))


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("chat", [False, True])
def test_counts_are_those_of_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, chat: bool) -> None:
    monkeypatch.setattr(counted, "_BLOCK", block)
    given = documents.samples(1, 80, chat=chat, longest=40)
    data = documents.write(tmp_path / "data", given)
    for first, last in ((0, 80), (13, 57), (79, 80)):
        found = counted.collect(data, first, last)
        mine = given[first:last]
        lengths = [sum(len(tokens) for _, tokens in document) for document in mine]
        trained = [sum(len(tokens) for mode, tokens in document if mode) for document in mine]
        assert (found.documents, found.tokens, found.trained_tokens) == (len(mine), sum(lengths), sum(trained))
        assert found.sequences == sum(map(len, mine)) and found.trained_share == sum(trained) / sum(lengths)
        for numbers, told in ((lengths, found.lengths), (trained, found.trained_lengths)):
            assert told is not None
            summary = told.summary()
            assert (summary["min"], summary["max"]) == (min(numbers), max(numbers))
            assert summary["mean"] == pytest.approx(statistics.fmean(numbers))
            assert [summary[name] for name in ("p50", "p90", "p99")] == [at_share(numbers, share) for share in (0.5, 0.9, 0.99)]
        bars = found.histogram()
        assert [bar["documents"] for bar in bars] == [sum(bar["from"] <= n < bar["below"] for n in lengths) for bar in bars]
        assert sum(bar["documents"] for bar in bars) == len(mine)
        assert bars[0]["documents"] and bars[-1]["documents"]


@pytest.mark.parametrize("longest", [0, 1, 3, 4, 5, 6, 7, 8, 9, 1023, 1024, 1025])
def test_every_length_has_a_bar(longest: int) -> None:
    lengths = counted.Lengths(values=np.array([longest]), counts=np.array([2]))
    found = counted.Statistics(
        name="x",
        documents=2,
        sequences=2,
        tokens=2 * longest,
        trained_tokens=None,
        lengths=lengths,
        trained_lengths=None,
        sources=[],
        lines={},
    )
    (bar,) = found.histogram()
    assert bar["documents"] == 2 and bar["from"] <= longest < bar["below"]


def test_without_modes_nothing_is_claimed_about_training(tmp_path: Path) -> None:
    found = counted.collect(IndexedDataset(theirs(tmp_path / "plain", [[1, 2], [3]])))
    assert found.trained_tokens is None and found.trained_share is None and found.trained_lengths is None
    assert "usable with loss_on all" in render(Account(statistics=found, packed=None, mix=[]), Style())
    assert json.loads(json.dumps(found.to_dict()))["trained_lengths"] is None


def account(tmp_path: Path, name: str = "data") -> Account:
    data = documents.write(tmp_path / name, documents.samples(2, 50, longest=60))
    packed = Packed(seq_length=64, packing="best_fit", rows=40, fill=0.9, trained=0.4, overlong=3, lost_tokens=9, losses=["9 tokens cut"])
    return Account(statistics=counted.collect(data), packed=packed, mix=[Part(name="a.jsonl", numbers={"lines": "50"})])


def test_table_in_plain_characters(tmp_path: Path) -> None:
    text = render(account(tmp_path), Style(newline="\\n", tab="\\t", context_bar="|", trained_bar="#", rule="-"))
    assert text.isascii()
    for fact in ("rows of 64", "90.00 % filled, 40.0 % trained", "3 documents, 9 tokens in no row", "9 tokens cut", "a.jsonl", "#"):
        assert fact in text


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    random_name = f"a$b_{random.Random(0).random()}"  # a dollar would begin a formula
    draw([account(tmp_path), account(tmp_path, random_name)], tmp_path / "stats.png")
    content = (tmp_path / "stats.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
