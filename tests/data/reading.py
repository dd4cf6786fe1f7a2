"""Samples as a list, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megawrap.data.fields import Batch, extractor
from megawrap.data.inputs import Piece, expand
from megawrap.data.reader import SampleReader

FIELDS = ("inputs", "outputs")
GOOD = b'{"inputs": "a", "outputs": "b"}'


class Sample(NamedTuple):
    """One sample of a batch."""

    texts: tuple[str, ...]
    source: str
    line: int


def unbatch(batch: Batch) -> list[Sample]:
    """The samples of a batch."""
    found, at = [], 0
    for count, line in zip(batch.counts.tolist(), batch.lines, strict=True):
        found.append(Sample(tuple(batch.texts[at : at + count]), batch.source.name, line))
        at += count
    assert at == len(batch.texts) == len(batch.trained)
    return found


def read(*paths: Path | str, fields: tuple[str, ...] = FIELDS, **options: Any) -> tuple[list[Sample], SampleReader]:
    """Samples of files, in order, and their reader."""
    reader = SampleReader([Piece(name) for name in expand(list(paths))], extractor(fields), **options)
    return [sample for batch in reader.batches() for sample in unbatch(batch)], reader


def added_up(reader: SampleReader) -> int:
    """Lines whose fate was counted."""
    counts = reader.counts
    return counts.samples + counts.blank + counts.empty + sum(counts.bad.values()) + counts.duplicates + counts.too_long
