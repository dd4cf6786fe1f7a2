"""Twin files: inputs and outputs in two indexed datasets, as the BigCode fork of Megatron-LM writes and reads them.

In: PREFIX_inputs_document and PREFIX_targets_document (or PREFIX_outputs_document), sample i being sequence i of each.
Out: `open_twins`, one dataset with two sequences a document, or the two writers that preprocessing fills.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from megawrap.data.format import IndexedDataset, IndexedWriter, idx_path, manifest_path, marker_path
from megawrap.errors import DataError

NAMES = ("targets", "outputs")


def twin_prefixes(prefix: Path | str, name: str) -> tuple[Path, Path]:
    """PREFIX_inputs_document and PREFIX_{name}_document; `name` is targets or outputs."""
    prefix = Path(prefix)
    return prefix.with_name(f"{prefix.name}_inputs_document"), prefix.with_name(f"{prefix.name}_{name}_document")


def open_twins(prefix: Path | str) -> IndexedDataset:
    """Read twin files as one dataset: document i is sample i, sequence 0 its inputs (mode 0), sequence 1 its outputs (mode 1).

    The tokens are interleaved into memory, both files' worth in every process: meant for fine-tuning sets, not for
    corpora. Preprocess into one prefix to have them mapped.

    Raises:
        DataError: a twin is missing, damaged, or the two do not pair up.
    """
    found = [name for name in NAMES if idx_path(twin_prefixes(prefix, name)[1]).exists()]
    if len(found) != 1:
        names = " or ".join(str(twin_prefixes(prefix, name)[1]) for name in NAMES)
        raise DataError(f"{prefix}: twin files need exactly one of {names}; there are {len(found)}", hint="Check the prefix")
    inputs, outputs = (IndexedDataset(path) for path in twin_prefixes(prefix, found[0]))
    for one in (inputs, outputs):
        if one.num_documents != one.num_sequences:
            raise DataError(f"{one.idx_path}: {one.num_sequences} sequences in {one.num_documents} documents, twin files have one each")
    if inputs.num_sequences != outputs.num_sequences or inputs.dtype != outputs.dtype:
        raise DataError(
            f"{prefix}: the twins do not pair up: {inputs.num_sequences} inputs of {inputs.dtype}, "
            f"{outputs.num_sequences} {found[0]} of {outputs.dtype}",
            hint="They come from different runs, or a sample was left out of one of them: preprocess again",
        )
    return _Interleaved(Path(prefix), inputs, outputs)


class _Interleaved(IndexedDataset):
    """Two checked datasets presented as one."""

    def __init__(self, prefix: Path, inputs: IndexedDataset, outputs: IndexedDataset) -> None:
        self.prefix, self.mmap, self.manifest, self.dtype = prefix, True, None, inputs.dtype
        self.bin_path, self.idx_path = outputs.bin_path, outputs.idx_path  # named in messages
        self._twins = (inputs, outputs)
        self.num_documents, self.num_sequences = inputs.num_documents, 2 * inputs.num_sequences
        self.num_tokens = inputs.num_tokens + outputs.num_tokens
        self.lengths = np.stack([inputs.lengths, outputs.lengths], axis=1).reshape(-1)
        ends = np.cumsum(self.lengths, dtype=np.int64)
        self.pointers = (ends - self.lengths) * self.dtype.itemsize
        self.document_indices = np.arange(0, self.num_sequences + 1, 2, dtype=np.int64)
        self.modes = np.tile(np.array([0, 1], dtype=np.int8), self.num_documents)
        is_output = np.repeat(self.modes.astype(bool), self.lengths)
        tokens = np.empty(self.num_tokens, dtype=self.dtype)
        tokens[~is_output], tokens[is_output] = inputs.tokens, outputs.tokens
        self.__dict__["tokens"] = tokens  # in place of the map that the base class would make

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """sha256 over the fingerprints of both files."""
        return hashlib.sha256("".join(one.fingerprint for one in self._twins).encode()).hexdigest()

    @property
    def max_token_id(self) -> int:  # type: ignore[override]
        """Largest token id of both files."""
        return max(one.max_token_id for one in self._twins)

    def verify(self, vocab_size: int | None = None) -> None:
        """Verify both files."""
        for one in self._twins:
            one.verify(vocab_size)


def open_writers(prefix: Path, name: str, dtype: Any) -> list[IndexedWriter]:
    """Writers of both twins, inputs first, to be published in this order.

    A run killed between the two publications leaves the inputs complete and the outputs marked as unfinished; only then
    are complete inputs replaced.

    Raises:
        DataError: one of them is already there.
    """
    inputs, outputs = twin_prefixes(prefix, name)
    half_published = manifest_path(inputs).exists() and marker_path(outputs).exists() and not manifest_path(outputs).exists()
    if not half_published:
        return _open_both(inputs, outputs, dtype)
    writer = IndexedWriter(outputs, dtype)  # takes the lock: whoever was writing is gone
    os.replace(manifest_path(inputs), marker_path(inputs))
    try:
        return [IndexedWriter(inputs, dtype), writer]
    except BaseException:
        writer.abort()
        raise


def _open_both(inputs: Path, outputs: Path, dtype: Any) -> list[IndexedWriter]:
    first = IndexedWriter(inputs, dtype)
    try:
        return [first, IndexedWriter(outputs, dtype)]
    except BaseException:
        first.abort()
        raise
