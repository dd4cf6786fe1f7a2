"""Other formats against the libraries that define them: sentencepiece for .model files, transformers for directories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megawrap.data.added_tokens import CutTexts
from megawrap.data.tokenizer import Tokenizer
from megawrap.data.tokenizer_parity import ADVERSARIAL
from megawrap.errors import EXIT_CORRUPT, EXIT_USAGE, DataError
from tests.data.tokenizers_of_kinds import END, TEXT, write_byte_level, write_sentencepiece, write_word_piece

SENTENCES = ["", " two  spaces ", "the café 日本 😀", *TEXT, *ADVERSARIAL]


def flat(lists: list[list[int]]) -> list[int]:
    return [index for one in lists for index in one]


# ---- SentencePiece --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sentencepiece")
    return write_sentencepiece(tmp_path_factory.mktemp("model") / "tokenizer.model", request.param)


def test_sentencepiece_gives_the_ids_of_the_library(model: Path) -> None:
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = Tokenizer(model)
    tokenizer.choose_backend(TEXT)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(st.text(), st.sampled_from(["</s>", "a</s>b", "<mask> x", "<unk>", "<0x41>", *SENTENCES])), max_size=6))
    def compare(texts: list[str]) -> None:
        ids, lengths = tokenizer.encode([*texts], escape_special=True)
        expected = [oracle.encode(text) for text in texts]
        assert ids.tolist() == flat(expected)
        assert lengths.tolist() == [len(one) for one in expected]

    compare()
    facts = tokenizer.facts()
    assert (facts["vocab_size"], facts["eos_token"], facts["eos_id"], facts["pad_id"]) == (
        oracle.get_piece_size(), "</s>", oracle.eos_id(), oracle.pad_id(),
    )  # fmt: skip


def test_special_tokens_of_sentencepiece_are_read_where_allowed(model: Path) -> None:
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = Tokenizer(model)
    ids, lengths = tokenizer.encode(["the fox</s>x", "<s>", "plain"], escape_special=False)
    first = [*oracle.encode("the fox"), oracle.eos_id(), *oracle.encode("x")]
    assert ids.tolist() == [*first, oracle.bos_id(), *oracle.encode("plain")]
    assert lengths.tolist() == [len(first), 1, len(oracle.encode("plain"))]
    assert tokenizer.decode(first) == "the fox</s>x"
    assert tokenizer.special_texts(["the fox</s>x", "</s", "<mask>"]) == [(0, "</s>")]


def test_a_directory_with_one_model_alone(model: Path) -> None:
    assert Tokenizer(model.parent).facts() == Tokenizer(model).facts()


def test_backends_that_cannot_read_a_model(model: Path) -> None:
    for name, reason in (("tokenizers", "sentencepiece reads this file"), ("tiktoken", "it cannot read a SentencePiece model")):
        with pytest.raises(DataError, match=f"--tokenizer-backend {name} cannot be used: {reason}") as refused:
            Tokenizer(model, backend=name)
        assert refused.value.exit_code == EXIT_USAGE


def test_a_damaged_model(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\x00" * 100, b"{}"):
        path = tmp_path / "bad.model"
        path.write_bytes(damaged)
        with pytest.raises(DataError) as refused:
            Tokenizer(path)
        assert str(path) in str(refused.value)
        assert refused.value.exit_code == EXIT_CORRUPT


# ---- directories without tokenizer.json -----------------------------------------------------------------------------


def test_word_piece_from_vocab_txt_and_from_tokenizer_json(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = write_word_piece(tmp_path / "bert")
    theirs = AutoTokenizer.from_pretrained(str(directory))
    theirs.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    for path in (directory, tmp_path / "saved"):
        ours = Tokenizer(path, eod_token="[SEP]")
        ids, lengths = ours.encode(SENTENCES, escape_special=False)
        expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in SENTENCES]
        assert ids.tolist() == flat(expected)
        assert lengths.tolist() == [len(one) for one in expected]
        assert ours.eos_id == theirs.sep_token_id
        assert ours.pad_id == theirs.pad_token_id
        assert ours.backend == "tokenizers"
    with pytest.raises(DataError, match=r"no end token.*\[SEP\]"):
        Tokenizer(directory)


def test_gpt2_from_vocab_json_and_merges_txt(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    content = json.loads((write_byte_level(tmp_path / "whole", "gpt2") / "tokenizer.json").read_text())
    directory = tmp_path / "parts"
    directory.mkdir()
    (directory / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in content["model"]["merges"]))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": END}))
    theirs = AutoTokenizer.from_pretrained(str(directory))
    ours = Tokenizer(directory)
    texts = [text for text in SENTENCES if text]
    assert ours.encode(texts, escape_special=False)[0].tolist() == flat(
        [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    )
    assert ours.eos_id == theirs.eos_token_id
    before = ours.sha256
    assert Tokenizer(directory).sha256 == before
    (directory / "merges.txt").write_text((directory / "merges.txt").read_text().rsplit("\n", 2)[0] + "\n")
    assert Tokenizer(directory).sha256 != before


def test_a_directory_that_transformers_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(DataError, match=r"transformers cannot read the tokenizer in this directory: .*"):
        Tokenizer(tmp_path)


def test_code_in_a_directory_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.py").write_text("open('ran', 'w').close()\nraise SystemExit")
    (tmp_path / "vocab.txt").write_text("a\n")
    auto_map = {"AutoTokenizer": ["tokenizer.Mine", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": auto_map}))
    with pytest.raises(DataError):
        Tokenizer(tmp_path)
    assert not Path("ran").exists()


# ---- cutting texts --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.tuples(st.just("known"), st.lists(st.integers(0, 9))), st.lists(st.one_of(st.text("abc"), st.integers(10, 19)))))
)
def test_cut_texts_put_everything_in_its_place(plan: list[object]) -> None:
    """Brute force: letters encode as their code, known ids stand where they were cut out."""
    cut, expected = CutTexts(), []
    for item in plan:
        if isinstance(item, tuple):
            cut.add_known(np.array(item[1], dtype=np.int32))
            expected.append(item[1])
            continue
        text, tokens, ids = "", [], []
        for part in item:  # type: ignore[attr-defined]
            if isinstance(part, int):
                tokens.append((len(text), len(text) + 1, part))
                ids.append(part)
            else:
                ids += map(ord, part)
            text += "#" if isinstance(part, int) else part
        cut.add_cut(text, tokens)
        expected.append(ids)
    encode_letters = lambda pieces: (  # noqa: E731
        np.array([ord(letter) for piece in pieces for letter in piece], dtype=np.int32),
        np.array([len(piece) for piece in pieces], dtype=np.int32),
    )
    ids, lengths = cut.encode(encode_letters)
    assert ids.tolist() == flat(expected)
    assert lengths.tolist() == [len(one) for one in expected]
