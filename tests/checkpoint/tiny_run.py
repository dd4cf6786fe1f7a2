"""A tiny run on real ranks for checkpoint tests: real model, optimizer and loop over rows drawn from a seed.

`TinyRun(...)` is built on every rank of a test's pool; `train(n)` takes n optimizer steps and gives each one's loss and
gradient norm. Rows depend on the number of consumed rows alone, as the real loader's do.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megawrap import families, objectives, parallel
from megawrap.checkpoint.state import Loaded, TrainingState, load_state, save_state
from megawrap.checkpoint.store import Store
from megawrap.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from megawrap.models import gpt, weights
from megawrap.parallel import Layout
from megawrap.training.loop import Progress, Trainer
from megawrap.training.optimizer import Optimizer, wrap
from megawrap.training.schedule import Schedule
from megawrap.training.signals import StopRequest

ROWS, LENGTH = 8, 16


class Rows:
    """Global row r is drawn from the seed and r; it belongs to the rank and micro-batch the loader's rule says."""

    def __init__(self, vocab_size: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> None:
        self.vocab_size, self.dp_rank, self.dp_size, self.micro = vocab_size, dp_rank, dp_size, micro_batch_size

    def micro_batches(self, consumed_rows: int) -> list[dict[str, Any]]:
        """The micro-batches of this rank in the global batch that starts there."""
        count = ROWS // (self.dp_size * self.micro)
        return [self._micro(consumed_rows + (m * self.dp_size + self.dp_rank) * self.micro) for m in range(count)]

    def _micro(self, first: int) -> dict[str, Any]:
        tokens = np.concatenate([np.random.default_rng(first + j).integers(0, self.vocab_size, LENGTH) for j in range(self.micro)])
        lengths = np.array([10, LENGTH - 10] * self.micro, np.int32)
        return {
            "tokens": tokens,
            "labels": np.roll(tokens, -1),
            "weights": (np.arange(len(tokens)) % 2).astype(np.float32),
            "position_ids": np.concatenate([np.arange(n) for n in lengths]),
            "segment_lengths": lengths,
            "num_tokens": len(tokens),
            "squared_lengths": int((lengths.astype(np.int64) ** 2).sum()),
        }


class TinyRun:
    """One rank's part of a run."""

    def __init__(
        self, *, tp: int = 1, pp: int = 1, dp: int = 1, vpp: int | None = None, family: str = "gpt_bigcode", precision: str = "fp32",
        distributed: bool = False, dropout: float = 0.1, seed: int = 7, changes: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.layout = Layout(tp=tp, pp=pp, dp=dp, vpp=vpp)
        parallel.start(self.layout, seed=seed)
        self.precision, self.seed = precision, seed
        known = families.get(family)
        self.architecture = known.from_hf(known.tiny(**(changes or {})))
        build = gpt.Build(precision=precision, hidden_dropout=dropout, vocab_divisor=4, padded_vocab_size=144)
        bare = gpt.build_chunks(self.architecture, self.layout, build)
        weights.fill(bare, weights.random_source(self.architecture, seed=seed, std=0.1))
        self.chunks = wrap(bare, distributed=distributed, overlap=False)
        optim = OptimConfig(lr=1e-2, min_lr=1e-3)
        self.optimizer = Optimizer(self.chunks, optim, distributed=distributed, overlap=False)
        train = TrainConfig(iterations=100, global_batch_size=ROWS, micro_batch_size=1)
        config = Config(run="unused", model=ModelConfig(family=family), data=DataConfig(splits="unused"), train=train, optim=optim)
        self.trainer = Trainer(
            config=config, architecture=self.architecture, chunks=self.chunks, optimizer=self.optimizer,
            schedule=Schedule.from_config(optim, config.schedule, train), objective=objectives.get("sft"),
            train_loader=Rows(131, parallel.dp_rank(), dp, 1), eval_loaders={}, progress=Progress(),
            save=lambda at: None, report=lambda record: None, stop=StopRequest(),
        )  # fmt: skip

    def train(self, steps: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each of the next steps."""
        return [(totals.loss, norm) for totals, norm in (self.trainer.step() for _ in range(steps))]

    def state(self, *, optimizer: bool = True) -> TrainingState:
        """What is saved and loaded."""
        return TrainingState(
            chunks=self.chunks, optimizer=self.optimizer.megatron if optimizer else None, architecture=self.architecture,
            padded_vocab_size=144, layout=self.layout, precision=self.precision, iteration=self.trainer.progress.iteration,
            consumed_rows=self.trainer.progress.consumed_rows, extra={"tokenizer": {"sha256": "00"}},
        )  # fmt: skip

    def save(self, root: str, **options: Any) -> str:
        """Commit the state to a store; the directory."""
        iteration = self.trainer.progress.iteration
        return str(Store(Path(root), **options).save(iteration, lambda path: save_state(path, self.state()), {"world": 1}).path)

    def load(self, directory: str, **options: Any) -> Loaded:
        """Take the state of a directory, and its progress."""
        loaded = load_state(Path(directory), self.state(), seed=self.seed, **options)
        self.trainer.progress = Progress(iteration=loaded.iteration, consumed_rows=loaded.consumed_rows)
        return loaded

    def digest(self) -> str:
        """sha256 of everything on this rank that a bitwise resume must restore."""
        digest = hashlib.sha256()

        def add(tensor: torch.Tensor) -> None:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

        for chunk in self.chunks:
            for parameter in chunk.parameters():
                add(parameter.reshape(-1))
        for inner in self.optimizer.megatron.chained_optimizers:
            for group in inner.optimizer.param_groups:
                digest.update(str(group.get("step")).encode())
                for parameter in group["params"]:
                    add(parameter.reshape(-1))
                    for name in ("exp_avg", "exp_avg_sq"):
                        add(inner.optimizer.state[parameter][name].reshape(-1))
        add(torch.get_rng_state())
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        for name, state in sorted(get_cuda_rng_tracker().get_states().items()):
            digest.update(name.encode())
            add(state)
        return digest.hexdigest()
