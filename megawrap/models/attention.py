"""Attention over packed rows: every segment attends to itself alone, and no S x S mask is ever made.

In: query [T, heads, D], key and value [T, groups, D] of one flat row and its `Segments`. Out: [T, heads x D].
Kernels: PyTorch's fused attention once per segment ("sdpa", any device; on CPU blocks of matrix products where those are
faster) or its variable-length flash kernel over the whole row ("varlen", CUDA).
Shapes: T positions, N query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megawrap.models.architecture import RopeScaling
from megawrap.models.batch import Segments
from megawrap.models.blocked_attention import blocked_attention
from megawrap.models.widened_attention import widened_attention

QUERY_BLOCK = 256
"""Queries that are scored at once when dropout rules the fused kernel out on CPU."""
WIDENED_UP_TO = 256
"""On CPU segments up to this long are attended in fp32 also when the model is bf16: PyTorch's bf16 kernel takes twice as
long for 128 positions forward and backward, and four times as long for 16 (one core, D = 64)."""
BLOCKED_UP_TO = 1024
"""On CPU longer segments, up to this long, are attended by `blocked_attention`, which keeps their probabilities."""


def rotary_tables(
    position_ids: torch.Tensor, width: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the rotary angles, [T, 1, width] each, computed in fp32.

    The angle of pair i at position p is p x theta^(-2i/width) (Su et al., 2021); halves of a head rotate against each
    other, as in Llama's published weights, not neighbours.
    """
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width)
    if scaling is not None:
        frequencies = _stretched(frequencies, scaling)
    angles = torch.outer(position_ids.reshape(-1).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _stretched(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Frequencies of a model that reaches further: "linear" of Chen et al. 2023, "llama3" of Llama 3.1's published code."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the positions of the first training
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply rotary angles to [T, heads, D]; with tables narrower than D, to the first elements of each head."""
    cos, sin = rotary
    width = cos.size(-1)
    if width < x.size(-1):
        return torch.cat([rotate(x[..., :width], rotary), x[..., width:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class PackedAttention(MegatronModule):
    """Core attention of a layer: causal inside each segment, with rotary positions when the segments carry them."""

    varlen = False
    """Use the variable-length kernel; set by the subclass of the layer provider."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = None if config.window_size is None else config.window_size[0] + 1

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Segments | None = None,
    ) -> torch.Tensor:
        """Attend within segments; the mask argument is megatron-core's and unused."""
        assert packed_seq_params is not None, "a row always comes with its segments"
        if packed_seq_params.rotary is not None:
            query, key = rotate(query, packed_seq_params.rotary), rotate(key, packed_seq_params.rotary)
        if self.varlen:
            return self._whole_row(query, key, value, packed_seq_params)
        dropout = self.dropout if self.training else 0.0
        if dropout:
            with get_cuda_rng_tracker().fork():
                return self._per_segment(query, key, value, packed_seq_params, dropout)
        return self._per_segment(query, key, value, packed_seq_params, 0.0)

    def _whole_row(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        longest = segments.max_seqlen_q
        out = varlen_attn(
            query, key, value, segments.cu_seqlens_q, segments.cu_seqlens_kv, longest, longest,
            scale=self.scale, window_size=(-1 if self.window is None else self.window - 1, 0), enable_gqa=query.size(1) != key.size(1),
        )  # fmt: skip
        return out.flatten(1)

    def _per_segment(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, dropout: float) -> torch.Tensor:
        lengths = list(segments.lengths)
        parts = [
            self._segment(q, k, v, dropout) for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).flatten(1)

    def _segment(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
        """One segment by the kernel that is fastest for its length; [S, N, D] in and out."""
        cpu, length = query.device.type == "cpu", query.size(0)
        if self.window is not None and length > self.window:
            return _windowed_attention(query, key, value, self.scale, dropout, self.window)
        if cpu and not dropout and WIDENED_UP_TO < length <= BLOCKED_UP_TO and query.dtype in (torch.float32, torch.bfloat16):
            return blocked_attention(query, key, value, self.scale)
        if cpu and not dropout and length <= WIDENED_UP_TO and query.element_size() < 4:
            return widened_attention(query, key, value, self.scale)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        if cpu and dropout:
            out = _dropped_attention(q, k, v, self.scale, dropout)
        else:
            grouped = q.size(1) != k.size(1)
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped, dropout_p=dropout)
        return out.squeeze(0).transpose(0, 1)


def _windowed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dropout: float, window: int
) -> torch.Tensor:
    """Causal attention to the last `window` positions, [S, N, D] in and out, by blocks of at most `window` queries.

    A block sees at most two windows of keys, so that work and memory grow with S x window, not with S^2. Blocks with dropout
    are computed again for their gradient, as in `_dropped_attention`.
    """
    repeat = query.size(1) // key.size(1)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)))
    size = min(window, 4 * QUERY_BLOCK)
    positions = torch.arange(query.size(0), device=query.device)

    def block(begin: int, q_block: torch.Tensor, k_seen: torch.Tensor, v_seen: torch.Tensor) -> torch.Tensor:
        end = begin + q_block.size(2)
        distance = positions[begin:end, None] - positions[None, end - k_seen.size(2) : end]
        seen = (distance >= 0) & (distance < window)
        return scaled_dot_product_attention(q_block, k_seen, v_seen, attn_mask=seen, scale=scale, dropout_p=dropout)

    parts = []
    for begin in range(0, query.size(0), size):
        end, first = min(begin + size, query.size(0)), max(0, begin - window + 1)
        inputs = (begin, q[:, :, begin:end], k[:, :, first:end], v[:, :, first:end])
        parts.append(checkpoint(block, *inputs, use_reentrant=False) if dropout else block(*inputs))
    return torch.cat(parts, dim=2).squeeze(0).transpose(0, 1)


def _dropped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout: float) -> torch.Tensor:
    """Causal attention with dropout of probabilities in blocks of queries, each computed again for its gradient.

    PyTorch has no fused CPU kernel with dropout and would keep the whole [N, S, S]; here at most [N, QUERY_BLOCK, S] lives.
    """
    repeat = q.size(1) // k.size(1)
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)

    def block(q_block: torch.Tensor, k_seen: torch.Tensor, v_seen: torch.Tensor, begin: int) -> torch.Tensor:
        scores = (q_block @ k_seen.transpose(-2, -1)).float() * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(begin + 1)
        probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.dropout(probabilities, dropout, True).to(v_seen.dtype) @ v_seen

    parts = []
    for begin in range(0, q.size(2), QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, q.size(2))
        parts.append(checkpoint(block, q[:, :, begin:end], k[:, :, :end], v[:, :, :end], begin, use_reentrant=False))
    return torch.cat(parts, dim=2)


class VarlenAttention(PackedAttention):
    """Packed attention through PyTorch's variable-length flash kernel (CUDA, bf16 or fp16)."""

    varlen = True
