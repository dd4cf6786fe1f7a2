"""Faster encoders of the same ids: gigatoken and tiktoken, built from the definition of a Hugging Face tokenizer.

In: the parsed tokenizer.json. Out: a `FastBackend`, or `UnusableError` with the reason. What is built is only a candidate:
tokenizer_parity compares it with the reference before it is used. Added tokens never reach it: they are cut out before.
"""

from __future__ import annotations

import os
import resource
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from megawrap.data.added_tokens import Encoded

SEPARATOR = "\ufdd0\ufdd1"
"""Two of Unicode's noncharacters, which no text that is meant to be read has; a text with them goes to the reference."""
# OpenAI's pattern for GPT-2, which the tokenizers library applies in ByteLevel.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after Digits has cut every number, or every digit, out: no space before it, and spaces before it are not split.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_GROWTH_PER_THREAD = 16 << 20  # bytes of words that gigatoken may remember; 160 MB of code in two threads give 20 MiB
_LARGE_CHARACTERS = 1 << 20  # a call after which the buffers have their size, and memory that grows is words
_ROW_CHARACTERS = 256 << 10  # less than this is not worth another thread


class UnusableError(Exception):
    """A backend cannot be used for this tokenizer; its text is the reason, for the user."""


class FastBackend(Protocol):
    """An encoder of text without added tokens.

    Attributes:
        name: of the library.
        can_cut: the parts of a text cut at an added token encode as texts of their own do.
        odd: says of a text outside ASCII whether it is not for this backend; None: all are.
        own_tokens: texts of added tokens that it matches itself.
    """

    name: str
    can_cut: bool
    odd: Callable[[str], bool] | None
    own_tokens: frozenset[str]

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids int32 [sum], back to back, and lengths int32 [n]."""


def num_threads() -> int:
    """Threads to encode with: RAYON_NUM_THREADS, which all of the libraries follow, else the cores of this process."""
    given = os.environ.get("RAYON_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build(name: str, definition: bytes | Path) -> FastBackend:
    """A candidate by name, from the content of a tokenizer.json or (gigatoken) the path of a SentencePiece model.

    Raises:
        UnusableError: the package is missing or cannot express this tokenizer.
    """
    if isinstance(definition, Path):
        if name == "gigatoken":
            return Gigatoken.from_sentencepiece(definition)
        raise UnusableError("it cannot read a SentencePiece model")
    content = orjson.loads(definition)
    return Gigatoken.from_definition(content) if name == "gigatoken" else Tiktoken(content)


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call into a Rust library whose refusals may be panics.

    Raises:
        UnusableError: it refused.
    """
    try:
        return function(*arguments, **options)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UnusableError(f"it refuses: {' '.join(str(error).split())[:200]}") from error


# ---- gigatoken ------------------------------------------------------------------------------------------------------


class Gigatoken:
    """gigatoken, with many texts in one call: they are joined by a separator that is a token of its own.

    The library returns Awkward arrays or Python lists for batches; a padded matrix of one joined row per thread needs
    neither, and releases the interpreter lock. Tokenizers that treat the beginning of a text in a way of their own are
    called once for each text instead.

    Args:
        make: makes a `gigatoken.Tokenizer`; called again when that has grown too large.
        source: `gigatoken.BytesSource`.
        separator: id of the separator; None: one call for each text.
        odd, own_tokens: as in FastBackend.
    """

    name = "gigatoken"

    def __init__(
        self, make: Callable[[], Any], source: Any, *, separator: int | None, odd: Callable[[str], bool] | None, own_tokens: frozenset[str]
    ) -> None:
        self._make, self._source, self._separator = make, source, separator
        self._library: Any = _call(make)
        self._resident, self._settled = 0, False
        self.odd, self.own_tokens = odd, own_tokens
        self.can_cut = separator is not None

    @classmethod
    def from_definition(cls, content: dict[str, Any]) -> Gigatoken:
        """Build from a parsed tokenizer.json.

        Special tokens are left out. `Digits`, which the library does not know, is expressed by making each of 0 to 9 an
        added token: they are cut out first, as Digits does; texts with other digits are `odd`.
        """
        library = _import("gigatoken")
        content, model = dict(content), content["model"]
        if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
            raise UnusableError(f"it cannot do a {model.get('type', 'BPE')} model with a {type(model.get('vocab')).__name__} vocabulary")
        vocabulary: dict[str, int] = model["vocab"]
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        own = [token for token in content.get("added_tokens") or () if not token["special"] and token["content"].isspace()]
        first_free = max([*vocabulary.values(), *(token["id"] for token in content.get("added_tokens") or ())], default=-1) + 1
        added = list(own)
        rest = _without_digits(content)
        if rest is not None:
            missing = [digit for digit in "0123456789" if digit not in vocabulary]
            if missing or content.get("normalizer"):
                raise UnusableError(f"it cannot split digits {'after a normalizer' if not missing else 'that are not tokens'}")
            content["pre_tokenizer"] = rest
            added += [{**plain, "content": digit, "id": vocabulary[digit]} for digit in "0123456789"]
        joins = _every_text_is_like_a_part(content)
        if joins:
            added.append({**plain, "content": SEPARATOR, "id": first_free})
        content |= {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
        definition = orjson.dumps(content)
        return cls(
            lambda: library.Tokenizer.from_json(definition),
            library.BytesSource,
            separator=first_free if joins else None,
            odd=_has_number if rest is not None else _has_separator if joins else None,
            own_tokens=frozenset(token["content"] for token in own),
        )

    @classmethod
    def from_sentencepiece(cls, path: Path) -> Gigatoken:
        """Build from a SentencePiece model."""
        library = _import("gigatoken")
        return cls(
            lambda: library.Tokenizer.from_sentencepiece(path), library.BytesSource, separator=None, odd=None, own_tokens=frozenset()
        )

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids int32 [sum], back to back, and lengths int32 [n]."""
        if not texts:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
        encoded = self._one_by_one(texts) if self._separator is None else self._joined(texts, self._separator)
        self._forget_words(sum(map(len, texts)))
        return encoded

    def _forget_words(self, characters: int) -> None:
        """Start afresh when memory has grown: the library keeps every word it has seen, in every thread, and cannot forget."""
        resident = _resident_bytes()
        if not self._settled:
            self._resident, self._settled = resident, characters >= _LARGE_CHARACTERS
        elif resident - self._resident > _GROWTH_PER_THREAD * num_threads():
            self._library, self._settled = None, False  # not two of them at a time
            self._library = self._make()

    def _joined(self, texts: Sequence[str], end: int) -> Encoded:
        separator = SEPARATOR.encode()  # joining bytes: ASCII texts would become two bytes a character beside it
        rows = [separator.join([*map(str.encode, part), b""]) for part in _shares(texts, num_threads())]
        parallel = None if len(rows) > 1 else False  # None: unless this is a forked process
        # A source of bytes, because a list makes the library import awkward: 0.3 s and 50 MB.
        matrix, sizes = self._library.encode_batch_padded(self._source(rows), end, parallel=parallel)
        ids = matrix[0, : sizes[0]] if len(rows) == 1 else np.concatenate([row[:size] for row, size in zip(matrix, sizes, strict=True)])
        is_separator = ids == end
        at = np.flatnonzero(is_separator)
        if len(at) != len(texts):
            raise AssertionError(f"{len(texts)} texts came back as {len(at)}")  # `odd` keeps texts with the separator away
        return ids[~is_separator].view(np.int32), (np.diff(at, prepend=-1) - 1).astype(np.int32)

    def _one_by_one(self, texts: Sequence[str]) -> Encoded:
        parts = [self._library.encode(text) for text in texts]
        return np.concatenate(parts).astype(np.int32), np.fromiter(map(len, parts), dtype=np.int32, count=len(parts))


def _resident_bytes() -> int:
    """Memory of this process now; where that cannot be known, the most it ever had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _shares(texts: Sequence[str], threads: int) -> Iterator[Sequence[str]]:
    """Runs of texts, about equally long, at most one for each thread; a single long text makes them fewer.

    Rows become a matrix, so its size is bounded by keeping every row at most twice as long as the average.
    """
    if threads == 1:
        yield texts
        return
    sizes = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)) + len(SEPARATOR)
    total = int(sizes.sum())
    wanted = min(threads, max(1, total // max(_ROW_CHARACTERS, int(sizes.max()))))
    share = np.minimum((np.cumsum(sizes) - 1) * wanted // total, wanted - 1)
    starts = np.flatnonzero(np.diff(share, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(texts)], strict=True):
        yield texts[start:end]


def _without_digits(content: dict[str, Any]) -> dict[str, Any] | None:
    """The pre-tokenizer that is left when a leading split of every digit is done elsewhere; None when there is none."""
    pre = content.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers") or []
    if pre.get("type") != "Sequence" or len(parts) < 2 or parts[0].get("type") != "Digits" or not parts[0].get("individual_digits"):
        return None
    return dict(parts[1]) if len(parts) == 2 else {**pre, "pretokenizers": parts[1:]}


def _every_text_is_like_a_part(content: dict[str, Any]) -> bool:
    """Whether the beginning of a text gets no treatment of its own, such as a space put before it."""

    def parts(node: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
        if node is not None and node.get("type") == "Sequence":
            for part in node[key]:
                yield from parts(part, key)
        elif node is not None:
            yield node

    pre = list(parts(content.get("pre_tokenizer"), "pretokenizers"))
    normalizers = {part.get("type") for part in parts(content.get("normalizer"), "normalizers")}
    known = all(part.get("type") in ("ByteLevel", "Split", "Digits") and not part.get("add_prefix_space") for part in pre)
    return bool(pre) and known and normalizers <= {"NFC", "NFD", "NFKC", "NFKD"}


@cache
def _is_number() -> np.ndarray:
    """bool [0x20000]: characters outside ASCII that are numbers, or may be in a later version of Unicode than Python's.

    No character of the planes above is, nor are any expected there. The separator's are among those not assigned.
    """
    categories = (unicodedata.category(chr(code)) for code in range(0x20000))
    table = np.fromiter((category[0] == "N" or category == "Cn" for category in categories), dtype=bool, count=0x20000)
    table[:128] = False
    return table


def _has_number(text: str) -> bool:
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return bool(_is_number()[codes[codes < 0x20000]].any())


def _has_separator(text: str) -> bool:
    return SEPARATOR in text


# ---- tiktoken -------------------------------------------------------------------------------------------------------


class Tiktoken:
    """tiktoken with the ranks and the pattern of a byte-level BPE; its ranks are the order of merging, so ids are looked up.

    Args:
        content: parsed tokenizer.json.
    """

    name = "tiktoken"
    can_cut = True
    odd: Callable[[str], bool] | None = None
    own_tokens: frozenset[str] = frozenset()

    def __init__(self, content: dict[str, Any]) -> None:
        library = _import("tiktoken")
        pattern, ranks, self._ids = byte_level_encoding(content)
        # The separator never occurs; without any special token the library's search for one stops at every character.
        specials = {SEPARATOR: len(ranks)}
        self._library = _call(library.Encoding, "megawrap", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self._threads = num_threads()
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids int32 [sum], back to back, and lengths int32 [n]."""
        shares = list(_shares(texts, self._threads * 4)) if texts else []
        parts = (
            self._pool.map(self._encode_share, shares) if self._pool is not None and len(shares) > 1 else map(self._encode_share, shares)
        )
        results = list(parts)
        if not results:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
        return np.concatenate([ids for ids, _ in results]), np.concatenate([lengths for _, lengths in results])

    def _encode_share(self, texts: Sequence[str]) -> Encoded:
        encode = self._library.encode_to_numpy  # no Python integers, unlike the other calls
        parts = [encode(text, disallowed_special=()) for text in texts]
        return self._ids[np.concatenate(parts)], np.fromiter(map(len, parts), dtype=np.int32, count=len(parts))


def byte_level_encoding(content: dict[str, Any]) -> tuple[str, dict[bytes, int], np.ndarray]:
    """A parsed tokenizer.json as tiktoken has it: the pattern, the ranks by bytes, and ids int32 by rank.

    Raises:
        UnusableError: it is not a byte-level BPE, or has parts that tiktoken lacks.
    """
    model = content["model"]
    if content.get("normalizer"):
        raise UnusableError(f"it has no normalizer such as {content['normalizer'].get('type')}")
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]
    if model.get("type", "BPE") != "BPE" or odd:
        raise UnusableError(f"it cannot do a {model.get('type', 'BPE')} model{' with ' if odd else ''}{', '.join(odd)}")
    if any(not token["special"] and token["content"].isspace() for token in content.get("added_tokens") or ()):
        raise UnusableError("added tokens of spaces alone would cut every text to pieces")
    return _pattern(content.get("pre_tokenizer")), *_ranks(model)


def _pattern(pre: dict[str, Any] | None) -> str:
    """A pattern that splits as the pre-tokenizer does."""
    parts = pre.get("pretokenizers", [pre]) if pre else []
    kinds = [part.get("type") for part in parts]
    last = parts[-1] if parts else {}
    if kinds[-1:] == ["ByteLevel"] and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and last.get("use_regex", True):
            return DIGITS_PATTERN % (r"\p{N}" if parts[0].get("individual_digits") else r"\p{N}+")
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            split = parts[0]
            pattern, way = split["pattern"].get("Regex"), (split.get("behavior"), bool(split.get("invert")))
            if pattern is not None and way in (("Isolated", False), ("Removed", True)):
                return str(pattern)
    raise UnusableError(f"no pattern of it is equal to the pre-tokenizer {', '.join(map(str, kinds)) or 'none'}")


def byte_characters() -> dict[str, int]:
    """Byte-level BPE's character -> byte: printable Latin-1 stands for itself, the rest is moved behind U+0100 (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(moved)}


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], np.ndarray]:
    """Bytes of token -> order of merging, and the ids int32 of those orders."""
    to_byte, vocabulary = byte_characters(), model["vocab"]
    missing = [character for character in to_byte if character not in vocabulary]
    if missing:
        raise UnusableError(f"it needs all 256 bytes in the vocabulary, {len(missing)} are not")
    ranks = {bytes([byte]): byte for byte in to_byte.values()}
    ids = [vocabulary[character] for character in sorted(to_byte, key=to_byte.__getitem__)]
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        try:
            spelled = bytes(to_byte[character] for character in token)
        except KeyError as error:
            raise UnusableError(f"the merge {merge!r} is not of bytes") from error
        if spelled not in ranks:
            ranks[spelled] = len(ids)
            ids.append(vocabulary[token])
    return ranks, np.array(ids, dtype=np.int32)


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnusableError("it is not installed (pip install 'megawrap[fast]')") from error
