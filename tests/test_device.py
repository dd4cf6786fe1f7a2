"""What is chosen for a machine, and that every adaptation of megatron-core to CPU is still needed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from megawrap import device
from megawrap.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megawrap.errors import ConfigError
from tests import ranks
from tests.training import tiny_layout

ON_CPU = device.detect().kind == "cpu"


def _config(**sections: Any) -> Config:
    base: dict[str, Any] = {"model": ModelConfig(family="llama"), "data": DataConfig(splits="x")}
    return Config(run="unused", **{**base, **sections})


@pytest.mark.skipif(not ON_CPU, reason="there is a GPU: nothing is adapted")
@pytest.mark.dist
def test_every_adaptation_is_reached() -> None:
    """One that is never reached was made needless by an upgrade of megatron-core: take it out of device.py."""
    hits: dict[str, int] = {}
    for world, task in ((1, _all_precisions), (2, _pipeline_of_tied_embeddings)):
        for part in ranks.run(world, task):
            for key, count in part.items():
                hits[key] = hits.get(key, 0) + count
    assert {adaptation.key for adaptation in device.ADAPTATIONS} <= hits.keys()


@pytest.mark.skipif(not ON_CPU, reason="there is a GPU: nothing is adapted")
def test_no_compiler_is_loaded() -> None:
    """megatron-core alone loads torch's compiler on import: when it no longer does, take `_nothing_compiled` out of device.py."""
    ask = "import sys; print('torch._inductor' in sys.modules)"
    for start, loaded in (("from megawrap import device; device.adapt()", "False"), ("import megatron.core.models.gpt", "True")):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", f"{start}; {ask}"], capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == loaded


def _all_precisions() -> dict[str, int]:
    from megawrap import parallel

    device.HITS.clear()
    for precision in ("bf16", "fp16", "fp32"):
        tiny_layout.losses(1, "llama", options={"layers": 1, "precision": precision, "recompute": "full", "global_batch_size": 2})
        parallel.reset()
    return dict(device.HITS)


def _pipeline_of_tied_embeddings() -> dict[str, int]:
    device.HITS.clear()
    tiny_layout.losses(1, "gpt_bigcode", 1, 2, options={"layers": 2, "global_batch_size": 2})
    return dict(device.HITS)


@pytest.mark.skipif(not ON_CPU, reason="there is a GPU")
def test_choices_say_why() -> None:
    choices = device.choose(_config(), dp=2)
    assert choices.layers == "torch" and choices.attention == "sdpa" and choices.distributed_optimizer
    reasons = {setting: why for setting, _, why in choices.reasons}
    assert "no GPU" in reasons["train.layers"] and reasons["parallel.distributed_optimizer"] == "dp is 2"


@pytest.mark.skipif(not ON_CPU, reason="there is a GPU")
def test_what_the_machine_cannot_do_is_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        device.choose(
            _config(train=TrainConfig(layers="te", attention="varlen"), parallel=ParallelConfig(sequence_parallel=True)),
            dp=1,
        )
    for fact in ("train.layers is te", "train.attention is varlen", "tp is 1"):
        assert fact in caught.value.message
