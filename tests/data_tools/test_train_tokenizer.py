"""The tokenizer trainer: loads in transformers, loses no text, has StarCoder's special tokens, same bytes twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools import train_tokenizer


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"inputs": text, "outputs": text[::-1] + "!"}) + "\n" for text in texts))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    words = ["def", "return", "self", "value", "import", "os", "path", "naïve", "日本", "\t", "    ", "1234567"]
    return jsonl(tmp_path / "train.jsonl", [" ".join(words[i % len(words) :] + words[: i % 7]) for i in range(200)])


def test_transformers_loads_it_and_nothing_is_lost(corpus: Path, tmp_path: Path) -> None:
    assert train_tokenizer.main(["--input", str(corpus), "--output", str(tmp_path / "tok"), "--vocab-size", "300"]) == 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert len(tokenizer) == 300
    assert [tokenizer.convert_tokens_to_ids(token) for token in train_tokenizer.SPECIAL_TOKENS] == list(range(5))
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    for text in ("def f():\n\treturn 12 + 3  # naïve 日本 🎈\r\n", " leading", "", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == ["1", "2", "3", "4"], "digits stand alone"


def test_same_text_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer.main(["--input", str(corpus), "--output", str(tmp_path / name), "--vocab-size", "300"])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_megawrap_reads_it(corpus: Path, tmp_path: Path) -> None:
    from megawrap.data.tokenizer import Tokenizer

    train_tokenizer.main(["--input", str(corpus), "--output", str(tmp_path / "tok"), "--vocab-size", "300"])
    tokenizer = Tokenizer(tmp_path / "tok")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.eos_token) == (300, 0, "<|endoftext|>")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--input", "FILE", "--vocab-size", "260"], ["--vocab-size is 260", "261 or more"]),
        (["--input", "FILE", "--fields", "text"], ["text", "inputs"]),
        (["--input", "none-*.jsonl"], ["none-*.jsonl"]),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    arguments: list[str], facts: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(corpus) if word == "FILE" else word for word in arguments]
    assert train_tokenizer.main(["--output", str(tmp_path / "tok"), *given]) == 2
    told = capsys.readouterr().err
    assert told.startswith("megawrap: error: ") and all(fact in told for fact in facts), told
    assert not (tmp_path / "tok").exists()
