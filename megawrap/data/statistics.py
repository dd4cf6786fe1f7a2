"""What a dataset consists of, counted from its index: lengths, trained tokens, and where the samples come from.

In: an indexed dataset and a range of its documents. Out: `Statistics`, exact counts in plain types, as a terminal table.
Only the index is read, in blocks, so a corpus takes seconds. What packing makes of the samples is the plan's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import dropwhile, pairwise
from typing import Any

import numpy as np

from megawrap.data.format import IndexedDataset

_BLOCK = 1 << 20  # documents counted at a time
_QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How often each number of tokens occurs.

    Attributes:
        values: the numbers, rising; int64 [n].
        counts: documents of each; int64 [n].
    """

    values: np.ndarray
    counts: np.ndarray

    def summary(self) -> dict[str, float]:
        """min, p50, p90, p99, max (each a number that occurs) and mean."""
        below = np.cumsum(self.counts)
        ranks = {name: int(np.searchsorted(below, share * below[-1])) for name, share in _QUANTILES}
        mean = float((self.values * self.counts).sum() / below[-1])
        quantiles = {name: int(self.values[at]) for name, at in ranks.items()}
        return {"min": int(self.values[0]), **quantiles, "max": int(self.values[-1]), "mean": mean}

    def histogram(self, edges: Sequence[int]) -> list[int]:
        """Documents with edges[i] <= tokens < edges[i + 1]."""
        place = np.searchsorted(np.asarray(edges), self.values, side="right") - 1
        return np.bincount(place, weights=self.counts, minlength=len(edges) - 1)[: len(edges) - 1].astype(np.int64).tolist()


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts of a range of documents.

    Attributes:
        name: of the dataset.
        documents, sequences, tokens: of the range.
        trained_tokens: tokens of sequences with mode 1; None when the dataset has no modes.
        lengths: tokens of a document.
        trained_lengths: trained tokens of a document; None without modes.
        sources: what the manifest says the samples were made from, one dictionary each.
        lines: the manifest's account of input lines by what became of them; empty when it has none.
    """

    name: str
    documents: int
    sequences: int
    tokens: int
    trained_tokens: int | None
    lengths: Lengths
    trained_lengths: Lengths | None
    sources: list[dict[str, Any]]
    lines: dict[str, Any]

    @property
    def trained_share(self) -> float | None:
        """Share of the tokens that is trained on; None without modes."""
        return None if self.trained_tokens is None else self.trained_tokens / max(1, self.tokens)

    def edges(self) -> list[int]:
        """Borders of the bars of the histogram: 0, then two bars for every doubling, up to above the longest document."""
        longest = int(self.lengths.values[-1])
        edges, power = [0, 1, 2, 3, 4], 4
        while edges[-1] <= longest:
            edges += [power + power // 2, 2 * power]
            power *= 2
        while len(edges) > 2 and edges[-2] > longest:
            edges.pop()
        return edges

    def histogram(self) -> list[dict[str, int]]:
        """Bars of the lengths of documents, from the shortest to the longest: from, below, documents."""
        edges = self.edges()
        counts = self.lengths.histogram(edges)
        bars = [{"from": low, "below": high, "documents": number} for (low, high), number in zip(pairwise(edges), counts, strict=True)]
        return list(dropwhile(lambda bar: not bar["documents"], bars))

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types, for JSON."""
        plain = {key: value for key, value in asdict(self).items() if not key.endswith("lengths")}
        return {
            **plain,
            "trained_share": self.trained_share,
            "lengths": self.lengths.summary(),
            "trained_lengths": None if self.trained_lengths is None else self.trained_lengths.summary(),
            "histogram": self.histogram(),
        }


def collect(dataset: IndexedDataset, first: int = 0, last: int | None = None) -> Statistics:
    """Count documents first..last-1 of a dataset (default all)."""
    last = dataset.num_documents if last is None else last
    whole, trained = _Tally(), _Tally()
    for begin in range(first, last, _BLOCK):
        bounds = dataset.document_indices[begin : min(last, begin + _BLOCK) + 1]
        sequences = slice(int(bounds[0]), int(bounds[-1]))
        lengths = dataset.lengths[sequences].astype(np.int64)
        whole.add(_per_document(lengths, bounds))
        if dataset.modes is not None:
            trained.add(_per_document(lengths * dataset.modes[sequences], bounds))
    manifest = dataset.manifest or {}
    sources, lines = manifest.get("sources"), manifest.get("lines")
    modes = dataset.modes is not None
    return Statistics(
        name=dataset.prefix.name,
        documents=last - first,
        sequences=int(dataset.document_indices[last] - dataset.document_indices[first]),
        tokens=whole.total,
        trained_tokens=trained.total if modes else None,
        lengths=whole.lengths(),
        trained_lengths=trained.lengths() if modes else None,
        sources=[source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else [],
        lines=lines if isinstance(lines, dict) else {},
    )


def _per_document(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sum of a value per sequence over each document; empty documents give 0."""
    before = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=before[1:])
    return np.diff(before[bounds - bounds[0]])


class _Tally:
    """Counts of values that come in blocks."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.total = 0

    def add(self, values: np.ndarray) -> None:
        self.total += int(values.sum())
        for value, count in zip(*(found.tolist() for found in np.unique(values, return_counts=True)), strict=True):
            self.counts[value] = self.counts.get(value, 0) + count

    def lengths(self) -> Lengths:
        values = sorted(self.counts)
        return Lengths(values=np.array(values, dtype=np.int64), counts=np.array([self.counts[value] for value in values], dtype=np.int64))
