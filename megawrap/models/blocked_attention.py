"""Causal attention of one segment on CPU in blocks of queries, by matrix products.

In: query [S, N, D], key and value [S, G, D]. Out: [S, N, D]. Own code because PyTorch's CPU kernel works head by head in
small products: here all heads that share keys are the rows of one product, which takes 0.6-0.7 of its time forward and
backward from 257 to 1,024 positions (one core, 8 heads over 1, D = 64), and probabilities are kept, not made again.
Scores and their gradients are fp32 whatever the dtype. Shapes: S positions, N query heads, G key/value heads, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

BLOCK = 64
"""Queries of a block; their scores, N x BLOCK x S, stay in the cache."""


class _BlockedAttention(torch.autograd.Function):
    """Rows of every product are (query, head of the group), so that causality cuts at block borders."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        length, heads = query.size(0), query.size(1) // key.size(1)
        padded_query, padded_key, padded_value = _whole_blocks(query, key, value)
        rows = _by_group(padded_query, key.size(1))
        keys, values = padded_key.transpose(0, 1).float(), padded_value.transpose(0, 1)
        out, kept = torch.empty_like(rows), []
        hidden = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=query.device).triu_(1)[:, None]
        for begin in range(0, length, BLOCK):
            end = begin + BLOCK
            block = slice(begin * heads, end * heads)
            scores = torch.bmm(rows[:, block].float(), keys[:, :end].transpose(1, 2)).mul_(scale)
            scores.view(-1, BLOCK, heads, end)[..., begin:].masked_fill_(hidden, -math.inf)
            probabilities = scores.softmax(-1).to(query.dtype)
            out[:, block] = torch.bmm(probabilities, values[:, :end])
            kept.append(probabilities)
        result = _by_position(out, padded_query.shape)[:length]
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, result, *kept)
            ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, *kept = ctx.saved_tensors
        length, heads = query.size(0), query.size(1) // key.size(1)
        query, key, value, out, grad = _whole_blocks(query, key, value, out, grad)
        rows, grad_rows, out_rows = (_by_group(x, key.size(1)) for x in (query, grad, out))
        keys, values = key.transpose(0, 1), value.transpose(0, 1).float()
        grad_query = torch.empty_like(rows)
        grad_key, grad_value = (torch.zeros(keys.shape, device=keys.device) for _ in range(2))
        inner = (grad_rows.float() * out_rows.float()).sum(-1, keepdim=True)
        for begin, probabilities in zip(range(0, length, BLOCK), kept, strict=True):
            end = begin + BLOCK
            block = slice(begin * heads, end * heads)
            grad_value[:, :end] += torch.bmm(probabilities.transpose(1, 2), grad_rows[:, block])
            scores = torch.bmm(grad_rows[:, block].float(), values[:, :end].transpose(1, 2))
            scores = scores.sub_(inner[:, block]).mul_(probabilities).mul_(ctx.scale).to(query.dtype)
            grad_query[:, block] = torch.bmm(scores, keys[:, :end])
            grad_key[:, :end] += torch.bmm(scores.transpose(1, 2), rows[:, block])
        grad_key, grad_value = (x.transpose(0, 1)[:length].to(query.dtype) for x in (grad_key, grad_value))
        return _by_position(grad_query, query.shape)[:length], grad_key, grad_value, None


def _whole_blocks(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Positions padded to whole blocks, which come after all real ones and so are never seen: then products have the same few
    shapes for every length, and oneDNN does not compile (0.8 ms) and cache (5 MB) a kernel for each."""
    return tuple(F.pad(x, (0, 0, 0, 0, 0, -x.size(0) % BLOCK)) for x in tensors)


def _by_group(x_SND: torch.Tensor, groups: int) -> torch.Tensor:
    """[S, N, D] -> [G, S x heads of a group, D]."""
    positions, heads, width = x_SND.shape
    return x_SND.reshape(positions, groups, heads // groups, width).transpose(0, 1).reshape(groups, -1, width)


def _by_position(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `_by_group`."""
    positions, heads, width = shape
    return rows.view(rows.size(0), positions, heads // rows.size(0), width).transpose(0, 1).reshape(shape)


def blocked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale x Q K^T, causal) V of one segment.

    Args:
        query: [S, N, D].
        key: [S, G, D], G dividing N.
        value: [S, G, D].
        scale: of the scores.

    Returns:
        [S, N, D] in the dtype of the query. The backward pass needs N x S^2 / 2 probabilities in that dtype.
    """
    return _BlockedAttention.apply(query, key, value, scale)
