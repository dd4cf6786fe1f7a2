"""A micro-batch on its way into a model: the loader's numpy arrays as tensors on the device.

In: a micro-batch of `megawrap.data.loader` (rows laid end to end). Out: a `Batch`, whose `segments` is what
megatron-core hands through its layers as packed-sequence parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class Segments(PackedSeqParams):
    """Where samples begin and end in a flat row, and their rotary angles. Attention never crosses a border."""

    lengths: tuple[int, ...] = ()
    """Positions of each segment, on the host; they sum to the row."""
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    """(cos, sin), each [T, 1, head_dim], in the compute dtype; set by the model when positions are rotary."""

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> Segments:
        """Segments of these lengths, int32 boundaries on `device`."""
        borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        on_device = torch.from_numpy(borders).to(device, non_blocking=True)
        longest = int(lengths.max())
        return cls(
            qkv_format="thd", cu_seqlens_q=on_device, cu_seqlens_kv=on_device, max_seqlen_q=longest, max_seqlen_kv=longest,
            lengths=tuple(lengths.tolist()),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Batch:
    """T positions: the rows of one micro-batch, end to end."""

    tokens: torch.Tensor
    """[1, T] int64."""
    position_ids: torch.Tensor
    """[1, T] int64, from 0 in every segment."""
    segments: Segments
    """Borders of samples."""
    targets: torch.Tensor
    """[K] int64: the positions whose label is trained, at least one (of weight 0 when there is none)."""
    labels: torch.Tensor
    """[K] int64: the token to predict at each target."""
    weights: torch.Tensor
    """[K] float32: its weight in the loss."""
    num_targets: int
    """Positions of weight above 0."""
    count: int
    """What the loss sum is divided by: the sum of all weights, a whole number for both normalisations."""
    num_tokens: int
    """Positions that are not padding."""
    squared_lengths: int
    """Sum over samples of the square of their length."""
    fim: tuple[int, int, int] = (0, 0, 0)
    """Samples transformed for fill-in-the-middle, kept as they are, and kept because they would have outgrown their place."""

    @classmethod
    def of(cls, arrays: Mapping[str, Any], device: torch.device) -> Batch:
        """Move a loader's micro-batch to the device."""
        weights = arrays["weights"]
        targets = np.flatnonzero(weights)
        if not len(targets):
            targets = np.zeros(1, np.int64)

        def move(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        return cls(
            tokens=move(arrays["tokens"])[None],
            position_ids=move(arrays["position_ids"])[None],
            segments=Segments.of(arrays["segment_lengths"], device),
            targets=move(targets),
            labels=move(arrays["labels"][targets]),
            weights=move(weights[targets].astype(np.float32)),
            num_targets=int(np.count_nonzero(weights)),
            count=round(float(weights.sum(dtype=np.float64))),
            num_tokens=int(arrays["num_tokens"]),
            squared_lengths=int(arrays["squared_lengths"]),
            fim=tuple(int(count) for count in arrays.get("fim", (0, 0, 0))),  # type: ignore[arg-type]
        )
