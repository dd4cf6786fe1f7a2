"""`megawrap data verify PREFIX ...`: read every byte of datasets again, and say what was proven. Nothing is written.

In: prefixes, of one dataset each or of twin files. Out: a short table, or JSON; exit code 3 names file and place of the
first damage of every damaged prefix. Without a manifest only the structure can be checked, and the table says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megawrap.errors import EXIT_CORRUPT, EXIT_OK, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="path without .bin/.idx, or of twin files without _inputs_document")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="token ids must be below; default the manifest's tokenizer's")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code."""
    from megawrap.cli import Parser, run_command

    def command(words: Sequence[str]) -> int:
        parser = Parser(prog="megawrap data verify", description=(__doc__ or "").split("\n\n")[0])
        add_arguments(parser)
        return run(parser.parse_args(words))

    return run_command(command, list(sys.argv[1:] if argv is None else argv))


def run(args: argparse.Namespace) -> int:
    """Verify every prefix, then report all of them.

    Raises:
        DataError: a prefix is not there or damaged, when it is the only one.
    """
    if args.vocab_size is not None and args.vocab_size < 1:
        raise DataError(f"--vocab-size {args.vocab_size}: at least 1 is needed")
    if len(args.prefix) == 1:
        _show([verified(Path(args.prefix[0]), args.vocab_size)], args.json)
        return EXIT_OK
    reports: list[dict[str, Any]] = []
    problems: list[DataError] = []
    for prefix in args.prefix:
        try:
            reports.append(verified(Path(prefix), args.vocab_size))
        except DataError as problem:
            problems.append(problem)
    _show(reports, args.json)
    if problems:
        damaged = any(problem.exit_code == EXIT_CORRUPT for problem in problems)
        lines = "\n  ".join(map(str, problems))
        raise DataError(f"{len(problems)} of {len(args.prefix)} datasets did not pass:\n  {lines}", corrupt=damaged)
    return EXIT_OK


def verified(prefix: Path, vocab_size: int | None = None) -> dict[str, Any]:
    """Read a dataset whole; what was found, in plain types.

    Args:
        prefix: of the dataset, or of twin files.
        vocab_size: token ids must be below; default the manifest's.

    Raises:
        DataError: damaged, naming file and place (corrupt), or not there.
    """
    from megawrap.data.format import IndexedDataset

    began = time.perf_counter()
    dataset = IndexedDataset(prefix)
    found = dataset.verify(vocab_size)
    twins = getattr(dataset, "twins", (dataset,))
    files = [path for one in twins for path in (one.bin_path, one.idx_path)]
    return {
        "prefix": str(prefix),
        "files": {str(path): path.stat().st_size for path in files},
        "dtype": str(dataset.dtype),
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "manifest": dataset.manifest is not None,
        **found,
        "seconds": time.perf_counter() - began,
    }


def _show(reports: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        import orjson

        print(orjson.dumps(reports, option=orjson.OPT_INDENT_2).decode())
    else:
        print("\n\n".join(_table(report) for report in reports))


def _table(report: dict[str, Any]) -> str:
    """What was proven about one dataset, a line for each fact."""
    from megawrap.data.view_text import Style, visible
    from megawrap.io import readable_size

    seconds = report["seconds"]
    size, trained = sum(report["files"].values()), report["trained_tokens"]
    digests = ", ".join(f"{name} {digest[:12]}..." for name, digest in report["sha256"].items())
    contents = f"as the manifest says ({digests})" if digests else "not known: there is no manifest, only the structure was checked"
    limit = "no vocabulary size is known" if report["vocab_size"] is None else f"the vocabulary has {report['vocab_size']:,}"
    modes = (
        "no sequence modes: usable with loss_on all" if trained is None else f"{trained:,} tokens, {100 * trained / report['tokens']:.1f} %"
    )
    rate = f", {size / 1e9 / seconds:.2f} GB/s" if seconds > 0.2 else ""  # less is the opening of files
    rows = [
        ("verified", visible(report["prefix"], Style())),
        ("read", f"{readable_size(size)} in {seconds:.2f} s{rate}"),
        ("documents", f"{report['documents']:,} ({report['sequences']:,} sequences, {report['tokens']:,} tokens of {report['dtype']})"),
        ("structure", "lengths, pointers, document indices and modes agree with each other and with the size of .bin"),
        ("sha256", contents),
        ("token ids", f"0 to {report['max_token_id']:,}; {limit}"),
        ("trained", modes),
    ]
    return "\n".join(f"{name:<10}  {value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
