"""Exact duplicates against a Python set, with runs merged in memory and on disk, and digests that agree in 64 bits."""

from __future__ import annotations

import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megawrap.data import dedup
from megawrap.data.dedup import SeenDigests, digests, normalized


@settings(max_examples=150, deadline=None)
@given(
    batches=st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40), max_size=12),
    memory=st.integers(0, 60),
    step=st.integers(1, 5),
)
def test_first_of_their_kind_as_a_set_says(batches: list[list[tuple[int, int]]], memory: int, step: int) -> None:
    """Halves of one digit: many digests agree in the high half only, which searching and merging must survive."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_STEP", step)
        seen, known = SeenDigests(memory_digests=memory), set()
        for batch in batches:
            expected = []
            for pair in batch:
                expected.append(pair not in known)
                known.add(pair)
            assert seen.add(np.array(batch, dtype=np.uint64)).tolist() == expected
        held = [list(zip(high.tolist(), low.tolist(), strict=True)) for high, low in seen._runs]
        assert all(run == sorted(run) for run in held)
        assert sorted(pair for run in held for pair in run) == sorted(known)


def test_memory_is_bounded(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    seen = SeenDigests(tmp_path, memory_digests=1 << 14)
    tracemalloc.start()
    for _ in range(200):
        assert seen.add(rng.integers(0, 1 << 63, size=(4096, 2), dtype=np.uint64)).all()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(high) for high, _ in seen._runs) == 200 * 4096
    assert held < 1 << 20  # 16 bytes each would be 12.5 MiB
    assert peak < 24 << 20  # one step of a merge: a constant
    assert list(tmp_path.iterdir()) == []  # files without names


def test_what_counts_as_the_same_text() -> None:
    assert normalized(" a\r\nb\rc\n") == "a\nb\nc"
    assert normalized("e\u0301") == unicodedata.normalize("NFC", "e\u0301") == "é"
    assert normalized("a  b") != normalized("a b")


def test_borders_between_fields_count() -> None:
    texts = ["ab", "c", "a", "bc", "ab ", "c\n", "abc", ""]
    one, two, three, four = map(tuple, digests(texts, np.full(4, 2)).tolist())
    assert one == three
    assert len({one, two, four}) == 3
