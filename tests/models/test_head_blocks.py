"""The linear cross entropy in chunks and fp32 blocks: low precision, and ranks of which some hold few real rows."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megawrap.models import head
from megawrap.models.head import linear_cross_entropy
from tests import ranks

HIDDEN, VOCAB, PADDED, TARGETS = 16, 130, 256, 37


def _problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """(hidden, output matrix with padding rows that are not zero, labels, weights with zeros among them)."""
    generator = torch.Generator().manual_seed(5)
    hidden, matrix = torch.randn(TARGETS, HIDDEN, generator=generator), torch.randn(PADDED, HIDDEN, generator=generator)
    labels = torch.randint(VOCAB, (TARGETS,), generator=generator)
    labels[:3] = torch.tensor([0, 127, 129])
    weights = torch.rand(TARGETS, generator=generator) * (torch.arange(TARGETS) % 5 != 4)
    return hidden.to(dtype), matrix.to(dtype), labels, weights


def _exact(hidden: torch.Tensor, matrix: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Losses and gradients from whole logits in fp64."""
    hidden, matrix = hidden.detach().double().requires_grad_(), matrix.detach().double().requires_grad_()
    losses = F.cross_entropy(hidden @ matrix[:VOCAB].t(), labels, reduction="none")
    (losses * weights).sum().backward()
    assert hidden.grad is not None and matrix.grad is not None
    return losses.detach(), hidden.grad, matrix.grad


@pytest.mark.parametrize(("at_once", "block"), [(2**26, 2**19), (2000, 700), (1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_chunks_and_blocks_change_nothing(
    at_once: int, block: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.LOGITS_AT_ONCE, "cpu", at_once)
    monkeypatch.setitem(head.BLOCK, "cpu", block)
    hidden, matrix, labels, weights = _problem(dtype)
    hidden.requires_grad_()
    matrix.requires_grad_()
    total, losses = linear_cross_entropy(hidden, matrix, labels, weights, vocab_size=VOCAB)
    total.backward()
    assert hidden.grad is not None and matrix.grad is not None and hidden.grad.dtype == matrix.grad.dtype == dtype
    for ours, exact in zip((losses, hidden.grad, matrix.grad), _exact(hidden, matrix, labels, weights), strict=True):
        assert (ours.double() - exact).norm() < tolerance * exact.norm()
    assert not matrix.grad[VOCAB:].any() and not hidden.grad[weights == 0].any()


def test_a_sure_prediction_keeps_its_small_gradient_in_low_precision() -> None:
    """softmax - one-hot is taken in fp32: rounding the probability first would leave noise of 1 part in 256."""
    hidden = torch.full((1, HIDDEN), 1.0, dtype=torch.bfloat16, requires_grad=True)
    matrix = torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16)
    matrix[7] = 0.75
    label, weight = torch.tensor([7]), torch.ones(1)
    linear_cross_entropy(hidden, matrix, label, weight, vocab_size=VOCAB)[0].backward()
    _, exact, _ = _exact(hidden, matrix, label, weight)
    assert hidden.grad is not None and 0 < exact.abs().max() < 2**-9
    torch.testing.assert_close(hidden.grad.double(), exact, rtol=0.02, atol=0)


def _split() -> tuple[torch.Tensor, ...]:
    """This rank's part of the problem, in several chunks."""
    hidden, matrix, labels, weights = _problem()
    mine = matrix.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    hidden.requires_grad_()
    with mock.patch.dict(head.LOGITS_AT_ONCE, cpu=700), mock.patch.dict(head.BLOCK, cpu=300):
        total, losses = linear_cross_entropy(hidden, mine, labels, weights, vocab_size=VOCAB, group=dist.group.WORLD)
    total.backward()
    assert hidden.grad is not None and mine.grad is not None
    return losses, hidden.grad, mine.grad


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_few_real_rows_or_none_take_the_same_chunks(world: int) -> None:
    """130 tokens padded to 256: of two ranks the second has 2 real rows, of four the last two have 2 and none."""
    losses, hidden_grad, matrix_grad = _exact(*_problem())
    results = ranks.run(world, _split)
    for found, hidden, _ in results:
        torch.testing.assert_close(found.double(), losses, rtol=0, atol=5e-6)
        torch.testing.assert_close(hidden.double(), hidden_grad, rtol=0, atol=5e-6)
    torch.testing.assert_close(torch.cat([rows for *_, rows in results]).double(), matrix_grad, rtol=0, atol=5e-6)
