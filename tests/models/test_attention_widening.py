"""bf16 attention of short segments in fp32 on CPU: the same numbers as an fp64 softmax, closer than bf16 rounding."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megawrap.models import attention
from megawrap.models.attention import PackedAttention
from megawrap.models.batch import Segments

LENGTHS = np.array([5, 300, 1, 40, 257, 256])


def _exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax over each segment's past in fp64, one head after the other."""
    out, begin = [], 0
    for length in LENGTHS.tolist():
        q, k, v = (x[begin : begin + length].double() for x in (query, key, value))
        scores = torch.einsum("qhd,kd->hqk", q, k[:, 0]) / q.size(-1) ** 0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        out.append(torch.einsum("hqk,kd->qhd", scores.softmax(-1), v[:, 0]))
        begin += length
    return torch.cat(out).flatten(1)


@pytest.mark.parametrize("widened", [0, 256, 10**6])
def test_output_and_gradients(widened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WIDENED_UP_TO", widened)
    generator = torch.Generator().manual_seed(3)
    total = int(LENGTHS.sum())
    tensors = [torch.randn(total, heads, 16, generator=generator).bfloat16().requires_grad_() for heads in (4, 1, 1)]
    direction = torch.randn(total, 64, generator=generator)
    module = PackedAttention(SimpleNamespace(attention_dropout=0.0, kv_channels=16), 1, None, "self")
    segments = Segments.of(LENGTHS, torch.device("cpu"))
    out = module(*tensors, None, packed_seq_params=segments)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad((out.float() * direction).sum(), tensors)
    exact = _exact(*tensors)
    expected = torch.autograd.grad((exact * direction).sum(), tensors)
    for ours, theirs in zip((out, *gradients), (exact, *expected), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs.double()).norm() < 0.008 * theirs.double().norm()
