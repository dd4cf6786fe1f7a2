"""The training loop: global batch in, optimizer step out, evaluation and checkpoints at their intervals.

In: wrapped model chunks, an optimizer, loaders and what saves. Out: whether the last iteration was reached. One all-reduce
per iteration carries the loss, the counts and every rank's wish to stop, so that all ranks take the same decisions. The
loop knows neither files nor families.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megawrap import device, parallel
from megawrap.config import Config
from megawrap.errors import TrainingError
from megawrap.models.architecture import Architecture
from megawrap.models.batch import Batch
from megawrap.objectives import Objective
from megawrap.training.flops import training_flops
from megawrap.training.loggers import PHASES, Record
from megawrap.training.optimizer import Optimizer
from megawrap.training.schedule import Schedule
from megawrap.training.signals import StopRequest

FIM = ("transformed", "kept", "outgrown")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is; with the configuration it decides everything that comes next."""

    iteration: int = 0
    """Finished iterations."""
    consumed_rows: int = 0
    """Rows of the training data that were used."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums of one global batch over all micro-batches and ranks."""

    loss_sum: float
    count: int
    targets: int
    """Positions whose label is trained."""
    tokens: int
    """Positions that are not padding."""
    positions: int
    squared_lengths: int
    stops: int
    """Ranks that were asked to stop."""
    fim: tuple[int, ...]
    """Samples transformed for fill-in-the-middle, kept, outgrown."""
    sums: Mapping[str, float]
    """What the objective reports, not yet divided."""

    @property
    def loss(self) -> float:
        """Weighted mean over the global batch, nats; 0 when nothing in it is trained."""
        return self.loss_sum / self.count if self.count else 0.0


class Trainer:
    """Runs a configuration from a progress to its end.

    Args:
        config: the run, already validated.
        architecture: of the model, for counting floating-point operations.
        chunks: wrapped model chunks of this rank.
        optimizer: over those chunks.
        schedule: learning rate by finished iterations.
        objective: what is learned.
        train_loader: `micro_batches(consumed_rows)` gives this rank's micro-batches of a global batch.
        eval_loaders: by group, iterables over global batches of micro-batches.
        progress: where to begin.
        save: called on all ranks with the progress to keep.
        report: called with every record; does something on rank 0 only.
        stop: set by signals.
        peak: matrix-product peak of all ranks together, FLOP/s, or none.
    """

    def __init__(
        self, *, config: Config, architecture: Architecture, chunks: Sequence[Any], optimizer: Optimizer, schedule: Schedule,
        objective: Objective, train_loader: Any, eval_loaders: Mapping[str, Any], progress: Progress,
        save: Callable[[Progress], None], report: Callable[[Record], None], stop: StopRequest, peak: float | None = None,
    ) -> None:  # fmt: skip
        self.config, self.architecture, self.chunks, self.optimizer = config, architecture, list(chunks), optimizer
        self.schedule, self.objective, self.progress = schedule, objective, progress
        self.train_loader, self.eval_loaders = train_loader, eval_loaders
        self.save, self.report, self.stop, self.peak = save, report, stop, peak
        self.device = device.detect().torch_device()
        self.forward_backward = get_forward_backward_func()
        self.interval = _Interval()
        self.skipped_in_a_row = 0

    def run(self) -> bool:
        """Train until the last iteration (True) or until a signal was answered with a checkpoint (False).

        Raises:
            TrainingError: a loss or gradient is not finite and the policy says stop.
        """
        total, evaluation, saving = self.config.train.iterations, self.config.eval.interval, self.config.checkpoint.interval
        if self.progress.iteration == 0 and evaluation and self.config.eval.at_start:
            self.evaluate()
        while (iteration := self.progress.iteration + 1) <= total:
            totals, norm = self.step()
            stopping, last = totals.stops > 0, iteration == total
            if iteration % self.config.log.interval == 0 or last or stopping:
                self._log(totals, norm)
            if evaluation and (iteration % evaluation == 0 or last) and not stopping:
                self.evaluate()
            if last or stopping or (saving and iteration % saving == 0):
                with self.interval.phase("checkpoint"):
                    self.save(self.progress)
            if stopping and not last:
                return False
        return True

    def step(self) -> tuple[Totals, float]:
        """One global batch and its optimizer step; returns its sums and the gradient norm before clipping."""
        with self.interval.phase("data"):
            batches = [Batch.of(arrays, self.device) for arrays in self.train_loader.micro_batches(self.progress.consumed_rows)]
        with self.interval.phase("forward_backward"):
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero()
            totals = self._totals(self._run(batches, forward_only=False), batches)
        with self.interval.phase("optimizer"):
            norm = self.optimizer.gradient_norm()
            if math.isfinite(totals.loss) and math.isfinite(norm):
                self.optimizer.step(self.schedule(self.progress.iteration))
                self.skipped_in_a_row = 0
            else:
                self._not_finite(totals, norm)
        self.interval.add(totals, training_flops(
            self.architecture, num_tokens=totals.tokens, squared_lengths=totals.squared_lengths, num_targets=totals.targets,
        ))  # fmt: skip
        self.progress = Progress(
            iteration=self.progress.iteration + 1,
            consumed_rows=self.progress.consumed_rows + self.config.train.global_batch_size,
        )
        return totals, norm

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss of every group over all its rows (or eval.batches of them), each reported under its own name."""
        losses = {}
        for chunk in self.chunks:
            chunk.eval()
        with self.interval.phase("eval"):
            for group, loader in self.eval_loaders.items():
                begin, group_sums = time.perf_counter(), Counter[str]()
                for micro_batches in loader:
                    batches = [Batch.of(arrays, self.device) for arrays in micro_batches]
                    totals = self._totals(self._run(batches, forward_only=True), batches)
                    group_sums.update(loss=totals.loss_sum, count=totals.count, targets=totals.targets, **totals.sums)  # type: ignore[call-overload]
                count = group_sums.pop("count") or 1
                losses[group], targets = group_sums.pop("loss") / count, int(group_sums.pop("targets"))
                self.report(Record(
                    iteration=self.progress.iteration, phase="eval", group=group, loss=losses[group], target_tokens=targets,
                    seconds={"eval": time.perf_counter() - begin},
                    metrics={name: value / count for name, value in group_sums.items()} or None,
                ))  # fmt: skip
        return losses

    def _run(self, batches: Sequence[Batch], *, forward_only: bool) -> list[dict[str, Any]]:
        """Push micro-batches through the pipeline; the last stage gets one dictionary of sums per micro-batch."""

        def forward_step(iterator: Iterator[Batch], model: Any, *_: Any) -> tuple[Any, Callable[..., Any]]:
            batch = next(iterator)
            output = self.objective.forward(model, batch)

            def loss_function(output: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
                loss = self.objective.loss(output, batch)
                count = torch.tensor(loss.count, dtype=torch.int, device=self.device)
                return loss.total, count, {"loss": loss.total.detach().clone(), "count": loss.count, **loss.sums}

            return output, loss_function

        iterators = [iter(batches) for _ in self.chunks]
        several = len(self.chunks) > 1
        return self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.size(1),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _totals(self, results: Sequence[Mapping[str, Any]], batches: Sequence[Batch]) -> Totals:
        """Add up over micro-batches and ranks: the last stage's first tensor-parallel ranks speak for their pipeline."""
        speaks = parallel.is_last_stage() and parallel.tp_rank() == 0
        names = self.objective.reports
        values = [float(bool(self.stop))] + [0.0] * (9 + len(names))
        if speaks:
            values[1:10] = [
                math.fsum(float(result["loss"]) for result in results),
                sum(result["count"] for result in results),
                sum(batch.num_targets for batch in batches),
                sum(batch.num_tokens for batch in batches),
                sum(batch.tokens.numel() for batch in batches),
                sum(batch.squared_lengths for batch in batches),
                *(sum(batch.fim[kind] for batch in batches) for kind in range(3)),
            ]
            values[10:] = [math.fsum(float(result[name]) for result in results) for name in names]
        vector = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(vector)
        stops, loss_sum, count, targets, tokens, positions, squared, *rest = vector.tolist()
        fim, rest = rest[:3], rest[3:]
        return Totals(
            stops=int(stops), loss_sum=loss_sum, count=int(count), targets=int(targets), tokens=int(tokens),
            positions=int(positions), squared_lengths=int(squared), fim=tuple(map(int, fim)), sums=dict(zip(names, rest, strict=True)),
        )  # fmt: skip

    def _not_finite(self, totals: Totals, norm: float) -> None:
        """Skip this step, or stop with the samples of the batch; the parameters were not touched."""
        expected = self.optimizer.scales_dynamically and math.isfinite(totals.loss)
        self.interval.skipped += 1
        if expected:  # fp16: the scale was too high and has just been lowered
            return
        self.skipped_in_a_row += 1
        policy = self.config.train
        if policy.on_nonfinite == "skip" and self.skipped_in_a_row <= policy.max_skipped:
            return
        samples = self.train_loader.describe(self.progress.consumed_rows)
        shown = "; ".join(samples[:8]) + (f"; and {len(samples) - 8} more rows" if len(samples) > 8 else "")
        cap = f" after {policy.max_skipped} skipped steps in a row" if policy.on_nonfinite == "skip" else ""
        raise TrainingError(
            f"iteration {self.progress.iteration + 1}: loss {totals.loss} and gradient norm {norm} must be finite{cap}; "
            f"no step was taken; the batch holds {shown}",
            hint="Look at these samples, lower optim.lr, or set train.on_nonfinite: skip.",
        )

    def _log(self, totals: Totals, norm: float) -> None:
        memory = torch.tensor([float(device.peak_memory())], dtype=torch.float64, device=self.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        record = self.interval.record(self.peak)
        self.report(replace(
            record, iteration=self.progress.iteration, loss=totals.loss, grad_norm=norm,
            lr=self.schedule(self.progress.iteration - 1), memory_mib=memory.item() / 2**20,
            loss_scale=self.optimizer.loss_scale if self.optimizer.scales_dynamically else None,
            metrics={name: value / max(1, totals.count) for name, value in totals.sums.items()} or None,
        ))  # fmt: skip
        self.interval = _Interval()


class _Interval:
    """What happened since the last logged line."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.tokens = self.positions = self.targets = self.flops = self.skipped = 0
        self.fim = Counter[str]()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin

    def add(self, totals: Totals, flops: int) -> None:
        self.tokens += totals.tokens
        self.positions += totals.positions
        self.targets += totals.targets
        self.flops += flops
        self.fim.update(dict(zip(FIM, totals.fim, strict=True)))

    def record(self, peak: float | None) -> Record:
        busy = sum(self.seconds[name] for name in ("data", "forward_backward", "optimizer")) or 1e-9
        return Record(
            iteration=0, phase="train", tokens=self.positions, useful_tokens=self.tokens, target_tokens=self.targets,
            tokens_per_s=self.positions / busy, useful_tokens_per_s=self.tokens / busy, target_tokens_per_s=self.targets / busy,
            flops_per_s=self.flops / busy, peak_share=self.flops / busy / peak if peak else None,
            seconds={name: value for name, value in self.seconds.items() if value}, skipped=self.skipped or None,
            fim=dict(self.fim) if any(self.fim.values()) else None,
        )  # fmt: skip
