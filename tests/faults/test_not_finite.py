"""R10: a loss or gradient that is not finite is never applied, and the batch's samples are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megawrap.errors import TrainingError
from megawrap.training.optimizer import unwrap
from tests import ranks
from tests.training import tiny_layout

pytestmark = [pytest.mark.fault, pytest.mark.dist]

PLACES = ("loss", "gradient", "weight", "data")
VALUES = ("nan", "inf")


def _inject(trainer: Any, place: str, value: float) -> None:
    """Put `value` where it can arise: a weight, one gradient, the loss, what the model makes of one token of the data."""
    bare = trainer.chunks[0]
    if place == "weight":
        with torch.no_grad():
            next(iter(bare.parameters())).view(-1)[0] = value
    elif place == "gradient":
        norm = trainer.optimizer.gradient_norm

        def poisoned() -> float:
            next(iter(bare.parameters())).main_grad.view(-1)[0] = value
            return norm()

        trainer.optimizer.gradient_norm = poisoned
    elif place == "loss":
        compute = trainer.objective.loss

        def broken(output: Any, batch: Any) -> Any:
            loss = compute(output, batch)
            return type(loss)(total=loss.total * value, count=loss.count, sums=loss.sums)

        trainer.objective.loss = broken
    else:

        def poison(_: Any, __: Any, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.clone()
            hidden[1] = value
            return hidden

        unwrap(trainer.chunks)[0].embedding.register_forward_hook(poison)


def _digest(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in trainer.chunks for parameter in chunk.parameters()]


def _stopped(place: str, value: str, tp: int) -> tuple[str, bool]:
    trainer = tiny_layout.build("gpt_bigcode", tp, layers=2, rows=tiny_layout.SeededRows(masked_every=10**6))
    trainer.step()
    _inject(trainer, place, float(value))
    before = _digest(trainer)
    with pytest.raises(TrainingError) as caught:
        trainer.step()
    unchanged = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, _digest(trainer), strict=True))
    return caught.value.message, unchanged and trainer.progress.iteration == 1


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", PLACES)
def test_r10_stops_before_the_step_and_names_the_samples(place: str, value: str) -> None:
    for message, unchanged in ranks.run(2, _stopped, place, value, 2):
        assert unchanged, "a parameter changed"
        assert "iteration 2" in message and "no step was taken" in message and "row 12" in message


def _skipping(max_skipped: int) -> tuple[int, str]:
    trainer = tiny_layout.build("gpt_bigcode", layers=2, on_nonfinite="skip", max_skipped=max_skipped)
    _inject(trainer, "gradient", float("nan"))
    before = _digest(trainer)
    for _ in range(max_skipped):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, _digest(trainer), strict=True))
    with pytest.raises(TrainingError) as caught:
        trainer.step()
    return trainer.progress.iteration, caught.value.message


def test_r10_skipping_is_capped() -> None:
    iteration, message = ranks.run(1, _skipping, 2)[0]
    assert iteration == 2 and "after 2 skipped steps in a row" in message


def _spike() -> tuple[float, float]:
    """A batch whose loss is huge but finite is clipped to the configured norm, not skipped."""
    trainer = tiny_layout.build("gpt_bigcode", layers=2)
    compute = trainer.objective.loss

    def huge(output: Any, batch: Any) -> Any:
        loss = compute(output, batch)
        return type(loss)(total=loss.total * 1e6, count=loss.count, sums=loss.sums)

    trainer.objective.loss = huge  # type: ignore[method-assign]
    before = _digest(trainer)
    _, norm = trainer.step()
    return norm, max((a - b).abs().max().item() for a, b in zip(before, _digest(trainer), strict=True))


def test_r10_a_loss_spike_is_clipped() -> None:
    norm, moved = ranks.run(1, _spike)[0]
    assert norm > 1e4 and 0 < moved < 2e-3, "AdamW moves a parameter by about its learning rate"
