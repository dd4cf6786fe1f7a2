"""A tokenizer as preprocessing needs it: ids in numpy, the end token, and facts that identify it.

In: a `tokenizer.json`, a SentencePiece `.model`, or a Hugging Face directory. Out: `Tokenizer`, which encodes by the fastest
library that gives the same ids, and whose `facts()` go into manifests and checkpoints, so that data and model can be told
to belong together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megawrap.data import tokenizer_parity
from megawrap.data.added_tokens import Cutter, TextFinder
from megawrap.data.tokenizer_backends import FastBackend, UnusableError, build
from megawrap.data.tokenizer_files import find
from megawrap.data.tokenizer_reference import HuggingFace, open_reference
from megawrap.errors import DataError

BACKENDS = ("auto", "gigatoken", "tiktoken", "tokenizers")
"""What `backend` may be; the fast ones in the order in which they are tried."""
# Asked in this order when no configuration file names the end token.
WELL_KNOWN_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>", "<|im_end|>", "<|eot_id|>")
_AUDIT_EVERY, _AUDITED_CHARACTERS = 1 << 19, 4096  # tokens between two audits; the longest text that is compared


class Tokenizer:
    """A tokenizer without truncation, padding or added begin and end tokens.

    Ids are those of the `tokenizers` library, or of `sentencepiece` for a .model file: the reference. A faster library is
    used once it has given the same ids on a sample of the texts to encode and on text made to tell them apart; after that
    a text is compared now and then.

    Args:
        path: `tokenizer.json`, a SentencePiece `.model`, or a directory that holds either or the files of a slow tokenizer.
        eod_token: text of the end token; default what the files beside it name, else a well-known one.
        backend: "auto", or the library to encode with; one that cannot be used is then an error instead of a fall back.

    Attributes:
        path: the file that was read, or the directory where transformers had to convert it.
        vocab_size: largest token id + 1, added tokens included.
        eos_id, eos_token: the token appended to every output.
        pad_id: the padding token, or None.
        special_tokens: text -> id of every special token.

    Raises:
        DataError: nothing there, not a tokenizer, no end token, or a backend asked for by name cannot be used.
    """

    def __init__(self, path: Path | str, eod_token: str | None = None, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise DataError(f"no tokenizer backend {backend!r}; there are {', '.join(BACKENDS)}")
        self._files = find(Path(path))
        self.path = self._files.path
        self._reference = open_reference(self._files)
        self.vocab_size = self._reference.vocab_size
        self.eos_token, self.eos_id = self._find_end_token(eod_token)
        pad = self._files.configs.token("pad_token")
        self.pad_id = self._reference.pad_id if pad is None else self._reference.id_of(pad)
        self.special_tokens: dict[str, int] = {token.text: token.id for token in self._reference.added if token.special}
        self.special_tokens.setdefault(self.eos_token, self.eos_id)
        self._special_finder = TextFinder(self.special_tokens)
        self._asked = backend
        self._fast: Cutter | None = None
        self._fast_name = ""
        self._reason: str | None = None
        self._audits = self._unaudited = 0
        if backend not in ("auto", "gigatoken", "tiktoken", self._reference.name):
            raise self._refusal(f"{self._reference.name} reads this file")
        self._built = self._build(backend) if backend in ("gigatoken", "tiktoken") else None  # refused here, not at the first text

    # ---- what it is -------------------------------------------------------------------------------------------------

    def _find_end_token(self, given: str | None) -> tuple[str, int]:
        named = given if given is not None else self._files.configs.token("eos_token")
        if named is not None:
            index = self._reference.id_of(named)
            if index is None:
                source = "--eod-token" if given is not None else "the tokenizer's configuration"
                raise DataError(
                    f"{self.path}: the end token {named!r} named by {source} is not in the vocabulary of {self.vocab_size} tokens",
                    hint="Name one with --eod-token",
                )
            return named, index
        for index in (*self._files.configs.eos_ids(), self._reference.eos_id):
            token = None if index is None else self._reference.token_of(index)
            if index is not None and token is not None:
                return token, index
        for token in WELL_KNOWN_END_TOKENS:
            index = self._reference.id_of(token)
            if index is not None:
                return token, index
        added = [token.text for token in self._reference.added]
        raise DataError(
            f"{self.path}: no end token: none is configured, and the vocabulary has none of {', '.join(WELL_KNOWN_END_TOKENS)}",
            hint=f"Name one with --eod-token; added tokens here are {', '.join(added[:10]) or 'none'}",
        )

    @cached_property
    def sha256(self) -> str:
        """sha256 of the file, hex; of a converted directory, over its vocabulary files."""
        return self._files.sha256()

    def facts(self) -> dict[str, Any]:
        """What identifies the tokenizer, in plain types: sha256, vocab_size, eos_token, eos_id, pad_id."""
        return {
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "eos_token": self.eos_token,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
        }

    # ---- special tokens in texts ------------------------------------------------------------------------------------

    def special_text(self, text: str) -> re.Match[str] | None:
        """The first special token that is spelled out in `text`, or None."""
        return self._special_finder.first(text)

    def special_texts(self, texts: Sequence[str]) -> list[tuple[int, str]]:
        """Which texts spell out a special token: (index, the first token found) of each, in order.

        Meant for whole batches: texts without the characters that special tokens start with cost one `memchr` each.
        """
        return [(index, found.group()) for index, text in enumerate(texts) if (found := self._special_finder.first(text))]

    # ---- which backend ----------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """Name of the library that encodes; "auto" until the first texts are known."""
        if self._reason is None:
            return self._asked
        return self._reference.name if self._fast is None else self._fast_name

    @property
    def backend_reason(self) -> str:
        """Which library encodes, and why no faster one, in one sentence for the user."""
        return self._reason or "the tokenizer backend is chosen when the first texts are known"

    def release(self) -> None:
        """Free what the fast backend holds, when there is nothing more to encode; later texts go to the reference."""
        self._fast = self._built = None

    def choose_backend(self, texts: Sequence[str] = ()) -> str:
        """Decide which library encodes, by comparing the candidates with the reference; `encode` does it when nobody did.

        Takes about a tenth of a second: at most 200 texts and 256 KiB are compared, and some 200 adversarial ones.

        Args:
            texts: of the user, such as the first batch.

        Returns:
            `backend_reason`.

        Raises:
            DataError: the backend asked for by name gives other ids.
        """
        sample = tokenizer_parity.sample(texts)
        reasons: list[str] = []
        self._fast = None
        for name in ("gigatoken", "tiktoken") if self._asked == "auto" else (self._asked,) if self._built else ():
            candidate = self._built or self._build(name)
            problem = candidate if isinstance(candidate, str) else self._try(candidate, sample)
            if problem is None:
                reasons.insert(0, f"{name} encodes: same ids as {self._reference.name} on {len(sample)} texts and the adversarial ones")
                break
            if self._asked != "auto":
                raise self._refusal(problem)
            reasons.append(f"not {name}: {problem}")
        else:
            reasons.insert(0, f"{self._reference.name} encodes{', as asked' if self._asked == self._reference.name else ''}")
        self._reason = "; ".join(reasons)
        return self._reason

    def _try(self, candidate: FastBackend, sample: Sequence[str]) -> str | None:
        """Take the candidate when it gives the ids of the reference; else how it does not."""
        cutter = Cutter(
            [token for token in self._reference.added if token.text not in candidate.own_tokens],
            fast=candidate.encode,
            reference=self._reference.encode,
            can_cut=candidate.can_cut,
            odd=candidate.odd,
        )
        problem = tokenizer_parity.difference(cutter.encode, self._reference.encode, sample, self._reference.added)
        if problem is None:
            self._fast, self._fast_name = cutter, candidate.name
        return problem

    def _build(self, name: str) -> FastBackend | str:
        """A candidate, or why there is none."""
        try:
            return build(name, self._reference.definition() if isinstance(self._reference, HuggingFace) else self.path)
        except UnusableError as error:
            if self._asked != "auto":
                raise self._refusal(str(error)) from error
            return str(error)

    def _refusal(self, problem: str) -> DataError:
        return DataError(
            f"{self.path}: --tokenizer-backend {self._asked} cannot be used: {problem}",
            hint="Use --tokenizer-backend auto, which takes the fastest that can",
        )

    # ---- text to ids and back ---------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str], *, escape_special: bool) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts, each by itself, in parallel.

        Args:
            texts: n strings.
            escape_special: read special tokens spelled out in a text as ordinary characters instead of as the token.

        Returns:
            ids int32 [sum of lengths], back to back; lengths int32 [n].

        Raises:
            DataError: an id is outside the vocabulary, the end token survives escaping, or a fast backend turned out to
                give other ids than the reference.
        """
        if self._reason is None:
            self.choose_backend(texts)
        if self._fast is None:
            ids, lengths = self._reference.encode(texts, escape_special)
        else:
            ids, lengths = self._fast.encode(texts, escape_special)
            self._audit(texts, ids, lengths, escape_special)
        if len(ids) and int(ids.view(np.uint32).max()) >= self.vocab_size:  # a negative id is large as well
            raise DataError(f"{self.path}: token id {int(ids.max())} is not below the vocabulary size {self.vocab_size}", corrupt=True)
        if escape_special and (ids == self.eos_id).any():
            raise DataError(
                f"{self.path}: the text {self.eos_token!r} cannot be escaped: this tokenizer does not mark it as special",
                hint="Use --special-tokens-in-text error or allow, or mark the token as special in tokenizer.json",
            )
        return ids, lengths

    def _audit(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray, escape_special: bool) -> None:
        """Compare one text of moderate length with the reference now and then, which costs about a hundredth of the time."""
        self._unaudited += len(ids)
        if self._unaudited < _AUDIT_EVERY:
            return
        self._unaudited, self._audits = 0, self._audits + 1
        start = self._audits * 7919 % len(texts)
        index = next((at for at in range(start, min(start + 16, len(texts))) if 0 < len(texts[at]) <= _AUDITED_CHARACTERS), None)
        if index is None:
            return
        expected, _ = self._reference.encode([texts[index]], escape_special)
        begin = int(lengths[:index].sum(dtype=np.int64))
        if not np.array_equal(ids[begin : begin + int(lengths[index])], expected):
            raise DataError(
                f"{self.path}: {self.backend} gives other ids than {self._reference.name} for the text {texts[index][:60]!r}",
                hint=f"Start again with --tokenizer-backend {self._reference.name}",
            )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._reference.decode(ids)
