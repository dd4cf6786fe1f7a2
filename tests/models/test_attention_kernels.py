"""The CPU kernels of packed attention by length (fp32 for short bf16 segments, blocks of products, PyTorch's own) against fp64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megawrap.models import attention, blocked_attention, widened_attention
from megawrap.models.attention import PackedAttention
from megawrap.models.batch import Segments

LENGTHS = np.array([5, 300, 1, 40, 257, 256, 128])
KERNELS = {"by length": (256, 1024), "PyTorch's": (0, 0), "widened": (10**6, 0), "blocked": (0, 10**6)}
"""name: (WIDENED_UP_TO, BLOCKED_UP_TO)"""


def _exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax over each segment's past in fp64."""
    out, begin, repeat = [], 0, query.size(1) // key.size(1)
    for length in LENGTHS.tolist():
        q, k, v = (x[begin : begin + length].double() for x in (query, key, value))
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.size(-1) ** 0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        begin += length
    return torch.cat(out).flatten(1)


def _tensors(groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    total = int(LENGTHS.sum())
    return [torch.randn(total, heads, 16, generator=generator).to(dtype).requires_grad_() for heads in (4, groups, groups)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.008)])
def test_output_and_gradients(kernel: str, groups: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WIDENED_UP_TO", KERNELS[kernel][0])
    monkeypatch.setattr(attention, "BLOCKED_UP_TO", KERNELS[kernel][1])
    tensors = _tensors(groups, dtype)
    direction = torch.randn(tensors[0].size(0), 64, generator=torch.Generator().manual_seed(4))
    module = PackedAttention(SimpleNamespace(attention_dropout=0.0, kv_channels=16, window_size=None), 1, None, "self")
    out = module(*tensors, None, packed_seq_params=Segments.of(LENGTHS, torch.device("cpu")))
    gradients = torch.autograd.grad((out.float() * direction).sum(), tensors)
    exact = _exact(*tensors)
    expected = torch.autograd.grad((exact * direction).sum(), tensors)
    for ours, theirs in zip((out, *gradients), (exact, *expected), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs.double()).norm() < tolerance * theirs.double().norm()


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("scale", [0.25, 50.0])
def test_blocks_and_large_scores_change_nothing(block: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "BLOCK", block)
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(67, heads, 16, generator=generator).requires_grad_() for heads in (6, 2, 2)]
    direction = torch.randn(67, 6, 16, generator=generator)
    out = blocked_attention.blocked_attention(*tensors, scale)
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in tensors)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(3, 1)) * scale
    probabilities = scores.masked_fill(torch.ones(67, 67, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    exact = torch.einsum("hqk,khd->qhd", probabilities, v.repeat_interleave(3, 1))
    torch.testing.assert_close(out.double(), exact, atol=5e-6 * max(1, scale), rtol=0)
    gradients = torch.autograd.grad((out * direction).sum(), tensors)
    for ours, theirs in zip(gradients, torch.autograd.grad((exact * direction).sum(), (q, k, v)), strict=True):
        assert (ours.double() - theirs).norm() < 5e-6 * max(1, scale) * theirs.norm()


@pytest.mark.parametrize("kernel", [blocked_attention.blocked_attention, widened_attention.widened_attention])
def test_nothing_is_kept_when_no_gradient_is_needed(kernel: Callable[..., torch.Tensor]) -> None:
    tensors = [tensor.detach() for tensor in _tensors(2, torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("a tensor was saved"), lambda x: x):
        out = kernel(*tensors, 0.25)
    assert not out.requires_grad


def test_only_log_sums_are_kept_wide() -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        widened_attention.widened_attention(*_tensors(2, torch.bfloat16), 0.25)
    wide = [x.numel() for x in kept if x.dtype == torch.float32]
    assert wide == [4 * int(LENGTHS.sum())], "one log sum a query and head"
