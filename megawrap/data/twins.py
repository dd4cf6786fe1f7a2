"""Twin files: inputs and outputs in two indexed datasets, as the BigCode fork of Megatron-LM writes and reads them.

In: PREFIX_inputs_document and PREFIX_targets_document (or PREFIX_outputs_document), sample i being sequence i of each.
Out: `TwinDataset`, their view as one dataset with two sequences a document, which `IndexedDataset(PREFIX)` gives by
itself; or the two writers that preprocessing fills.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megawrap.data.format import IndexedDataset, IndexedWriter, bin_path, idx_path, manifest_path, marker_path
from megawrap.errors import DataError
from megawrap.io import readable_size

NAMES = ("targets", "outputs")
MAX_BYTES_IN_MEMORY = 4 << 30  # of token ids, in every process that trains: more is asked to be merged into one mapped file
_BLOCK = 1 << 22  # tokens interleaved at a time


def twin_prefixes(prefix: Path | str, name: str) -> tuple[Path, Path]:
    """PREFIX_inputs_document and PREFIX_{name}_document; `name` is targets or outputs."""
    prefix = Path(prefix)
    return prefix.with_name(f"{prefix.name}_inputs_document"), prefix.with_name(f"{prefix.name}_{name}_document")


def twin_names(prefix: Path | str) -> list[str]:
    """Which of targets and outputs are beside PREFIX_inputs_document; all of a damaged pair's names when only one twin is there."""
    prefix = Path(prefix)
    if not prefix.name:
        return []
    inputs = twin_prefixes(prefix, NAMES[0])[0]
    found = [name for name in NAMES if _exists(twin_prefixes(prefix, name)[1])]
    return found or (list(NAMES[:1]) if _exists(inputs) else [])


def _exists(prefix: Path) -> bool:
    return any(path(prefix).exists() for path in (bin_path, idx_path, marker_path))


class TwinDataset(IndexedDataset):
    """Two datasets read as one: document i is sample i, sequence 0 its inputs (mode 0), sequence 1 its outputs (mode 1).

    The index is made from both. Rows need the tokens of a sample side by side: `tokens` interleaves them in memory, in
    every process, so it is meant for fine-tuning sets; `read` takes a part.

    Raises:
        DataError: a twin is missing, damaged, or the two do not pair up.
    """

    def __init__(self, prefix: Path | str, *, mmap: bool = True) -> None:
        self.prefix, self.mmap = Path(prefix), mmap
        names = twin_names(prefix)
        if len(names) != 1:
            paths = " or ".join(str(twin_prefixes(prefix, name)[1]) for name in NAMES)
            raise DataError(f"{prefix}: twin files need exactly one of {paths}; there are {len(names)}", hint="Check the prefix")
        self.twins = tuple(IndexedDataset(path, mmap=mmap) for path in twin_prefixes(prefix, names[0]))
        inputs, outputs = self.twins
        self._check_pair(names[0])
        self.dtype, self.manifest = inputs.dtype, self._common_manifest()
        self.bin_path, self.idx_path = outputs.bin_path, outputs.idx_path  # named in messages
        self.num_documents, self.num_sequences = inputs.num_sequences, 2 * inputs.num_sequences
        self.num_tokens = inputs.num_tokens + outputs.num_tokens
        self.lengths = np.stack([inputs.lengths, outputs.lengths], axis=1).reshape(-1)
        self.pointers = np.zeros(self.num_sequences, dtype=np.int64)
        np.cumsum(self.lengths[:-1], dtype=np.int64, out=self.pointers[1:])
        self.pointers *= self.dtype.itemsize
        self.document_indices = np.arange(0, self.num_sequences + 1, 2, dtype=np.int64)
        self.modes = np.tile(np.array([0, 1], dtype=np.int8), self.num_documents)

    def _check_pair(self, name: str) -> None:
        inputs, outputs = self.twins
        for one in self.twins:
            if one.num_documents != one.num_sequences:
                raise DataError(f"{one.idx_path}: {one.num_sequences} sequences in {one.num_documents} documents, twin files have one each")
        if inputs.num_sequences != outputs.num_sequences or inputs.dtype != outputs.dtype:
            raise DataError(
                f"{self.prefix}: the twins do not pair up: {inputs.num_sequences} inputs of {inputs.dtype}, "
                f"{outputs.num_sequences} {name} of {outputs.dtype}",
                hint="They come from different runs, or a sample was left out of one of them: preprocess again",
            )

    def _common_manifest(self) -> dict[str, Any] | None:
        """What both manifests say: all but the files and the counts, which are each one's own."""
        first, second = (one.manifest for one in self.twins)
        if first is None or second is None:
            return None
        common = {key: value for key, value in first.items() if key not in ("files", "counts", "modes")}
        for key, value in common.items():
            if second.get(key) != value:
                raise DataError(
                    f"{self.prefix}: the manifests of the twins differ in {key}: {value!r} and {second.get(key)!r}",
                    hint="They come from different runs: preprocess again",
                )
        return {**common, "counts": {"max_token_id": max(one.max_token_id for one in self.twins)}}

    @cached_property
    def tokens(self) -> np.ndarray:
        """All token ids, [num_tokens], the two of a sample side by side, in memory.

        Raises:
            DataError: more than `MAX_BYTES_IN_MEMORY`.
        """
        num_bytes = self.num_tokens * self.dtype.itemsize
        if num_bytes > MAX_BYTES_IN_MEMORY:
            raise DataError(
                f"{self.prefix}: twin files are read into memory, {readable_size(num_bytes)} in every process,"
                f" and the limit is {readable_size(MAX_BYTES_IN_MEMORY)}",
                hint=f"Make one file of them, which is mapped: megawrap data merge {self.prefix}_merged --inputs {self.prefix}",
            )
        tokens = np.empty(self.num_tokens, dtype=self.dtype)
        for first in range(0, self.num_tokens, _BLOCK):
            tokens[first : first + _BLOCK] = self.read(first, min(_BLOCK, self.num_tokens - first))
        return tokens

    def read(self, first: int, count: int) -> np.ndarray:
        """Token ids first..first+count-1 of the interleaved whole, by reads of both files."""
        if count == 0:
            return np.empty(0, dtype=self.dtype)
        starts = self.pointers  # even sequences are inputs, odd ones outputs: whole samples are read, and cut to what was asked for
        begin, end = (int(np.searchsorted(starts, at * self.dtype.itemsize, side="right") - 1) // 2 for at in (first, first + count - 1))
        end += 1
        is_output = np.repeat(np.tile([False, True], end - begin), self.lengths[2 * begin : 2 * end])
        tokens = np.empty(len(is_output), dtype=self.dtype)
        for mask, one in zip((~is_output, is_output), self.twins, strict=True):
            tokens[mask] = one.read(int(one.pointers[begin]) // one.dtype.itemsize, int(np.count_nonzero(mask)))
        skip = first - int(starts[2 * begin]) // self.dtype.itemsize
        return tokens[skip : skip + count]

    def sequence(self, index: int) -> np.ndarray:
        """Token ids of one sequence, from the file it lies in."""
        return self.twins[index % 2].sequence(index // 2)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the fingerprints of both files, hex."""
        return hashlib.sha256("".join(one.fingerprint for one in self.twins).encode()).hexdigest()

    @cached_property
    def max_token_id(self) -> int:
        """Largest token id of both files."""
        return max(one.max_token_id for one in self.twins)

    def verify(self, vocab_size: int | None = None) -> dict[str, Any]:
        """Verify both files; see `IndexedDataset.verify`."""
        inputs, outputs = (one.verify(vocab_size) for one in self.twins)
        digests = {
            f"{side} {name}": value for side, found in (("inputs", inputs), ("outputs", outputs)) for name, value in found["sha256"].items()
        }
        highest = max(inputs["max_token_id"], outputs["max_token_id"])
        return {**outputs, "max_token_id": highest, "trained_tokens": self._num_trained(), "sha256": digests}


def open_twins(prefix: Path | str) -> TwinDataset:
    """The view of twin files, also where a single dataset of the same prefix stands beside them."""
    return TwinDataset(prefix)


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
