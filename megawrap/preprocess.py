"""`python -m megawrap.preprocess`: text in, one indexed dataset out, every line accounted for.

In: JSONL (plain, .gz, .xz, .zst), parquet or saved `datasets`, and a tokenizer. Out: PREFIX.bin, PREFIX.idx and
PREFIX.manifest.json, where a document is a sample, a sequence one of its fields or turns, and mode 1 marks what is trained.
Works in blocks of bounded memory; large inputs in parts that survive a kill; the output does not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megawrap.errors import EXIT_OK, EXIT_UNFINISHED, DataError

if TYPE_CHECKING:
    from megawrap.data.assemble import Result, Task
    from megawrap.data.parts import Plan

EXIT_INTERRUPTED = 130


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to a parser, so that `megawrap preprocess` is the same command."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH",
        help="files, globs or directories: .jsonl (also .gz, .xz, .zst), .parquet, what datasets saved; - reads standard input")
    add("--tokenizer", required=True, metavar="PATH", help="tokenizer.json, SentencePiece .model, or the directory that holds it")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.manifest.json")
    add("--twin-files", choices=("targets", "outputs"),
        help="write PREFIX_inputs_document and PREFIX_{targets|outputs}_document instead, as the BigCode fork reads them")
    _add_sample_arguments(parser.add_argument_group("samples"))
    _add_line_arguments(parser.add_argument_group("lines"))
    _add_work_arguments(parser.add_argument_group("work"))


def _add_sample_arguments(group: Any) -> None:
    add = group.add_argument
    add("--fields", nargs="+", default=["inputs", "outputs"], metavar="KEY",
        help="keys to read, the last is what is trained (default: inputs outputs); or prompt/completion, instruction/input/output, "
        "text (all trained), messages (by the tokenizer's chat template), spans (a list of strings)")
    add("--loss", nargs="+", type=int, metavar="0|1", help="for each of the fields, whether it is trained")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="append the end token to the last trained field, and train on it")
    add("--eod-token", metavar="TEXT", help="end token; default what the tokenizer's files name")
    add("--special-tokens-in-text", choices=("allow", "escape", "error"), default="escape",
        help="text such as <|endoftext|> inside a sample: read as the token, as plain characters (default), or as a bad line")
    add("--dedup", choices=("exact",), help="keep only the first of equal samples (sha256 of the texts after NFC, \\n and strip)")
    add("--max-tokens", type=int, metavar="N", help="drop and count samples of more tokens; default: packing decides")


def _add_line_arguments(group: Any) -> None:
    add = group.add_argument
    add("--on-bad-line", choices=("refuse", "skip"), default="refuse",
        help="skip: leave bad lines out, count them, list them in PREFIX.bad.jsonl")
    add("--max-bad", type=int, default=1000, metavar="N", help="with skip: give up after this many bad lines (default 1000)")
    add("--strict", action="store_true", help="a sample with nothing to train on is a bad line; default: dropped and counted")
    add("--limit", type=int, metavar="N", help="read only the first N lines")
    add("--max-line-mib", type=float, default=64, metavar="MIB", help="a longer line is a bad line (default 64)")


def _add_work_arguments(group: Any) -> None:
    add = group.add_argument
    add("--tokenizer-backend", choices=("auto", "gigatoken", "tiktoken", "tokenizers"), default="auto",
        help="what encodes; auto takes the fastest that agrees with tokenizers on this data")
    add("--workers", type=int, metavar="N", help="tokenizing threads; default all cores; never changes the output")
    add("--part-mib", type=float, default=256, metavar="MIB",
        help="larger inputs are done in parts of this size, kept in PREFIX.parts until all are there (default 256)")
    add("--restart", action="store_true", help="discard the parts of an interrupted run")
    add("--only-parts", metavar="K/N",
        help="do every N-th part from the K-th (from 0) and stop before merging; for jobs that share the work")
    add("--plan", action="store_true", help="check everything, write the plan of the parts and stop")
# fmt: on


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
        MegawrapError: bad flags, input, tokenizer or disk; nothing is left behind but finished parts of a large input.
    """
    check_flags(args)
    workers = args.workers or num_cores()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    plan: Plan | None = None
    try:
        with _terminate_as_interrupt():
            task = task_of(args)
            plan = plan_of(args, task)
            print(_run(args, task, plan))
    except KeyboardInterrupt:
        if plan is None or len(plan.parts) == 1 or not plan.folder.exists():
            print("megawrap: interrupted, nothing was written", file=sys.stderr)
            return EXIT_INTERRUPTED
        done = f"{len(plan.finished())} of {len(plan.parts)} parts are finished in {plan.folder}"
        print(f"megawrap: interrupted; {done}; the same command continues", file=sys.stderr)
        return EXIT_UNFINISHED
    return EXIT_OK


def num_cores() -> int:
    """Cores this process may use."""
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


def check_flags(args: argparse.Namespace) -> None:
    """Report everything wrong with the flags at once.

    Raises:
        DataError: something is.
    """
    from megawrap.data.fields import problems, resolve

    found = []
    if args.workers is not None and args.workers < 1:
        found.append(f"--workers {args.workers}: at least 1 is needed")
    if args.limit is not None and args.limit < 1:
        found.append(f"--limit {args.limit}: at least 1 line is needed")
    if args.max_tokens is not None and args.max_tokens < 1:
        found.append(f"--max-tokens {args.max_tokens}: at least 1 is needed")
    if args.max_bad < 0:
        found.append(f"--max-bad {args.max_bad}: must not be negative")
    if not 0 < args.max_line_mib <= 1024:
        found.append(f"--max-line-mib {args.max_line_mib:g}: allowed is more than 0, up to 1024")
    if not args.part_mib > 0:
        found.append(f"--part-mib {args.part_mib:g}: must be more than 0")
    found += problems(args.fields, args.loss)
    fields = resolve(args.fields)
    if args.twin_files and (len(fields) != 2 or args.loss not in (None, [0, 1])):
        found.append(f"--twin-files needs two --fields, {len(fields)} given" if len(fields) != 2 else "--twin-files needs --loss 0 1")
    if args.only_parts is not None:
        first, _, step = args.only_parts.partition("/")
        if not (first.isdigit() and step.isdigit() and int(first) < int(step)):
            found.append(f"--only-parts {args.only_parts}: must be K/N with K below N, such as 0/16")
        if args.restart:
            found.append("--only-parts cannot --restart: jobs that share the work would discard each other's")
    if found:
        raise DataError("; ".join(found))


def task_of(args: argparse.Namespace) -> Task:
    """What the flags ask for, with input and tokenizer checked."""
    from megawrap.data.assemble import Task
    from megawrap.data.build import Options
    from megawrap.data.fields import MESSAGES, extractor, resolve
    from megawrap.data.inputs import expand
    from megawrap.data.tokenizer import Tokenizer

    names = expand(args.input)
    tokenizer = Tokenizer(args.tokenizer, eod_token=args.eod_token, backend=args.tokenizer_backend)
    template_sha256 = None
    if resolve(args.fields) == (MESSAGES,):
        from megawrap.data.chat import ChatTemplate, ChatTexts

        template = ChatTemplate.of(tokenizer)
        reader: Any = ChatTexts(template, tokenizer.special_text, args.special_tokens_in_text)
        template_sha256 = template.sha256
    else:
        reader = extractor(args.fields, args.loss)
    options = Options(
        fields=resolve(args.fields),
        loss=None if args.loss is None else tuple(args.loss),
        append_eod=args.append_eod,
        special_tokens_in_text=args.special_tokens_in_text,
        strict=args.strict,
        on_bad_line=args.on_bad_line,
        dedup=args.dedup,
        max_tokens=args.max_tokens,
        max_line_mib=args.max_line_mib,
        twin_files=args.twin_files,
        limit=args.limit,
        chat_template_sha256=template_sha256,
    )
    return Task(names, Path(args.output_prefix), tokenizer, reader, options, args.max_bad)


def plan_of(args: argparse.Namespace, task: Task) -> Plan:
    """How the input is divided; nothing is written yet."""
    from megawrap.data.inputs import Piece
    from megawrap.data.parts import Plan, divide, identity_of

    part_bytes = max(1, int(args.part_mib * 2**20))
    parts = divide(task.names, part_bytes) if args.limit is None else (tuple(map(Piece, task.names)),)
    return Plan(task.prefix, parts, task.options.twin_files, identity_of(task.names, task.options.to_dict(), task.tokenizer.facts()))


def _run(args: argparse.Namespace, task: Task, plan: Plan) -> str:
    """Everything after the checks; returns what is printed at the end."""
    from megawrap.data.assemble import run_whole
    from megawrap.data.inputs import STDIN
    from megawrap.data.progress import Progress
    from megawrap.io import require_free_space

    size = sum(os.stat(name).st_size for name in task.names if name != STDIN)
    if args.limit is None:
        require_free_space(
            task.prefix, size // 16, error=DataError
        )  # a low estimate: text gives 0.4 to 1 byte of ids per byte, other keys none
    if args.restart and plan.folder.exists():
        shutil.rmtree(plan.folder)
    started = time.monotonic()
    if len(plan.parts) > 1 or args.only_parts is not None or args.plan:
        try:
            result = _run_parts(args, task, plan, size)
        except DataError:
            if plan.folder.exists() and not plan.finished():
                shutil.rmtree(plan.folder)  # nothing in it is worth keeping
            raise
        if isinstance(result, str):
            return result
    else:
        with Progress(size) as progress:
            result = run_whole(task, progress.update)
    return _summary(task, result, size / 2**20 / max(time.monotonic() - started, 1e-9))


def _run_parts(args: argparse.Namespace, task: Task, plan: Plan, size: int) -> Result | str:
    """A large input part by part; a sentence when the whole is not to be made here."""
    from megawrap.data.assemble import merge_parts, require_free_prefix, run_part
    from megawrap.data.counts import Counts
    from megawrap.data.progress import Progress

    if plan.published():
        if not plan.folder.exists():
            raise DataError(
                f"{plan.prefix}: already there, nothing was written", hint="Choose another --output-prefix, or remove the files"
            )
        plan.settle()
        shutil.rmtree(plan.folder)
        return f"{plan.prefix}: was complete; what was left of its parts is removed"
    if not args.only_parts:  # jobs that share the work would find each other there
        require_free_prefix(task)
    plan.settle()
    if args.plan:
        return f"{plan.folder}: {len(plan.parts)} parts, {len(plan.finished())} of them finished"
    first, step = map(int, args.only_parts.split("/")) if args.only_parts else (0, 1)
    mine = range(first, len(plan.parts), step)
    total, done = Counts(), 0
    with Progress(size * len(mine) // len(plan.parts)) as progress:

        def report(read: int, lines: int) -> None:
            progress.update(done + read, total.lines + lines)

        for number in mine:
            counts, num_bytes = run_part(task, plan, number, report, bad_so_far=sum(total.bad.values()))
            total.add(counts)
            done += num_bytes
            report(0, 0)
    if args.only_parts:
        return f"{plan.folder}: {len(mine)} parts of {len(plan.parts)} finished here: {total.sentence()}"
    return merge_parts(task, plan)


def _summary(task: Task, result: Result, speed: float) -> str:
    counts, tokens = result.counts, result.tokens
    notes = f"; bad lines are listed in {result.side_file}" if result.side_file else ""
    if counts.special_texts:
        notes += f"; {counts.special_texts:,} samples spell out a special token"
    total = tokens.context + tokens.target
    whole = f"{task.prefix}: {counts.sentence()}; {total:,} tokens, {tokens.target:,} of them trained; {speed:.1f} MiB/s{notes}"
    return f"{whole}\ntokenizer: {task.tokenizer.backend_reason}"


if __name__ == "__main__":
    sys.exit(main())
