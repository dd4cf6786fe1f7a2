"""`python -m megawrap.preprocess`: JSON lines in, one indexed dataset out, every line accounted for.

In: JSONL files with an input and an output text per line, and a tokenizer. Out: PREFIX.bin, PREFIX.idx and
PREFIX.manifest.json, where a document is a sample, a sequence one of its fields, and mode 1 marks what is trained.
Works in blocks of bounded memory; the output does not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megawrap.errors import EXIT_OK, DataError

if TYPE_CHECKING:
    import numpy as np

    from megawrap.data.jsonl import JsonlReader, Sample
    from megawrap.data.tokenizer import Tokenizer

BATCH_BYTES = 4 << 20  # measured on 40 MB: 1 MiB peaks at 122 MB, 4 at 228, 16 at 672, all at the same speed
LOG_SECONDS = 30.0
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to a parser, so that `megawrap preprocess` is the same command."""
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSONL files or globs; .gz and .zst too; - reads standard input"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR_OR_JSON", help="tokenizer.json, or the directory that holds it")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.manifest.json")
    parser.add_argument(
        "--fields", nargs="+", default=["inputs", "outputs"], metavar="KEY", help="keys to read; the last is what is trained"
    )
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="tokenizing threads; default all cores; never changes the output"
    )
    parser.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True, help="append the end token to every output, and train on it"
    )
    parser.add_argument("--eod-token", metavar="TEXT", help="end token; default what the tokenizer's files name")
    parser.add_argument(
        "--on-bad-line",
        choices=("refuse", "skip"),
        default="refuse",
        help="skip: leave bad lines out, count them, list them in PREFIX.bad.jsonl",
    )
    parser.add_argument(
        "--max-bad", type=int, default=1000, metavar="N", help="with skip: give up after this many bad lines (default 1000)"
    )
    parser.add_argument("--strict", action="store_true", help="a sample with empty outputs is a bad line; default: dropped and counted")
    parser.add_argument(
        "--special-tokens-in-text",
        choices=("allow", "escape", "error"),
        default="escape",
        help="text such as <|endoftext|> inside a sample: read as the token, as plain characters (default), or as a bad line",
    )
    parser.add_argument(
        "--twin-files",
        choices=("targets", "outputs"),
        help="write PREFIX_inputs_document and PREFIX_{targets|outputs}_document instead, as the BigCode fork reads them",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="read only the first N lines")
    parser.add_argument("--max-line-mib", type=float, default=64, metavar="MIB", help="a longer line is a bad line (default 64)")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code."""
    from megawrap.cli import Parser, run_command

    def command(words: Sequence[str]) -> int:
        parser = Parser(prog="megawrap preprocess", description="Turn JSON lines into an indexed dataset of token ids.")
        add_arguments(parser)
        return run(parser.parse_args(words))

    return run_command(command, list(sys.argv[1:] if argv is None else argv))


def run(args: argparse.Namespace) -> int:
    """Preprocess as the parsed flags say.

    Raises:
        MegawrapError: bad flags, input, tokenizer or disk; nothing is left behind.
    """
    _check_flags(args)
    workers = args.workers or _num_cores()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    try:
        with _terminate_as_interrupt():
            print(_preprocess(args))
    except KeyboardInterrupt:
        print("megawrap: interrupted, nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OK


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM, which ends a cluster job, cleans up as Ctrl-C does; only the main thread may ask for signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _check_flags(args: argparse.Namespace) -> None:
    problems = []
    if args.workers is not None and args.workers < 1:
        problems.append(f"--workers {args.workers}: at least 1 is needed")
    if args.limit is not None and args.limit < 1:
        problems.append(f"--limit {args.limit}: at least 1 line is needed")
    if args.max_bad < 0:
        problems.append(f"--max-bad {args.max_bad}: must not be negative")
    if not 0 < args.max_line_mib <= 1024:
        problems.append(f"--max-line-mib {args.max_line_mib:g}: allowed is more than 0, up to 1024")
    if len(set(args.fields)) != len(args.fields):
        problems.append(f"--fields {' '.join(args.fields)}: a key is there twice")
    if args.twin_files and len(args.fields) != 2:
        problems.append(f"--twin-files needs two --fields, {len(args.fields)} given")
    if problems:
        raise DataError("; ".join(problems))


@dataclass
class Totals:
    """What was written, beside the reader's counts of lines."""

    context_tokens: int = 0
    target_tokens: int = 0
    no_output_token: int = 0
    """Samples dropped because their outputs gave no token."""
    special_texts: int = 0
    """Samples with a special token spelled out in a text."""


def _preprocess(args: argparse.Namespace) -> str:
    """The whole command; returns the summary line."""
    from megawrap.data.jsonl import BadLines, JsonlReader, expand
    from megawrap.data.tokenizer import Tokenizer
    from megawrap.io import atomic_write, require_free_space

    names = expand(args.input)
    tokenizer = Tokenizer(args.tokenizer, eod_token=args.eod_token)
    prefix = Path(args.output_prefix)
    totals = Totals()
    bad_lines = BadLines(args.on_bad_line, args.max_bad)
    special = _SpecialText(tokenizer, totals, refuse=args.special_tokens_in_text == "error")
    reader = JsonlReader(
        names,
        args.fields,
        bad_lines=bad_lines,
        strict=args.strict,
        check=special.check,
        max_line_bytes=int(args.max_line_mib * 2**20),
        limit=args.limit,
    )
    size = _input_bytes(names)
    if args.limit is None:
        require_free_space(prefix, size // 16, error=DataError)  # a low estimate: text gives 0.4 to 1 byte of ids per byte, other keys none
    started = time.monotonic()
    with ExitStack() as stack:
        output = stack.enter_context(_Output(args, prefix, tokenizer))
        progress = stack.enter_context(_Progress(size))
        for batch in reader.batches(BATCH_BYTES):
            output.add(batch, totals)
            progress.update(reader.raw_bytes, reader.counts.lines)
        counts = _final_counts(reader, totals, names, output.num_documents)
        output.prepare(_manifest(args, tokenizer, reader, counts, totals))
        side_file = prefix.with_name(prefix.name + ".bad.jsonl")
        if bad_lines.total:
            atomic_write(side_file, bad_lines.copy_to)
            stack.callback(lambda: None if output.published else side_file.unlink(missing_ok=True))
        else:
            side_file.unlink(missing_ok=True)  # of an earlier, interrupted run
        output.publish()
    return _summary(prefix, counts, totals, side_file if bad_lines.total else None, size / 2**20 / max(time.monotonic() - started, 1e-9))


class _SpecialText:
    """Counts, or refuses, samples that spell out a special token."""

    def __init__(self, tokenizer: Tokenizer, totals: Totals, *, refuse: bool) -> None:
        self._tokenizer, self._totals, self._refuse = tokenizer, totals, refuse

    def check(self, texts: tuple[str, ...]) -> None:
        """Raise LineError for such a sample when refusing."""
        from megawrap.data.jsonl import LineError

        for text in texts:
            found = self._tokenizer.special_text(text)
            if found is not None:
                if self._refuse:
                    raise LineError("special-token", f"the special token {found.group()!r} is spelled out in the text")
                self._totals.special_texts += 1
                return


class _Output:
    """The writer of PREFIX, or the two writers of twin files, behind one pair of calls."""

    def __init__(self, args: argparse.Namespace, prefix: Path, tokenizer: Tokenizer) -> None:
        from megawrap.data.format import IndexedWriter, token_dtype
        from megawrap.data.twins import open_writers

        self._tokenizer, self._append_eod = tokenizer, args.append_eod
        self._escape, self._num_fields = args.special_tokens_in_text != "allow", len(args.fields)
        self._strict, self.published = args.strict, False
        dtype = token_dtype(tokenizer.vocab_size)
        self._writers = open_writers(prefix, args.twin_files, dtype) if args.twin_files else [IndexedWriter(prefix, dtype)]

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def abort(self) -> None:
        """Remove what was not published."""
        for writer in self._writers:
            writer.abort()

    def add(self, batch: list[Sample], totals: Totals) -> None:
        """Tokenize a batch and append it.

        Every sample becomes one document of `num_fields` sequences, empty context fields included, so that fields can
        never shift; a sample whose last field gives no token is dropped and counted.
        """
        import numpy as np

        width = self._num_fields
        ids, lengths = self._tokenizer.encode([text for sample in batch for text in sample.texts], escape_special=self._escape)
        table = lengths.reshape(-1, width).astype(np.int64)
        keep = table[:, -1] > 0
        if not keep.all():
            if self._strict:
                sample = batch[int(np.argmin(keep))]
                raise DataError(f"{sample.source}:{sample.line}: the last field gives no token, which --strict refuses")
            ids = ids[np.repeat(keep, table.sum(axis=1))]
            table = table[keep]
            totals.no_output_token += int((~keep).sum())
        if self._append_eod:
            ids = np.insert(ids, np.cumsum(table.sum(axis=1)), self._tokenizer.eos_id)
            table[:, -1] += 1
        totals.target_tokens += int(table[:, -1].sum())
        totals.context_tokens += int(table[:, :-1].sum())
        self._write(ids, table)

    def _write(self, ids: np.ndarray, table: np.ndarray) -> None:
        """Append documents: ids [sum(table)], table [documents, fields] of lengths."""
        import numpy as np

        documents, width = table.shape
        modes = np.tile(np.arange(width) == width - 1, documents)
        if len(self._writers) == 1:
            self._writers[0].add(ids, table.reshape(-1), np.full(documents, width), modes)
            return
        is_target = np.repeat(modes, table.reshape(-1))
        for writer, mask, column in zip(self._writers, (~is_target, is_target), (0, 1), strict=True):
            writer.add(ids[mask], table[:, column], np.ones(documents, dtype=np.int32), None)

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


def _input_bytes(names: Sequence[str]) -> int:
    from megawrap.data.jsonl import STDIN

    return sum(os.stat(name).st_size for name in names if name != STDIN)


def _final_counts(reader: JsonlReader, totals: Totals, names: Sequence[str], num_documents: int) -> dict[str, Any]:
    """Counts of lines by what became of them; refuses when nothing is left."""
    counts = reader.counts
    whole = counts.to_dict()
    whole["samples"] -= totals.no_output_token
    whole["empty_outputs"] += totals.no_output_token
    parts = whole["samples"] + whole["blank"] + whole["empty_outputs"] + sum(whole["bad"].values())
    if whole["lines"] != parts or whole["samples"] != num_documents:
        raise AssertionError(f"counts do not add up: {whole}, {num_documents} documents written")
    if whole["samples"] == 0:
        raise DataError(f"{', '.join(names)}: no sample in {_lines_sentence(whole)}, nothing was written")
    return whole


def _lines_sentence(counts: dict[str, Any]) -> str:
    bad = sum(counts["bad"].values())
    reasons = f" ({', '.join(f'{reason} {number}' for reason, number in counts['bad'].items())})" if bad else ""
    parts = (
        f"{counts['samples']:,} samples + {counts['blank']:,} blank + {counts['empty_outputs']:,} with empty outputs + {bad:,} bad{reasons}"
    )
    return f"{counts['lines']:,} lines = {parts}"


def _manifest(
    args: argparse.Namespace, tokenizer: Tokenizer, reader: JsonlReader, counts: dict[str, Any], totals: Totals
) -> dict[str, Any]:
    """What is recorded beside files and counts: nothing that changes from run to run."""
    return {
        "tokenizer": tokenizer.facts(),
        "options": {
            "fields": list(args.fields),
            "append_eod": args.append_eod,
            "special_tokens_in_text": args.special_tokens_in_text,
            "strict": args.strict,
            "on_bad_line": args.on_bad_line,
            "twin_files": args.twin_files,
            "limit": args.limit,
        },
        "sources": [source.facts() for source in reader.sources],
        "lines": counts,
        "counts": {
            "context_tokens": totals.context_tokens,
            "target_tokens": totals.target_tokens,
            "samples_with_special_text": totals.special_texts,
        },
    }


def _summary(prefix: Path, counts: dict[str, Any], totals: Totals, side_file: Path | None, speed: float) -> str:
    tokens = totals.context_tokens + totals.target_tokens
    notes = f"; bad lines are listed in {side_file}" if side_file else ""
    if totals.special_texts:
        notes += f"; {totals.special_texts:,} samples spell out a special token"
    return f"{prefix}: {_lines_sentence(counts)}; {tokens:,} tokens, {totals.target_tokens:,} of them trained; {speed:.1f} MiB/s{notes}"


class _Progress:
    """A bar on a terminal, a line every 30 s in a log; on standard error."""

    def __init__(self, total_bytes: int) -> None:
        self._total, self._started = total_bytes, time.monotonic()
        self._last = self._started
        self._bar: Any = None
        if sys.stderr.isatty():
            with suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=total_bytes or None, unit="B", unit_scale=True, desc="preprocess", file=sys.stderr)

    def update(self, done_bytes: int, lines: int) -> None:
        """Show how far reading is."""
        if self._bar is not None:
            self._bar.update(done_bytes - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last < LOG_SECONDS:
            return
        self._last, elapsed = now, now - self._started
        share = f" of {self._total / 2**20:.0f}" if self._total else ""
        left = f", {elapsed * (self._total - done_bytes) / max(done_bytes, 1):.0f} s left" if self._total else ""
        print(f"preprocess: {done_bytes / 2**20:.0f}{share} MiB, {lines:,} lines, {elapsed:.0f} s{left}", file=sys.stderr, flush=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
