"""Concatenation of indexed datasets against Python lists, with blocks from one token to everything."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megawrap.data import concat
from megawrap.data.concat import concatenate, document_blocks
from megawrap.data.format import IndexedDataset, IndexedWriter
from megawrap.errors import DataError

Document = list[list[int]]


def write(prefix: Path, documents: list[Document], *, dtype: str = "uint16", modes: bool = True, sha256: str | None = None) -> Path:
    flat = [token for document in documents for sequence in document for token in sequence]
    lengths = [len(sequence) for document in documents for sequence in document]
    with IndexedWriter(prefix, dtype) as writer:
        counts = np.array([len(document) for document in documents])
        writer.add(np.array(flat, dtype=np.int64), np.array(lengths), counts, np.ones(len(lengths)) if modes else None)
        writer.commit({"tokenizer": {"sha256": sha256}} if sha256 else {})
    return prefix


def contents(dataset: IndexedDataset) -> list[Document]:
    bounds = dataset.document_indices.tolist()
    return [[dataset.sequence(index).tolist() for index in range(first, stop)] for first, stop in pairwise(bounds)]


DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=3), min_size=1, max_size=8
).filter(lambda documents: any(sequence for document in documents for sequence in document))  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(DOCUMENTS, min_size=1, max_size=3), block=st.integers(1, 30), step=st.integers(1, 9))
def test_documents_of_all_parts_in_order(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[Document]], block: int, step: int
) -> None:
    folder = tmp_path_factory.mktemp("concat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concat, "BLOCK_DOCUMENTS", step)
        prefixes = [write(folder / f"part{number}", documents) for number, documents in enumerate(parts)]
        for prefix, documents in zip(prefixes, parts, strict=True):
            dataset, low = IndexedDataset(prefix), len(documents) // 2
            found = [len(piece.sequences_per_document) for piece in document_blocks(dataset, first=low, block_tokens=block)]
            assert sum(found) == len(documents) - low
            for piece in document_blocks(dataset, block_tokens=block):
                assert len(piece.tokens) <= block or len(piece.sequences_per_document) == 1
        concatenate(prefixes, folder / "whole", {})
    whole = IndexedDataset(folder / "whole")
    whole.verify()
    assert contents(whole) == [document for documents in parts for document in documents]
    assert whole.modes is not None


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [[[1, 2]]], sha256="a" * 64)
    cases = [
        (write(tmp_path / "wide", [[[1]]], dtype="int32"), "holds uint16 tokens, .*wide int32"),
        (write(tmp_path / "plain", [[[1]]], modes=False), "one says which sequences are trained, .*plain does not"),
        (write(tmp_path / "other", [[[1]]], sha256="b" * 64), "different tokenizers .*aaaaaaaaaaaa and bbbbbbbbbbbb"),
    ]
    for other, message in cases:
        with pytest.raises(DataError, match=message):
            concatenate([one, other], tmp_path / "sub" / "whole", {})
    with pytest.raises(DataError, match="no dataset"):
        concatenate([], tmp_path / "sub" / "whole", {})
    assert not (tmp_path / "sub").exists()


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "one", [[[1, 2, 3]]]))
    dataset.bin_path.write_bytes(b"\1\0")
    with pytest.raises(DataError, match=r"one\.bin: size: 3 tokens at 0 were there at open, 1 are now"):
        list(document_blocks(dataset))
