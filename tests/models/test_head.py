"""The linear cross entropy against torch's own on the full logits: loss, gradients, split vocabulary, chunks, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megawrap.models import head
from tests import ranks

K, H, VOCAB, PADDED = 37, 16, 101, 128


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(K, H, generator=generator).to(dtype)
    weight = torch.randn(PADDED, H, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (K,), generator=generator)
    return hidden, weight, labels, torch.rand(K, generator=generator)


def _oracle(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    losses = F.cross_entropy((hidden @ weight[:VOCAB].t()), labels, reduction="none")
    (3 * (losses * weights).sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    return (losses * weights).sum().detach(), losses.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_loss_and_gradients_equal_the_full_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.LOGITS_AT_ONCE, "cpu", chunk * VOCAB)
    hidden, weight, labels, weights = _inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    total, losses = head.linear_cross_entropy(hidden, weight, labels, weights, vocab_size=VOCAB)
    (3 * total).backward()
    for got, expected in zip((total, losses, hidden.grad, weight.grad), _oracle(*_inputs()), strict=True):
        assert got is not None
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)
    assert not weight.grad[VOCAB:].any(), "padding rows must not learn"  # type: ignore[index]


def _split(reduce_hidden: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, labels, weights = _inputs()
    hidden.requires_grad_()
    mine = weight.chunk(size)[rank].clone().requires_grad_()
    total, _ = head.linear_cross_entropy(
        hidden, mine, labels, weights, vocab_size=VOCAB, group=dist.group.WORLD, reduce_hidden=reduce_hidden
    )
    (3 * total).backward()
    assert hidden.grad is not None and mine.grad is not None
    return total.detach(), hidden.grad, mine.grad


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("reduce_hidden", [True, False])
def test_a_split_vocabulary_changes_nothing(world: int, reduce_hidden: bool) -> None:
    """At four ranks of 32 rows the last one holds 5 real rows and 27 of padding."""
    total, _, hidden_grad, weight_grad = _oracle(*_inputs())
    results: list[Any] = ranks.run(world, _split, reduce_hidden)
    for got, _, _ in results:
        torch.testing.assert_close(got.double(), total, atol=2e-5, rtol=1e-5)
    of_hidden = [part for _, part, _ in results]
    whole = of_hidden[0] if reduce_hidden else torch.stack(of_hidden).sum(0)
    torch.testing.assert_close(whole.double(), hidden_grad, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([part for _, _, part in results]).double(), weight_grad, atol=2e-5, rtol=1e-5)


def test_half_precision_gradients_of_rare_tokens_do_not_underflow() -> None:
    """A probability of 1e-6 times a weight of 0.01 is below fp16's smallest number; scaled by the head, its gradient lives."""
    hidden = torch.full((1, 4), 3.5, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(2, 4, dtype=torch.float16)
    weight[1] = 1.0
    weight.requires_grad_()
    total, _ = head.linear_cross_entropy(hidden, weight, torch.tensor([1]), torch.tensor([0.01]), vocab_size=2)
    (total * 65536).backward()
    assert weight.grad is not None
    expected = 0.01 * torch.sigmoid(torch.tensor(-14.0)).item() * 3.5 * 65536
    assert weight.grad[0, 0].item() == pytest.approx(expected, rel=0.02)


def test_without_gradient_nothing_but_the_loss_is_computed() -> None:
    hidden, weight, labels, weights = _inputs()
    total, losses = head.linear_cross_entropy(hidden, weight, labels, weights, vocab_size=VOCAB)
    assert not total.requires_grad
    torch.testing.assert_close(losses.double(), _oracle(*_inputs())[1], atol=2e-5, rtol=1e-5)
