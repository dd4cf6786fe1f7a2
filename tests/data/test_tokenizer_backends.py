"""Every backend against the library whose ids count, one text at a time; planted defects against the comparison at the start."""

from __future__ import annotations

import importlib
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megawrap.data import tokenizer as tokenizer_module
from megawrap.data import tokenizer_backends, tokenizer_parity
from megawrap.data.tokenizer import Tokenizer
from megawrap.data.tokenizer_backends import SEPARATOR
from megawrap.errors import EXIT_USAGE, DataError
from tests.data.tokenizers_of_kinds import BYTE_LEVEL, END, PAD, TEXT, write_byte_level

pytest.importorskip("gigatoken")
pytest.importorskip("tiktoken")

CAN = {
    "gigatoken": {"gpt2", "starcoder", "llama3", "spaces", "nfc", "prefix-space"},
    "tiktoken": {"gpt2", "starcoder", "grouped-digits", "llama3", "split-alone"},
}
PAIRS = [(name, kind) for name, kinds in CAN.items() for kind in BYTE_LEVEL if kind in kinds]
HOSTILE = st.lists(
    st.one_of(
        st.text(),
        st.text(alphabet=" \t\n\r'sx1２½é\u0301日"),
        st.lists(st.sampled_from([END, PAD, "<|", "a", " ", "7", SEPARATOR, SEPARATOR[0], "½", "  "])).map("".join),
    ),
    max_size=6,
)


def encode_alone(directory: Path, texts: Sequence[str], escape: bool) -> list[list[int]]:
    from tokenizers import Tokenizer as Oracle

    oracle = Oracle.from_file(str(directory / "tokenizer.json"))
    oracle.encode_special_tokens = escape
    return [oracle.encode(text, add_special_tokens=False).ids for text in texts]


def assert_same(tokenizer: Tokenizer, directory: Path, texts: Sequence[str]) -> None:
    for escape in (True, False):
        expected = encode_alone(directory, texts, escape)
        ids, lengths = tokenizer.encode(texts, escape_special=escape)
        assert ids.dtype == lengths.dtype == np.int32
        assert lengths.tolist() == [len(one) for one in expected]
        assert ids.tolist() == [index for one in expected for index in one]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_byte_level(tmp_path_factory.mktemp(kind), kind) for kind in BYTE_LEVEL}


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_backend_gives_the_ids_of_the_library(directories: dict[str, Path], name: str, kind: str) -> None:
    tokenizer = Tokenizer(directories[kind], backend=name)
    assert tokenizer.choose_backend(TEXT).startswith(f"{name} encodes: same ids as tokenizers on {len(TEXT)} texts")
    assert tokenizer.backend == name

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(HOSTILE)
    def compare(texts: list[str]) -> None:
        assert_same(tokenizer, directories[kind], texts)

    compare()


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_auto_takes_the_first_that_can(directories: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer(directories[kind])
    assert tokenizer.backend == "auto"
    assert_same(tokenizer, directories[kind], [*TEXT, *tokenizer_parity.ADVERSARIAL])
    first = next((name for name in ("gigatoken", "tiktoken") if kind in CAN[name]), "tokenizers")
    assert tokenizer.backend == first
    for refused in ("gigatoken", "tiktoken")[: ("gigatoken", "tiktoken", "tokenizers").index(first)]:
        assert f"not {refused}: " in tokenizer.backend_reason


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("gigatoken", "grouped-digits", "it refuses"),
        ("tiktoken", "nfc", "it has no normalizer such as NFC"),
        ("tiktoken", "spaces", "added tokens of spaces"),
        ("tiktoken", "prefix-space", "no pattern of it is equal to the pre-tokenizer ByteLevel"),
    ],
)
def test_a_backend_asked_for_that_cannot_is_refused(directories: dict[str, Path], name: str, kind: str, reason: str) -> None:
    with pytest.raises(DataError) as refused:
        Tokenizer(directories[kind], backend=name)
    for fact in (str(directories[kind]), f"--tokenizer-backend {name} cannot be used", reason, "--tokenizer-backend auto"):
        assert fact in str(refused.value)
    assert refused.value.exit_code == EXIT_USAGE


def test_unknown_backend(directories: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"no tokenizer backend 'fast'; there are auto, gigatoken, tiktoken, tokenizers"):
        Tokenizer(directories["gpt2"], backend="fast")


def test_tokenizers_by_name(directories: dict[str, Path]) -> None:
    tokenizer = Tokenizer(directories["gpt2"], backend="tokenizers")
    assert_same(tokenizer, directories["gpt2"], TEXT)
    assert (tokenizer.backend, tokenizer.backend_reason) == ("tokenizers", "tokenizers encodes, as asked")


def test_packages_that_are_not_installed(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = importlib.import_module

    def missing(name: str, *arguments: Any) -> Any:
        if name in ("gigatoken", "tiktoken"):
            raise ImportError(name)
        return import_module(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    tokenizer = Tokenizer(directories["gpt2"])
    assert_same(tokenizer, directories["gpt2"], TEXT)
    assert tokenizer.backend == "tokenizers"
    assert tokenizer.backend_reason.count("is not installed (pip install 'megawrap[fast]')") == 2
    with pytest.raises(DataError, match="gigatoken cannot be used: it is not installed"):
        Tokenizer(directories["gpt2"], backend="gigatoken")


# ---- defects that the comparison has to see -------------------------------------------------------------------------


def test_a_wrong_pattern_falls_back_and_says_so(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_backends, "DIGITS_PATTERN", tokenizer_backends.GPT2_PATTERN.replace("%", "%%") + "%.0s")
    tokenizer = Tokenizer(directories["grouped-digits"])
    assert_same(tokenizer, directories["grouped-digits"], ["in 12  34 steps"])
    assert tokenizer.backend == "tokenizers"
    assert "not tiktoken: it gives [" in tokenizer.backend_reason
    with pytest.raises(DataError, match=r"--tokenizer-backend tiktoken cannot be used: it gives \[.*\] for '.*', not \["):
        Tokenizer(directories["grouped-digits"], backend="tiktoken").choose_backend(TEXT)


def test_numbers_left_with_their_neighbours_are_seen(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_backends, "_has_number", lambda text: SEPARATOR in text)
    assert "not gigatoken: it gives [" in Tokenizer(directories["starcoder"]).choose_backend()


def test_a_separator_in_a_text_never_goes_unseen(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_backends, "_has_separator", lambda text: False)
    with pytest.raises(AssertionError, match="texts came back as"):
        Tokenizer(directories["gpt2"]).choose_backend()


def test_text_of_the_user_alone_can_tell_backends_apart(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    encode = tokenizer_backends.Gigatoken.encode

    def sometimes_wrong(self: Any, texts: Sequence[str]) -> Any:
        ids, lengths = encode(self, texts)
        if any("rare word" in text for text in texts):
            ids[-1] ^= 1
        return ids, lengths

    monkeypatch.setattr(tokenizer_backends.Gigatoken, "encode", sometimes_wrong)
    assert Tokenizer(directories["gpt2"]).choose_backend(TEXT).startswith("gigatoken encodes")
    assert "not gigatoken" in Tokenizer(directories["gpt2"]).choose_backend(["a rare word", *TEXT])


def test_a_backend_that_goes_wrong_later_is_refused(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_AUDIT_EVERY", 100)
    tokenizer = Tokenizer(directories["gpt2"])
    texts = ["some words"] * 64
    tokenizer.encode(texts, escape_special=True)
    encode = tokenizer_backends.Gigatoken.encode
    monkeypatch.setattr(
        tokenizer_backends.Gigatoken, "encode", lambda self, texts: (encode(self, texts)[0][::-1].copy(), encode(self, texts)[1])
    )
    tokenizer = Tokenizer(directories["gpt2"])
    monkeypatch.setattr(tokenizer_parity, "difference", lambda *arguments: None)
    with pytest.raises(DataError, match=r"gigatoken gives other ids than tokenizers for the text 'some words'.*backend tokenizers"):
        tokenizer.encode(texts, escape_special=True)


# ---- added tokens ---------------------------------------------------------------------------------------------------

ADDED: dict[str, list[dict[str, Any]]] = {
    "of both kinds": [{"content": "<tool>", "special": False}, {"content": "<tool>x", "special": False}, {"content": "<|im|>"}],
    "that swallow spaces": [{"content": "<mask>", "lstrip": True}, {"content": "<right>", "rstrip": True, "special": False}],
    "of whole words": [{"content": "word", "single_word": True, "special": False}],
    "matched in two rounds": [{"content": "<a>", "special": False, "normalized": True}, {"content": "b<a", "special": True}],
    "with digits": [{"content": "<|7|>"}, {"content": "<|77|>x7"}],
}  # fmt: skip


@pytest.mark.parametrize("name", ["auto", "gigatoken", "tiktoken"])
@pytest.mark.parametrize("kind", ["gpt2", "starcoder"])
@pytest.mark.parametrize("added", ADDED)
def test_added_tokens(tmp_path: Path, added: str, kind: str, name: str) -> None:
    directory = write_byte_level(tmp_path, kind, added=ADDED[added])
    tokenizer = Tokenizer(directory, backend=name)
    tokenizer.choose_backend()
    assert tokenizer.backend == (name if name != "auto" else "gigatoken")
    words = [END, PAD, " ", "x", "7", "½", "sword", "b<", *(token["content"] for token in ADDED[added])]

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.lists(st.sampled_from(words)).map("".join), max_size=5))
    def compare(texts: list[str]) -> None:
        assert_same(tokenizer, directory, texts)

    compare()


# ---- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gigatoken", "tiktoken"])
def test_many_threads_give_the_same(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    monkeypatch.setattr(tokenizer_backends, "_ROW_CHARACTERS", 50)
    tokenizer = Tokenizer(directories["starcoder"], backend=name)
    texts = [text * (number % 5) for number, text in enumerate(TEXT * 20)]
    for batch in (texts, ["x" * 3000, *texts[:5]], [""], ["", ""], []):
        assert_same(tokenizer, directories["starcoder"], batch)


def test_words_seen_are_forgotten_before_memory_grows(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """gigatoken keeps every distinct word; 40 MB of them would be 400 MB."""
    monkeypatch.setattr(tokenizer_backends, "_GROWTH_PER_THREAD", 8 << 20)
    tokenizer = Tokenizer(directories["gpt2"], backend="gigatoken")
    draw, most = random.Random(0), 0
    letters = bytes.maketrans(bytes(range(256)), bytes(97 + byte % 26 for byte in range(256)))
    for number in range(20):
        word = draw.randbytes(2_000_000).translate(letters).decode()
        texts = [" ".join(word[at : at + 8] for at in range(begin, begin + 8000, 8)) for begin in range(0, len(word), 8000)]
        tokenizer.encode(texts, escape_special=True)
        if number == 1:
            first = tokenizer_backends._resident_bytes()
        most = max(most, tokenizer_backends._resident_bytes())
    assert most - first < 100 << 20


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.integers(1, 9))
def test_shares_hold_every_text_once_and_none_is_much_longer(sizes: list[int], threads: int) -> None:
    texts = ["x" * size for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_backends, "_ROW_CHARACTERS", 10)
        shares = list(tokenizer_backends._shares(texts, threads))
    assert [text for share in shares for text in share] == texts
    assert 1 <= len(shares) <= threads
    assert all(len(share) for share in shares)
    widest = max(sum(len(text) + 2 for text in share) for share in shares)
    assert widest * len(shares) <= 3 * sum(size + 2 for size in sizes)  # what a matrix of them holds


def test_numbers_are_those_of_unicode() -> None:
    for code in range(0x110000):
        if unicodedata.category(chr(code))[0] == "N" and code > 127:
            assert tokenizer_backends._is_number()[code]
    assert not tokenizer_backends._has_number("0123 abc é日本😀")
    assert tokenizer_backends._has_number("x²") and tokenizer_backends._has_number(SEPARATOR)


def test_bytes_of_characters_are_those_of_the_library() -> None:
    from tokenizers import pre_tokenizers

    found = tokenizer_backends.byte_characters()
    assert sorted(found) == sorted(pre_tokenizers.ByteLevel.alphabet())
    for text in ("é", "\n", "日", "\x00\x7f", "\u00ad"):
        ((piece, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert bytes(found[character] for character in piece) == text.encode()


def test_sample_is_bounded() -> None:
    texts = ["short"] * 5000 + ["x" * 100_000] * 5000
    chosen = tokenizer_parity.sample(texts)
    assert 0 < len(chosen) <= tokenizer_parity.MAX_TEXTS
    assert sum(map(len, chosen)) <= tokenizer_parity.MAX_CHARACTERS
    assert "short" in chosen and "x" * tokenizer_parity.LONGEST in chosen
    assert tokenizer_parity.sample([]) == []
    assert tokenizer_parity.sample(["one"]) == ["one"]
