"""Packed attention against a brute-force softmax over a block-diagonal causal mask; rotary angles against transformers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megawrap import device
from megawrap.models.batch import Segments

device.adapt()

from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402

from megawrap.models import attention  # noqa: E402

LENGTHS = np.array([5, 1, 300, 9])
TOTAL = int(LENGTHS.sum())


def _layer(dropout: float = 0.0, window: int | None = None) -> attention.PackedAttention:
    size = None if window is None else (window - 1, 0)
    config = SimpleNamespace(attention_dropout=dropout, kv_channels=8, cuda_graph_impl="none", window_size=size)
    return attention.PackedAttention(config, 1, None, "self")


def _inputs(groups: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(TOTAL, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, groups, groups))


def _brute_force(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int = TOTAL) -> torch.Tensor:
    owner = torch.from_numpy(np.repeat(np.arange(len(LENGTHS)), LENGTHS))
    distance = torch.arange(TOTAL)[:, None] - torch.arange(TOTAL)[None]
    allowed = (owner[:, None] == owner[None]) & (distance >= 0) & (distance < window)
    repeat = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(8)
    probabilities = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value).flatten(1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_no_token_sees_another_sample_or_its_future(groups: int) -> None:
    query, key, value = _inputs(groups)
    got = _layer()(query, key, value, None, packed_seq_params=Segments.of(LENGTHS, torch.device("cpu")))
    torch.testing.assert_close(got, _brute_force(query, key, value), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [1, 4, 128, 299, 300])
def test_a_window_hides_what_lies_further_back(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)  # blocks of 32 queries, shorter than the longer windows
    tensors = [tensor.requires_grad_() for tensor in _inputs(2)]
    results = []
    for out in (
        _layer(window=window)(*tensors, None, packed_seq_params=Segments.of(LENGTHS, torch.device("cpu"))),
        _brute_force(*tensors, window=window),
    ):
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)


def test_other_borders_give_other_numbers() -> None:
    query, key, value = _inputs(2)
    merged = Segments.of(np.array([6, 300, 9]), torch.device("cpu"))
    assert (_layer()(query, key, value, None, packed_seq_params=merged) - _brute_force(query, key, value)).abs().max() > 1e-2


def _seeded_tracker() -> None:
    megatron_random.initialize_rng_tracker(force_reset=True)
    megatron_random.get_cuda_rng_tracker().add("model-parallel-rng", 5)


def test_dropout_keeps_the_expected_value_and_never_builds_a_square_matrix() -> None:
    query, key, value = (tensor.float().requires_grad_() for tensor in _inputs(2))
    _seeded_tracker()
    layer, segments = _layer(dropout=0.3), Segments.of(LENGTHS, torch.device("cpu"))
    draws = torch.stack([layer(query, key, value, None, packed_seq_params=segments).detach() for _ in range(400)])
    expected = _brute_force(query, key, value).detach()
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() > 5 * standard_error + 1e-6).float().mean() < 1e-3
    assert draws.std(0)[10:].mean() > 0.01, "nothing was dropped"
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        layer(query, key, value, None, packed_seq_params=segments).sum().backward()
    assert max(kept) < 4 * 300 * 300, "the scores of a segment were kept for the backward pass"


@pytest.mark.parametrize("window", [None, 40])
def test_dropout_replays_the_same_draw_in_the_backward_pass(window: int | None) -> None:
    """The loss is linear in the values, so the gradient times the values is the loss, if both passes drop the same."""
    query, key, value = (tensor.float() for tensor in _inputs(2))
    value.requires_grad_()
    _seeded_tracker()
    total = _layer(0.5, window)(query, key, value, None, packed_seq_params=Segments.of(LENGTHS, torch.device("cpu"))).sum()
    total.backward()
    assert value.grad is not None
    torch.testing.assert_close((value.grad * value).sum(), total, atol=1e-3, rtol=1e-4)


def test_rotary_angles_equal_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in LENGTHS]))[None]
    query, key, _ = (tensor.float() for tensor in _inputs(2))
    cos, sin = LlamaRotaryEmbedding(config)(query, positions)
    theirs, _ = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    mine = attention.rotate(query, attention.rotary_tables(positions, 8, 5000.0, torch.float32))
    torch.testing.assert_close(mine, theirs[0].transpose(0, 1), atol=1e-5, rtol=0)
