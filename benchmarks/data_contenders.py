"""The programs that the data benchmark runs, each in a process of its own: `python -m benchmarks.data_contenders NAME SPEC`.

In: a name and a JSON object. Out: one JSON line with the seconds and CPU seconds of the part that counts, and the work done.
What a tokenizer alone can do is timed over texts in memory, in blocks like ours, its result thrown away: that is the limit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_BYTES = 4 << 20


class Clock:
    """Wall and CPU seconds of the parts between `start` and `stop`."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._begin = (0.0, 0.0)

    def __enter__(self) -> Clock:
        self._begin = (time.perf_counter(), time.process_time())
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begin[0]
        self.cpu_seconds += time.process_time() - self._begin[1]

    def facts(self) -> dict[str, float]:
        """As every contender reports them."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


# ---- tokenizers alone -----------------------------------------------------------------------------------------------


def tokenizer_alone(spec: dict[str, Any]) -> dict[str, Any]:
    """Encode both fields of the corpus by one library's own call for batches; `library`, `tokenizer`, `corpus`, `threads`."""
    encode = {"gigatoken": _gigatoken, "tiktoken": _tiktoken, "tokenizers": _tokenizers}[spec["library"]](spec)
    clock, tokens = Clock(), 0
    for texts in _blocks(Path(spec["corpus"])):
        with clock:
            tokens += encode(texts)
    return {**clock.facts(), "tokens": tokens}


def _blocks(corpus: Path) -> Iterator[list[str]]:
    import orjson

    with open(corpus, "rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            samples = map(orjson.loads, lines)
            yield [text for sample in samples for text in (sample["inputs"], sample["outputs"])]


def _gigatoken(spec: dict[str, Any]) -> Callable[[list[str]], int]:
    import gigatoken

    library = gigatoken.Tokenizer(str(Path(spec["tokenizer"]) / "tokenizer.json"))
    library.encode_batch(["the first call imports more"])
    return lambda texts: len(library.encode_batch(texts, parallel=spec["threads"] > 1).layout.content)


def _tiktoken(spec: dict[str, Any]) -> Callable[[list[str]], int]:
    """The library with the ranks that megawrap builds, called as its documentation says."""
    import tiktoken

    from megawrap.data.tokenizer_backends import byte_level_encoding

    definition = json.loads((Path(spec["tokenizer"]) / "tokenizer.json").read_text())
    pattern, ranks, _ = byte_level_encoding(definition)
    library = tiktoken.Encoding("benchmark", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
    return lambda texts: sum(map(len, library.encode_ordinary_batch(texts, num_threads=spec["threads"])))


def _tokenizers(spec: dict[str, Any]) -> Callable[[list[str]], int]:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(Path(spec["tokenizer"]) / "tokenizer.json"))
    library.encode_special_tokens = True
    return lambda texts: sum(len(encoding.ids) for encoding in library.encode_batch_fast(texts, add_special_tokens=False))


# ---- packing --------------------------------------------------------------------------------------------------------


def packing(spec: dict[str, Any]) -> dict[str, Any]:
    """Pack `samples` samples of log-normal length into rows of `seq_length`; only whole rows and a bounded tail, as data has."""
    from megawrap.data.packing import pack
    from megawrap.data.samples import Counts, Pieces

    number, seq_length = spec["samples"], spec["seq_length"]
    draw = np.random.default_rng(spec.get("seed", 0))
    length = np.clip(draw.lognormal(5.3, 1.1, number), 2, seq_length + 1).astype(np.int32)
    documents = np.arange(number, dtype=np.int64)
    counts = Counts(documents=number, tokens=int(length.sum()))
    pieces = Pieces(document=documents, start=np.zeros(number, dtype=np.int32), length=length, counts=counts)
    clock = Clock()
    with clock:
        packed = pack(pieces, seq_length, key=1)
    _every_piece_once(packed.windows, number)
    fill = (length.astype(np.int64) - 1).sum() / (packed.num_rows * seq_length)
    return {**clock.facts(), "tokens": int(length.sum()), "rows": packed.num_rows, "fill": float(fill)}


def pack_dataset(spec: dict[str, Any]) -> dict[str, Any]:
    """Select and pack the documents of an indexed dataset under `split`; the account of its tokens must be complete."""
    from megawrap.data.format import IndexedDataset
    from megawrap.data.packing import pack
    from megawrap.data.samples import select

    dataset = IndexedDataset(Path(spec["prefix"]))
    clock = Clock()
    with clock:
        pieces = select(dataset, 0, dataset.num_documents, seq_length=spec["seq_length"], overlong="split", loss_on="all")
        packed = pack(pieces, spec["seq_length"], key=1)
    _every_piece_once(packed.windows, len(pieces.length))
    pairs = int((pieces.length.astype(np.int64) - 1).sum())
    bounds = np.asarray(dataset.document_indices)
    expected = dataset.num_tokens - int((np.diff(bounds) > 0).sum())  # of a document of n tokens, n - 1 pairs
    fill = pairs / (packed.num_rows * spec["seq_length"])
    return {**clock.facts(), "tokens": dataset.num_tokens, "rows": packed.num_rows, "fill": fill, "lost": expected - pairs}


def _every_piece_once(windows: np.ndarray, number: int) -> None:
    if len(windows) != number or not np.bincount(windows, minlength=number).max() == 1:
        raise AssertionError(f"{len(windows)} windows packed for {number} pieces")


# ---- writing and reading --------------------------------------------------------------------------------------------


def write_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Write the tokens of `prefix` again, in blocks; the limit of an indexed dataset's builder."""
    from megawrap.data.format import IndexedDataset, IndexedWriter

    dataset = IndexedDataset(Path(spec["prefix"]))
    lengths, ids = np.asarray(dataset.lengths), np.asarray(dataset.tokens)
    bounds = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    width = 2  # inputs and outputs
    clock = Clock()
    with clock, IndexedWriter(Path(spec["out"]), dataset.dtype) as writer:
        for first in range(0, len(lengths), 8192):
            last = min(first + 8192, len(lengths))
            modes = np.tile(np.array([0, 1], dtype=np.int8), (last - first) // width)
            writer.add(ids[bounds[first] : bounds[last]], lengths[first:last], np.full((last - first) // width, width), modes)
        writer.commit({})
    return {**clock.facts(), "tokens": dataset.num_tokens}


def write_megatron(spec: dict[str, Any]) -> dict[str, Any]:
    """The same by megatron-core's IndexedDatasetBuilder, a document at a time as its scripts do."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    from megawrap.data.format import IndexedDataset

    dataset = IndexedDataset(Path(spec["prefix"]))
    lengths, ids = dataset.lengths.tolist(), torch.from_numpy(np.array(dataset.tokens).astype(np.int32))
    clock, position = Clock(), 0
    with clock:
        builder = IndexedDatasetBuilder(get_bin_path(spec["out"]), dtype=dataset.dtype.type)
        for first in range(0, len(lengths), 2):
            sizes = lengths[first : first + 2]
            builder.add_document(ids[position : position + sum(sizes)], sizes)
            position += sum(sizes)
        builder.finalize(get_idx_path(spec["out"]))
    return {**clock.facts(), "tokens": dataset.num_tokens}


def load_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Read `rows` packed rows of `seq_length` in a random order."""
    from megawrap.data.format import IndexedDataset
    from megawrap.data.packing import pack
    from megawrap.data.rows import RowDataset
    from megawrap.data.samples import select

    dataset, seq_length = IndexedDataset(Path(spec["prefix"])), spec["seq_length"]
    pieces = select(dataset, 0, dataset.num_documents, seq_length=seq_length, overlong="split")
    rows = RowDataset(dataset, pack(pieces, seq_length, key=1), seq_length=seq_length, seed=1)
    rows.row(0)  # the tables of the epoch, once
    order = np.random.default_rng(0).integers(0, len(rows), spec["rows"]).tolist()
    clock = Clock()
    with clock:
        for index in order:
            row = rows.row(index)
    if any(array.size > seq_length for array in row.values()):
        raise AssertionError("a row holds more than its positions")
    return {**clock.facts(), "tokens": seq_length * len(order), "rows": len(order)}


def load_megatron(spec: dict[str, Any]) -> dict[str, Any]:
    """Read rows of the same tokens by megatron-core's GPTDataset, with its attention mask and position ids per document."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Tokens:
        """As much of a tokenizer as the dataset asks for."""

        eod, vocab_size = spec["eod"], spec["vocab_size"]
        pad = bos_id = eos_id = eod
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=spec["seq_length"], blend=None, split="1,0,0", path_to_cache=spec["out"], tokenizer=Tokens(),
        reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=False, create_attention_mask=spec["mask"],
    )  # fmt: skip
    low_level = GPTDataset.build_low_level_dataset(spec["prefix"], config)
    dataset = GPTDataset(low_level, spec["prefix"], np.arange(len(low_level), dtype=np.int32), spec["rows"], Split.train, config)
    dataset[0]
    clock = Clock()
    with clock:
        for index in range(spec["rows"]):
            dataset[index]
    return {**clock.facts(), "tokens": spec["seq_length"] * spec["rows"], "rows": spec["rows"]}


CONTENDERS = {
    function.__name__: function
    for function in (tokenizer_alone, packing, pack_dataset, write_ours, write_megatron, load_ours, load_megatron)
}  # fmt: skip


def main() -> None:
    """Run one contender and print what it found."""
    name, spec = sys.argv[1], json.loads(sys.argv[2])
    found = CONTENDERS[name](spec)
    print(json.dumps({**found, "threads": len(os.sched_getaffinity(0))}), flush=True)


if __name__ == "__main__":
    main()
