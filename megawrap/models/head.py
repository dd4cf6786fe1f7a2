"""The output layer and its cross entropy at target positions, in one pass, without ever holding all logits.

In: hidden states of K target positions, this rank's rows of the output matrix, labels and weights. Out: the weighted
loss sum. Own code because neither PyTorch nor megatron-core has a linear cross entropy over a split vocabulary.
Shapes: K targets, H hidden, V vocabulary rows of this rank that are real (padding rows are never multiplied).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

LOGITS_AT_ONCE = {"cpu": 2**26, "cuda": 2**28}
"""Logits of one chunk of targets, in the compute dtype; one chunk is one pass over the output matrix and its gradient."""
BLOCK = {"cpu": 2**19, "cuda": 2**26}
"""Logits that are in fp32 at a time: on CPU as many as stay in the cache, which makes their exponentials almost free."""
CPU_TARGETS = 128
"""On CPU targets are padded to a multiple, with weight 0: oneDNN compiles and keeps a kernel for every new number of them."""
_HALF_SCALE = 1024.0  # fp16 gradients of small probabilities would underflow; undone in backward


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients chunk by chunk in the forward pass: softmax minus one-hot is known there."""

    @staticmethod
    def forward(
        ctx: Any, hidden_KH: torch.Tensor, weight_VH: torch.Tensor, labels_K: torch.Tensor, weights_K: torch.Tensor,
        first_row: int, real_rows: int, group: Any, reduce_hidden: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        parallel = group is not None and group.size() > 1
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        rows_VH = weight_VH[:real_rows]
        kind, num_targets = hidden_KH.device.type, hidden_KH.size(0)
        num_chunks = max(1, -(-num_targets * weight_VH.size(0) // LOGITS_AT_ONCE[kind]))  # padding counts: alike on all ranks
        chunk, block = max(1, -(-num_targets // num_chunks)), max(1, BLOCK[kind] // max(1, real_rows))
        scale = _HALF_SCALE if hidden_KH.dtype == torch.float16 else 1.0
        losses, hidden_parts, grad_VH = [], [], None
        for hidden, labels, weights in zip(hidden_KH.split(chunk), labels_K.split(chunk), weights_K.split(chunk), strict=True):
            logits = hidden @ rows_VH.t()
            local, here = labels - first_row, (labels >= first_row) & (labels < first_row + real_rows)
            at = torch.where(here, local, 0).unsqueeze(1)
            predicted = logits.gather(1, at).squeeze(1).float() if real_rows else torch.zeros_like(weights)
            if parallel or not needs:
                log_sum = torch.cat([torch.logsumexp(part.float(), dim=1) for part in logits.split(block)])
            if parallel:
                log_sum, predicted = _across_ranks(log_sum, torch.where(here, predicted, 0.0), group)
            if needs:
                log_sum = _to_gradient(logits, log_sum if parallel else None, at, here, weights * scale, block)
            losses.append(log_sum - predicted)
            if not needs:
                continue
            hidden_parts.append(logits @ rows_VH)
            part = logits.t() @ hidden
            grad_VH = part if grad_VH is None else grad_VH.float().add_(part)
        losses_K = torch.cat(losses)
        if needs:
            assert grad_VH is not None
            grad_weight = grad_VH.to(weight_VH.dtype)
            if real_rows < weight_VH.size(0):
                grad_weight = torch.cat([grad_weight, grad_weight.new_zeros(weight_VH.size(0) - real_rows, weight_VH.size(1))])
            ctx.save_for_backward(torch.cat(hidden_parts), grad_weight)
            ctx.group, ctx.scale = (group if parallel and reduce_hidden else None), scale
        ctx.mark_non_differentiable(losses_K)
        return (losses_K * weights_K).sum(), losses_K

    @staticmethod
    def backward(ctx: Any, grad_sum: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.group is not None:
            dist.all_reduce(grad_hidden, group=ctx.group)
        factor = (grad_sum / ctx.scale).to(grad_weight.dtype)
        if grad_hidden.is_cuda or factor != 1:
            grad_hidden, grad_weight = grad_hidden * factor, grad_weight * factor
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _to_gradient(
    logits: torch.Tensor, log_sum: torch.Tensor | None, at: torch.Tensor, here: torch.Tensor, weights: torch.Tensor, block: int
) -> torch.Tensor:
    """Turn logits [K, V] into weights x (softmax - one-hot) in place, `block` rows at a time in fp32.

    Args:
        logits: in the compute dtype; overwritten.
        log_sum: [K] log sum exp over the whole vocabulary, or none when `logits` is the whole vocabulary.
        at: [K, 1] column of the label, where this rank has it.
        here: [K] whether it does.
        weights: [K].
        block: rows.

    Returns:
        [K] log sum exp over the whole vocabulary.
    """
    sums = []
    for begin in range(0, logits.size(0), block):
        rows = slice(begin, begin + block)
        part = logits[rows]
        if log_sum is None:  # one exponential a logit: the largest logit and its probability give the sum
            grad = part.softmax(1, dtype=torch.float32)
            sums.append(part.amax(1).float() - grad.amax(1).log())
        else:
            grad = part.float().sub_(log_sum[rows].unsqueeze(1)).exp_()
        if grad.size(1):
            grad.scatter_add_(1, at[rows], -here[rows].float().unsqueeze(1))
        part.copy_(grad.mul_(weights[rows].unsqueeze(1)))
    return torch.cat(sums) if log_sum is None else log_sum


def _across_ranks(log_sum: torch.Tensor, predicted: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """log sum exp over all ranks' vocabulary rows, and the logit of the label from the rank that has it."""
    highest = log_sum.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    both = torch.stack([(log_sum - highest).exp(), predicted])
    dist.all_reduce(both, group=group)
    return both[0].log() + highest, both[1]


def linear_cross_entropy(
    hidden_KH: torch.Tensor, weight_VH: torch.Tensor, labels_K: torch.Tensor, weights_K: torch.Tensor, *,
    vocab_size: int, group: Any = None, reduce_hidden: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Weighted sum of cross entropies of `hidden @ weight.T` against labels, and each target's own loss.

    Args:
        hidden_KH: [K, H], the same on all ranks of `group`.
        weight_VH: this rank's rows of the output matrix, [padded vocabulary / ranks, H].
        labels_K: int64 token ids below `vocab_size`.
        weights_K: float32.
        vocab_size: real tokens; padding rows beyond take no part.
        group: ranks that split the vocabulary, or none.
        reduce_hidden: sum the gradient of hidden over the group here; off when the caller reduce-scatters it.

    Returns:
        The scalar sum (differentiable) and losses [K] (not), both float32.
    """
    num_targets = hidden_KH.size(0)
    if not hidden_KH.is_cuda:
        padding = -num_targets % CPU_TARGETS
        hidden_KH, labels_K, weights_K = F.pad(hidden_KH, (0, 0, 0, padding)), F.pad(labels_K, (0, padding)), F.pad(weights_K, (0, padding))
    first_row = (group.rank() if group is not None else 0) * weight_VH.size(0)
    real_rows = min(max(vocab_size - first_row, 0), weight_VH.size(0))
    total, losses = _LinearCrossEntropy.apply(hidden_KH, weight_VH, labels_K, weights_K, first_row, real_rows, group, reduce_hidden)
    return total, losses[:num_targets]
