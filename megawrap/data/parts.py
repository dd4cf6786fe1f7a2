"""Large inputs in parts: what each part reads, where finished parts wait, and how they become one dataset.

In: input files and everything that decides the output. Out: PREFIX.parts/ with a plan, a dataset and a marker per
finished part, so that a rerun continues, and a plan that no longer fits input, tokenizer or options is refused with the
difference. The plan does not depend on the number of workers, and the merged dataset does not depend on the plan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megawrap.data.format import manifest_path
from megawrap.data.inputs import STDIN, Piece, Source, is_plain, is_table
from megawrap.data.twins import twin_prefixes
from megawrap.errors import DataError
from megawrap.io import atomic_write, read_json

PLAN_VERSION = 1
_UNFOLDED = 4  # bytes of text per byte of a compressed file or a table, to balance parts


@dataclass(frozen=True)
class Plan:
    """How one run is divided.

    Args:
        prefix: of the output.
        parts: pieces of every part, in input order.
        twin_files: name of the second of twin files, or None.
        identity: options, tokenizer and input files: what must not change while parts wait.
    """

    prefix: Path
    parts: tuple[tuple[Piece, ...], ...]
    twin_files: str | None
    identity: dict[str, Any]

    @property
    def folder(self) -> Path:
        """PREFIX.parts"""
        return self.prefix.with_name(self.prefix.name + ".parts")

    @property
    def path(self) -> Path:
        """The plan's own file."""
        return self.folder / "plan.json"

    def part_prefix(self, number: int) -> Path:
        """Prefix of the dataset of a part."""
        return self.folder / f"part-{number:05d}"

    def marker(self, number: int) -> Path:
        """The file that says a part is finished, and what was counted in it."""
        return self.folder / f"part-{number:05d}.json"

    def finished(self) -> list[int]:
        """Parts whose marker is there."""
        return [number for number in range(len(self.parts)) if self.marker(number).exists()]

    def published(self) -> bool:
        """Whether the whole output is there."""
        prefixes = twin_prefixes(self.prefix, self.twin_files) if self.twin_files else (self.prefix,)
        return all(manifest_path(prefix).exists() for prefix in prefixes)

    def content(self) -> dict[str, Any]:
        """Plain types, for the plan's file."""
        return {"version": PLAN_VERSION, **self.identity, "parts": [[list(piece) for piece in pieces] for pieces in self.parts]}

    def settle(self) -> None:
        """Write the plan, or make sure that the one that is there is the same.

        Raises:
            DataError: it differs: every difference is named, up to ten.
        """
        if not self.path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, json.dumps(self.content(), indent=1).encode() + b"\n")
            return
        there = read_json(self.path, error=DataError)
        here = json.loads(json.dumps(self.content()))
        for side in (there, here):  # follows from the files unless nothing else differs
            side["parts"] = {"number": len(side["parts"]), "pieces": side["parts"]}
        found = differences(there, here)
        found = [item for item in found if not item[0].startswith("parts.")] or found
        if found and all(item.endswith(".mtime_ns") for item, _, _ in found) and self._same_bytes():
            atomic_write(self.path, json.dumps(self.content(), indent=1).encode() + b"\n")
        elif found:
            said = "; ".join(f"{item} was {_short(before)}, is {_short(now)}" for item, before, now in found[:10])
            raise DataError(
                f"{self.folder} holds {len(self.finished())} of {len(self.parts)} parts of a run that differs: {said}",
                hint="Give the former input and options to continue it, or --restart to begin again",
            )

    def _same_bytes(self) -> bool:
        """Whether finished parts were made from the bytes that are there now, whatever the times of the files say."""
        for number in self.finished():
            noted = read_json(self.marker(number), error=DataError)["sources"]
            for piece, facts in zip(self.parts[number], noted, strict=True):
                if sha256_piece(piece) != facts["sha256"]:
                    return False
        return True


def divide(names: Sequence[str], part_bytes: int) -> tuple[tuple[Piece, ...], ...]:
    """Pieces of every part, in input order: files together up to `part_bytes`, large uncompressed ones in ranges.

    Standard input and pipes can be read only once and make everything one part.
    """
    if any(name == STDIN or not os.path.isfile(name) for name in names):
        return (tuple(Piece(name) for name in names),)
    parts: list[tuple[Piece, ...]] = []
    together: list[Piece] = []
    held = 0
    for name in names:
        size = os.stat(name).st_size
        plain = is_plain(name)
        weight = size if plain else size * _UNFOLDED
        if together and held + weight > part_bytes:
            parts.append(tuple(together))
            together, held = [], 0
        if plain and size > part_bytes:
            ranges = -(-size // part_bytes)
            bounds = [size * place // ranges for place in range(ranges + 1)]
            parts += [(Piece(name, bounds[place], bounds[place + 1]),) for place in range(ranges)]
        else:
            together.append(Piece(name))
            held += weight
    if together:
        parts.append(tuple(together))
    return tuple(parts)


def identity_of(names: Sequence[str], options: dict[str, Any], tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What parts depend on, in plain types."""
    sources = {}
    for name in names:
        if name != STDIN:
            status = os.stat(name)
            sources[name] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return {"options": options, "tokenizer": tokenizer, "inputs": list(names), "sources": sources}


def differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two plain values differ: (dotted name, before, now)."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys((*before, *now)):
            found += differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        return found
    return [] if before == now else [(name, before, now)]


def sha256_piece(piece: Piece) -> str | None:
    """sha256 of the bytes of the file that make up a piece."""
    if is_table(piece.name):
        from megawrap.io import sha256_file

        return sha256_file(Path(piece.name))
    source = Source(piece)
    try:
        while source.read(1 << 20):
            pass
        return source.facts()["sha256"]
    finally:
        source.close()


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
