"""What every readable checkpoint looks like to converting, comparing and loading: canonical tensors, one at a time.

Canonical tensors carry megatron's names with the layer written out, have no vocabulary padding, and a tied output layer
is not listed. `HFDirectory` and `MegatronCheckpoint` are the two sources.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megawrap.errors import ConversionError
from megawrap.families.base import Family, Rule
from megawrap.models.architecture import Architecture

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a checkpoint says about itself besides architecture and weights. Plain types only."""

    hf_config: dict[str, Any] | None = None
    """The config.json it was imported from."""
    generation_config: dict[str, Any] | None = None
    """The generation_config.json it was imported from."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """How its tokenizer is described in the checkpoint."""
    tokenizer_dir: Path | None = None
    """Directory with its tokenizer files, when there is one."""
    iteration: int = 0
    """Optimizer steps taken when it was written."""
    padded_vocab_size: int | None = None
    """Rows of the vocabulary tensors on disk; none when they are not padded."""


class Source(ABC):
    """A checkpoint whose tensors can be read under canonical names.

    Attributes:
        path: the directory that holds the tensors.
        format: "hf" or "torch_dist".
        family: its model family.
        architecture: its architecture.
        record: what else it says about itself.
        allow_nonfinite: read NaN and Inf instead of refusing them.
    """

    path: Path
    format: str
    family: Family
    architecture: Architecture
    record: Record
    allow_nonfinite: bool

    @property
    @abstractmethod
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every canonical tensor, in the order of the model."""

    @abstractmethod
    def read_padded(self, name: str) -> torch.Tensor:
        """A tensor on the CPU in the dtype on disk, unchecked and with the vocabulary padding that is there.

        Raises:
            MegawrapError: damaged.
        """

    def read(self, name: str) -> torch.Tensor:
        """A canonical tensor on the CPU in the dtype on disk.

        Raises:
            MegawrapError: damaged, or not finite and not allowed.
        """
        return self.require_finite(name, self.read_padded(name)[: self.rules[name].megatron_shape[0]])

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    @property
    def rules(self) -> dict[str, Rule]:
        """The rule of every canonical tensor, in the order of the model."""
        return {rule.megatron: rule for rule in self.family.expanded_rules(self.architecture)}

    @property
    def num_elements(self) -> int:
        """Elements of all canonical tensors."""
        from math import prod

        return sum(prod(rule.megatron_shape) for rule in self.rules.values())

    def require_finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, unless it holds NaN or Inf and that is not allowed."""
        if self.allow_nonfinite or not tensor.numel():
            return tensor
        import torch

        low, high = torch.aminmax(tensor)  # NaN wins both; no temporary of the tensor's size
        if not (torch.isfinite(low) and torch.isfinite(high)):
            shown = ", ".join(self.rules[name].hf) if self.format == "hf" else name
            raise ConversionError(
                f"tensor {shown} of {self.path} holds NaN or Inf", hint="The model is broken; --allow-nonfinite converts it as it is"
            )
        return tensor

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
