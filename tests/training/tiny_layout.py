"""One rank of a tiny run in any layout, on rows that follow from a seed alone: losses, gradients and steps to compare.

The functions run on the ranks of tests/ranks.py. Rows and weights are the same for every layout; what comes back is full
tensors under canonical names, so that layouts can be compared with a single process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megawrap import families, objectives, parallel
from megawrap.checkpoint import state as checkpoint_state
from megawrap.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from megawrap.data.loader import Loader, RowPadding
from megawrap.models import gpt, weights
from megawrap.parallel import Layout
from megawrap.training.loop import Progress, Trainer
from megawrap.training.optimizer import Optimizer, wrap
from megawrap.training.schedule import Schedule
from megawrap.training.signals import StopRequest

SEQ_LENGTH = 24
VOCAB = 131


class SeededRows:
    """Row n: three segments and padding; every `masked_every`-th row has nothing to train on."""

    def __init__(self, masked_every: int = 4, segments: tuple[int, ...] = (9, 1, 10)) -> None:
        self.masked_every, self.segments = masked_every, segments

    def rows(self, numbers: np.ndarray) -> list[dict[str, np.ndarray]]:
        """See `megawrap.data.loader.RowOrder`."""
        return [self._row(int(number)) for number in numbers]

    def describe(self, numbers: np.ndarray) -> list[str]:
        """See `megawrap.data.loader.RowOrder`."""
        return [f"row {number}" for number in numbers]

    def _row(self, number: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(number)
        lengths = [*self.segments, SEQ_LENGTH - sum(self.segments)]
        weight = (rng.random(SEQ_LENGTH) < 0.5).astype(np.float32)
        weight[sum(self.segments) :] = 0
        if number % self.masked_every == 0:
            weight[:] = 0
        return {
            "tokens": rng.integers(0, VOCAB, SEQ_LENGTH),
            "labels": rng.integers(0, VOCAB, SEQ_LENGTH),
            "weights": weight,
            "position_ids": np.concatenate([np.arange(n) for n in lengths]),
            "segment_lengths": np.array(lengths, np.int32),
            "sample_ids": np.arange(3),
        }


def build(
    family: str, tp: int = 1, pp: int = 1, vpp: int | None = None, dp: int = 1, *, sequence_parallel: bool = False,
    distributed: bool = False, micro_batch_size: int = 1, global_batch_size: int = 12, precision: str = "fp32", layers: int = 6,
    rows: SeededRows | None = None, recompute: str = "none", lr: float = 1e-3,
    overlap: bool = False, padding: RowPadding | None = None, **train: Any,
) -> Trainer:  # fmt: skip
    """A trainer on this rank."""
    layout = Layout(tp=tp, pp=pp, vpp=vpp, dp=dp, sequence_parallel=sequence_parallel)
    parallel.start(layout)
    known = families.get(family)
    depth = "n_layer" if "n_layer" in known.tiny() else "num_hidden_layers"
    architecture = known.from_hf(known.tiny(**{depth: layers, "vocab_size": VOCAB}))
    bare = gpt.build_chunks(architecture, layout, gpt.Build(precision=precision, padded_vocab_size=144, recompute=recompute))
    weights.fill(bare, weights.random_source(architecture, seed=3, std=0.08))
    chunks = wrap(bare, distributed=distributed, overlap=overlap)
    optim = OptimConfig(lr=lr, min_lr=lr)
    options = TrainConfig(iterations=100, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, **train)
    config = Config(run="unused", model=ModelConfig(family=family), data=DataConfig(splits="x"), optim=optim, train=options)
    loader = Loader(
        rows or SeededRows(), dp_rank=parallel.dp_rank(), dp_size=dp, micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size, padding=padding,
    )  # fmt: skip
    return Trainer(
        config=config, architecture=architecture, chunks=chunks,
        optimizer=Optimizer(chunks, optim, distributed=distributed, overlap=overlap),
        schedule=Schedule.from_config(optim, config.schedule, options), objective=objectives.get("sft"), train_loader=loader,
        eval_loaders={}, progress=Progress(), save=lambda at: None, report=lambda record: None, stop=StopRequest(),
    )  # fmt: skip


def losses(steps: int, family: str, *args: Any, options: dict[str, Any] | None = None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    trainer = build(family, *args, **(options or {}))
    return [(totals.loss, norm) for totals, norm in (trainer.step() for _ in range(steps))]


def losses_and_first_gradients(
    steps: int, family: str, *args: Any, options: dict[str, Any] | None = None
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """`losses`, and on rank 0 the whole gradient of the first global batch by canonical name.

    Tied copies must agree. With the distributed optimizer a rank ends with its part of the gradient alone, so none is given.
    """
    trainer = build(family, *args, **(options or {}))
    whole: dict[str, torch.Tensor] = {}
    norm = trainer.optimizer.gradient_norm

    def look_first() -> float:
        if trainer.progress.iteration == 0 and not (options or {}).get("distributed"):
            whole.update(_gradients(trainer))
        return norm()

    trainer.optimizer.gradient_norm = look_first  # type: ignore[method-assign]
    return [(totals.loss, norm) for totals, norm in (trainer.step() for _ in range(steps))], whole


def _gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    pieces = []
    for chunk in trainer.chunks:
        for item in checkpoint_state._items(checkpoint_state._bare([chunk])[0]):
            for shard in checkpoint_state._shards(item, item.key, item.data.main_grad.view(item.data.shape)):
                layer = (shard.global_offset[0],) if shard.prepend_axis_num else ()
                where = tuple(shard.global_offset[shard.prepend_axis_num :])
                shape = tuple(shard.global_shape[shard.prepend_axis_num :])
                pieces.append((shard.key, layer, where, shape, shard.data.float().clone()))
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, pieces)
    full: dict[str, torch.Tensor] = {}
    for key, layer, where, shape, data in (piece for part in everything for piece in part):
        name = f"{key} {layer}"
        target = full.setdefault(name, torch.full(shape, float("nan")))
        target[tuple(slice(begin, begin + size) for begin, size in zip(where, data.shape, strict=True))] = data
    return full if dist.get_rank() == 0 else {}
