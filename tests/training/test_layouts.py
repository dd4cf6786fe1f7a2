"""Every layout computes what one process computes: losses over 20 iterations and the first gradient.

The oracle is the single process, whose logits are compared with transformers in tests/conversion. Weights and rows are
the same by construction; all figures are fp32 without dropout.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests import ranks
from tests.training import tiny_layout

pytestmark = pytest.mark.dist

# tp, pp, vpp, dp, sequence parallel, distributed optimizer
LAYOUTS = [
    (2, 1, None, 1, False, False),
    (2, 1, None, 1, True, False),
    (4, 1, None, 1, False, False),
    (4, 1, None, 1, True, True),
    (1, 2, None, 1, False, False),
    (1, 3, None, 1, False, False),
    (1, 4, None, 1, False, False),
    (1, 1, None, 2, False, False),
    (1, 1, None, 2, False, True),
    (1, 1, None, 4, False, True),
    (2, 2, None, 1, True, False),
    (2, 1, None, 2, True, True),
    (1, 2, None, 2, False, True),
    (1, 2, 2, 1, False, False),
    (1, 2, 3, 1, False, True),
    (1, 3, 2, 1, False, False),
    (1, 2, 2, 2, False, True),
    (2, 2, 2, 1, True, False),
]


def _arguments(layout: tuple[Any, ...]) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    tp, pp, vpp, dp, sequence_parallel, distributed = layout
    return tp * pp * dp, (tp, pp, vpp, dp), {"sequence_parallel": sequence_parallel, "distributed": distributed}


FEWER = [layout for layout in LAYOUTS if layout[:4] in {(2, 1, None, 1), (4, 1, None, 1), (1, 3, None, 1), (2, 1, None, 2), (1, 2, 2, 2)}]
CASES = [("gpt_bigcode", layout) for layout in LAYOUTS] + [("llama", layout) for layout in FEWER]
CASES += [("qwen3", (2, 1, None, 1, True, False)), ("qwen3", (2, 1, None, 1, False, False)), ("gpt_neox", (2, 1, None, 1, True, False))]


@cache
def _single(family: str, layers: int) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    return ranks.run(1, _run, 20, family, (), {"layers": layers})[0]


def _run(steps: int, family: str, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    return tiny_layout.losses_and_first_gradients(steps, family, *args, options=options)


def _same_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, theirs in expected.items():
        torch.testing.assert_close(got[name], theirs, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("family", "layout"), CASES, ids=str)
def test_losses_of_20_iterations_and_first_gradient_equal_the_single_process(family: str, layout: tuple[Any, ...]) -> None:
    tp, pp, vpp, dp, sequence_parallel, distributed = layout
    layers = max(2, pp * (vpp or 1))
    micro = 4 if pp == 3 else 3  # virtual stages want a multiple of pp micro-batches of the 12 rows
    options = {"sequence_parallel": sequence_parallel, "distributed": distributed, "layers": layers, "micro_batch_size": micro}
    expected, gradients = _single(family, layers)
    results = ranks.run(tp * pp * dp, _run, 20, family, (tp, pp, vpp, dp), options)
    for got, _ in results:
        for iteration, (mine, theirs) in enumerate(zip(got, expected, strict=True), 1):
            assert mine[0] == pytest.approx(theirs[0], abs=1e-5), f"loss of iteration {iteration}"
            assert mine[1] == pytest.approx(theirs[1], abs=1e-4), f"gradient norm of iteration {iteration}"
    if not distributed:
        _same_gradients(results[0][1], gradients, 1e-5)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_r16_loss_and_gradient_do_not_depend_on_how_a_batch_is_cut(micro: int, dp: int, pp: int) -> None:
    """Rows 0 and 4 have nothing to train on: at micro 1 they are micro-batches of their own."""
    base = {"global_batch_size": 8, "layers": 2}
    expected, gradients = ranks.run(1, _run, 1, "gpt_bigcode", (), {**base, "micro_batch_size": 8})[0]
    got, mine = ranks.run(dp * pp, _run, 1, "gpt_bigcode", (1, pp, None, dp), {**base, "micro_batch_size": micro})[0]
    assert got[0][0] == pytest.approx(expected[0][0], abs=1e-6)
    _same_gradients(mine, gradients, 1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_nothing(recompute: str) -> None:
    plain = ranks.run(2, _run, 3, "llama", (2, 1, None, 1), {"layers": 2})[0][0]
    assert ranks.run(2, _run, 3, "llama", (2, 1, None, 1), {"layers": 2, "recompute": recompute})[0][0] == plain


@pytest.mark.parametrize(("vpp", "pp"), [(None, 1), (2, 2)])
def test_overlapped_gradient_reduction_changes_nothing(vpp: int | None, pp: int) -> None:
    plain = ranks.run(2 * pp, _run, 3, "llama", (1, pp, vpp, 2), {"layers": 4, "distributed": True})[0][0]
    options = {"layers": 4, "distributed": True, "overlap": True}
    overlapped = ranks.run(2 * pp, _run, 3, "llama", (1, pp, vpp, 2), options)[0][0]
    for mine, theirs in zip(overlapped, plain, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


def test_a_wrong_batch_would_be_seen() -> None:
    """The comparison has teeth: other borders between samples are off by far more than the tolerance."""
    expected, _ = _single("gpt_bigcode", 2)
    other = ranks.run(1, _run, 1, "gpt_bigcode", (), {"layers": 2, "rows": tiny_layout.SeededRows(segments=(10, 1, 9))})[0][0]
    assert abs(other[0][0] - expected[0][0]) > 1e-4
