"""Fill-in-the-middle on the fly: a sample's text is cut at two characters and its parts put in another order.

In: tokens of a sample and a tokenizer. Out: the tokens of PREFIX, SUFFIX and MIDDLE with sentinels between them, a function of
(seed, epoch, sample) alone. What is cut: the last supervised sequence of a document (of a pair its outputs, the context
stays in front), or the whole document when it has no sequence modes; the end token stays at the end.
PSM: prefix-token PREFIX suffix-token SUFFIX middle-token MIDDLE. SPM: prefix-token suffix-token SUFFIX middle-token PREFIX
MIDDLE (Bavarian et al. 2022, variant 2, as StarCoder was trained).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megawrap.config import FimConfig
from megawrap.data.format import IndexedDataset
from megawrap.data.shuffle import make_key, mixed
from megawrap.errors import DataError

SENTINELS = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),  # StarCoder
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),  # SantaCoder
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Qwen
)
RESERVE = 3 + 6
"""Positions kept free behind a sample: the sentinels, and what two cuts inside tokens add. Of 6,602 samples of Python code with
a byte-level BPE of 32k tokens 0.3 % need more (1.2 % more than 8, none more than 12)."""
_PROBES = ("def F(a_1):\n\treturn  a_1 + 10\r\n", "naïve café — 中文, e\u0301 🙂\n", " leading and trailing ", "\n\n    \n")


class TextTokenizer(Protocol):
    """What is needed of `megawrap.data.tokenizer.Tokenizer`."""

    eos_id: int
    special_tokens: dict[str, int]

    def encode(self, texts: Sequence[str], *, escape_special: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids back to back, and the number of each text's."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


@dataclass(frozen=True, kw_only=True)
class Rearranged:
    """A text in its new order."""

    ids: np.ndarray
    """int64, sentinels included, without the end token."""
    middle: int
    """Where the middle begins."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The tokens of a window, and which of them are the text that can be cut."""

    tokens: np.ndarray
    """int64 [n]."""
    trained: np.ndarray
    """int8 [n]: 1 in supervised sequences."""
    begin: int
    """First token of the text; a begin token is not part of it."""
    end: int
    """The one after its last; an end token is not part of it."""

    def with_text(self, new: Rearranged, *, everything: bool, middle_only: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and supervision of the window with its text replaced.

        Args:
            new: what replaces the text.
            everything: all tokens are supervised, whatever their sequence.
            middle_only: of the text only the middle is.

        Returns:
            int64 [m] and float32 [m] of 0 and 1.
        """
        inside = np.ones(len(new.ids), dtype=np.float32)
        if middle_only:
            inside[: new.middle] = 0
        around = np.ones(len(self.trained), dtype=np.float32) if everything else self.trained.astype(np.float32)
        return (
            np.concatenate([self.tokens[: self.begin], new.ids, self.tokens[self.end :]]),
            np.concatenate([around[: self.begin], inside, around[self.end :]]),
        )


class Fim:
    """Draws samples and rearranges their texts.

    Args:
        settings: rate, share of SPM, and what is supervised.
        tokenizer: of the data and the model.
        seed: of the draws.
        name: of the tokenizer, for messages.
        vocab_size: of the model; the sentinels must be below. None checks nothing.

    Attributes:
        middle_only: of a transformed text only the middle and the end token are supervised.

    Raises:
        DataError: the tokenizer has no sentinels, or does not give back a text that was cut.
    """

    def __init__(
        self, settings: FimConfig, tokenizer: TextTokenizer, *, seed: int, name: str = "the tokenizer", vocab_size: int | None = None
    ) -> None:
        self.settings = settings
        self.middle_only = settings.loss == "middle"
        self._tokenizer, self._seed = tokenizer, seed
        self.prefix_id, self.middle_id, self.suffix_id = _sentinels(tokenizer, name, vocab_size)
        self._special = np.unique([*tokenizer.special_tokens.values(), tokenizer.eos_id, self.prefix_id, self.middle_id, self.suffix_id])
        _require_exact(tokenizer, name)

    def with_rate(self, rate: float) -> Fim:
        """The same with another share of samples."""
        other = copy(self)
        other.settings = replace(self.settings, rate=rate)
        return other

    def drawn(self, fingerprint: str, epoch: int, documents: np.ndarray) -> list[int]:
        """Which of the documents are to be transformed in this epoch, by their place in `documents`."""
        return np.flatnonzero(_draws(self._seed, fingerprint, epoch, documents)[:, 0] < self.settings.rate).tolist()

    def text_of(self, dataset: IndexedDataset, tokens: np.ndarray, document: int, begin: int) -> Sample | None:
        """The window of a document whose text is to be cut; None when the text is not whole inside it.

        Args:
            dataset: where the document is.
            tokens: integer [n], the window.
            document: its number.
            begin: offset in .bin of the window's first token.
        """
        first, last = (int(bound) for bound in dataset.document_indices[document : document + 2])
        starts = dataset.pointers[first:last] // dataset.dtype.itemsize - begin
        ends = starts + dataset.lengths[first:last]
        if dataset.modes is None:
            modes, text = np.ones(last - first, dtype=np.int8), (int(starts[0]), int(ends[-1]))
        else:
            modes = dataset.modes[first:last]
            held = np.flatnonzero((modes == 1) & (ends > starts))
            if not len(held):
                return None
            text = (int(starts[held[-1]]), int(ends[held[-1]]))
        if text[0] < 0 or text[1] > len(tokens):
            return None
        trained = np.repeat(modes, np.clip(ends, 0, len(tokens)) - np.clip(starts, 0, len(tokens)))
        begin, end = text
        if begin < end and tokens[end - 1] == self._tokenizer.eos_id:
            end -= 1
        if begin < end and tokens[begin] in self._special:
            begin += 1
        return Sample(tokens=tokens.astype(np.int64), trained=trained, begin=begin, end=end)

    def rearrange(self, samples: Sequence[Sample | None], documents: np.ndarray, fingerprint: str, epoch: int) -> list[Rearranged | None]:
        """The texts of samples in their new order; None where there is no text, or one that cannot be cut without a change.

        Those are texts with special tokens inside, and bytes that are no text (which would come back as U+FFFD).

        Args:
            samples: windows from `text_of`.
            documents: integer [samples], their numbers.
            fingerprint: of the dataset.
            epoch: of the rows.
        """
        whole = [self._whole_text(sample) for sample in samples]
        draws = _draws(self._seed, fingerprint, epoch, documents).tolist()
        cuts = [_cut(text, one, two) for text, (_, _, one, two) in zip(whole, draws, strict=True)]
        ids, lengths = self._tokenizer.encode([part for cut in cuts for part in cut], escape_special=True)
        parts = np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])
        made: list[Rearranged | None] = []
        for number, (text, (_, order, _, _)) in enumerate(zip(whole, draws, strict=True)):
            prefix, middle, suffix = parts[3 * number : 3 * number + 3]
            if not text or self._tokenizer.decode(np.concatenate([prefix, middle, suffix]).tolist()) != text:
                made.append(None)
                continue
            made.append(self._ordered(prefix, middle, suffix, order < self.settings.spm_rate))
        return made

    def _ordered(self, prefix: np.ndarray, middle: np.ndarray, suffix: np.ndarray, spm: bool) -> Rearranged:
        first, second, third = np.array([[self.prefix_id], [self.suffix_id], [self.middle_id]])
        order = [first, second, suffix, third, prefix, middle] if spm else [first, prefix, second, suffix, third, middle]
        ids = np.concatenate(order)
        return Rearranged(ids=ids, middle=len(ids) - len(middle))

    def _whole_text(self, sample: Sample | None) -> str:
        """The text of a sample; empty when it cannot be cut."""
        if sample is None or sample.begin == sample.end:
            return ""
        ids = sample.tokens[sample.begin : sample.end]
        if np.isin(ids, self._special).any():
            return ""
        text = self._tokenizer.decode(ids.tolist())
        if "\ufffd" in text and not np.array_equal(self._tokenizer.encode([text], escape_special=True)[0], ids):
            return ""
        return text


def _draws(seed: int, fingerprint: str, epoch: int, documents: np.ndarray) -> np.ndarray:
    """Four numbers in [0, 1) of each sample in an epoch: transform, order, and both cuts; float64 [k, 4]."""
    counters = documents.astype(np.uint64)[:, None] * np.uint64(4) + np.arange(1, 5, dtype=np.uint64)
    return (mixed(make_key("fim", seed, fingerprint, epoch), counters) >> np.uint64(11)) * 2.0**-53


def _cut(text: str, one: float, two: float) -> tuple[str, str, str]:
    """Prefix, middle and suffix between two cuts drawn from 0..len(text), both included."""
    first, last = sorted((int(one * (len(text) + 1)), int(two * (len(text) + 1))))
    return text[:first], text[first:last], text[last:]


def _sentinels(tokenizer: TextTokenizer, name: str, vocab_size: int | None) -> tuple[int, int, int]:
    """Ids of the prefix, middle and suffix tokens.

    Raises:
        DataError: none of the known triples is in the vocabulary, or the model has no row for one.
    """
    for triple in SENTINELS:
        ids, lengths = tokenizer.encode(triple, escape_special=False)
        if lengths.tolist() == [1, 1, 1]:
            if vocab_size is not None and int(ids.max()) >= vocab_size:
                raise DataError(
                    f"{name} has {triple[0]} and its companions at ids up to {ids.max()}, the model knows 0 to {vocab_size - 1}",
                    hint="Use the model's own tokenizer, or set data.fim.rate to 0",
                )
            prefix, middle, suffix = ids.tolist()
            return prefix, middle, suffix
    looked = "; ".join(" ".join(triple) for triple in SENTINELS)
    raise DataError(
        f"data.fim.rate is above 0, but {name} has no fill-in-the-middle tokens; looked for {looked}",
        hint="Set data.fim.rate to 0, or use a tokenizer that has them",
    )


def _require_exact(tokenizer: TextTokenizer, name: str) -> None:
    """Refuse a tokenizer whose parts of a text do not join to the text: one that adds or strips spaces, or folds case.

    Raises:
        DataError: naming the text.
    """
    for text in _PROBES:
        for at in range(0, len(text) + 1, 3):
            ids, _ = tokenizer.encode([text[:at], text[at:]], escape_special=True)
            if (found := tokenizer.decode(ids.tolist())) != text:
                raise DataError(
                    f"data.fim.rate is above 0, but {name} does not give back a text that is cut in two:"
                    f" {text!r} cut at {at} became {found!r}",
                    hint="Fill-in-the-middle needs a byte-level tokenizer; set data.fim.rate to 0",
                )
