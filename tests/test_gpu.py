"""What only a GPU can show: `make test ARGS="-m gpu"`. One process on one GPU; the oracle is the same code on CPU in fp32.

Skipped by default, and on machines without a GPU; `python benchmarks/train.py --device cuda` measures the speed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megawrap import device, parallel
from tests.training import tiny_layout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _alone() -> Any:
    yield
    parallel.stop()


def test_nothing_is_adapted() -> None:
    device.adapt()
    assert isinstance(torch.cuda.current_device(), int) and not device.HITS


@pytest.mark.parametrize("family", ["gpt_bigcode", "llama"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 5e-2), ("fp16", 2e-2)])
def test_losses_fall_as_on_cpu(family: str, precision: str, tolerance: float) -> None:
    from tests import ranks

    expected = ranks.run(1, tiny_layout.losses, 5, family)[0]
    got = tiny_layout.losses(5, family, options={"precision": precision})
    for mine, theirs in zip(got, expected, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=tolerance)


@pytest.mark.parametrize("window", [None, (99, 0)])
def test_the_variable_length_kernel_equals_attention_per_segment(window: tuple[int, int] | None) -> None:
    from types import SimpleNamespace

    from megawrap.models.attention import PackedAttention, VarlenAttention
    from megawrap.models.batch import Segments

    lengths = np.array([5, 1, 300, 9])
    segments = Segments.of(lengths, torch.device("cuda"))
    config = SimpleNamespace(attention_dropout=0.0, kv_channels=64, cuda_graph_impl="none", window_size=window)
    inputs = [torch.randn(int(lengths.sum()), heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    results = []
    for kind in (PackedAttention, VarlenAttention):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = kind(config, 1, None, "self")(*leaves, None, packed_seq_params=segments)
        out.float().square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-2, rtol=5e-2)


def test_the_head_on_cuda_equals_the_head_on_cpu() -> None:
    from megawrap.models.head import linear_cross_entropy

    hidden, weight = torch.randn(50, 32), torch.randn(128, 32)
    labels, weights = torch.randint(0, 100, (50,)), torch.rand(50)
    results = []
    for where in ("cpu", "cuda"):
        leaves = [tensor.to(where).requires_grad_() for tensor in (hidden, weight)]
        total, _ = linear_cross_entropy(*leaves, labels.to(where), weights.to(where), vocab_size=100)
        total.backward()
        results.append([tensor.detach().cpu() for tensor in (total, leaves[0].grad, leaves[1].grad)])  # type: ignore[union-attr]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_a_checkpoint_of_a_gpu_resumes_bit_for_bit(tmp_path: Path) -> None:
    from tests.checkpoint.tiny_run import TinyRun

    run = TinyRun(precision="bf16")
    run.train(3)
    directory = run.save(str(tmp_path))
    expected = run.train(3), run.digest()
    parallel.reset()
    again = TinyRun(precision="bf16")
    again.load(directory)
    assert (again.train(3), again.digest()) == expected
