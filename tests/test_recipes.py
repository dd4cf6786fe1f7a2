"""Every recipe that is shipped parses, survives a round trip, and describes the published run it is named after."""

from __future__ import annotations

from pathlib import Path

import pytest

from megawrap.arguments import parse, to_yaml
from megawrap.config import Config

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def named_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STARCODERBASE", "SANTACODER", "SPLITS"):
        monkeypatch.setenv(name, f"/given/{name.lower()}")


def recipe(name: str) -> Config:
    return parse(["--config", str(next(path for path in RECIPES if path.stem == name))])[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_parses_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config, _ = parse(["--config", str(path)])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "again.yaml")])[0] == config
    assert path.read_text().startswith("# "), "a recipe says what it is"


def test_starcoderbase_is_the_published_recipe() -> None:
    config = recipe("starcoderbase-15b")
    assert config.model.init_from == config.data.tokenizer == "/given/starcoderbase"
    assert (config.parallel.tp, config.parallel.pp, config.parallel.sequence_parallel) == (4, 4, True)
    train = config.train
    assert (config.data.seq_length, train.micro_batch_size, train.global_batch_size, train.iterations) == (8192, 1, 128, 10_000)
    assert (config.optim.lr, config.optim.min_lr, config.schedule.name, config.schedule.warmup) == (5e-5, 5e-6, "cosine", 0.01)
    assert (config.optim.weight_decay, config.optim.beta2, config.optim.clip_grad, train.precision) == (0.05, 0.95, 1.0, "bf16")
    assert config.model.attention_dropout == config.model.hidden_dropout == 0.1
    assert config.checkpoint.interval == config.eval.interval == 250


def test_santacoder_is_the_published_recipe() -> None:
    config = recipe("santacoder-1b")
    train = config.train
    assert (config.data.seq_length, train.micro_batch_size, train.global_batch_size, train.iterations) == (2048, 8, 192, 50_000)
    assert (config.optim.lr, train.precision) == (4e-4, "fp16")


def test_demo_runs_on_two_ranks_and_evaluates_two_groups() -> None:
    config = recipe("stdlib-demo")
    assert config.parallel.tp == 2 and config.train.global_batch_size % config.train.micro_batch_size == 0
    assert [group.split(":")[0] for group in config.data.splits] == ["train", "valid_files", "valid_packages"]
