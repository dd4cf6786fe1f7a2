"""Random documents, the files that hold them, and what a row must contain, written token by token without numpy.

The oracle knows nothing of the code under test: it walks single tokens as the definitions in words do.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from megawrap.data.format import IndexedDataset, IndexedWriter

END = 0  # end token; rows are padded with 0 too, so padding known by id would be seen
Document = list[tuple[int, list[int]]]  # (mode, tokens) of each sequence
VOCAB = 60000


def sample(rng: random.Random, *, longest: int = 12, chat: bool = False) -> Document:
    """Inputs and outputs, the outputs with an end token; either may be empty but for it. Chats have several turns."""
    turns = rng.randint(1, 3) if chat else 1
    document: Document = []
    for _ in range(turns):
        document.append((0, [rng.randrange(1, VOCAB) for _ in range(rng.randint(0, longest))]))
        document.append((1, [*(rng.randrange(1, VOCAB) for _ in range(rng.randint(0, longest))), END]))
    return document


def samples(seed: int, number: int, **options: Any) -> list[Document]:
    """`number` random samples."""
    rng = random.Random(seed)
    return [sample(rng, **options) for _ in range(number)]


def write(
    prefix: Path, documents: list[Document], *, tokenizer: dict[str, Any] | None = None, modes: bool = True, manifest: bool = True
) -> IndexedDataset:
    """Write documents through the real writer and open them."""
    sequences = [sequence for document in documents for sequence in document]
    writer = IndexedWriter(prefix, np.uint16)
    writer.add(
        np.array([token for _, tokens in sequences for token in tokens], dtype=np.int64),
        np.array([len(tokens) for _, tokens in sequences]),
        np.array([len(document) for document in documents]),
        np.array([mode for mode, _ in sequences]) if modes else None,
    )
    writer.commit({"tokenizer": tokenizer or {"sha256": "ab" * 32, "vocab_size": VOCAB}})
    if not manifest:
        prefix.with_name(prefix.name + ".manifest.json").unlink()
    return IndexedDataset(prefix)


def flat(document: Document) -> tuple[list[int], list[int]]:
    """Tokens and modes of every token."""
    return [t for _, tokens in document for t in tokens], [mode for mode, tokens in document for _ in tokens]


def windows(document: Document, seq_length: int, overlong: str, loss_on: str) -> list[tuple[int, int]]:
    """Start and length of what is kept of a document, in order."""
    tokens, modes = flat(document)
    n = len(tokens)

    def trained(start: int, length: int) -> bool:
        return any(loss_on == "all" or modes[i] for i in range(start + 1, start + length))

    if n < 2 or not trained(0, n):
        return []
    if n <= seq_length + 1:
        found = [(0, n)]
    elif overlong == "drop":
        found = []
    elif overlong == "truncate-outputs":
        found = [(0, seq_length + 1)]
    elif overlong == "truncate-inputs-left":
        start = n - seq_length - 1
        while start > 0 and any(modes[: start + 1]):
            start -= 1
        found = [(start, seq_length + 1)]
    else:
        assert overlong == "split"
        found, pair = [], 0  # pair i is (token i, token i + 1)
        while pair < n - 1:
            pairs = min(seq_length, n - 1 - pair)
            found.append((pair, pairs + 1))
            pair += pairs
        return found
    return [(start, length) for start, length in found if trained(start, length)]


def segment(document: Document, start: int, length: int, loss_on: str, normalize: str) -> list[tuple[int, int, int, float]]:
    """Every position of a window: (token, label, position id, weight)."""
    tokens, modes = flat(document)
    supervised = [loss_on == "all" or modes[i] == 1 for i in range(start + 1, start + length)]
    weights = []
    for here, flag in enumerate(supervised):
        if not flag:
            weights.append(0.0)
        elif normalize == "token":
            weights.append(1.0)
        else:
            first = last = here
            while first > 0 and supervised[first - 1]:
                first -= 1
            while last + 1 < len(supervised) and supervised[last + 1]:
                last += 1
            weights.append(1.0 / (last - first + 1))
    return [(tokens[start + i], tokens[start + i + 1], i, weights[i]) for i in range(length - 1)]
