"""Keyed shuffling in fixed integer arithmetic, so that an order is the same on every machine and numpy release.

In: a size and a 64-bit key made of whatever the order may depend on. Out: permutations, either of single indices
without memory (`permute`) or as a sort order with random ties (`shuffled_order`). numpy's own generators may change
their streams between releases; a resumed run must not.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def make_key(*parts: str | int) -> int:
    """64-bit key of strings and integers; any change of a part changes it."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _mix(values: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014) of uint64 [n], in place."""
    shifted = values >> np.uint64(30)
    values ^= shifted
    values *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(values, np.uint64(27), out=shifted)
    values ^= shifted
    values *= np.uint64(0x94D049BB133111EB)
    np.right_shift(values, np.uint64(31), out=shifted)
    values ^= shifted
    return values


def mixed(key: int, counters: np.ndarray) -> np.ndarray:
    """Outputs of splitmix64 for a key, each found without those before it.

    Args:
        key: from `make_key`.
        counters: integer, any shape: which outputs, the first is 1.

    Returns:
        uint64 in the shape of `counters`.
    """
    values = counters.astype(np.uint64)
    values *= np.uint64(_GOLDEN)
    values += np.uint64(key & _MASK)
    return _mix(values)


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of range(size) takes `indices`, in memory of the indices alone.

    A Feistel network over the smallest power of two that holds `size`; values that fall outside walk on along their
    cycle until they are inside (Black and Rogaway 2002).

    Args:
        indices: integer [n], each in 0..size-1.
        size: length of the permuted range.
        key: from `make_key`.

    Returns:
        int64 [n].
    """
    low_bits = max(2, (size - 1).bit_length()) // 2
    high_bits = max(2, (size - 1).bit_length()) - low_bits
    values = np.array(indices, dtype=np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        walked = _feistel(values[outside], low_bits, high_bits, key)
        values[outside] = walked
        outside = outside[walked >= size]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, low_bits: int, high_bits: int, key: int) -> np.ndarray:
    low_mask, high_mask, shift = np.uint64((1 << low_bits) - 1), np.uint64((1 << high_bits) - 1), np.uint64(low_bits)
    low, high = values & low_mask, values >> shift
    for turn in range(_ROUNDS):
        round_key = np.uint64((key + (turn + 1) * _GOLDEN) & _MASK)
        if turn % 2:
            high ^= _mix(low + round_key) & high_mask
        else:
            low ^= _mix(high + round_key) & low_mask
    return (high << shift) | low


def shuffled_order(values: np.ndarray, bound: int, key: int) -> np.ndarray:
    """Order that sorts `values` ascending, equal ones shuffled by the key.

    One sort of 64-bit words [value | random bits | index]: numpy sorts those with vector instructions, several times
    faster than a stable argsort after a permutation.

    Args:
        values: integer [n], each in 0..bound.
        bound: largest possible value.
        key: from `make_key`.

    Returns:
        int64 [n].
    """
    size = len(values)
    value_bits, index_bits = bound.bit_length(), max(1, (size - 1).bit_length())
    if value_bits + index_bits > 56:
        raise ValueError(f"{size} values up to {bound} leave no room for random bits")
    words = np.arange(size, dtype=np.uint64)
    words *= np.uint64(_GOLDEN)
    words += np.uint64(key & _MASK)
    _mix(words)
    words >>= np.uint64(value_bits)
    words &= np.uint64(_MASK >> index_bits << index_bits)
    words |= np.arange(size, dtype=np.uint64)
    if value_bits:
        words |= values.astype(np.uint64) << np.uint64(64 - value_bits)
    words.sort()
    words &= np.uint64((1 << index_bits) - 1)
    return words.view(np.int64)
