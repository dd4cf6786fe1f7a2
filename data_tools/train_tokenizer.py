"""Train a byte-level BPE tokenizer with StarCoder's special tokens on JSONL.

In: JSONL files of the training part only (a validation file among them would leak into the vocabulary). Out: a
directory that Hugging Face loads, tokenizer.json and tokenizer_config.json. The same text gives the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from megawrap.data.fields import extractor
from megawrap.data.inputs import Piece, expand
from megawrap.data.reader import SampleReader
from megawrap.errors import DataError
from megawrap.io import atomic_write

END_TOKEN = "<|endoftext|>"
SPECIAL_TOKENS = (END_TOKEN, "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
_SMALLEST = 256 + len(SPECIAL_TOKENS)


def train(texts: Iterator[str], vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer` of at most `vocab_size` tokens, the special ones first.

    Digits are split one by one and the rest as GPT-2 does, as StarCoder's tokenizer; every text survives encode and
    decode unchanged, because all 256 bytes are in the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Any, output_dir: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, each whole or not at all."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TOKEN,
        "eos_token": END_TOKEN,
        "unk_token": END_TOKEN,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(output_dir / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    atomic_write(output_dir / "tokenizer_config.json", orjson.dumps(config, option=orjson.OPT_INDENT_2))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m data_tools.train_tokenizer --input FILE... --output DIR --vocab-size N`."""
    from megawrap.cli import Parser, run_command

    def run(arguments: Sequence[str] | None) -> int:
        parser = Parser(prog="megawrap data tokenizer", description=(__doc__ or "").split("\n\n")[0])
        parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSONL of the training part")
        parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of tokenizer.json")
        parser.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="tokens, special ones included (default: 8192)")
        parser.add_argument("--fields", nargs="+", default=["inputs", "outputs"], metavar="NAME", help="keys that hold text")
        return _run(parser.parse_args(arguments))

    return run_command(run, argv)


def _run(args: Any) -> int:
    if args.vocab_size < _SMALLEST:
        raise DataError(
            f"--vocab-size is {args.vocab_size}; it must be {_SMALLEST} or more, 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    reader = SampleReader([Piece(name) for name in expand(args.input)], extractor(args.fields))
    tokenizer = train((text for batch in reader.batches() for text in batch.texts), args.vocab_size)
    found = tokenizer.get_vocab_size()
    save(tokenizer, args.output)
    print(f"{found:,} tokens ({len(SPECIAL_TOKENS)} special) in {args.output}")
    if found < args.vocab_size:
        print(f"the text has no more pairs to merge: {found:,} of the {args.vocab_size:,} tokens asked for")
    return 0


if __name__ == "__main__":
    sys.exit(main())
