"""One preprocessing run from checked input to published dataset: in one go, or part by part and merged.

In: a `Task`, which is everything a run needs. Out: PREFIX (or twin files), its manifest and its list of bad lines, and
the summary a user reads. Counts are checked in every run: each line read is accounted for, or nothing is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from megawrap.data.build import RECORD, Encoder, Options, Output, TokenCounts, build
from megawrap.data.concat import Block, document_blocks
from megawrap.data.counts import BadLines, Counts, too_many
from megawrap.data.dedup import SeenDigests
from megawrap.data.fields import Extractor
from megawrap.data.format import IndexedDataset, bin_path, idx_path, manifest_path, token_dtype
from megawrap.data.inputs import Piece
from megawrap.data.parts import Plan
from megawrap.data.reader import SampleReader
from megawrap.data.tokenizer import Tokenizer
from megawrap.errors import DataError
from megawrap.io import atomic_write, explain_write_errors, read_json, require_free_space, sha256_file

Report = Callable[[int, int], None]
"""Called with bytes read and lines counted."""


@dataclass(frozen=True)
class Task:
    """Everything a run needs.

    Args:
        names: input files, checked.
        prefix: of the output.
        tokenizer: what encodes.
        extractor: which fields are read.
        options: what else decides the output.
        max_bad: with skip: most bad lines of the whole run.
    """

    names: Sequence[str]
    prefix: Path
    tokenizer: Tokenizer
    extractor: Extractor
    options: Options
    max_bad: int = 1000

    @property
    def side_file(self) -> Path:
        """Where bad lines are listed."""
        return self.prefix.with_name(self.prefix.name + ".bad.jsonl")

    def reader(self, pieces: Sequence[Piece], folder: Path, max_bad: int) -> SampleReader:
        """A reader of some of the input.

        Args:
            pieces: what to read.
            folder: for what does not fit into memory.
            max_bad: bad lines that are still allowed.
        """
        options = self.options
        return SampleReader(
            pieces,
            self.extractor,
            bad_lines=BadLines(options.on_bad_line, max_bad),
            strict=options.strict,
            special=self.tokenizer.special_texts,
            special_words=self.tokenizer.special_tokens,
            refuse_special=options.special_tokens_in_text == "error",
            max_line_bytes=int(options.max_line_mib * 2**20),
            limit=options.limit,
            seen=SeenDigests(folder) if options.dedup else None,
        )


@dataclass
class Result:
    """What a run did."""

    counts: Counts
    tokens: TokenCounts
    side_file: Path | None
    """The list of bad lines, if there are any."""


def run_whole(task: Task, report: Report) -> Result:
    """Preprocess all input in one go.

    Raises:
        DataError: bad input, or the disk refuses; nothing is left behind.
    """
    pieces = [Piece(name) for name in task.names]
    with ExitStack() as stack:
        output = stack.enter_context(Output(task.prefix, token_dtype(task.tokenizer.vocab_size), task.options.twin_files))
        reader = task.reader(pieces, task.prefix.parent, task.max_bad)
        encoder = Encoder(task.tokenizer, task.options)
        counts, tokens = build(reader, encoder, output, progress=lambda read: report(read.raw_bytes, read.counts.lines))
        _publish(stack, task, output, counts, tokens, [source.facts() for source in reader.sources], reader.bad_lines.copy_to)
    return Result(counts, tokens, task.side_file if counts.bad else None)


def require_free_prefix(task: Task) -> None:
    """Refuse now what the end of a long run would refuse: a prefix that is taken, or cannot be written.

    Raises:
        DataError: it is; or another process writes it.
    """
    with Output(task.prefix, token_dtype(task.tokenizer.vocab_size), task.options.twin_files):
        pass  # left without publishing, it removes what it made


def run_part(task: Task, plan: Plan, number: int, report: Report, *, bad_so_far: int = 0) -> tuple[Counts, int]:
    """Preprocess one part of a plan into PREFIX.parts, unless that was done before.

    Returns:
        The counts of the part, and the bytes of input it was made from.
    """
    marker, prefix = plan.marker(number), plan.part_prefix(number)
    if marker.exists():
        facts = read_json(marker, error=DataError)
        return Counts.from_dict(facts["lines"]), sum(source["bytes"] for source in facts["sources"])
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        path.unlink(missing_ok=True)  # published by a run that was killed before it could say so
    with ExitStack() as stack:
        output = stack.enter_context(Output(prefix, token_dtype(task.tokenizer.vocab_size)))
        reader = task.reader(plan.parts[number], plan.folder, task.max_bad - bad_so_far)
        digests = prefix.with_suffix(".digests")
        with explain_write_errors(digests, error=DataError), open(digests, "wb") as stream:
            counts, tokens = build(
                reader,
                Encoder(task.tokenizer, task.options),
                output,
                progress=lambda read: report(read.raw_bytes, read.counts.lines),
                digests=stream,
            )
        _require_sum(counts, output.num_documents)
        if output.num_documents:
            output.prepare({"tokenizer": task.tokenizer.facts()})
            output.publish()
        if counts.bad:
            atomic_write(prefix.with_suffix(".bad.jsonl"), reader.bad_lines.copy_to)
        sources = [{**source.facts(), "first": source.first} for source in reader.sources]
        facts = {"lines": counts.to_dict(), "context_tokens": tokens.context, "target_tokens": tokens.target, "sources": sources}
        atomic_write(marker, orjson.dumps(facts, option=orjson.OPT_INDENT_2))
    return counts, sum(source["bytes"] for source in sources)


def merge_parts(task: Task, plan: Plan) -> Result:
    """Make one dataset of finished parts, and remove them.

    Raises:
        DataError: a part is missing or damaged, or parts do not cover the input; nothing is written.
    """
    missing = sorted(set(range(len(plan.parts))) - set(plan.finished()))
    if missing:
        listed = ", ".join(map(str, missing[:10]))
        raise DataError(f"{plan.folder}: {len(missing)} of {len(plan.parts)} parts are not finished: {listed}", hint="Run them first")
    task.tokenizer.release()
    facts = [read_json(plan.marker(number), error=DataError) for number in range(len(plan.parts))]
    counts = Counts()
    for part in facts:
        counts.add(Counts.from_dict(part["lines"]))
    total_bad = sum(counts.bad.values())
    if total_bad > task.max_bad:
        bad_lines = BadLines(max_bad=task.max_bad)
        bad_lines.total = total_bad
        raise too_many(bad_lines, counts, f"{plan.prefix}: all parts together have")
    parts = [plan.part_prefix(number) for number, part in enumerate(facts) if part["lines"]["samples"]]
    require_free_space(plan.prefix, sum(bin_path(part).stat().st_size for part in parts), error=DataError)
    with ExitStack() as stack:
        hashing = stack.enter_context(ThreadPoolExecutor(1))
        sources = _whole_sources([source for part in facts for source in part["sources"]], hashing)
        output = stack.enter_context(Output(plan.prefix, token_dtype(task.tokenizer.vocab_size), task.options.twin_files))
        tokens = TokenCounts()
        seen = SeenDigests(plan.folder) if task.options.dedup else None
        for part in parts:
            _copy_part(part, seen, counts, output, tokens)
        _publish(stack, task, output, counts, tokens, _hashed(sources), lambda stream: _join_notes(plan, facts, stream))
    shutil.rmtree(plan.folder)
    return Result(counts, tokens, task.side_file if counts.bad else None)


def _copy_part(part: Path, seen: SeenDigests | None, counts: Counts, output: Output, tokens: TokenCounts) -> None:
    """Append the documents of a part; its index is unmapped before the next part's is mapped."""
    dataset = IndexedDataset(part)
    dataset.verify()
    for block in _first_of_kind(dataset, part, seen, counts):
        output.add(block)
        tokens.add(block)


def _publish(
    stack: ExitStack, task: Task, output: Output, counts: Counts, tokens: TokenCounts, sources: list[dict[str, Any]],
    notes: Callable[[BinaryIO], None],
) -> None:  # fmt: skip
    """Check the counts, then write manifest and side file, then make everything visible."""
    _require_sum(counts, output.num_documents)
    if counts.samples == 0:
        raise DataError(f"{', '.join(task.names)}: no sample in {counts.sentence()}, nothing was written")
    output.prepare(
        {
            "tokenizer": task.tokenizer.facts(),
            "options": task.options.to_dict(),
            "sources": sources,
            "lines": counts.to_dict(),
            "counts": {
                "context_tokens": tokens.context,
                "target_tokens": tokens.target,
                "samples_with_special_text": counts.special_texts,
            },
        }
    )
    if counts.bad:
        atomic_write(task.side_file, notes)
        stack.callback(lambda: None if output.published else task.side_file.unlink(missing_ok=True))
    else:
        task.side_file.unlink(missing_ok=True)  # of an earlier, interrupted run
    output.publish()


def _require_sum(counts: Counts, num_documents: int) -> None:
    if counts.lines != counts.accounted or counts.samples != num_documents:
        raise AssertionError(f"counts do not add up: {counts}, {num_documents} documents written")


def _first_of_kind(dataset: IndexedDataset, part: Path, seen: SeenDigests | None, counts: Counts) -> Iterator[Block]:
    """Blocks of a part without samples that an earlier part has; moves those from samples to duplicates."""
    if seen is None:
        yield from document_blocks(dataset)
        return
    path = part.with_suffix(".digests")
    if path.stat().st_size != RECORD.itemsize * dataset.num_documents:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes for {dataset.num_documents} documents", hint="Begin again with --restart", corrupt=True
        )
    with open(path, "rb") as stream:
        for block in document_blocks(dataset):
            documents = len(block.sequences_per_document)
            records = np.fromfile(stream, RECORD, documents)
            keep = seen.add(records["digest"].astype(np.uint64))
            flags = records["flags"][~keep]
            dropped = len(flags)
            counts.samples -= dropped
            counts.duplicates += dropped
            counts.special_texts -= int((flags & 1 > 0).sum())
            counts.control_characters -= int((flags & 2 > 0).sum())
            if dropped == 0:
                yield block
            elif dropped < documents:
                by_sequence = np.repeat(keep, block.sequences_per_document)
                assert block.modes is not None
                yield Block(
                    block.tokens[np.repeat(by_sequence, block.lengths)],
                    block.lengths[by_sequence],
                    block.sequences_per_document[keep],
                    block.modes[by_sequence],
                )


def _whole_sources(pieces: list[dict[str, Any]], hashing: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """Facts of whole files from those of their pieces, which must follow each other without gap; hashes are futures."""
    files: dict[str, list[dict[str, Any]]] = {}
    for piece in pieces:
        files.setdefault(piece["path"], []).append(piece)
    found: list[dict[str, Any]] = []
    for name, own in files.items():
        end = 0
        for piece in own:
            if piece["first"] != end:
                raise DataError(f"{name}: bytes {end} to {piece['first']} are in no part, or in two", hint="Begin again with --restart")
            end += piece["bytes"]
        digest: Any = own[0]["sha256"]
        if len(own) > 1:
            if end != Path(name).stat().st_size:
                raise DataError(
                    f"{name}: {Path(name).stat().st_size} bytes, the parts were made from {end}", hint="Begin again with --restart"
                )
            digest = hashing.submit(sha256_file, Path(name))
        found.append({"path": name, "bytes": end, "lines_read": sum(piece["lines_read"] for piece in own), "sha256": digest})
    return found


def _hashed(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**one, "sha256": one["sha256"].result() if isinstance(one["sha256"], Future) else one["sha256"]} for one in sources]


def _join_notes(plan: Plan, facts: list[dict[str, Any]], stream: BinaryIO) -> None:
    """The notes of all parts, with line numbers that count from the start of each file."""
    before: dict[str, int] = {}
    for number, part in enumerate(facts):
        path = plan.part_prefix(number).with_suffix(".bad.jsonl")
        if part["lines"]["bad"]:
            for line in path.read_bytes().splitlines():
                note = orjson.loads(line)
                stream.write(orjson.dumps({**note, "line": note["line"] + before.get(note["file"], 0)}) + b"\n")
        for source in part["sources"]:
            before[source["path"]] = before.get(source["path"], 0) + source["lines_read"]
