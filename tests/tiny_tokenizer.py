"""A byte-level BPE trained on a few lines, for tests: in a directory, as `save_pretrained` would leave it."""

from __future__ import annotations

import json
from pathlib import Path

END, PAD = "<|endoftext|>", "<|pad|>"
TEXT = ["def add(a, b):\n    return a + b\n", "The quick brown fox jumps over the lazy dog.", "for i in range(10):\n    print(i)\n"]


def write_tokenizer(directory: Path, *, vocab_size: int = 300, config: dict[str, object] | None = None) -> Path:
    """Write tokenizer.json and tokenizer_config.json (`config`; default names the end token); returns the directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END} if config is None else config))
    return directory
