"""The tokenizer against the tokenizers library one text at a time, and against transformers for the end token."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megawrap.data.tokenizer import Tokenizer
from megawrap.errors import EXIT_CORRUPT, EXIT_USAGE, DataError
from tests.tiny_tokenizer import END, PAD, write_tokenizer

TEXTS = ["def f():\n    return 1\n", "", "héllo wörld 😀", "x" * 3000, "a  b\t\r\n", "日本語", f"before {END} after", "\x00\x1b"]


def edit(directory: Path, change: Any) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("escape", [True, False])
def test_encode_equals_one_text_at_a_time(tmp_path: Path, escape: bool) -> None:
    from tokenizers import Tokenizer as Oracle

    directory = write_tokenizer(tmp_path)
    oracle = Oracle.from_file(str(directory / "tokenizer.json"))
    oracle.encode_special_tokens = escape
    expected = [oracle.encode(text, add_special_tokens=False).ids for text in TEXTS]
    ids, lengths = Tokenizer(directory).encode(TEXTS, escape_special=escape)
    assert ids.tolist() == [index for one in expected for index in one]
    assert lengths.tolist() == [len(one) for one in expected]
    assert (Tokenizer(directory).eos_id in ids) == (not escape)


def test_every_text_comes_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    for text in TEXTS:
        ids, _ = tokenizer.encode([text], escape_special=True)
        assert tokenizer.decode(ids.tolist()) == text


def test_facts(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, config={"eos_token": {"content": END, "lstrip": False}, "pad_token": PAD})
    tokenizer = Tokenizer(directory / "tokenizer.json")  # the files beside it count all the same
    assert tokenizer.facts() == {
        "sha256": hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest(),
        "vocab_size": 300,
        "eos_token": END,
        "eos_id": 0,
        "pad_id": 1,
    }
    assert tokenizer.special_tokens == {END: 0, PAD: 1}


def test_vocab_size_counts_added_tokens_and_gaps(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    added = {"content": "<|late|>", "id": 777, "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    edit(directory, lambda content: content["added_tokens"].append(added))
    from tokenizers import Tokenizer as Oracle

    oracle = Oracle.from_file(str(directory / "tokenizer.json"))
    assert Tokenizer(directory).vocab_size == 1 + max(oracle.get_vocab(with_added_tokens=True).values())


def test_stored_truncation_and_padding_are_turned_off(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    from tokenizers import Tokenizer as Oracle

    oracle = Oracle.from_file(str(directory / "tokenizer.json"))
    whole = len(oracle.encode("x" * 1000, add_special_tokens=False).ids)
    oracle.enable_truncation(16)
    oracle.enable_padding(length=64)
    oracle.save(str(directory / "tokenizer.json"))
    assert Tokenizer(directory).encode(["x" * 1000, "x"], escape_special=True)[1].tolist() == [whole, 1]


def test_no_begin_or_end_token_is_added(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    from tokenizers import Tokenizer as Oracle
    from tokenizers import processors

    oracle = Oracle.from_file(str(directory / "tokenizer.json"))
    oracle.post_processor = processors.TemplateProcessing(single=f"{PAD} $A {END}", special_tokens=[(END, 0), (PAD, 1)])
    oracle.save(str(directory / "tokenizer.json"))
    ids, _ = Tokenizer(directory).encode(["abc"], escape_special=True)
    assert not {0, 1} & set(ids.tolist())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"eos_token": PAD}}, PAD),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": {"content": PAD}}}, PAD),
        ({"tokenizer_config.json": {"eos_token": None}, "generation_config.json": {"eos_token_id": [1, 0]}}, PAD),
        ({"tokenizer_config.json": {}, "config.json": {"eos_token_id": 1}}, PAD),
        ({"tokenizer_config.json": {}}, END),  # well known
        ({"tokenizer_config.json": {"eos_token": PAD}, "generation_config.json": {"eos_token_id": 0}}, PAD),
    ],
)
def test_where_the_end_token_is_found(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    directory = write_tokenizer(tmp_path)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    tokenizer = Tokenizer(directory)
    assert tokenizer.eos_token == expected
    assert tokenizer.eos_id == [END, PAD].index(expected)
    assert Tokenizer(directory, eod_token=END).eos_id == 0  # the flag wins


def test_end_token_is_the_one_transformers_finds(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    source = write_tokenizer(tmp_path / "source")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), eos_token=PAD, pad_token=END)
    theirs.save_pretrained(tmp_path / "saved")
    ours = Tokenizer(tmp_path / "saved")
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)


def test_special_texts_are_found_as_a_plain_search_finds_them(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    for number, word in enumerate(["<|end", "[CLS]", "<|endoftext|>x", "\u2581end"]):
        token = {"content": word, "id": 300 + number, "special": True, "normalized": False}
        token |= {"lstrip": False, "rstrip": False, "single_word": False}
        edit(directory, lambda content, token=token: content["added_tokens"].append(token))
    tokenizer = Tokenizer(directory)
    texts = ["", "<|", "a [CLS] <|end", "<|endoftext|>x", "<|endoftext|", "\u2581end [CLS]", "plain", "[CLS", f"{PAD}{END}"]
    expected = []
    for index, text in enumerate(texts):
        found = [(text.find(word), -len(word), word) for word in tokenizer.special_tokens if word in text]
        expected += [(index, min(found)[2])] if found else []
    assert tokenizer.special_texts(texts) == expected == [(2, "[CLS]"), (3, "<|endoftext|>x"), (4, "<|end"), (5, "\u2581end"), (8, PAD)]


# ---- refused --------------------------------------------------------------------------------------------------------


def test_no_end_token(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, config={})
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace("endoftext", "stop_here"))
    with pytest.raises(DataError) as refused:
        Tokenizer(directory)
    for fact in (str(path), "no end token", "<|endoftext|>", "--eod-token", "<|stop_here|>"):
        assert fact in str(refused.value)
    assert Tokenizer(directory, eod_token="<|stop_here|>").eos_id == 0


def test_end_token_not_in_the_vocabulary(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, config={"eos_token": "</s>"})
    with pytest.raises(DataError, match=r"'</s>' named by the tokenizer's configuration is not in the vocabulary of 300"):
        Tokenizer(directory)
    with pytest.raises(DataError, match="'<nope>' named by --eod-token"):
        Tokenizer(directory, eod_token="<nope>")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bigcode/starcoder: no such tokenizer.*nothing is downloaded") as refused:
        Tokenizer("bigcode/starcoder")
    assert refused.value.exit_code == EXIT_USAGE
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match=r"no tokenizer\.json in this directory; it holds vocab\.json.*save_pretrained"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (lambda content: content[: len(content) // 2], "is not JSON"),
        (lambda content: b"\x80" + content, "is not UTF-8"),
        (lambda content: b"{}", "no `model` inside"),
        (lambda content: b"[1]", "no `model` inside"),
        (lambda content: content.replace(b'"type":"BPE"', b'"type":"XYZ"').replace(b'"type": "BPE"', b'"type": "XYZ"'), "cannot read it"),
        (lambda content: b"", "is not JSON"),
    ],
)
def test_corrupt_file(tmp_path: Path, damage: Any, fact: str) -> None:
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as refused:
        Tokenizer(tmp_path)
    assert str(path) in str(refused.value)
    assert fact in str(refused.value)
    assert refused.value.exit_code == EXIT_CORRUPT


def test_an_end_token_that_cannot_be_escaped_is_refused(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    edit(directory, lambda content: [token.update(special=False) for token in content["added_tokens"]])
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode(["plain"], escape_special=True)[1].tolist()
    with pytest.raises(DataError, match=r"'<\|endoftext\|>' cannot be escaped"):
        tokenizer.encode([f"a {END}"], escape_special=True)
