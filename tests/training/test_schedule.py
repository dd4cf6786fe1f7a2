"""Schedules against the published formulas and transformers' own schedulers where the two mean the same."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch
import transformers.optimization as hf

from megawrap.config import OptimConfig, ScheduleConfig, TrainConfig
from megawrap.errors import ConfigError
from megawrap.training import schedule as schedules
from megawrap.training.schedule import Schedule

MAX, MIN, TOTAL = 4e-4, 3e-5, 200


def make(name: str, warmup: float = 0, decay: float = 0.1, *, min_lr: float = MIN, iterations: int = TOTAL) -> Schedule:
    return Schedule.from_config(
        OptimConfig(lr=MAX, min_lr=min_lr), ScheduleConfig(name=name, warmup=warmup, decay=decay), TrainConfig(iterations=iterations)
    )


def published(name: str, i: int, w: int, d: int) -> float:
    """The formulas written once more, one case at a time."""
    if i < w:
        return MAX * (i + 1) / w
    if name == "constant":
        return MAX
    if name == "inverse-sqrt":
        t = w if w else 10000
        return max(MIN, MAX / math.sqrt((i + t - w) / t))
    if i >= TOTAL:
        return MIN
    if name == "cosine":
        return MIN + (MAX - MIN) / 2 * (1 + math.cos(math.pi * (i - w) / (TOTAL - w)))
    if name == "linear":
        return MAX - (MAX - MIN) * (i - w) / (TOTAL - w)
    return MAX if i < TOTAL - d else MAX - (MAX - MIN) * (i - TOTAL + d) / d


@pytest.mark.parametrize("name", schedules.known())
@pytest.mark.parametrize("warmup", [0, 1, 17])
def test_formulas(name: str, warmup: int) -> None:
    ours = make(name, warmup, 30)
    for i in range(TOTAL + 20):
        assert ours(i) == pytest.approx(published(name, i, warmup, 30), rel=1e-12), i


def transformers_rates(name: str, w: int, d: int) -> list[float]:
    """Rates of transformers' scheduler at steps 0..TOTAL, for a floor of MIN."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=MAX)
    scheduler = {
        "cosine": lambda: hf.get_cosine_with_min_lr_schedule_with_warmup(optimizer, w, TOTAL, min_lr=MIN),
        "linear": lambda: hf.get_linear_schedule_with_warmup(optimizer, w, TOTAL),
        "constant": lambda: hf.get_constant_schedule_with_warmup(optimizer, w),
        "inverse-sqrt": lambda: hf.get_inverse_sqrt_schedule(optimizer, w),
        "wsd": lambda: hf.get_wsd_schedule(optimizer, w, d, num_stable_steps=TOTAL - w - d, decay_type="linear", min_lr_ratio=MIN / MAX),
    }[name]()
    rates = []
    for _ in range(TOTAL + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", schedules.known())
@pytest.mark.parametrize("warmup", [0, 25])
def test_equals_transformers_after_warmup(name: str, warmup: int) -> None:
    """transformers warms up with i / w instead of (i + 1) / w (its wsd from the floor); from w on the two are one."""
    min_lr = 0.0 if name in ("linear", "inverse-sqrt") else MIN
    ours, theirs = make(name, warmup, 40, min_lr=min_lr), transformers_rates(name, warmup, 40)
    for i in range(warmup, TOTAL + 1):
        assert ours(i) == pytest.approx(theirs[i], rel=1e-9, abs=1e-15), i
    for i in range(1, warmup if name != "wsd" else 0):
        assert ours(i - 1) == pytest.approx(theirs[i], rel=1e-9)


@pytest.mark.parametrize("name", schedules.known())
def test_bounds_and_shape(name: str) -> None:
    ours = make(name, 20)
    rates = [ours(i) for i in range(3 * TOTAL)]
    assert 0 < rates[0] == MAX / 20 and rates[19] == MAX
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert max(rates) == MAX and min(rates[20:]) >= MIN
    if name in ("cosine", "linear", "wsd"):
        assert rates[TOTAL] == MIN == rates[-1] and rates[TOTAL - 1] > MIN


def test_whole_run_of_warmup_and_of_decay() -> None:
    assert make("cosine", TOTAL)(TOTAL - 1) == MAX and make("cosine", TOTAL)(TOTAL) == MIN
    assert make("wsd", 0, TOTAL)(0) == MAX and make("wsd", 0, TOTAL)(TOTAL // 2) == pytest.approx((MAX + MIN) / 2)


@pytest.mark.parametrize(
    ("given", "total", "expected"), [(0.01, 1000, 10), (0.07, 100, 7), (0.01, 10, 0), (1, 100, 1), (25.0, 100, 25), (0, 100, 0)]
)
def test_warmup_is_a_count_or_a_fraction(given: float, total: int, expected: int) -> None:
    assert make("cosine", given, iterations=total).warmup == expected


@pytest.mark.parametrize(
    ("name", "warmup", "decay", "facts"),
    [
        ("cosine", 2.5, 0, ["schedule.warmup", "2.5", "whole"]),
        ("cosine", 201, 0, ["201", "200", "train.iterations"]),
        ("wsd", 150, 60, ["150", "60", "200"]),
        ("wsd", 0, 1.5, ["schedule.decay", "1.5"]),
        ("cosin", 0, 0, ["cosin", "cosine", "wsd"]),
    ],
)
def test_refusals_state_the_facts(name: str, warmup: float, decay: float, facts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        make(name, warmup, decay)
    assert all(fact in str(refused.value) for fact in facts)


def test_every_configurable_name_is_known() -> None:
    assert set(get_args(get_type_hints(ScheduleConfig)["name"])) == set(schedules.known())
