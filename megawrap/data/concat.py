"""Indexed datasets end to end: documents read in blocks of bounded memory, and written one dataset after another.

In: datasets opened or named by prefix. Out: `Block`s of whole documents for whoever filters or rewrites them, or one
dataset that holds the documents of all parts in order. Nothing is tokenized again, and no file is ever loaded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megawrap.data.format import IndexedDataset, IndexedWriter
from megawrap.errors import DataError

BLOCK_TOKENS = 1 << 21
BLOCK_DOCUMENTS = 1 << 18


class Block(NamedTuple):
    """Whole documents, as `IndexedWriter.add` takes them."""

    tokens: np.ndarray
    """[sum(lengths)], sequences back to back."""
    lengths: np.ndarray
    """int32 [sequences]."""
    sequences_per_document: np.ndarray
    """int64 [documents]."""
    modes: np.ndarray | None
    """int8 [sequences], or None where the dataset has none."""


def document_blocks(
    dataset: IndexedDataset, *, first: int = 0, stop: int | None = None, block_tokens: int = BLOCK_TOKENS
) -> Iterator[Block]:
    """Documents `first` to `stop` of a dataset in order, about `block_tokens` tokens at a time (one document at least).

    Tokens are read, not mapped, so that resident memory stays at a block or the longest document.

    Raises:
        DataError: the .bin file became shorter after it was opened.
    """
    stop = dataset.num_documents if stop is None else stop
    itemsize = dataset.dtype.itemsize
    at = first
    while at < stop:
        sequences = dataset.document_indices[at : min(stop, at + BLOCK_DOCUMENTS) + 1]
        offset = _token_offset(dataset, int(sequences[0]))
        if _token_offset(dataset, int(sequences[-1])) - offset > block_tokens:
            ends = dataset.pointers[np.minimum(sequences[1:], dataset.num_sequences - 1)] // itemsize
            ends = np.where(sequences[1:] == dataset.num_sequences, dataset.num_tokens, ends)
            sequences = sequences[: max(1, int(np.searchsorted(ends, offset + block_tokens, side="right"))) + 1]
        low, high = int(sequences[0]), int(sequences[-1])
        end = _token_offset(dataset, high)
        tokens = dataset.read(offset, end - offset)
        modes = None if dataset.modes is None else dataset.modes[low:high]
        yield Block(tokens, dataset.lengths[low:high], np.diff(sequences), modes)
        at += len(sequences) - 1


def _token_offset(dataset: IndexedDataset, sequence: int) -> int:
    """Where a sequence starts in .bin, in tokens; the end of .bin for the sequence after the last."""
    return dataset.num_tokens if sequence == dataset.num_sequences else int(dataset.pointers[sequence]) // dataset.dtype.itemsize


def concatenate(
    parts: Sequence[Path | str], prefix: Path | str, manifest: dict[str, Any], *, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Write one dataset that holds the documents of `parts` in order, atomically.

    Args:
        parts: prefixes.
        prefix: of the new dataset.
        manifest: what to record, as `IndexedWriter.prepare` takes it.
        progress: called with the number of tokens copied so far.

    Returns:
        The complete manifest.

    Raises:
        DataError: a part is damaged, or parts differ in dtype or in having modes; nothing is written.
    """
    if not parts:
        raise DataError(f"{prefix}: no dataset to put into it", hint="Name at least one prefix")
    opened = [IndexedDataset(part) for part in parts]
    for other in opened[1:]:
        require_alike(opened[0], other)
    with IndexedWriter(prefix, opened[0].dtype.newbyteorder("=")) as writer:
        for dataset in opened:
            for block in document_blocks(dataset):
                writer.add(*block)
                if progress is not None:
                    progress(writer.num_tokens)
        return writer.commit(manifest)


def require_alike(one: IndexedDataset, other: IndexedDataset) -> None:
    """Refuse to join datasets whose files cannot be one: other token dtype, modes in only one, another tokenizer."""
    if one.dtype != other.dtype:
        raise DataError(
            f"{one.prefix} holds {one.dtype} tokens, {other.prefix} {other.dtype}: they cannot be one dataset",
            hint="Preprocess them with one tokenizer",
        )
    if (one.modes is None) != (other.modes is None):
        with_modes, without = (one, other) if other.modes is None else (other, one)
        raise DataError(
            f"{with_modes.prefix} says which sequences are trained, {without.prefix} does not: they cannot be one dataset",
            hint="Preprocess both with megawrap, or neither",
        )
    first, second = (((dataset.manifest or {}).get("tokenizer") or {}).get("sha256") for dataset in (one, other))
    if first and second and first != second:
        raise DataError(
            f"{one.prefix} and {other.prefix} come from different tokenizers (sha256 {first[:12]} and {second[:12]})",
            hint="Preprocess them with one tokenizer",
        )
