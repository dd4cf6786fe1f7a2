"""`megawrap data cut PREFIX OUT --documents A:B | --range 0.0:0.5`: a range of documents as a dataset of its own.

In: a dataset or twin files, and which documents, by number or as fractions that are rounded as those of `data.splits`.
Out: OUT.bin, OUT.idx and a manifest that names what it was cut from, all there or nothing. Nothing is tokenized again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megawrap.errors import EXIT_OK, DataError

if TYPE_CHECKING:
    from megawrap.data.format import IndexedDataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("prefix", metavar="PREFIX", help="dataset to cut from")
    parser.add_argument("output", metavar="OUT", help="prefix of the new dataset")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--documents", metavar="A:B", help="numbers, from 0, B excluded; either may be left out")
    which.add_argument(
        "--range", metavar="START:END", help="fractions from 0 to 1: documents round(START x N) to round(END x N), as in data.splits"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code."""
    from megawrap.cli import Parser, run_command

    def command(words: Sequence[str]) -> int:
        parser = Parser(prog="megawrap data cut", description=(__doc__ or "").split("\n\n")[0])
        add_arguments(parser)
        return run(parser.parse_args(words))

    return run_command(command, list(sys.argv[1:] if argv is None else argv))


def run(args: argparse.Namespace) -> int:
    """Copy the documents and say what was written.

    Raises:
        DataError: the range is none, holds nothing to train on, or the dataset is damaged; nothing is written.
    """
    from megawrap.data.concat import document_blocks
    from megawrap.data.format import IndexedDataset, IndexedWriter
    from megawrap.data.view_text import Style, visible
    from megawrap.data_merge import facts_of_samples, source_of
    from megawrap.io import require_free_space

    dataset, output = IndexedDataset(args.prefix), Path(args.output)
    if args.documents is not None:
        first, last = documents(args.documents, dataset.num_documents)
    else:
        first, last = fractions(args.range, dataset.num_documents)
    tokens, targets = _contents(dataset, first, last)
    require_free_space(output, tokens * dataset.dtype.itemsize, error=DataError)
    dataset.verify()  # damage must not be copied under a new sha256
    manifest = {**facts_of_samples([dataset]), "sources": [source_of(dataset, first, last)]}
    if targets is not None:
        manifest["counts"] = {"context_tokens": tokens - targets, "target_tokens": targets}
    with IndexedWriter(output, dataset.dtype.newbyteorder("=")) as writer:
        for block in document_blocks(dataset, first=first, stop=last):
            writer.add(*block)
        writer.commit(manifest)
    name = visible(str(output), Style())
    print(f"{name}: documents {first:,}:{last:,} of {dataset.num_documents:,}, {tokens:,} of {dataset.num_tokens:,} tokens")
    return EXIT_OK


def documents(text: str, num_documents: int) -> tuple[int, int]:
    """First document and the one after the last of `A:B`.

    Raises:
        DataError: not two numbers, or not inside the dataset.
    """
    match = re.fullmatch(r"\s*(\d{0,18})\s*:\s*(\d{0,18})\s*", text)
    if match is None:
        raise DataError(f"--documents {text}: expected A:B, two numbers of documents", hint="For example --documents 0:1000")
    first, last = int(match[1] or 0), int(match[2] or num_documents)
    if not first < last <= num_documents:
        raise DataError(f"--documents {text}: the dataset has documents 0:{num_documents}, and A must be below B")
    return first, last


def fractions(text: str, num_documents: int) -> tuple[int, int]:
    """First document and the one after the last of `START:END`, rounded as a range of data.splits is.

    Raises:
        DataError: not two fractions, START not below END, outside 0..1, or so narrow that no document is inside.
    """
    number = r"(\d+\.?\d*|\.\d+)"
    match = re.fullmatch(rf"\s*{number}\s*:\s*{number}\s*", text)
    if match is None:
        raise DataError(f"--range {text}: expected START:END, two fractions from 0 to 1", hint="For example --range 0.0:0.5")
    start, end = float(match[1]), float(match[2])
    if not 0 <= start < end <= 1:
        raise DataError(f"--range {text}: needs 0 <= START < END <= 1")
    first, last = round(start * num_documents), round(end * num_documents)
    if first == last:
        raise DataError(
            f"--range {text}: holds none of {num_documents} documents (round({start:g} x {num_documents}) ="
            f" round({end:g} x {num_documents}) = {first})",
            hint="Widen the range",
        )
    return first, last


def _contents(dataset: IndexedDataset, first: int, last: int) -> tuple[int, int | None]:
    """Tokens, and trained ones (None without modes), of documents first..last-1; a cut that could not be read is refused."""
    sequences = slice(int(dataset.document_indices[first]), int(dataset.document_indices[last]))
    tokens = int(dataset.lengths[sequences].sum(dtype="int64"))
    if tokens == 0:
        raise DataError(f"{dataset.prefix}: documents {first}:{last} hold no token", hint="Choose others")
    if dataset.modes is None:
        return tokens, None
    modes = dataset.modes[sequences]
    if not modes.any():
        raise DataError(
            f"{dataset.prefix}: documents {first}:{last} hold no sequence of mode 1: nothing would be trained", hint="Choose others"
        )
    return tokens, int(dataset.lengths[sequences].sum(where=modes == 1, dtype="int64"))


if __name__ == "__main__":
    sys.exit(main())
