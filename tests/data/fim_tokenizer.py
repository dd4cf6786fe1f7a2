"""A byte-level BPE with the fill-in-the-middle tokens of StarCoder, and data made with it, for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megawrap.data.format import IndexedDataset, IndexedWriter
from megawrap.data.tokenizer import Tokenizer
from tests.tiny_tokenizer import END, write_tokenizer

STARCODER = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
SANTACODER = ("<fim-prefix>", "<fim-middle>", "<fim-suffix>")


def write_fim_tokenizer(directory: Path, sentinels: Sequence[str] = STARCODER, *, vocab_size: int = 300) -> Path:
    """A tokenizer of tests/tiny_tokenizer.py with sentinels added as special tokens; returns the directory."""
    write_tokenizer(directory, vocab_size=vocab_size)
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    path = directory / "tokenizer.json"
    tokenizer = Backend.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in sentinels])
    tokenizer.save(str(path))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return directory


def write_texts(
    prefix: Path, tokenizer: Tokenizer, samples: Sequence[tuple[str, str]], *, modes: bool = True, begin: str | None = None
) -> IndexedDataset:  # fmt: skip
    """Pairs of (inputs, outputs) as preprocessing writes them, the end token behind the outputs; without modes as one text.

    `begin` is a special token in front of the outputs.
    """
    texts = [text for pair in samples for text in pair]
    ids, lengths = tokenizer.encode(texts, escape_special=True)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    first = [] if begin is None else [tokenizer.special_tokens[begin]]
    documents = [[parts[n].tolist(), [*first, *parts[n + 1].tolist(), tokenizer.eos_id]] for n in range(0, len(parts), 2)]
    if not modes:
        documents = [[[*inputs, *outputs]] for inputs, outputs in documents]
    writer = IndexedWriter(prefix, np.uint16)
    writer.add(
        np.array([token for document in documents for sequence in document for token in sequence]),
        np.array([len(sequence) for document in documents for sequence in document]),
        np.array([len(document) for document in documents]),
        np.tile([0, 1], len(documents)) if modes else None,
    )
    writer.commit({"tokenizer": tokenizer.facts(), "options": {"append_eod": True}})
    return IndexedDataset(prefix)
