"""Learning rate as a pure function of the iteration.

In: the optim, schedule and train sections of the configuration. Out: `Schedule`, called with the number of
finished iterations i (0 before the first step), giving the rate of the step that comes next. There is no
state: a resumed run asks for iteration i and gets what the uninterrupted run got. Nothing here imports torch.

Symbols: max and min rates, w warmup iterations, D iterations of the whole run, d iterations of the final decay.
Every shape starts with max (i + 1) / w for i < w, so the first step already learns and step w is the first at max.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megawrap.config import OptimConfig, ScheduleConfig, TrainConfig
from megawrap.errors import ConfigError

INVERSE_SQRT_TIMESCALE = 10_000  # iterations; T5 (Raffel et al. 2020, 3.1.2) and transformers' default without warmup


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning-rate schedule; calling it gives the rate of the step after `iteration` finished ones."""

    name: str
    """One of `known()`."""
    max_lr: float
    """Rate at the end of warmup."""
    min_lr: float
    """Rate at the end of the decay, and the floor of inverse-sqrt."""
    iterations: int
    """Iterations of the whole run (D)."""
    warmup: int = 0
    """Iterations of linear warmup (w)."""
    decay: int = 0
    """wsd only: iterations of the final decay (d)."""

    @classmethod
    def from_config(cls, optim: OptimConfig, schedule: ScheduleConfig, train: TrainConfig) -> Schedule:
        """Resolve fractions of the run to iterations.

        Raises:
            ConfigError: the name is not known, a count is not whole, or warmup and decay do not fit in the run.
        """
        if schedule.name not in _SHAPES:
            raise ConfigError(f"schedule.name is {schedule.name!r}; known schedules: {', '.join(known())}")
        warmup = _iterations("schedule.warmup", schedule.warmup, train.iterations)
        decay = _iterations("schedule.decay", schedule.decay, train.iterations) if schedule.name == "wsd" else 0
        if warmup + decay > train.iterations:
            parts = f"schedule.warmup {warmup}" + (f" + schedule.decay {decay}" if decay else "")
            raise ConfigError(
                f"{parts} iterations do not fit in train.iterations {train.iterations}",
                hint="Give fewer, or fractions below 1 of train.iterations.",
            )
        return cls(name=schedule.name, max_lr=optim.lr, min_lr=optim.min_lr, iterations=train.iterations, warmup=warmup, decay=decay)

    def __call__(self, iteration: int) -> float:
        """Learning rate of the step that turns `iteration` finished iterations into one more (iteration >= 0)."""
        if iteration < self.warmup:
            return self.max_lr * (iteration + 1) / self.warmup
        return _SHAPES[self.name](self, iteration)


def known() -> tuple[str, ...]:
    """Names of the schedules."""
    return tuple(_SHAPES)


def _cosine(schedule: Schedule, iteration: int) -> float:
    """min + (max - min) / 2 (1 + cos(pi (i - w) / (D - w))), min after D (Loshchilov and Hutter 2017, one cycle)."""
    progress = _progress(iteration, schedule.warmup, schedule.iterations)
    return schedule.min_lr + (schedule.max_lr - schedule.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(schedule: Schedule, iteration: int) -> float:
    """max - (max - min) (i - w) / (D - w), min after D (Devlin et al. 2019)."""
    progress = _progress(iteration, schedule.warmup, schedule.iterations)
    return schedule.min_lr + (schedule.max_lr - schedule.min_lr) * (1.0 - progress)


def _constant(schedule: Schedule, iteration: int) -> float:
    """max."""
    return schedule.max_lr


def _inverse_sqrt(schedule: Schedule, iteration: int) -> float:
    """max sqrt(t / (t + i - w)), t = w or 10,000 without warmup, never under min (Raffel et al. 2020; transformers' timescale)."""
    timescale = schedule.warmup or INVERSE_SQRT_TIMESCALE
    return max(schedule.min_lr, schedule.max_lr * math.sqrt(timescale / (timescale + iteration - schedule.warmup)))


def _wsd(schedule: Schedule, iteration: int) -> float:
    """max until D - d, then linearly to min at D (warmup-stable-decay, Hu et al. 2024; linear decay as Hägele et al. 2024)."""
    progress = _progress(iteration, schedule.iterations - schedule.decay, schedule.iterations)
    return schedule.min_lr + (schedule.max_lr - schedule.min_lr) * (1.0 - progress)


def _progress(iteration: int, start: int, end: int) -> float:
    """Share of start..end that has passed, between 0 and 1; 1 at and after the end."""
    if iteration >= end:
        return 1.0
    return max(0.0, (iteration - start) / (end - start))


def _iterations(name: str, value: float, total: int) -> int:
    """A count of iterations as given: below 1 a fraction of the run (to the nearest whole), else a whole number."""
    if value < 1:
        return round(value * total)
    if value != int(value):
        raise ConfigError(f"{name} is {value}; it must be a whole number of iterations, or a fraction of the run below 1")
    return int(value)


_SHAPES: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "inverse-sqrt": _inverse_sqrt,
    "wsd": _wsd,
}
