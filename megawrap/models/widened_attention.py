"""Causal attention of one short segment on CPU in fp32, for a bf16 or fp16 model, that keeps nothing in fp32 but its log sums.

In: query [S, N, D], key and value [S, G, D]. Out: [S, N, D] in their dtype. The arithmetic is PyTorch's fused CPU kernel;
its autograd would keep fp32 copies of all four tensors, here they are widened once more for the backward pass.
Shapes: S positions, N query heads, G key/value heads, D width.
"""

from __future__ import annotations

from typing import Any

import torch

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _WidenedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        out, log_sums = _FORWARD(*_widened(query, key, value), 0.0, True, scale=scale)
        result = out[0].transpose(0, 1).to(query.dtype)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, result, log_sums)
            ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, log_sums = ctx.saved_tensors
        heads, groups = query.size(1), key.size(1)
        wide_out, wide_grad = (x.float().transpose(0, 1).unsqueeze(0) for x in (out, grad))
        found = _BACKWARD(wide_grad, *_widened(query, key, value), wide_out, log_sums, 0.0, True, scale=ctx.scale)
        grad_query, grad_key, grad_value = (x[0].transpose(0, 1) for x in found)
        if groups < heads:
            grad_key, grad_value = (x.unflatten(1, (groups, heads // groups)).sum(2) for x in (grad_key, grad_value))
        return *(x.to(query.dtype) for x in (grad_query, grad_key, grad_value)), None


def _widened(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """fp32 [1, N, S, D] each; key and value heads are shared by stride, not copied."""
    repeat = query.size(1) // key.size(1)
    wide = [x.float().transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
    if repeat > 1:
        wide[1:] = (x.unsqueeze(2).expand(-1, -1, repeat, -1, -1).flatten(1, 2) for x in wide[1:])
    return tuple(wide)


def widened_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale x Q K^T, causal) V of one segment, computed in fp32.

    Args:
        query: [S, N, D], bf16 or fp16.
        key: [S, G, D], G dividing N.
        value: [S, G, D].
        scale: of the scores.

    Returns:
        [S, N, D] in the dtype of the query.
    """
    return _WidenedAttention.apply(query, key, value, scale)
