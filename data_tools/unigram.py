"""What a model that knows only how frequent each token is would lose on the validation outputs.

In: indexed datasets. Out: nats per supervised token of each validation dataset under the token counts of the training
outputs, with add-one smoothing: -mean log((count(token) + 1) / (total + vocabulary)). A trained model must beat it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megawrap.data.format import IndexedDataset
from megawrap.errors import DataError

_BLOCK = 4096  # sequences counted at a time


def supervised_counts(dataset: IndexedDataset, vocab_size: int) -> np.ndarray:
    """How often each token id is supervised (sequence mode 1; every token where there are no modes), int64 [vocab_size].

    Raises:
        DataError: a token id is outside the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    chosen = np.arange(dataset.num_sequences) if dataset.modes is None else np.flatnonzero(dataset.modes == 1)
    for first in range(0, len(chosen), _BLOCK):
        tokens = np.concatenate([dataset.sequence(int(index)) for index in chosen[first : first + _BLOCK]])
        if len(tokens) and int(tokens.max()) >= vocab_size:
            raise DataError(f"token id {int(tokens.max())} is outside the vocabulary of {vocab_size}", hint="Give the right --vocab-size")
        counts += np.bincount(tokens.astype(np.int64, copy=False), minlength=vocab_size)
    return counts


def cross_entropy(train_counts: np.ndarray, valid_counts: np.ndarray) -> float:
    """Nats per token of the second counts under the first, add-one smoothed; both [vocabulary].

    Raises:
        DataError: there is no validation token.
    """
    num_tokens = int(valid_counts.sum())
    if num_tokens == 0:
        raise DataError("the validation dataset has no supervised token", hint="Preprocess it with outputs")
    log_probability = np.log(train_counts + 1.0) - np.log(train_counts.sum() + len(train_counts))
    return float(-(valid_counts * log_probability).sum() / num_tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m data_tools.unigram --train PREFIX... --valid PREFIX...`."""
    from megawrap.cli import Parser, run_command

    def run(arguments: Sequence[str] | None) -> int:
        parser = Parser(prog="megawrap data unigram", description=(__doc__ or "").split("\n\n")[0])
        parser.add_argument("--train", nargs="+", type=Path, required=True, metavar="PREFIX", help="training datasets, counted together")
        parser.add_argument("--valid", nargs="+", type=Path, required=True, metavar="PREFIX", help="validation datasets, one figure each")
        parser.add_argument("--vocab-size", type=int, default=None, metavar="N", help="default: the tokenizer's, from the manifest")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
        return _run(parser.parse_args(arguments))

    return run_command(run, argv)


def _run(args: Any) -> int:
    training = [IndexedDataset(prefix) for prefix in args.train]
    vocab_size = args.vocab_size or _vocab_size(training[0], args.train[0])
    counts = sum((supervised_counts(dataset, vocab_size) for dataset in training), np.zeros(vocab_size, dtype=np.int64))
    found = {}
    for prefix in args.valid:
        valid = supervised_counts(IndexedDataset(prefix), vocab_size)
        found[str(prefix)] = {"nats_per_token": cross_entropy(counts, valid), "tokens": int(valid.sum())}
    if args.json:
        print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    else:
        for name, figure in found.items():
            print(f"{figure['nats_per_token']:.4f} nats per token over {figure['tokens']:,} supervised tokens: {name}")
    return 0


def _vocab_size(dataset: IndexedDataset, prefix: Path) -> int:
    size = ((dataset.manifest or {}).get("tokenizer") or {}).get("vocab_size")
    if not isinstance(size, int):
        raise DataError(f"{prefix} has no manifest that tells the vocabulary", hint="Give --vocab-size")
    return size


if __name__ == "__main__":
    sys.exit(main())
