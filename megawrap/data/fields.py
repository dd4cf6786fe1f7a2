"""From the object of a line to the texts of a sample: which keys are read, one text a sequence, and which are trained.

In: parsed objects and `--fields`. Out: `Batch`es, flat lists of texts with their loss flags. `FieldTexts` reads a fixed
set of keys, `SpanTexts` a list of strings; `messages` are read by `megawrap.data.chat`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np

from megawrap.data.jsonl import KIND, LineError, count_quotes
from megawrap.errors import DataError

# Names that stand for a set of keys; any other words are keys themselves.
PRESETS = {
    "inputs/outputs": ("inputs", "outputs"),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "input", "output"),
}
MESSAGES, SPANS = "messages", "spans"


class Sequences(NamedTuple):
    """The sequences of one sample."""

    texts: tuple[str, ...]
    trained: tuple[bool, ...]
    """[texts]; texts that make up one sequence agree."""
    markup: tuple[bool, ...] | None = None
    """[texts]: special tokens in it are tokens whatever the policy; None: in none."""
    starts: tuple[bool, ...] | None = None
    """[texts]: begins a sequence, where False continues the one before; None: all begin one."""
    special: bool = False
    """A special token is spelled out where a user wrote."""


@dataclass
class Batch:
    """Samples of one file in order; texts are flat, sample by sample."""

    source: Any
    """The `Source` they were read from."""
    texts: list[str] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[samples] texts of each."""
    trained: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """[texts]"""
    lines: Sequence[int] = ()
    """[samples] line numbers, counted from where reading of the file started."""
    markup: np.ndarray | None = None
    starts: np.ndarray | None = None
    special: np.ndarray | None = None
    """[samples]: spells out a special token; None: in none."""
    controls: np.ndarray | None = None
    """[samples]: holds a control character; None: in none."""
    digests: np.ndarray | None = None
    """uint64 [samples, 2], for deduplication."""

    @classmethod
    def of(cls, samples: Sequence[Sequences], lines: Sequence[int], has_control: Callable[[str], bool]) -> Batch:
        """A batch of samples that were read one by one."""
        batch = cls(None, [text for sample in samples for text in sample.texts], lines=lines)
        batch.counts = np.array([len(sample.texts) for sample in samples], dtype=np.int64)
        batch.trained = np.array([flag for sample in samples for flag in sample.trained], dtype=bool)
        controls = np.array([any(map(has_control, sample.texts)) for sample in samples], dtype=bool)
        special = np.array([sample.special for sample in samples], dtype=bool)
        batch.controls, batch.special = controls if controls.any() else None, special if special.any() else None
        for name, default in (("markup", False), ("starts", True)):
            flags = [getattr(sample, name) or (default,) * len(sample.texts) for sample in samples]
            array = np.array([flag for some in flags for flag in some], dtype=bool)
            setattr(batch, name, None if (array == default).all() else array)
        return batch

    @classmethod
    def join(cls, parts: Sequence[Batch]) -> Batch:
        """One batch of several that follow each other in a file."""
        if len(parts) <= 1:
            return parts[0] if parts else cls(None)
        whole = cls(parts[0].source, [text for part in parts for text in part.texts], lines=[line for part in parts for line in part.lines])
        whole.counts = np.concatenate([part.counts for part in parts])
        whole.trained = np.concatenate([part.trained for part in parts])
        for name, default, of in (
            ("markup", False, "texts"),
            ("starts", True, "texts"),
            ("special", False, "lines"),
            ("controls", False, "lines"),
        ):
            arrays = [getattr(part, name) for part in parts]
            if any(array is not None for array in arrays):
                sizes = [len(getattr(part, of)) for part in parts]
                filled = [np.full(size, default) if array is None else array for array, size in zip(arrays, sizes, strict=True)]
                setattr(whole, name, np.concatenate(filled))
        return whole

    def select(self, keep: np.ndarray) -> None:
        """Leave out the samples where `keep` (bool [samples]) is False."""
        by_text = np.repeat(keep, self.counts)
        self.texts = [text for text, kept in zip(self.texts, by_text.tolist(), strict=True) if kept]
        self.lines = [line for line, kept in zip(self.lines, keep.tolist(), strict=True) if kept]
        self.counts = self.counts[keep]
        for name, mask in (
            ("trained", by_text),
            ("markup", by_text),
            ("starts", by_text),
            ("special", keep),
            ("controls", keep),
            ("digests", keep),
        ):
            array = getattr(self, name)
            if array is not None:
                setattr(self, name, array[mask])


class Extractor(Protocol):
    """How the texts of a sample are read from its object."""

    fields: tuple[str, ...]
    """Keys read."""
    width: int | None
    """Texts of every sample, where that is fixed and all texts are sequences of their own."""
    trained: tuple[bool, ...]
    """[width], where that is fixed."""

    def pick(self, value: dict[str, Any]) -> Sequences:
        """The texts of one object.

        Raises:
            LineError: a key is missing or its value is not what it must be.
        """


class FieldTexts:
    """A string under each of a fixed set of keys, one sequence each.

    Args:
        fields: keys in order.
        trained: loss flag of each; default: only the last is trained.

    Raises:
        DataError: the flags do not fit the fields, or train nothing.
    """

    def __init__(self, fields: Sequence[str], trained: Sequence[bool] | None = None) -> None:
        self.fields = tuple(fields)
        self.width: int | None = len(self.fields)
        self.trained = tuple(trained) if trained is not None else (*(False,) * (len(self.fields) - 1), True)
        self._key_quotes = sum(2 + key.count('"') for key in self.fields)

    def pick(self, value: dict[str, Any]) -> Sequences:
        """The strings under the fields."""
        for name in self.fields:
            require_key(value, name)
        texts = tuple(value[name] for name in self.fields)
        for name, text in zip(self.fields, texts, strict=True):
            if not isinstance(text, str):
                raise LineError("wrong-type", f"{name!r} is {KIND[type(text)]}, it must be a string")
        return Sequences(texts, self.trained)

    def columns(self, values: Sequence[Any]) -> list[str] | None:
        """Texts of many objects, flat; None when one of them is not as it must be."""
        fields = self.fields
        try:
            if len(fields) == 2:
                one, two = fields
                texts = [text for value in values for text in (value[one], value[two])]
            else:
                texts = [value[name] for value in values for name in fields]
        except (KeyError, TypeError, IndexError):
            return None
        return texts if set(map(type, texts)) <= {str} and set(map(type, values)) <= {dict} else None

    def other_quotes(self, values: Sequence[dict[str, Any]]) -> int:
        """Quotes that JSON texts of the objects have outside the strings of the fields; takes the fields out of them."""
        width = len(self.fields)
        quotes = len(values) * (self._key_quotes + 2 * width)
        if sum(map(len, values)) == len(values) * width:
            return quotes
        for name in self.fields:
            for value in values:
                del value[name]
        for key, number in Counter(chain.from_iterable(values)).items():
            quotes += number * (2 + key.count('"'))
        others = list(chain.from_iterable(map(dict.values, values)))
        if set(map(type, others)) <= {str}:
            return quotes + 2 * len(others) + "".join(others).count('"')
        return quotes + sum(map(count_quotes, others))


class SpanTexts:
    """A list of strings under the key `spans`, one sequence each; a list under `loss` says which are trained, default all."""

    fields: tuple[str, ...] = (SPANS,)
    width: int | None = None
    trained: tuple[bool, ...] = ()

    def pick(self, value: dict[str, Any]) -> Sequences:
        """The strings and their flags."""
        require_key(value, SPANS)
        spans, flags = value[SPANS], value.get("loss")
        if not isinstance(spans, list) or not spans or not all(isinstance(span, str) for span in spans):
            found = "an empty list" if spans == [] else KIND[type(spans)] if not isinstance(spans, list) else "a list of other things"
            raise LineError("wrong-type", f"{SPANS!r} is {found}, it must be a list of strings")
        if flags is None:
            return Sequences(tuple(spans), (True,) * len(spans))
        if not isinstance(flags, list) or len(flags) != len(spans) or not all(flag in (0, 1) for flag in flags):
            raise LineError("wrong-type", f"'loss' is {flags!r:.80}, it must hold a 0 or 1 for each of the {len(spans)} spans")
        return Sequences(tuple(spans), tuple(map(bool, flags)))


def require_key(value: dict[str, Any], name: str) -> None:
    """Refuse an object without a key, with the keys it has and the nearest."""
    if name not in value:
        seen = [repr(key) for key in list(value)[:10]]
        near = difflib.get_close_matches(name, list(value)[:1000], n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        raise LineError("missing-key", f"no key {name!r}, the keys are {', '.join(seen) or 'none'}{suggestion}")


def resolve(words: Sequence[str]) -> tuple[str, ...]:
    """Keys that `--fields` names: a preset, or the words themselves."""
    return PRESETS.get(words[0], tuple(words)) if len(words) == 1 else tuple(words)


def problems(words: Sequence[str], loss: Sequence[int] | None) -> list[str]:
    """What is wrong with --fields and --loss, a sentence each."""
    fields, found = resolve(words), []
    if len(set(fields)) != len(fields):
        found.append(f"--fields {' '.join(fields)}: a key is there twice")
    special = [name for name in fields if name in (MESSAGES, SPANS)]
    if special and len(fields) > 1:
        found.append(f"--fields {' '.join(fields)}: {special[0]} is a whole sample and stands alone")
    if loss is not None:
        if special:
            found.append(f"--loss is for plain fields; with {special[0]} the data say what is trained")
        elif len(loss) != len(fields) or any(flag not in (0, 1) for flag in loss) or not any(loss):
            given = " ".join(map(str, loss))
            found.append(f"--loss {given}: give a 0 or 1 for each of the {len(fields)} --fields, at least one of them 1")
    return found


def extractor(words: Sequence[str], loss: Sequence[int] | None = None) -> FieldTexts | SpanTexts:
    """What reads the fields; `messages` need a tokenizer and are made by `megawrap.data.chat`.

    Raises:
        DataError: the fields or flags are not possible.
    """
    wrong = problems(words, loss)
    if wrong:
        raise DataError("; ".join(wrong))
    fields = resolve(words)
    if fields == (SPANS,):
        return SpanTexts()
    return FieldTexts(fields, None if loss is None else tuple(map(bool, loss)))
