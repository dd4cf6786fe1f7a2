"""Objectives: what is learned from a batch, one file each.

An objective says what a model computes for a batch and which sums it reports. The training loop adds the sums over
micro-batches and data-parallel ranks and divides once: a loss is never a mean of means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megawrap.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megawrap.models.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one micro-batch adds to the global batch."""

    total: torch.Tensor
    """Scalar float32, differentiable: the weighted sum that is minimised."""
    count: int
    """What the global sum is divided by; the counts of all micro-batches add up."""
    sums: dict[str, torch.Tensor | float]
    """Further sums to report under the objective's `reports`, each divided by the global count."""


class Objective(Protocol):
    """What the training loop needs of an objective."""

    name: str
    reports: tuple[str, ...]
    """Names of the further sums it reports."""

    def forward(self, model: Any, batch: Batch) -> Any:
        """Run this pipeline stage; the result goes to the next stage, or to `loss` on the last."""
        ...

    def loss(self, output: Any, batch: Batch) -> Loss:
        """The micro-batch's share of the loss; last stage only."""
        ...


def known() -> tuple[str, ...]:
    """Names of the objectives."""
    return ("sft",)


def get(name: str) -> Objective:
    """The objective of this name.

    Raises:
        ConfigError: it is not known.
    """
    if name not in known():
        raise ConfigError(f"objective.name is {name!r}; known objectives: {', '.join(known())}")
    from megawrap.objectives.sft import SupervisedFineTuning

    return SupervisedFineTuning()
