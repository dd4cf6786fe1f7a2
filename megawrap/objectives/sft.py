"""Supervised fine-tuning: next-token cross entropy on the outputs of each sample.

In: a batch whose weights are 1 at output tokens (normalize: token), or sum to 1 over each span of them (normalize:
target); the data rows make them. Out: the weighted sum of cross entropies and the sum of weights. Logits exist at
target positions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megawrap.objectives import Loss

if TYPE_CHECKING:
    from megawrap.models.batch import Batch


class SupervisedFineTuning:
    """loss = sum_i w_i CE_i / sum_i w_i over the whole global batch."""

    name = "sft"
    reports: tuple[str, ...] = ()

    def forward(self, model: Any, batch: Batch) -> Any:
        """Hidden states of this stage, or (weighted sum, losses [K]) on the last."""
        return model(batch)

    def loss(self, output: Any, batch: Batch) -> Loss:
        """The sum and count of this micro-batch."""
        total, _ = output
        return Loss(total=total, count=batch.count, sums={})
