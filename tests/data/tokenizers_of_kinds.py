"""Small tokenizers of many kinds, trained on a few lines: byte-level BPE with several pre-tokenizers, WordPiece, SentencePiece."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

END, PAD = "<|endoftext|>", "<|pad|>"
TEXT = [
    "def add(a, b):\n    return a + b  # 12 + 345\n", "The quick brown fox jumps over the lazy dog 1234 times.",
    "x = {'k': [1, 2.5, 1000]}\n\n\n",
    "for i in range(10):\n\tprint(i)\r\n", "naïve café, 日本語 текст, I'm you're they've", "        deep    indentation  here",
]  # fmt: skip
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = ("gpt2", "starcoder", "grouped-digits", "llama3", "split-alone", "spaces", "nfc", "prefix-space")


def write_byte_level(directory: Path, kind: str, *, added: list[dict[str, Any]] | None = None) -> Path:
    """A byte-level BPE of 400 tokens with the pre-tokenizer of `kind`; `added` tokens go behind its own two."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix-space")
    alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    words = pre_tokenizers.Split(Regex(r"\w+|\W+"), behavior="isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = {
        "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "grouped-digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level]),
        "llama3": pre_tokenizers.Sequence([split, alone]),
        "split-alone": pre_tokenizers.Sequence([words, alone]),
    }.get(kind, byte_level)
    if kind == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    if kind == "spaces":  # as CodeGen and GPT-NeoX have them
        tokenizer.add_tokens([AddedToken(" " * number, normalized=True) for number in range(2, 9)])
    for token in added or ():
        options = {"normalized": False, **token}
        content, special = options.pop("content"), options.pop("special", True)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([AddedToken(content, special=special, **options)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


def write_word_piece(directory: Path) -> Path:
    """BERT's files without a tokenizer.json: vocab.txt beside tokenizer_config.json."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "quick",
        "brown",
        "fox",
        "jump",
        "##s",
        "##ing",
        ",",
        ".",
        "cafe",
        "1",
        "##2",
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in [*words, *"abcdefghijklmnopqrstuvwxyz"]))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    return directory


def write_sentencepiece(path: Path, model_type: str) -> Path:
    """A SentencePiece model of 400 pieces with byte fallback and one user-defined symbol."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_writer=model, vocab_size=400, model_type=model_type, byte_fallback=True, pad_id=3,
        hard_vocab_limit=False, user_defined_symbols=["<mask>"], character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path
