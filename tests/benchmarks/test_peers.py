"""The peers train what megawrap trains: isolated samples, the same targets, the same counts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ours, peers
from benchmarks.models import hugging_face
from benchmarks.samples import SHORTEST, draw
from megawrap.data.format import IndexedDataset

SPEC: dict[str, Any] = {"model": {"size": "tiny", "vocab_size": 97, "positions": 64}, "seq_length": 64, "rows": 2, "dtype": "fp32"}


def test_samples_are_reproducible_and_half_of_them_is_trained() -> None:
    drawn = draw(500, vocab_size=97, longest=1024)
    again = draw(500, vocab_size=97, longest=1024)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(drawn, again, strict=True))
    lengths = np.array([len(sample.tokens) for sample in drawn])
    assert lengths.min() >= SHORTEST and lengths.max() <= 1024
    assert 100 < np.median(lengths) < 200 < lengths.mean() < 350
    assert 0.49 < sum(sample.targets for sample in drawn) / lengths.sum() < 0.52


def test_packed_transformers_isolates_samples() -> None:
    """The loss of a packed batch is the mean over targets of the losses of its samples alone."""
    model = hugging_face(SPEC["model"], attn_implementation="sdpa").eval()
    drawn = draw(12, vocab_size=97, longest=64)
    by_length = {tuple(sample.tokens): sample for sample in drawn}
    for arrays, work in peers._packed_batches(drawn, 2, 64):
        with torch.no_grad():
            packed = model(**{name: torch.from_numpy(array) for name, array in arrays.items()}, use_cache=False).loss.item()
        total = count = predictions = 0.0
        for row in range(2):
            starts = [*np.flatnonzero(arrays["position_ids"][row] == 0), 64]
            for begin, end in itertools.pairwise(starts):
                sample = by_length.get(tuple(arrays["input_ids"][row, begin:end]))
                if sample is None:  # tail padding
                    assert (arrays["labels"][row, begin:end] == peers.IGNORED).all()
                    continue
                tokens = torch.from_numpy(sample.tokens)[None]
                with torch.no_grad():
                    logits = model(tokens, use_cache=False).logits[0]
                losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")[sample.num_inputs - 1 :]
                total, count, predictions = total + losses.sum().item(), count + len(losses), predictions + sample.predictions
        assert packed == pytest.approx(total / count, rel=1e-5)
        assert work["targets"] == count and work["tokens"] == predictions


def test_dataset_holds_the_same_samples(tmp_path: Path) -> None:
    drawn = draw(20, vocab_size=97, longest=64)
    ours.write_dataset(drawn, tmp_path / "samples", 97)
    dataset = IndexedDataset(tmp_path / "samples")
    assert dataset.num_documents == 20 and list(dataset.modes) == [0, 1] * 20
    for number, sample in enumerate(drawn):
        parts = [dataset.sequence(2 * number), dataset.sequence(2 * number + 1)]
        assert np.array_equal(np.concatenate(parts), sample.tokens) and len(parts[0]) == sample.num_inputs
