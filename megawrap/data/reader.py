"""Samples out of files, a block at a time: every line is a sample, is counted, or is refused by file, line and column.

In: pieces of files and an extractor of fields. Out: `Batch`es in input order, and `Counts` that add up to the lines read.
A block of lines is parsed and checked as a whole; only where that does not prove it clean are smaller parts, and in the
end single lines, looked at. Memory is bounded by the block and the longest line allowed, whatever the input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from typing import Any

import numpy as np
import orjson

from megawrap.data.counts import BadLines, Counts
from megawrap.data.dedup import SeenDigests, digests
from megawrap.data.fields import Batch, Extractor, FieldTexts, Sequences
from megawrap.data.inputs import STDIN, Piece, Source, is_table
from megawrap.data.jsonl import (
    BOM,
    MAX_LINE_BYTES,
    LineBlock,
    LineError,
    control_positions,
    count_byte,
    line_blocks,
    parse_object,
    proven,
)
from megawrap.errors import DataError

BLOCK_BYTES = 4 << 20
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_BORDER = b"\xff"  # between texts: no byte of UTF-8, so that nothing is found across a border
_PARTS = 16  # a block that is not proven is looked at in so many parts
_FEW = 8  # lines that are looked at one by one

Special = Callable[[Sequence[str]], list[tuple[int, str]]]
Problem = tuple[int, int, LineError]
"""Line, byte offset from where reading started, what is wrong."""


class BytesFinder:
    """Where any of a set of words starts in a block of UTF-8: one expression per first byte, which `re` skips ahead to."""

    def __init__(self, words: Iterable[str]) -> None:
        groups: dict[bytes, list[bytes]] = {}
        for word in filter(None, words):
            groups.setdefault(word.encode()[:1], []).append(re.escape(word.encode()))
        self._patterns = [re.compile(b"|".join(group)) for group in groups.values()]

    def positions(self, data: bytes) -> np.ndarray:
        """int64, in no order; of words that overlap with one another, at least one."""
        return np.array([match.start() for pattern in self._patterns for match in pattern.finditer(data)], dtype=np.int64)


class SampleReader:
    """Read samples from pieces of files, in order.

    Args:
        pieces: what to read; names as `expand` returned them.
        extractor: which keys make up a sample.
        bad_lines: policy for lines that are not samples.
        strict: a sample without text to train on is a bad line; default: it is dropped and counted.
        special: finds texts that spell out a special token (index, token); None: nobody asks.
        special_words: the special tokens, to rule out whole blocks at once; None: every text is asked for.
        refuse_special: such a sample is a bad line.
        max_line_bytes: a longer line is a bad line.
        limit: read only this many lines.
        seen: drop and count samples whose digest it knows already.
        block_bytes: about how much is read and parsed at once.

    Attributes:
        counts: what became of the lines so far.
        sources: one per piece that was begun.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        extractor: Extractor,
        *,
        bad_lines: BadLines | None = None,
        strict: bool = False,
        special: Special | None = None,
        special_words: Iterable[str] | None = None,
        refuse_special: bool = False,
        max_line_bytes: int = MAX_LINE_BYTES,
        limit: int | None = None,
        seen: SeenDigests | None = None,
        block_bytes: int | None = None,
    ) -> None:
        self.pieces, self.extractor, self.counts = list(pieces), extractor, Counts()
        self.sources: list[Any] = []
        self.bad_lines = bad_lines or BadLines()
        self._strict, self._special, self._refuse_special, self._seen = strict, special, refuse_special, seen
        self._special_finder = None if special_words is None else BytesFinder(special_words)
        self._max_line_bytes, self._limit, self._block_bytes = max_line_bytes, limit, block_bytes or BLOCK_BYTES

    @property
    def raw_bytes(self) -> int:
        """Bytes of the files read so far."""
        return sum(source.raw_bytes for source in self.sources)

    def batches(self) -> Iterator[Batch]:
        """Samples in input order, about a block of lines at a time.

        Raises:
            DataError: a bad line under policy `refuse`, too many of them, a damaged or empty file.
        """
        for piece in self.pieces:
            if self._left() == 0:
                return
            yield from self._table(piece) if is_table(piece.name) else self._lines(piece)

    def _left(self) -> int | None:
        return None if self._limit is None else self._limit - self.counts.lines

    def _lines(self, piece: Piece) -> Iterator[Batch]:
        source = Source(piece)
        self.sources.append(source)
        try:
            for block in line_blocks(source.chunks(self._block_bytes), self._max_line_bytes):
                left = self._left()
                if left is not None and len(block.lines) > left:
                    block = _slice(block, 0, left)
                if block.offset == 0 and source.first == 0 and block.body.startswith(BOM):
                    block = LineBlock(len(BOM), [block.lines[0][len(BOM) :], *block.lines[1:]], block.body[len(BOM) :], block.complete)  # type: ignore[index]
                batch = self._block(source, block)
                if batch.lines:
                    yield batch
                if self._left() == 0:
                    break
        finally:
            source.close()
        if source.lines == 0 and piece.start == 0 and piece.stop is None:
            raise DataError(f"{'standard input' if piece.name == STDIN else piece.name}: empty: there is no line in it")

    def _table(self, piece: Piece) -> Iterator[Batch]:
        from megawrap.data.tables import TableSource

        source = TableSource(piece.name, self.extractor)
        self.sources.append(source)
        try:
            for rows in source.rows(self._block_bytes):
                left = self._left()
                rows = rows if left is None else rows[:left]
                if not rows:
                    break
                first = source.lines + 1
                self._begin(source, len(rows))
                numbers = range(first, first + len(rows))
                batch = self._from_values(rows, numbers, None)
                problems: list[Problem] = []
                if batch is None:
                    batch = self._one_by_one(zip(numbers, rows, strict=True), lambda row: row, problems)
                self._finish(source, batch, problems)
                if batch.lines:
                    yield batch
        finally:
            source.close()
        if source.lines == 0:
            raise DataError(f"{piece.name}: empty: there is no row in it")

    def _begin(self, source: Any, lines: int) -> None:
        source.lines += lines
        self.counts.lines += lines

    def _block(self, source: Source, block: LineBlock) -> Batch:
        first = source.lines + 1
        self._begin(source, len(block.lines))
        problems: list[Problem] = []
        batch = Batch.join([part for part in self._parts(block, first, problems) if part.lines])
        self._finish(source, batch, problems)
        return batch

    def _parts(self, block: LineBlock, first: int, problems: list[Problem]) -> Iterator[Batch]:
        """Batches of a block whose first line has number `first`: of all of it at once if that can be, else of its parts."""
        batch = self._whole(block, first) if isinstance(self.extractor, FieldTexts) and block.body else None
        if batch is not None:
            yield batch
        elif len(block.lines) <= _FEW or self.extractor.width is None:
            yield self._careful(block, first, problems)
        else:
            step = -(-len(block.lines) // _PARTS)
            for start in range(0, len(block.lines), step):
                yield from self._parts(_slice(block, start, start + step), first + start, problems)

    def _whole(self, block: LineBlock, first: int) -> Batch | None:
        """The block if every line of it is a sample, has no text to train on, or is empty; None: look closer."""
        lines, numbers = block.lines, range(first, first + len(block.lines))
        if b"" in lines:
            numbers = list(compress(numbers, lines))  # type: ignore[arg-type, assignment]
            lines = list(filter(None, lines))
        try:
            values = list(map(orjson.loads, lines))  # type: ignore[arg-type]
        except orjson.JSONDecodeError:
            return None
        batch = self._from_values(values, numbers, block)
        if batch is not None:
            self.counts.blank += len(block.lines) - len(lines)
        return batch

    def _from_values(self, values: list[Any], numbers: Sequence[int], block: LineBlock | None) -> Batch | None:
        """A batch of all objects at once; None when one of them needs a closer look."""
        extractor = self.extractor
        texts = extractor.columns(values) if isinstance(extractor, FieldTexts) else None
        if texts is None or not isinstance(extractor, FieldTexts):
            return None
        encoded = list(map(str.encode, texts))
        blob = _BORDER.join(encoded)
        if block is not None and not proven(block, extractor.other_quotes(values) + count_byte(blob, 34)):
            return None
        if block is None and len(blob) > self._max_line_bytes:
            return None
        positions = control_positions(blob)
        special = self._spelled_out(texts, encoded, blob)
        if special and self._refuse_special:
            return None
        width, samples = len(extractor.fields), len(values)
        keep = _trains(texts, extractor.trained)
        if keep is not None and self._strict:
            return None
        batch = Batch(None, texts, np.full(samples, width), np.tile(np.array(extractor.trained), samples), numbers)
        if special:
            batch.special = np.zeros(samples, dtype=bool)
            batch.special[np.array(special) // width] = True
        if len(positions):
            batch.controls = np.zeros(samples, dtype=bool)
            batch.controls[_texts_at(positions, encoded) // width] = True
        if keep is not None:
            self.counts.empty += int((~keep).sum())
            batch.select(keep)
        return batch

    def _spelled_out(self, texts: list[str], encoded: list[bytes], blob: bytes) -> list[int]:
        """Which texts spell out a special token."""
        if self._special is None:
            return []
        if self._special_finder is None:
            return [index for index, _ in self._special(texts)]
        positions = self._special_finder.positions(blob)
        asked = np.unique(_texts_at(positions, encoded)).tolist() if len(positions) else []
        return [asked[index] for index, _ in self._special([texts[place] for place in asked])]

    def _careful(self, block: LineBlock, first: int, problems: list[Problem]) -> Batch:
        last = len(block.lines) - 1

        def lines() -> Iterator[tuple[int, tuple[bytes | None, bool]]]:
            for index, line in enumerate(block.lines):
                if line is not None and not line.strip():
                    self.counts.blank += 1
                else:
                    yield first + index, (line, index < last or block.complete)

        found: list[Problem] = []
        batch = self._one_by_one(lines(), self._parse, found)
        problems += [(number, block.position(number - first), error) for number, _, error in found]
        return batch

    def _parse(self, given: tuple[bytes | None, bool]) -> dict[str, Any]:
        line, complete = given
        if line is None:
            raise self._too_long()
        return parse_object(line, complete=complete)

    def _too_long(self) -> LineError:
        limit = self._max_line_bytes
        return LineError("line-too-long", f"longer than {limit} bytes ({limit / 2**20:g} MiB), the most --max-line-mib allows")

    def _one_by_one(self, numbered: Any, parse: Callable[[Any], dict[str, Any]], problems: list[Problem]) -> Batch:
        """A batch of (line number, what `parse` makes an object of); what is wrong goes to `problems`."""
        samples: list[Sequences] = []
        numbers: list[int] = []
        for number, given in numbered:
            try:
                sample = self._check(self.extractor.pick(parse(given)))
            except LineError as problem:
                problems.append((number, 0, problem))
                continue
            if sample is None:
                self.counts.empty += 1
            else:
                samples.append(sample)
                numbers.append(number)
        return Batch.of(samples, numbers, lambda text: _CONTROL.search(text) is not None)

    def _check(self, sample: Sequences) -> Sequences | None:
        """The sample with `special` filled in; None when it has nothing to train on."""
        if not any(text for text, trained in zip(sample.texts, sample.trained, strict=True) if trained):
            if self._strict:
                names = " and ".join(map(repr, compress(self.extractor.fields, self.extractor.trained or (True,))))
                raise LineError("empty-outputs", f"{names} is empty, which --strict refuses")
            return None
        if sum(map(len, sample.texts)) > self._max_line_bytes:
            raise self._too_long()
        if sample.markup is None and self._special is not None:
            found = self._special(sample.texts)
            if found and self._refuse_special:
                raise LineError("special-token", f"the special token {found[0][1]!r} is spelled out in the text")
            return sample._replace(special=bool(found))
        return sample

    def _finish(self, source: Any, batch: Batch, problems: list[Problem]) -> None:
        for line, position, problem in sorted(problems, key=lambda one: one[0]):
            self.bad_lines.add(source, line, position, problem, self.counts)
        batch.source = source
        if self._seen is not None and batch.lines:
            batch.digests = digests(batch.texts, batch.counts)
            new = self._seen.add(batch.digests)
            if not new.all():
                self.counts.duplicates += int((~new).sum())
                batch.select(new)
        self.counts.samples += len(batch.lines)
        self.counts.control_characters += 0 if batch.controls is None else int(batch.controls.sum())
        self.counts.special_texts += 0 if batch.special is None else int(batch.special.sum())


def _texts_at(positions: np.ndarray, encoded: list[bytes]) -> np.ndarray:
    """Number of the text at each position of the joined texts, which have a byte between them."""
    ends = np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)) + 1)
    return np.searchsorted(ends, positions, side="right")


def _slice(block: LineBlock, start: int, stop: int) -> LineBlock:
    lines = block.lines[start:stop]
    complete = block.complete or stop < len(block.lines)
    whole = bool(block.body) and None not in lines
    body = b"\n".join(lines) + (b"\n" if complete else b"") if whole else b""  # type: ignore[arg-type]
    return LineBlock(block.position(start), lines, body, complete)


def _trains(texts: list[str], trained: tuple[bool, ...]) -> np.ndarray | None:
    """bool [samples], whether any trained text has characters; None: all of them have."""
    columns = [texts[place :: len(trained)] for place, flag in enumerate(trained) if flag]
    if all(columns[0]):
        return None
    return np.array([any(sample) for sample in zip(*columns, strict=True)], dtype=bool)
