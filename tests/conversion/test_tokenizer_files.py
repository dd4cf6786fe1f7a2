"""The tokenizer that goes into a checkpoint and out with the model is the one the data was made with, whatever its format."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion.export import write_tokenizer
from conversion.megatron import TOKENIZER_DIR, keep_tokenizer
from megawrap.data.tokenizer import Tokenizer
from tests.data.tokenizers_of_kinds import write_byte_level, write_sentencepiece, write_word_piece


@pytest.mark.parametrize("kind", ["tokenizer.json", "sentencepiece", "word pieces"])
def test_a_kept_and_exported_tokenizer_is_the_same(tmp_path: Path, kind: str) -> None:
    if kind == "sentencepiece":
        pytest.importorskip("sentencepiece")
        path = write_sentencepiece(tmp_path / "model" / "own.model", "bpe")
    elif kind == "word pieces":
        path = write_word_piece(tmp_path / "bert")
    else:
        path = write_byte_level(tmp_path / "bpe", "gpt2")
    end = "[SEP]" if kind == "word pieces" else None
    given = Tokenizer(path, eod_token=end)
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    checkpoint.mkdir()
    exported.mkdir()
    keep_tokenizer(path, checkpoint)
    kept = Tokenizer(checkpoint / TOKENIZER_DIR, eod_token=end)
    assert kept.sha256 == given.sha256
    write_tokenizer(kept, exported, 1024)
    again = Tokenizer(exported, eod_token=end)
    assert again.sha256 == given.sha256
    assert (
        again.encode(["the quick fox"], escape_special=True)[0].tolist() == given.encode(["the quick fox"], escape_special=True)[0].tolist()
    )
