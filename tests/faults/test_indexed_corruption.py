"""Scorecard R11: 18 ways to damage a .bin/.idx pair, each refused at open with file, field and both numbers, mapped or read."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megawrap.data.format import IndexedDataset, IndexedWriter
from megawrap.errors import EXIT_CORRUPT, DataError

pytestmark = pytest.mark.fault

NUM_SEQUENCES, NUM_INDICES = 8, 5
LENGTHS, POINTERS = 34, 34 + 4 * NUM_SEQUENCES
INDICES = POINTERS + 8 * NUM_SEQUENCES
MODES = INDICES + 8 * NUM_INDICES


def patch(suffix: str, offset: int, layout: str, *values: int) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        path = prefix.with_name(prefix.name + suffix)
        content = bytearray(path.read_bytes())
        struct.pack_into(layout, content, offset, *values)
        path.write_bytes(content)

    return change


def resize(suffix: str, difference: int) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        path = prefix.with_name(prefix.name + suffix)
        content = path.read_bytes()
        path.write_bytes(content[:difference] if difference < 0 else content + bytes(difference))

    return change


def remove(suffix: str) -> Callable[[Path], None]:
    return lambda prefix: os.unlink(prefix.with_name(prefix.name + suffix))


MUTATIONS = {
    "idx missing": (remove(".idx"), "idx: file"),
    "bin missing": (remove(".bin"), "bin: file"),
    "magic": (patch(".idx", 0, "<B", 0), "magic"),
    "version": (patch(".idx", 9, "<Q", 2), "version"),
    "dtype code unknown": (patch(".idx", 17, "<B", 9), "dtype code"),
    "dtype code of another size": (patch(".idx", 17, "<B", 4), "pointers"),
    "count 2^50": (patch(".idx", 18, "<Q", 1 << 50), "sequence count"),
    "document count 2^50": (patch(".idx", 26, "<Q", 1 << 50), "document count"),
    "bin short": (resize(".bin", -2), "bin: size"),
    "bin long": (resize(".bin", 2), "bin: size"),
    "bin empty": (resize(".bin", -(1 << 20)), "bin: size"),
    "idx cut": (resize(".idx", -3), "idx: size"),
    "negative length": (patch(".idx", LENGTHS + 4, "<i", -1), "lengths"),
    "sum of lengths": (patch(".idx", LENGTHS + 4 * (NUM_SEQUENCES - 1), "<i", 99), "bin: size"),
    "pointer negative": (patch(".idx", POINTERS + 8, "<q", -4), "pointers"),
    "pointer past the end": (patch(".idx", POINTERS + 24, "<q", 1 << 40), "pointers"),
    "pointers overlapping": (patch(".idx", POINTERS + 16, "<q", 2), "pointers"),
    "document index not ending at the count": (patch(".idx", MODES - 8, "<q", NUM_SEQUENCES - 1), "document_indices"),
}
MORE = {
    "document index not starting at 0": (patch(".idx", INDICES, "<q", 1), "document_indices"),
    "document index going back": (patch(".idx", INDICES + 8, "<q", 6), "document_indices"),
    "document without a sequence": (patch(".idx", INDICES + 8, "<q", 4), "document_indices"),
    "mode 2": (patch(".idx", MODES, "<b", 2), "modes"),
    "mode negative": (patch(".idx", MODES, "<b", -1), "modes"),
    "all modes 0": (patch(".idx", MODES, f"<{NUM_SEQUENCES}b", *[0] * NUM_SEQUENCES), "modes"),
    "trailing bytes": (resize(".idx", 5), "idx: size"),
    "dtype code of floats": (patch(".idx", 17, "<B", 7), "dtype code"),
    "count 0": (patch(".idx", 18, "<Q", 0), "sequence count"),
    "header cut": (resize(".idx", -(MODES + NUM_SEQUENCES - 20)), "header"),
    "idx empty": (resize(".idx", -(1 << 20)), "header"),
}
# What each message says besides file and field: what was found, and what it has to be.
FACTS = {
    "idx missing": ("missing, though data.bin is there",),
    "bin missing": ("missing, though data.idx is there",),
    "magic": (r"b'\x00MIDIDX\x00\x00' instead of b'MMIDIDX\x00\x00'",),
    "version": ("2, only version 1 is known",),
    "dtype code unknown": ("9, token ids are one of 1 (uint8), 2 (int8), 3 (int16), 4 (int32), 5 (int64), 8 (uint16)",),
    "dtype code of another size": ("sequence 1 starts at byte 4, by the lengths before it at byte 8",),
    "count 2^50": ("1125899906842624 sequences, a file of 178 bytes holds 1 to 12",),
    "document count 2^50": ("1125899906842624 document indices, 48 bytes are left for 2 to 6",),
    "bin short": ("38 bytes, data.idx tells of 20 uint16 tokens, 40 bytes",),
    "bin long": ("42 bytes, data.idx tells of 20 uint16 tokens, 40 bytes",),
    "bin empty": ("0 bytes, data.idx tells of 20 uint16 tokens, 40 bytes",),
    "idx cut": ("5 bytes after the document indices; expected 0, or 8 bytes",),
    "negative length": ("sequence 1 has -1 tokens",),
    "sum of lengths": ("40 bytes, data.idx tells of 116 uint16 tokens, 232 bytes",),
    "pointer negative": ("sequence 1 starts at byte -4, by the lengths before it at byte 4",),
    "pointer past the end": ("sequence 3 starts at byte 1099511627776, by the lengths before it at byte 10",),
    "pointers overlapping": ("sequence 2 starts at byte 2, by the lengths before it at byte 10",),
    "document index not ending at the count": ("the last is 7, it must be the number of sequences, 8",),
    "document index not starting at 0": ("the first is 1, it must be 0",),
    "document index going back": ("document 1 runs from sequence 6 to 4",),
    "document without a sequence": ("document 1 runs from sequence 4 to 4",),
    "mode 2": ("sequence 0 has mode 2, allowed are 0 (context) and 1 (trained)",),
    "mode negative": ("sequence 0 has mode -1, allowed are 0 (context) and 1 (trained)",),
    "all modes 0": ("all 8 sequences have mode 0: nothing would be trained",),
    "trailing bytes": ("13 bytes after the document indices; expected 0, or 8 bytes",),
    "dtype code of floats": ("7, token ids are one of 1 (uint8)",),
    "count 0": ("0 sequences, a file of 178 bytes holds 1 to 12",),
    "header cut": ("the file has 20 bytes, the header alone has 34",),
    "idx empty": ("the file has 0 bytes, the header alone has 34",),
}


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """An intact pair without a manifest, so that only the index itself can give the damage away."""
    path = tmp_path / "data"
    lengths = np.array([2, 3, 0, 4, 1, 2, 5, 3])
    with IndexedWriter(path, np.uint16) as writer:
        writer.add(np.arange(lengths.sum()), lengths, np.array([2, 2, 2, 2]), np.tile([0, 1], 4))
        writer.commit({})
    (tmp_path / "data.manifest.json").unlink()
    return path


def test_eighteen() -> None:
    assert len(MUTATIONS) == 18 and set(FACTS) == {*MUTATIONS, *MORE}


@pytest.mark.parametrize("mmap", [True, False], ids=["mmap", "file"])
@pytest.mark.parametrize("name", [*MUTATIONS, *MORE])
def test_r11_damage_is_refused_at_open(prefix: Path, name: str, mmap: bool) -> None:
    IndexedDataset(prefix, mmap=mmap)  # intact before: the refusal is the mutation's doing
    change, field = (MUTATIONS | MORE)[name]
    change(prefix)
    with pytest.raises(DataError) as refused:
        IndexedDataset(prefix, mmap=mmap)
    assert refused.value.exit_code == EXIT_CORRUPT
    assert str(prefix) in str(refused.value)
    assert f"{field}: " in str(refused.value)
    assert all(fact in str(refused.value) for fact in FACTS[name]), refused.value
    assert refused.value.hint
