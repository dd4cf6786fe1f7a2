"""megawrap in the training benchmark: the run that `megawrap finetune` makes, stopped between windows.

In: the worker's spec and its `Port`. The samples are written as an indexed dataset and the whole of `megawrap.finetune` is
run on it, so that data reading, counting and the finite checks are paid for; evaluation, saving and logging, which a window
must not contain, are put beyond its reach by their intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import SIZES
from benchmarks.samples import Sample
from benchmarks.worker import Port
from megawrap.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from megawrap.data.format import IndexedWriter, token_dtype

NEVER = 10**6  # iterations


def write_dataset(samples: Sequence[Sample], prefix: Path, vocab_size: int) -> None:
    """The samples as inputs/outputs documents at PREFIX.bin, .idx and .manifest.json."""
    with IndexedWriter(prefix, token_dtype(vocab_size)) as writer:
        lengths = np.array([[sample.num_inputs, sample.targets] for sample in samples], dtype=np.int32).ravel()
        two = np.full(len(samples), 2, dtype=np.int32)
        writer.add(np.concatenate([sample.tokens for sample in samples]), lengths, two, np.tile([0, 1], len(samples)).astype(np.int8))
        writer.commit({"tokenizer": {"vocab_size": vocab_size}})


def config(spec: dict[str, Any]) -> Config:
    """The recipe of a contender."""
    model = spec["model"]
    return Config(
        run=spec["run_dir"],
        model=ModelConfig(
            family="gpt_bigcode", **SIZES[model["size"]], vocab_size=model["vocab_size"], max_position_embeddings=model["positions"]
        ),
        data=DataConfig(splits=[f"train: 1.0 0:1 {spec['data_prefix']}"], seq_length=spec["seq_length"]),
        parallel=ParallelConfig(tp=spec.get("tp", 1)),
        optim=OptimConfig(lr=1e-5, min_lr=1e-6),
        train=TrainConfig(
            iterations=NEVER, micro_batch_size=spec["rows"], global_batch_size=spec["rows"], precision=spec["dtype"],
            recompute=spec.get("recompute", "none"),
        ),
        eval=EvalConfig(interval=0),
        checkpoint=CheckpointConfig(interval=0),
        log=LogConfig(interval=NEVER, plots=False),
    )  # fmt: skip


def run(spec: dict[str, Any], port: Port) -> None:
    """Serve windows of iterations of a real run."""
    from megawrap import finetune
    from megawrap.arguments import Options
    from megawrap.training import loop

    class Windowed(loop.Trainer):
        """The training loop, with a pause where a window ends."""

        def run(self) -> bool:
            port.ready(parameters=sum(p.numel() for chunk in self.chunks for p in chunk.parameters()))
            return super().run()

        def step(self) -> tuple[loop.Totals, float]:
            totals, norm = super().step()
            port.did(tokens=totals.tokens, targets=totals.targets, squared=totals.squared_lengths)
            return totals, norm

    loop.Trainer = Windowed  # type: ignore[misc]
    finetune.run(config(spec), Options())
