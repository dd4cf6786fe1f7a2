"""R1 and R2: a stopped and resumed run ends bit for bit like one that was never stopped.

Losses, gradient norms, parameters, optimizer state and random states are compared with tolerance 0, with dropout on. Runs
that resume start from other weights and another seed, so that nothing can be right by accident.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megawrap import parallel
from megawrap.config import DataConfig, ObjectiveConfig
from megawrap.data import plan
from megawrap.data.loader import Loader
from tests import ranks
from tests.checkpoint.tiny_run import ROWS, TinyRun
from tests.data.documents import END, write

pytestmark = [pytest.mark.fault, pytest.mark.dist]

TOTAL = 8
STOPS = (1, 2, 4, 7)
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))


def _run(tp: int, pp: int, seed: int, prefix: str) -> TinyRun:
    run = TinyRun(tp=tp, pp=pp, seed=seed)
    data = DataConfig(splits=[f'train: 1 0:1 "{prefix}"'], seq_length=16)
    made = plan.build(data.splits, data, ObjectiveConfig(), global_batch_size=ROWS, iterations=TOTAL, build_cache=False)
    assert made.report[0].rows == 3 * ROWS // 2, "the second epoch begins inside the second iteration, the third with the fourth"
    run.trainer.train_loader = Loader(
        made.train, dp_rank=parallel.dp_rank(), dp_size=1, micro_batch_size=1, global_batch_size=ROWS
    )  # fmt: skip
    return run


def _whole(tp: int, pp: int, root: str, prefix: str, stops: tuple[int, ...]) -> tuple[list[Any], str, dict[int, str]]:
    run, steps, directories = _run(tp, pp, 7, prefix), [], {}
    for iteration in range(1, TOTAL + 1):
        steps += run.train(1)
        if iteration in stops:
            directories[iteration] = run.save(root)
    return steps, run.digest(), directories


def _resumed(tp: int, pp: int, directory: str, prefix: str) -> tuple[list[Any], str]:
    run = _run(tp, pp, 99, prefix)
    assert run.load(directory).random_states
    return run.train(TOTAL - run.trainer.progress.iteration), run.digest()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of twelve rows of 16 positions, each filled by one sample."""
    path = tmp_path_factory.mktemp("rows") / "data"
    write(
        path, [[(0, [1 + (7 * n + k) % 120 for k in range(8)]), (1, [1 + (5 * n + k) % 120 for k in range(8)] + [END])] for n in range(12)]
    )
    return str(path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, prefix: str) -> dict[tuple[int, int], list[Any]]:
    """By layout: every rank's steps, digest and checkpoints."""
    return {
        (tp, pp): ranks.run(tp * pp, _whole, tp, pp, str(tmp_path_factory.mktemp(f"tp{tp}pp{pp}")), prefix, STOPS) for tp, pp in LAYOUTS
    }


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_r1_resume_is_bit_for_bit(tp: int, pp: int, stop: int, uninterrupted: dict[tuple[int, int], list[Any]], prefix: str) -> None:
    whole = uninterrupted[tp, pp]
    again = ranks.run(tp * pp, _resumed, tp, pp, whole[0][2][stop], prefix)
    for (steps, digest, _), (found, resumed_digest) in zip(whole, again, strict=True):
        assert found == steps[stop:]
        assert resumed_digest == digest


def _five_times(root: str, prefix: str, first: str) -> tuple[list[Any], str]:
    directory, steps = first, []
    for _ in range(5):
        run = _run(1, 1, 99, prefix)
        run.load(directory)
        steps += run.train(1)
        directory = run.save(root)
        digest = run.digest()
        parallel.reset()
    return steps, digest


def test_r2_five_resumes_in_a_row(uninterrupted: dict[tuple[int, int], list[Any]], prefix: str, tmp_path: Path) -> None:
    steps, _, directories = uninterrupted[1, 1][0]
    found, _ = ranks.run(1, _five_times, str(tmp_path), prefix, directories[2])[0]
    assert found == steps[2:7]


def test_r2_at_an_epoch_border(prefix: str, tmp_path: Path) -> None:
    """After three iterations of 8 rows the two first epochs of 12 rows are over."""
    steps, digest, directories = ranks.run(1, _whole, 1, 1, str(tmp_path), prefix, (3,))[0]
    assert ranks.run(1, _resumed, 1, 1, directories[3], prefix)[0] == (steps[3:], digest)


def test_r2_with_another_save_interval(uninterrupted: dict[tuple[int, int], list[Any]], prefix: str, tmp_path: Path) -> None:
    """Saving more or less often changes nothing that is trained."""
    steps, digest, _ = ranks.run(1, _whole, 1, 1, str(tmp_path), prefix, tuple(range(1, TOTAL + 1)))[0]
    assert (steps, digest) == uninterrupted[1, 1][0][:2]


def test_a_stop_that_loses_the_random_state_is_seen(uninterrupted: dict[tuple[int, int], list[Any]], prefix: str) -> None:
    """The comparison has teeth: without the random states the next dropout is another."""
    steps, _, directories = uninterrupted[1, 1][0]
    assert ranks.run(1, _without_random_states, directories[4], prefix)[0] != steps[4:5]


def _without_random_states(directory: str, prefix: str) -> list[Any]:
    run = _run(1, 1, 99, prefix)
    run.load(directory, rng=False)
    return run.train(1)
