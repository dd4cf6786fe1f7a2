"""From samples to an indexed dataset: tokenize batches, append the end token, drop what gives nothing to train on, write.

In: a reader of samples and a tokenizer. Out: documents in a dataset (or in twin files), and what was counted on the way.
One document is one sample, one sequence one of its fields or turns, and mode 1 marks what is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np

from megawrap.data.ahead import ahead
from megawrap.data.concat import Block
from megawrap.data.counts import Counts
from megawrap.data.fields import Batch
from megawrap.data.format import IndexedWriter, token_dtype
from megawrap.data.reader import SampleReader
from megawrap.data.tokenizer import Tokenizer
from megawrap.data.twins import open_writers
from megawrap.errors import DataError

SpecialPolicy = Literal["allow", "escape", "error"]
RECORD = np.dtype([("digest", "<u8", (2,)), ("flags", "u1")])
"""What is kept of a document for deduplication across parts; flags: 1 spells out a special token, 2 holds control characters."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything but input and tokenizer that decides what is written; recorded in the manifest."""

    fields: tuple[str, ...] = ("inputs", "outputs")
    loss: tuple[int, ...] | None = None
    append_eod: bool = True
    special_tokens_in_text: SpecialPolicy = "escape"
    strict: bool = False
    on_bad_line: Literal["refuse", "skip"] = "refuse"
    dedup: Literal["exact"] | None = None
    max_tokens: int | None = None
    max_line_mib: float = 64.0
    twin_files: Literal["targets", "outputs"] | None = None
    limit: int | None = None
    chat_template_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a manifest."""
        given = asdict(self)
        return {**given, "fields": list(self.fields), "loss": None if self.loss is None else list(self.loss)}


@dataclass
class TokenCounts:
    """Tokens written."""

    context: int = 0
    target: int = 0

    def add(self, block: Block) -> None:
        """Count a block of documents with modes."""
        assert block.modes is not None
        total = int(block.lengths.sum(dtype=np.int64))
        target = int(block.lengths[block.modes.astype(bool)].sum(dtype=np.int64))
        self.target += target
        self.context += total - target


class Encoder:
    """Batches to blocks of documents.

    Args:
        tokenizer: what encodes.
        options: end token, special tokens, limits.

    Attributes:
        dropped: what became of samples that are not written after all, to be moved out of `Counts.samples`.
    """

    def __init__(self, tokenizer: Tokenizer, options: Options) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._special_ids = np.array(sorted(tokenizer.special_tokens.values()), dtype=self._dtype)
        self.dropped = Counts()

    def encode(self, batch: Batch) -> tuple[Block, np.ndarray]:
        """Token ids of a batch.

        Returns:
            The block, without samples that give no token to train on or are too long, and bool [samples], which are in it.

        Raises:
            DataError: a sample gives no token to train on and the options are strict.
        """
        ids, lengths = self._ids(batch)
        lengths, trained, counts = _sequences(batch, lengths.astype(np.int64))
        starts = np.cumsum(counts) - counts
        totals, targets = np.add.reduceat(lengths, starts), np.add.reduceat(lengths * trained, starts)
        keep = self._kept(batch, totals, targets)
        if not keep.all():
            ids = ids[np.repeat(keep, totals)]
            by_sequence = np.repeat(keep, counts)
            lengths, trained, counts = lengths[by_sequence], trained[by_sequence], counts[keep]
        if self._options.append_eod and len(counts):
            ids, lengths = self._append_eod(ids, lengths, trained, counts, unless_special=batch.markup is not None)
        return Block(ids, lengths, counts, trained.astype(np.int8)), keep

    def _ids(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Ids in the dtype on disk, flat, and lengths [texts]."""
        escape = self._options.special_tokens_in_text != "allow"
        markup = batch.markup
        if markup is None or markup.all() or not escape:
            ids, lengths = self._tokenizer.encode(batch.texts, escape_special=escape and markup is None)
            return ids.astype(self._dtype), lengths
        lengths = np.zeros(len(batch.texts), dtype=np.int64)
        groups = []
        for flag in (True, False):
            index = np.flatnonzero(markup == flag)
            ids, lengths[index] = self._tokenizer.encode([batch.texts[at] for at in index.tolist()], escape_special=not flag)
            groups.append((index, ids))
        starts = np.cumsum(lengths) - lengths
        mixed = np.empty(int(lengths.sum()), dtype=self._dtype)
        for index, ids in groups:
            own = lengths[index]
            mixed[np.arange(len(ids)) + np.repeat(starts[index] - (np.cumsum(own) - own), own)] = ids
        return mixed, lengths

    def _kept(self, batch: Batch, totals: np.ndarray, targets: np.ndarray) -> np.ndarray:
        keep = targets > 0
        if not keep.all() and self._options.strict:
            at = int(np.argmin(keep))
            place = f"{batch.source.name}:{batch.source.line_number(batch.lines[at])}"
            what = "the last field gives" if self._options.loss is None else "the trained fields give"
            raise DataError(f"{place}: {what} no token, which --strict refuses")
        self.dropped.empty += int((~keep).sum())
        if self._options.max_tokens is not None:
            fits = totals + self._options.append_eod <= self._options.max_tokens
            self.dropped.too_long += int((keep & ~fits).sum())
            keep = keep & fits
        for mask, name in ((batch.special, "special_texts"), (batch.controls, "control_characters")):
            if mask is not None:
                setattr(self.dropped, name, getattr(self.dropped, name) + int((mask & ~keep).sum()))
        return keep

    def _append_eod(
        self, ids: np.ndarray, lengths: np.ndarray, trained: np.ndarray, counts: np.ndarray, *, unless_special: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Put the end token behind the last trained sequence of every document.

        A chat template ends turns itself: with `unless_special`, not behind a special token.
        """
        starts = np.cumsum(counts) - counts
        last = np.maximum.reduceat(np.where(trained, np.arange(len(lengths)), -1), starts)
        places = np.cumsum(lengths)[last]
        if unless_special:
            missing = ~((lengths[last] > 0) & np.isin(ids[np.maximum(places - 1, 0)], self._special_ids))
            last, places = last[missing], places[missing]
        lengths = lengths.copy()
        lengths[last] += 1
        return np.insert(ids, places, self._tokenizer.eos_id), lengths


def _sequences(batch: Batch, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths and flags [sequences], and sequences [samples], of a batch whose texts have `lengths` tokens."""
    if batch.starts is None:
        return lengths, batch.trained, batch.counts
    first = np.flatnonzero(batch.starts)
    starts = np.cumsum(batch.counts) - batch.counts
    return np.add.reduceat(lengths, first), batch.trained[first], np.add.reduceat(batch.starts.astype(np.int64), starts)


def _records(batch: Batch, digests: np.ndarray) -> np.ndarray:
    """`RECORD` [samples]"""
    records = np.zeros(len(digests), dtype=RECORD)
    records["digest"] = digests
    for flag, mask in ((1, batch.special), (2, batch.controls)):
        if mask is not None:
            records["flags"] |= np.where(mask, flag, 0).astype(np.uint8)
    return records


class Output:
    """The writer of PREFIX, or the two writers of twin files, behind one set of calls.

    Args:
        prefix: of the dataset, or of the twins.
        dtype: of the token ids.
        twin_files: name of the second twin, or None.
    """

    def __init__(self, prefix: Path, dtype: Any, twin_files: str | None = None) -> None:
        self.prefix, self.published = prefix, False
        self._writers = open_writers(prefix, twin_files, dtype) if twin_files else [IndexedWriter(prefix, dtype)]

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for writer in self._writers:
            writer.abort()

    def add(self, block: Block) -> None:
        """Append documents; twin files take documents of two sequences, the first of them not trained."""
        if len(self._writers) == 1:
            self._writers[0].add(*block)
            return
        table = np.asarray(block.lengths).reshape(-1, 2)
        is_target = np.repeat(np.tile([False, True], len(table)), table.reshape(-1))
        for writer, mask, column in zip(self._writers, (~is_target, is_target), (0, 1), strict=True):
            writer.add(block.tokens[mask], table[:, column], np.ones(len(table), dtype=np.int32), None)

    @property
    def num_documents(self) -> int:
        """Samples written so far."""
        return self._writers[-1].num_documents

    def prepare(self, manifest: dict[str, Any]) -> None:
        """Write everything under temporary names."""
        for writer in self._writers:
            writer.prepare(manifest)

    def publish(self) -> None:
        """Make it visible."""
        for writer in self._writers:
            writer.publish()
        self.published = True


def build(
    reader: SampleReader,
    encoder: Encoder,
    output: Output,
    *,
    progress: Callable[[SampleReader], None] | None = None,
    digests: IO[bytes] | None = None,
) -> tuple[Counts, TokenCounts]:
    """Read everything, tokenize it and append it to the output.

    Args:
        reader: of the samples; works ahead in a thread.
        encoder: of its batches.
        output: where documents go.
        progress: called after every batch.
        digests: where the digests of the documents written go, for deduplication across parts.

    Returns:
        What became of the lines, and tokens written.
    """
    tokens = TokenCounts()
    for batch in ahead(reader.batches()):
        block, keep = encoder.encode(batch)
        if len(block.sequences_per_document):
            output.add(block)
            tokens.add(block)
            if digests is not None and batch.digests is not None:
                digests.write(_records(batch, batch.digests)[keep].tobytes())
        if progress is not None:
            progress(reader)
    counts, dropped = reader.counts, encoder.dropped
    counts.samples -= dropped.empty + dropped.too_long
    counts.empty += dropped.empty
    counts.too_long += dropped.too_long
    counts.special_texts -= dropped.special_texts
    counts.control_characters -= dropped.control_characters
    return counts, tokens
