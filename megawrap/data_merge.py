"""`megawrap data merge OUT --inputs A B ...`: several indexed datasets as one, without tokenizing again.

In: prefixes of datasets, or of twin files, which become one file on the way. Out: OUT.bin, OUT.idx and a manifest that
names every source, all there or nothing. Streams in blocks, whatever the size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megawrap.errors import EXIT_OK, DataError

if TYPE_CHECKING:
    from megawrap.data.format import IndexedDataset

# Options of preprocessing that decide which lines are read or where they go, not which tokens a sample becomes.
_NOT_COMPARED = ("limit", "twin_files", "on_bad_line", "max_bad", "strict", "dedup", "workers", "tokenizer_backend")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("output", metavar="OUT", help="prefix of the new dataset")
    parser.add_argument("--inputs", nargs="+", required=True, metavar="PREFIX", help="datasets, in the order of the result")
    parser.add_argument(
        "--allow-different-options", action="store_true", help="join datasets that were preprocessed with different options"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code."""
    from megawrap.cli import Parser, run_command

    def command(words: Sequence[str]) -> int:
        parser = Parser(prog="megawrap data merge", description=(__doc__ or "").split("\n\n")[0])
        add_arguments(parser)
        return run(parser.parse_args(words))

    return run_command(command, list(sys.argv[1:] if argv is None else argv))


def run(args: argparse.Namespace) -> int:
    """Join the datasets and say what was written.

    Raises:
        DataError: an input is damaged, or the inputs do not belong together, with the difference; nothing is written.
    """
    from megawrap.data.concat import concatenate, require_alike
    from megawrap.data.format import IndexedDataset
    from megawrap.data.view_text import Style, visible
    from megawrap.io import require_free_space

    output = Path(args.output)
    parts = [IndexedDataset(prefix) for prefix in args.inputs]
    _require_distinct(parts)
    for part in parts[1:]:
        require_alike(parts[0], part)
        if not args.allow_different_options:
            _require_equal_options(parts[0], part)
    need = sum(part.num_tokens * part.dtype.itemsize + 21 * part.num_sequences for part in parts)
    require_free_space(output, need, error=DataError)
    found = [part.verify() for part in parts]  # damage must not be copied under a new sha256
    whole = concatenate(args.inputs, output, _manifest(parts, [one["trained_tokens"] for one in found]))
    counts = whole["counts"]
    sizes = " + ".join(f"{part.num_documents:,}" for part in parts)
    print(f"{visible(str(output), Style())}: {counts['documents']:,} documents ({sizes}), {counts['tokens']:,} tokens")
    return EXIT_OK


def _require_distinct(parts: Sequence[IndexedDataset]) -> None:
    """Refuse the same files twice: weights in a split string repeat data where everybody sees it."""
    seen: dict[Path, IndexedDataset] = {}
    for part in parts:
        first = seen.setdefault(part.prefix.resolve(), part)
        if first is not part:
            raise DataError(
                f"{part.prefix}: the same dataset twice (first as {first.prefix})",
                hint="Name every dataset once; to train on one more often, raise its weight in the split string",
            )


def _require_equal_options(one: IndexedDataset, other: IndexedDataset) -> None:
    """Refuse to join samples that the same text would have made differently."""
    options = [dict((dataset.manifest or {}).get("options") or {}) for dataset in (one, other)]
    if not all(options):
        return  # of another tool: nothing is known
    names = sorted(set(options[0]) | set(options[1]))
    differences = [
        f"{name} ({options[0].get(name)!r} and {options[1].get(name)!r})"
        for name in names
        if name not in _NOT_COMPARED and options[0].get(name) != options[1].get(name)
    ]
    if differences:
        raise DataError(
            f"{one.prefix} and {other.prefix} were preprocessed with different options: {', '.join(differences)}",
            hint="Preprocess them alike, or join them as they are with --allow-different-options",
        )


def source_of(dataset: IndexedDataset, first: int, last: int) -> dict[str, Any]:
    """What a manifest records about documents first..last-1 of a dataset they were copied from.

    The name is that of the files, not the path to them: the manifest does not depend on where it was made.
    """
    inner = (dataset.manifest or {}).get("sources")
    return {
        "dataset": dataset.prefix.name,
        "fingerprint": dataset.fingerprint,
        "documents": [first, last],
        "of_documents": dataset.num_documents,
        **({"sources": inner} if inner else {}),
    }


def facts_of_samples(parts: Sequence[IndexedDataset]) -> dict[str, Any]:
    """Tokenizer and options for the manifest of a dataset made of others: what all of them say, nothing that only some do."""
    manifests = [part.manifest or {} for part in parts]
    facts: dict[str, Any] = {}
    if all(manifest.get("tokenizer") for manifest in manifests):
        facts["tokenizer"] = manifests[0]["tokenizer"]
    options = [dict(manifest.get("options") or {}) for manifest in manifests]
    if all(options):
        facts["options"] = {name: value for name, value in options[0].items() if all(other.get(name) == value for other in options)}
    return facts


def _manifest(parts: Sequence[IndexedDataset], trained: Sequence[int | None]) -> dict[str, Any]:
    """What is recorded beside files and counts."""
    manifest = facts_of_samples(parts)
    manifest["sources"] = [source_of(part, 0, part.num_documents) for part in parts]
    targets = [number for number in trained if number is not None]
    if len(targets) == len(parts):
        tokens = sum(part.num_tokens for part in parts)
        manifest["counts"] = {"context_tokens": tokens - sum(targets), "target_tokens": sum(targets)}
    return manifest


if __name__ == "__main__":
    sys.exit(main())
