"""Blending: shares at every prefix, complete epochs, and an order that only grows."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megawrap.data.blend import MAX_CYCLE, Blend, Once, fair_cycle, integer_weights
from megawrap.data.packing import pack
from megawrap.data.rows import RowDataset
from megawrap.data.samples import select
from tests.data.documents import samples, write


def source(tmp_path: Path, name: str, seed: int, number: int, seq_length: int = 24) -> RowDataset:
    dataset = write(tmp_path / name, samples(seed, number))
    return RowDataset(
        dataset, pack(select(dataset, 0, number, seq_length=seq_length, overlong="split"), seq_length, seed), seq_length=seq_length
    )


@pytest.fixture
def sources(tmp_path: Path) -> list[RowDataset]:
    return [source(tmp_path, "a", 1, 60), source(tmp_path, "b", 2, 25), source(tmp_path, "c", 3, 4)]


def test_weights_as_people_write_them_are_exact() -> None:
    assert integer_weights([1.0, 0.3]) == [10, 3]
    assert integer_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert integer_weights([2.0, 4.0]) == [1, 2]
    assert integer_weights([0.25]) == [1]
    assert integer_weights([1e-05, 1.0]) != [0, 1]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30))
def test_other_weights_are_rounded_by_less_than_a_multiple(weights: list[float]) -> None:
    whole = integer_weights(weights)
    assert min(whole) >= 1 and sum(whole) <= MAX_CYCLE + len(weights)
    for weight, number in zip(weights, whole, strict=True):
        assert number == 1 or abs(number / sum(whole) - weight / sum(weights)) < len(weights) / MAX_CYCLE


@settings(max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_no_prefix_is_a_whole_row_off(weights: list[int]) -> None:
    total = sum(weights)
    taken = [0] * len(weights)
    for turn, k in enumerate(fair_cycle(weights).tolist(), start=1):
        taken[k] += 1
        assert all(abs(Fraction(turn * weight, total) - number) < 1 for weight, number in zip(weights, taken, strict=True))
    assert taken == weights


def test_one_large_and_many_small_sources() -> None:
    """Merging by (j + 1/2) / weight draws the large one 50 times before any other here."""
    weights = [100] + [1] * 100
    taken = np.cumsum(fair_cycle(weights) == 0)
    assert np.abs(taken - 0.5 * np.arange(1, 201)).max() < 1


def test_shares_hold_over_many_cycles(sources: list[RowDataset]) -> None:
    blend = Blend(sources, [1.0, 0.3, 0.07], seed=1)
    drawn, _, _ = blend.locate(np.arange(20_000))
    for k, share in enumerate(np.array([1.0, 0.3, 0.07]) / 1.37):
        assert blend.shares[k] == pytest.approx(share)
        assert np.abs(np.cumsum(drawn == k) - share * np.arange(1, 20_001)).max() < 1


def test_every_epoch_of_every_source_is_complete(sources: list[RowDataset]) -> None:
    blend = Blend(sources, [2, 1, 1], seed=1)
    source_of, epoch, row = blend.locate(np.arange(2000))
    for k, rows in enumerate(sources):
        for e in range(int(epoch[source_of == k].max())):
            assert sorted(row[(source_of == k) & (epoch == e)]) == list(range(len(rows)))
    first, second = (row[(source_of == 0) & (epoch == e)].tolist() for e in (0, 1))
    assert first != second and first != sorted(first)


def test_any_row_is_found_without_those_before(sources: list[RowDataset]) -> None:
    blend = Blend(sources, [2, 1, 0.3], seed=1)
    whole = np.stack(blend.locate(np.arange(3000)))
    picked = np.random.default_rng(0).permutation(3000)[:100]
    assert (np.stack(blend.locate(picked)) == whole[:, picked]).all()
    far = np.stack(Blend(sources, [2, 1, 0.3], seed=1).locate(np.array([10**12])))
    assert far.shape == (3, 1) and far[1, 0] > 10**8


def test_order_depends_on_seed_and_data_alone(tmp_path: Path, sources: list[RowDataset]) -> None:
    numbers = np.arange(500)
    order = np.stack(Blend(sources, [2, 1, 1], seed=1).locate(numbers))
    assert (np.stack(Blend(sources, [2, 1, 1], seed=1).locate(numbers)) == order).all()
    assert (np.stack(Blend(sources, [2, 1, 1], seed=2).locate(numbers)) != order).any()
    alone = Blend(sources[:1], [0.4], seed=1).locate(np.arange(100))[2]
    assert (order[2][order[0] == 0][:100] == alone).all()  # a source's own order does not depend on its companions


def test_evaluation_takes_every_row_once_and_spreads_sources(sources: list[RowDataset]) -> None:
    once = Once(sources)
    assert len(once) == sum(map(len, sources))
    source_of, row = once.locate(np.arange(len(once)))
    assert Counter(zip(source_of.tolist(), row.tolist(), strict=True)) == Counter(
        (k, i) for k, s in enumerate(sources) for i in range(len(s))
    )
    half = Counter(source_of[: len(once) // 2].tolist())
    assert all(abs(half[k] - len(s) / 2) <= len(sources) / 2 for k, s in enumerate(sources))
    rows = once.rows(np.array([len(once) - 1, len(once), len(once) + 5]))
    assert [len(row["sample_ids"]) > 0 for row in rows] == [True, False, False]
    assert rows[1]["weights"].sum() == 0


def test_a_batch_can_be_described(sources: list[RowDataset]) -> None:
    blend = Blend(sources, [1, 1, 1], seed=1)
    numbers = np.arange(6)
    for text, row, k in zip(blend.describe(numbers), blend.rows(numbers), blend.locate(numbers)[0].tolist(), strict=True):
        assert str(sources[k].dataset.prefix) in text
        assert text.endswith("documents " + ", ".join(map(str, row["sample_ids"].tolist())))


def test_a_blend_needs_rows(sources: list[RowDataset]) -> None:
    with pytest.raises(ValueError, match="needs sources"):
        Blend([], [], seed=1)
