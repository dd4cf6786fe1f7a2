"""Exact duplicates: a 128-bit digest per sample, and a set of digests whose memory is bounded.

In: batches of samples. Out: which samples are the first of their kind. Digests live in sorted runs that are merged as
they grow, in memory up to a bound and in unnamed files beyond it; the price of a look-up is a binary search per run.
"""

from __future__ import annotations

import hashlib
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

MEMORY_DIGESTS = 1 << 21  # 32 MiB
_STEP = 1 << 18  # digests of each run that are merged at a time
Run = tuple[np.ndarray, np.ndarray]
"""High and low halves, uint64 [n], sorted by (high, low)."""


def normalized(text: str) -> str:
    """What counts as the same text: Unicode NFC, \\n for line ends, nothing around it."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip()


def digests(texts: list[str], counts: np.ndarray) -> np.ndarray:
    """The first 128 bits of the sha256 of every sample.

    Args:
        texts: flat, sample by sample.
        counts: [samples] texts of each.

    Returns:
        uint64 [samples, 2].
    """
    found = bytearray()
    at = 0
    for count in counts.tolist():
        parts = [normalized(text).encode() for text in texts[at : at + count]]
        at += count
        head = b"".join(len(part).to_bytes(8, "little") for part in parts)  # so that ("ab", "c") is not ("a", "bc")
        found += hashlib.sha256(b"".join((head, *parts))).digest()[:16]
    return np.frombuffer(bytes(found), dtype=">u8").astype(np.uint64).reshape(-1, 2)


class SeenDigests:
    """A set of digests that remembers everything in bounded memory.

    Args:
        folder: where files go when memory is full; they have no names and need no cleaning.
        memory_digests: how many are kept in memory, 16 bytes each.
    """

    def __init__(self, folder: Path | None = None, *, memory_digests: int = MEMORY_DIGESTS) -> None:
        self._folder, self._memory = folder, memory_digests
        self._runs: list[Run] = []  # each at least twice as long as the next
        self._files: list[IO[bytes]] = []

    def add(self, given: np.ndarray) -> np.ndarray:
        """Remember digests.

        Args:
            given: uint64 [n, 2].

        Returns:
            bool [n]: True where a digest was neither seen before nor stands earlier in `given`.
        """
        order = np.lexsort((given[:, 1], given[:, 0]))  # stable: equal digests keep their order
        high, low = np.ascontiguousarray(given[order, 0]), np.ascontiguousarray(given[order, 1])
        new = np.ones(len(order), dtype=bool)
        new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        for run in self._runs:
            new &= ~_contains(run, high, low)
        if new.any():
            self._runs.append((high[new], low[new]))
            self._merge()
        found = np.empty(len(order), dtype=bool)
        found[order] = new
        return found

    def _merge(self) -> None:
        """Restore the order of lengths, so that there are at most log2(n) runs; long ones are written to files."""
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            one, other = self._runs[-2:]
            size = len(one[0]) + len(other[0])
            if size <= self._memory // 2:
                merged = _sorted(np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]]))
            else:
                merged = self._merge_on_disk(one, other, size)
            self._runs[-2:] = [merged]

    def _merge_on_disk(self, one: Run, other: Run, size: int) -> Run:
        halves = []
        with tempfile.TemporaryFile(dir=self._folder) as low_file:
            high_file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - the map keeps the file
            for high, low in _merged(one, other):
                high_file.write(high.tobytes())
                low_file.write(low.tobytes())
            for file in (high_file, low_file):
                file.flush()
                halves.append(np.memmap(file, dtype=np.uint64, mode="r", shape=(size,)))
            high_file.close()
        return halves[0], halves[1]


def _sorted(high: np.ndarray, low: np.ndarray) -> Run:
    order = np.lexsort((low, high))
    return high[order], low[order]


def _contains(run: Run, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """bool [n], which of the digests (sorted) the run holds."""
    at = np.searchsorted(run[0], high, side="left")
    found = np.zeros(len(high), dtype=bool)
    open_ = np.flatnonzero(at < len(run[0]))
    while len(open_):  # once, but for digests that agree in 64 bits
        open_ = open_[run[0][at[open_]] == high[open_]]
        found[open_] |= run[1][at[open_]] == low[open_]
        open_ = open_[~found[open_]]
        at[open_] += 1
        open_ = open_[at[open_] < len(run[0])]
    return found


def _merged(one: Run, other: Run) -> Iterator[Run]:
    """Two runs as one, a bounded number of digests at a time."""
    places = [0, 0]
    runs = (one, other)
    while any(place < len(run[0]) for place, run in zip(places, runs, strict=True)):
        heads = [run[0][place : place + _STEP] for place, run in zip(places, runs, strict=True)]
        last = [int(head[-1]) for place, head, run in zip(places, heads, runs, strict=True) if place + len(head) < len(run[0])]
        if last:  # what follows a head is not below its last, which may go on behind it: take what is below the smallest
            takes = [int(np.searchsorted(head, np.uint64(min(last)), side="left")) for head in heads]
        else:
            takes = [len(head) for head in heads]
        if not any(takes):  # a head of one value throughout: 64 equal bits in `_STEP` digests do not happen, but must not hang
            takes = [
                int(np.searchsorted(run[0][place:], np.uint64(min(last)), side="right")) for place, run in zip(places, runs, strict=True)
            ]
        yield _sorted(
            *(
                np.concatenate([run[half][place : place + take] for place, take, run in zip(places, takes, runs, strict=True)])
                for half in (0, 1)
            )
        )
        places = [place + take for place, take in zip(places, takes, strict=True)]
