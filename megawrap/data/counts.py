"""What became of the lines read: counts that add up, and the list of the bad lines.

In: one verdict a line. Out: `Counts` for the manifest, and `BadLines`, which refuses the first bad line or notes each of
them up to a cap, in a side file of JSON objects.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, Literal, Protocol

import orjson

from megawrap.data.jsonl import LineError
from megawrap.errors import DataError

OnBadLine = Literal["refuse", "skip"]
_COPY_BYTES = 1 << 20


class Place(Protocol):
    """Where lines come from; `Source` is one."""

    name: str
    first: int

    def line_number(self, line: int) -> int:
        """Number in the file of a line counted from where reading started."""


@dataclass
class Counts:
    """What became of the lines read: lines = samples + blank + empty + bad + duplicates + too_long, always."""

    lines: int = 0
    samples: int = 0
    blank: int = 0
    empty: int = 0
    """Nothing to train on: the trained fields are empty, or give no token."""
    bad: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    too_long: int = 0
    control_characters: int = 0
    """Samples (already counted) whose text holds control characters."""
    special_texts: int = 0
    """Samples (already counted) with a special token spelled out in a text."""

    @property
    def accounted(self) -> int:
        """Lines whose fate is known; equal to `lines` between batches."""
        return self.samples + self.blank + self.empty + sum(self.bad.values()) + self.duplicates + self.too_long

    def add(self, other: Counts) -> None:
        """Count what another reader counted, too."""
        for name in ("lines", "samples", "blank", "empty", "duplicates", "too_long", "control_characters", "special_texts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad.update(other.bad)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a manifest."""
        return {
            "lines": self.lines,
            "samples": self.samples,
            "blank": self.blank,
            "empty_outputs": self.empty,
            "bad": dict(sorted(self.bad.items())),
            "duplicates": self.duplicates,
            "too_long": self.too_long,
            "samples_with_control_characters": self.control_characters,
            "samples_with_special_text": self.special_texts,
        }

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Counts:
        """The inverse of `to_dict`."""
        return cls(
            lines=given["lines"],
            samples=given["samples"],
            blank=given["blank"],
            empty=given["empty_outputs"],
            bad=Counter(given["bad"]),
            duplicates=given["duplicates"],
            too_long=given["too_long"],
            control_characters=given["samples_with_control_characters"],
            special_texts=given["samples_with_special_text"],
        )

    def sentence(self) -> str:
        """`9 lines = 5 samples + 1 blank + ...`, with the kinds that every run has and those that occurred."""
        bad = sum(self.bad.values())
        reasons = f" ({', '.join(f'{reason} {number}' for reason, number in sorted(self.bad.items()))})" if bad else ""
        parts = f"{self.samples:,} samples + {self.blank:,} blank + {self.empty:,} with empty outputs + {bad:,} bad{reasons}"
        for number, name in ((self.duplicates, "duplicates"), (self.too_long, "too long")):
            parts += f" + {number:,} {name}" if number else ""
        return f"{self.lines:,} lines = {parts}"


class BadLines:
    """What happens to bad lines: the first is refused, or each is skipped, counted and noted up to a cap.

    Args:
        policy: `refuse` or `skip`.
        max_bad: skip: more bad lines than this are refused.
    """

    def __init__(self, policy: OnBadLine = "refuse", max_bad: int = 1000) -> None:
        self.policy, self.max_bad, self.total = policy, max_bad, 0
        self._notes: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the run, has no name

    def add(self, source: Place, line: int, position: int, problem: LineError, counts: Counts) -> None:
        """Count and note a bad line, or raise.

        Args:
            source: what is read.
            line: counted from where reading of it started, 1-based.
            position: byte offset of the line from where reading started.
            problem: what is wrong.
            counts: where it is counted.

        Raises:
            DataError: policy `refuse`, or the cap is exceeded.
        """
        byte = None if problem.byte is None else source.first + position + problem.byte
        message = problem.message if byte is None else f"{problem.message} (byte {byte} of the file)"
        if self.policy == "refuse":
            place = _place(source, line, problem.column)
            hint = "Correct the line, or pass --on-bad-line skip to leave such lines out and count them"
            raise DataError(f"{place}: {message}", hint=hint)
        self.total += 1
        counts.bad[problem.reason] += 1
        if self.total > self.max_bad:
            raise too_many(self, counts, f"{_place(source, line, problem.column)}: {message}; this is")
        note = {
            "file": source.name, "line": line, "column": problem.column, "byte": byte, "reason": problem.reason, "message": problem.message,
        }  # fmt: skip
        self._notes.write(orjson.dumps(note) + b"\n")

    def copy_to(self, stream: BinaryIO) -> None:
        """Write the notes, a JSON object a line; line numbers count from where reading of the file started."""
        self._notes.seek(0)
        while block := self._notes.read(_COPY_BYTES):
            stream.write(block)


def too_many(bad_lines: BadLines, counts: Counts, prefix: str) -> DataError:
    """The error for more bad lines than allowed."""
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(counts.bad.items()))
    return DataError(
        f"{prefix} bad line {bad_lines.total}, --max-bad allows {bad_lines.max_bad} ({reasons})",
        hint="Look at the data, or raise --max-bad",
    )


def _place(source: Place, line: int, column: int | None) -> str:
    return f"{source.name}:{source.line_number(line)}" + (f":{column}" if column is not None else "")
