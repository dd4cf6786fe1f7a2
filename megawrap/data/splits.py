"""Weighted split strings: which documents of which datasets train, validate and test a model.

In: a file or strings of `NAME: WEIGHT START:END PREFIX, WEIGHT START:END PREFIX`, one group a line, or the BigCode form
(one line of groups in double quotes, separated by `" "`). Out: `Splits`, with one train group and any number of valid
and test groups, each of which is evaluated and logged under its own name. Every problem of the text is reported at once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from megawrap.errors import DataError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_GROUP_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_LOOKS_LIKE_GROUP = re.compile(r"\s*\"?[^:/\\\s]+:\s")
_ESCAPES = {"n": "\n", "\\": "\\", '"': '"', "'": "'"}
_OTHER_WORDS = {"val": "valid", "dev": "valid", "eval": "valid", "evaluation": "valid", "holdout": "test"}
_FORM = "NAME: WEIGHT START:END PREFIX, WEIGHT START:END PREFIX"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A range of documents of one dataset.

    Attributes:
        weight: as written; only the ratio to the group's others counts.
        start: fraction of the documents, included.
        end: fraction of the documents, excluded.
        prefix: path of the dataset without .bin/.idx, relative ones resolved.
        where: `file:line` (or `splits[i]`) for messages.
    """

    weight: float
    start: float
    end: float
    prefix: Path
    where: str

    def documents(self, num_documents: int) -> tuple[int, int]:
        """First document and the one after the last: round(fraction x documents), so that adjoining ranges meet exactly."""
        return round(self.start * num_documents), round(self.end * num_documents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A named group of sources: `train`, or one that is evaluated under its own name."""

    name: str
    sources: tuple[Source, ...]
    where: str

    @property
    def is_valid(self) -> bool:
        """Evaluated while training; test groups are kept for the end."""
        return self.name.lower().startswith("valid")


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """All groups of a run.

    Attributes:
        train: the one group that is trained on.
        evaluation: valid and test groups in the order they were written.
    """

    train: Group
    evaluation: tuple[Group, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """Train, then the others."""
        return (self.train, *self.evaluation)


def parse(splits: str | Path | Sequence[str], *, base_dir: Path | None = None) -> Splits:
    """Read weighted split strings.

    Names are `train`, `valid...` and `test...` (capitals allowed, as in `VALID_EN`). A prefix may be quoted with " or ',
    and then hold spaces, commas, colons and the escapes \\\\ \\" \\' \\n; inside a group that is itself in double quotes
    write ' or \\". A # at the start of a line or after a space begins a comment.

    The BigCode fork has a file for each of training, validation and test, in which names are free: `train=FILE`, `valid=FILE`
    and `test=FILE` in a list say which is which; groups of a valid file become `valid_NAME`.

    Args:
        splits: a file, one or several lines of text, or a list of such strings and files.
        base_dir: what relative prefixes (and a relative file) start from; default the splits file's directory for a
            file, the working directory for strings.

    Raises:
        DataError: anything is wrong; the message names every problem with file and line.
    """
    reader, work_dir = _Reader(), base_dir or Path()
    several = not isinstance(splits, str | Path)
    texts: list[str | Path] = [splits] if isinstance(splits, str | Path) else list(splits)
    for number, text in enumerate(texts):
        role, file = _role(text, work_dir) if several else ("", Path(str(text)))
        path = work_dir / file.expanduser()
        if not role and (_is_text(text) or (several and not path.is_file())):
            name = f"splits[{number}]" if several else "splits"
            reader.read_text(str(text), name, work_dir, numbered="\n" in str(text))
        else:
            reader.read_text(_read_file(path), str(file), path.parent, numbered=True, role=role)
    groups = [group for group in (reader.group(*found) for found in reader.found) if group]
    reader.check_groups(groups)
    if reader.problems:
        raise _refusal(reader.problems)
    train = next(group for group in groups if group.name == "train")
    return Splits(train=train, evaluation=tuple(group for group in groups if group is not train))


def _role(text: str | Path, work_dir: Path) -> tuple[str, Path]:
    """(train, valid or test, FILE) of `ROLE=FILE`, else an empty role and the text as a path."""
    role, _, file = str(text).partition("=")
    if role in ("train", "valid", "test") and file and not (work_dir / str(text)).is_file():
        return role, Path(file)
    return "", Path(str(text))


def _is_text(splits: str | Path) -> bool:
    return isinstance(splits, str) and ("\n" in splits or (_LOOKS_LIKE_GROUP.match(splits) is not None and not os.path.exists(splits)))


def _read_file(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise DataError(
            f"cannot read the splits file {path}: {problem.strerror}", hint=f"Name a file, or write the groups: {_FORM}"
        ) from problem
    except UnicodeDecodeError as problem:
        raise DataError(f"the splits file {path} is not UTF-8 at byte {problem.start}") from problem


def _refusal(problems: list[str]) -> DataError:
    form = f"A group is {_FORM}, for example `train: 1.0 0:0.95 data/code`"
    if len(problems) == 1:
        return DataError(problems[0], hint=form)
    return DataError(f"{len(problems)} problems in the split strings:\n  " + "\n  ".join(problems), hint=form)


class _Reader:
    """Collects groups and problems from texts."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.found: list[tuple[str, str, Path, str]] = []  # text of a group, where it stands, base of its relative prefixes, role

    def read_text(self, text: str, name: str, base_dir: Path, *, numbered: bool, role: str = "") -> None:
        for number, line in enumerate(text.splitlines() or [""], start=1):
            where = f"{name}:{number}" if numbered else name
            stripped = line.strip()
            if stripped.startswith('"'):
                self._quoted_groups(stripped, where, base_dir, role)
            elif stripped and not stripped.startswith("#"):
                self.found.append((stripped, where, base_dir, role))

    def _quoted_groups(self, line: str, where: str, base_dir: Path, role: str) -> None:
        position = 0
        while position < len(line) and line[position] != "#":
            if line[position] != '"':
                self.problems.append(f'{where}: {line[position:]!r} stands outside the quotes; groups are separated by `" "`')
                return
            match = re.compile(r'"((?:\\.|[^"\\])*)"\s*').match(line, position)
            if match is None:
                self.problems.append(f"{where}: missing quote: the group that begins {line[position : position + 30]!r} is not closed")
                return
            self.found.append((match[1].replace('\\"', '"'), where, base_dir, role))
            position = match.end()

    def group(self, text: str, where: str, base_dir: Path, role: str) -> Group | None:
        """The group written in `text`; None after a problem that leaves nothing to check."""
        name, colon, body = text.partition(":")
        name = name.strip()
        if not colon or not name:
            self.problems.append(f"{where}: {text!r} has no group name; the name ends at the first colon")
            return None
        if role and not name.lower().startswith(role):
            name = role if role == "train" else f"{role}_{name}"
        name = self._group_name("train" if role == "train" else name, where)
        entries = self._entries(body, f"{where}: group {name}")
        sources = []
        for number, words in enumerate(entries, start=1):
            source = self._source(words, f"{where}: group {name}, entry {number} ({' '.join(words)})", where, base_dir)
            if source is not None:
                sources.append(source)
        return Group(name=name, sources=tuple(sources), where=where)

    def _group_name(self, name: str, where: str) -> str:
        lower = name.lower()
        if lower == "train":
            return "train"
        if _GROUP_NAME.fullmatch(name) is None:
            self.problems.append(f"{where}: group name {name!r} is not made of letters, digits, _ . - and so cannot name a metric")
        elif not lower.startswith(("valid", "test")):
            head, _, tail = lower.partition("_")
            near = _OTHER_WORDS.get(head) or next(iter(difflib.get_close_matches(head, ["train", "valid", "test"], n=1)), None)
            if head == "train":
                better = "there is one train group, named train; list its sources with commas"
            elif near:
                better = f"did you mean {near + ('_' + tail if tail and near != 'train' else '')}?"
            else:
                better = f"write valid_{name} or test_{name}"
            self.problems.append(f"{where}: group name {name!r} is neither train nor begins with valid or test; {better}")
        return name

    def _entries(self, body: str, where: str) -> list[list[str]]:
        """Words of each entry; commas outside quotes separate entries."""
        entries: list[list[str]] = [[]]
        position = 0
        while position < len(body):
            char = body[position]
            if char.isspace():
                position += 1
            elif char == ",":
                entries.append([])
                position += 1
            elif char == "#" and body[position - 1].isspace():
                break
            elif char in "\"'":
                word, position = self._quoted(body, position, where)
                if position < 0:
                    return entries[:-1]
                entries[-1].append(word)
            else:
                match = re.compile(r"[^\s,]+").match(body, position)
                assert match is not None
                entries[-1].append(match[0])
                position = match.end()
        if any(not words for words in entries):
            self.problems.append(f"{where}: an entry is empty" if len(entries) > 1 else f"{where}: no dataset is given")
        return [words for words in entries if words]

    def _quoted(self, body: str, start: int, where: str) -> tuple[str, int]:
        """The text of a quoted word and the position after it; position -1 after a problem."""
        quote, word, position = body[start], "", start + 1
        while position < len(body) and body[position] != quote:
            if body[position] == "\\" and body[position + 1 : position + 2] in _ESCAPES:
                position += 1
                word += _ESCAPES[body[position]]
            else:
                word += body[position]
            position += 1
        after = body[position + 1 : position + 2]
        if position >= len(body):
            self.problems.append(f"{where}: missing quote: {body[start:]!r} is not closed")
        elif after and not after.isspace() and after != ",":
            self.problems.append(f"{where}: {body[position + 1 :]!r} follows a closing quote; a comma or a space belongs there")
        else:
            return word, position + 1
        return "", -1

    def _source(self, words: list[str], entry: str, where: str, base_dir: Path) -> Source | None:
        before = len(self.problems)
        weight = self._number(words[0], "WEIGHT", entry)
        if weight is not None and weight <= 0:
            self.problems.append(f"{entry}: WEIGHT is {words[0]}; it must be above 0, leave the entry out to not use it")
        start, end = self._range(words[1], entry) if len(words) > 1 else (None, None)
        if len(words) != 3:
            why = "a comma is missing between entries?" if len(words) in (6, 9, 12) else "quote a prefix that holds spaces or commas"
            self.problems.append(f"{entry}: {len(words)} words instead of WEIGHT START:END PREFIX; {why}")
            return None
        if not words[2].strip() or "\0" in words[2]:
            self.problems.append(f"{entry}: PREFIX {words[2]!r} is not a path")
        if len(self.problems) > before:
            return None
        assert weight is not None and start is not None and end is not None
        return Source(weight=weight, start=start, end=end, prefix=base_dir / Path(words[2]).expanduser(), where=where)

    def _range(self, text: str, entry: str) -> tuple[float | None, float | None]:
        bounds = text.split(":")
        if len(bounds) != 2:
            self.problems.append(f"{entry}: {text!r} is not START:END, two fractions of the documents such as 0:0.95")
            return None, None
        start, end = (self._number(bound, name, entry) for bound, name in zip(bounds, ("START", "END"), strict=True))
        for value, bound, name in zip((start, end), bounds, ("START", "END"), strict=True):
            if value is not None and not 0 <= value <= 1:
                self.problems.append(f"{entry}: {name} is {bound}; it must be a fraction from 0 to 1")
        if start is not None and end is not None and start >= end:
            self.problems.append(f"{entry}: START {bounds[0]} is not below END {bounds[1]}")
        return start, end

    def _number(self, text: str, name: str, entry: str) -> float | None:
        if _NUMBER.fullmatch(text):
            value = float(text)
            if value < float("inf"):
                return value
            self.problems.append(f"{entry}: {name} is {text}, too large for a number")
        elif text.endswith("%") and _NUMBER.fullmatch(text[:-1]):
            self.problems.append(f"{entry}: {name} is {text}; write the fraction {float(text[:-1]) / 100:g}")
        else:
            self.problems.append(f"{entry}: {name} is {text!r}; it must be a finite number")
        return None

    def check_groups(self, groups: list[Group]) -> None:
        """Names once, one train group, no prefix twice in a group, no document in two groups."""
        by_name: dict[str, Group] = {}
        for group in groups:
            first = by_name.setdefault(group.name.lower(), group)
            if first is not group:
                self.problems.append(f"{group.where}: group {group.name} is already given at {first.where}")
        if "train" not in by_name and not any("train?" in problem for problem in self.problems):
            names = ", ".join(group.name for group in groups) or "none at all"
            self.problems.append(f"there is no train group; groups given: {names}")
        for group in groups:
            seen: dict[str, Source] = {}
            for source in group.sources:
                if seen.setdefault(os.path.realpath(source.prefix), source) is not source:
                    self.problems.append(
                        f"{source.where}: group {group.name} names {source.prefix} twice; give it one entry and one weight"
                    )
        for one, other in combinations(groups, 2):
            for a in one.sources:
                for b in other.sources:
                    if os.path.realpath(a.prefix) == os.path.realpath(b.prefix) and a.start < b.end and b.start < a.end:
                        self.problems.append(
                            f"{b.where}: {other.name} {b.start:g}:{b.end:g} overlaps {one.name} {a.start:g}:{a.end:g} ({a.where})"
                            f" of the same dataset {b.prefix}; documents {max(a.start, b.start):g}:{min(a.end, b.end):g} would be in both"
                        )
