"""The ledger of a conversion: every source element used exactly once, every target element written exactly once.

In: the rules, then each tensor as it is used and written. Out: a summary, or a refusal when anything is left over. A rule
moves rows, so that one look at its row numbers proves it for every element.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megawrap.families.base import Rule


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a finished ledger says."""

    tensors: int
    """Canonical tensors."""
    elements: int
    """Elements of all canonical tensors."""
    num_bytes: int
    """Their bytes."""
    problems: tuple[str, ...]
    """Everything that was not used or written exactly once; empty when complete."""

    @property
    def complete(self) -> bool:
        """Whether every element was used and written exactly once."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "bytes": self.num_bytes,
            "complete": self.complete,
            "problems": list(self.problems),
        }


class Ledger:
    """Counts elements of named tensors on both sides.

    Args:
        source: shape of every tensor that has to be used.
        target: shape of every tensor that has to be written.
    """

    def __init__(self, source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]]) -> None:
        self._sides = {"used": dict(source), "written": dict(target)}
        self._counts: dict[str, Counter[str]] = {"used": Counter(), "written": Counter()}
        self._problems: list[str] = []
        self._bytes = 0

    def used(self, name: str, tensor: torch.Tensor) -> None:
        """A source tensor was read and used whole."""
        self._counts["used"][name] += tensor.numel()

    def written(self, name: str, tensor: torch.Tensor) -> None:
        """A target tensor was written whole."""
        self._counts["written"][name] += tensor.numel()
        self._bytes += tensor.nbytes

    def prove(self, rules: Iterable[Rule]) -> None:
        """Check by its row numbers that each rule moves every row to exactly one place, and back."""
        for rule in rules:
            narrow = rule.changed(columns=())
            sources = list(torch.arange(math.prod(narrow.megatron_shape)).split([math.prod(shape) for shape in narrow.hf_shapes.values()]))
            moved = narrow.from_hf(sources)
            back = narrow.to_hf(moved)
            if not torch.equal(moved.sort().values, torch.arange(len(moved))) or not all(map(torch.equal, back, sources)):
                self._problems.append(f"the rule of {rule.megatron} does not move every row exactly once")

    def close(self) -> Coverage:
        """Compare the counts with what there is."""
        problems = list(self._problems)
        for side, shapes in self._sides.items():
            counts = self._counts[side]
            for name in sorted(set(shapes) | set(counts)):
                expected = math.prod(shapes[name]) if name in shapes else 0
                if counts[name] != expected:
                    problems.append(f"{name}: {counts[name]} elements {side}, {expected} expected")
        written = self._sides["written"]
        elements = sum(map(math.prod, written.values()))
        return Coverage(tensors=len(written), elements=elements, num_bytes=self._bytes, problems=tuple(problems))
