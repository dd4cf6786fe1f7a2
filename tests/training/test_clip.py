"""Clipping by a known norm against PyTorch's own and megatron-core's."""

from __future__ import annotations

import pytest
import torch

from megawrap import device

device.adapt()

from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402

from megawrap.training.optimizer import clip  # noqa: E402


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    made = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 7, 1)]
    for parameter in made[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("largest", [0.5, 2.0, 100.0])
def test_equals_torch_and_megatron_core_bit_for_bit(largest: float) -> None:
    ours, theirs, megatron = _parameters(), _parameters(), _parameters()
    norm = torch.nn.utils.clip_grad_norm_(theirs, largest).item()
    clip(ours, norm, largest)
    clip_grad_by_total_norm_fp32(megatron, largest, norm)
    for mine, torchs, core in zip(ours, theirs, megatron, strict=True):
        if mine.grad is None:
            assert torchs.grad is None
            continue
        assert torch.equal(mine.grad, core.grad)  # type: ignore[arg-type]
        torch.testing.assert_close(mine.grad, torchs.grad, rtol=1e-6, atol=0)
    clipped = torch.cat([parameter.grad for parameter in ours if parameter.grad is not None]).norm().item()
    assert clipped == pytest.approx(min(norm, largest), rel=1e-5)
    assert norm > 2.0, "the case that clips must be among them"


def test_a_norm_that_is_not_finite_leaves_gradients_alone_or_empty_lists_pass() -> None:
    ours, before = _parameters(), _parameters()
    clip(ours, float("nan"), 1.0)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], before[:2], strict=True))  # type: ignore[arg-type]
    clip([], 10.0, 1.0)
