"""The state of megatron-core's optimizers as full tensors per model parameter, whatever class and layout they have.

Comes in: megatron-core's optimizer of a run. Goes out: for every parameter its fp32 main copy (`param`, where it is not the
parameter itself) and its moments (`exp_avg`, `exp_avg_sq`); and the same back. Own code because megatron-core writes three
different formats for its three optimizer classes, gathers a whole distributed optimizer at once, and refuses to save
before the first step: a run could not change from dp 1 to dp 2, where its optimizer class changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

MAIN = "param"
MOMENTS = ("exp_avg", "exp_avg_sq")


def initialise(inner: torch.optim.Optimizer) -> None:
    """Give an inner Adam that has not stepped yet the moments it would make at its first step: zeros."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            if isinstance(inner, torch.optim.Adam) and "step" not in state:  # AdamW is one; others count per group
                on_device = group.get("fused") or group.get("capturable")
                state["step"] = torch.zeros((), device=parameter.device if on_device else "cpu")


def get_step(inner: torch.optim.Optimizer) -> int:
    """Steps that were taken."""
    counts = [int(group["step"]) for group in inner.param_groups if "step" in group]
    counts += [int(state["step"]) for state in inner.state.values() if "step" in state]
    return max(counts, default=0)


def set_step(inner: torch.optim.Optimizer, step: int) -> None:
    """Make the next step number `step` + 1."""
    per_parameter = isinstance(inner, torch.optim.Adam)
    for group in inner.param_groups:
        if not per_parameter:
            group["step"] = step
    for state in inner.state.values():
        if "step" in state:
            state["step"].fill_(step)


class ParameterStates(ABC):
    """Main copy and moments of the parameters of one megatron-core optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        initialise(optimizer.optimizer)

    @abstractmethod
    def owner(self, parameter: torch.nn.Parameter) -> int | None:
        """Data-parallel rank that can write this parameter's state without being sent most of it; None: any can."""

    @abstractmethod
    def names(self, parameter: torch.nn.Parameter) -> tuple[str, ...]:
        """What there is for this parameter; the same on every data-parallel rank. Empty: it is not trained."""

    @abstractmethod
    def collect(self, parameter: torch.nn.Parameter, name: str, owner: int) -> torch.Tensor | None:
        """One full tensor, of the parameter's shape, on rank `owner` of the data-parallel group; None elsewhere.

        All ranks of the group call it in the same order.
        """

    @abstractmethod
    def is_here(self, parameter: torch.nn.Parameter) -> bool:
        """Whether this rank holds any of this parameter's state."""

    @abstractmethod
    def restore(self, parameter: torch.nn.Parameter, name: str, full: torch.Tensor) -> None:
        """Take this rank's part of a full tensor of the parameter's shape."""


class WholeStates(ParameterStates):
    """Optimizers that hold all of every parameter on every data-parallel rank."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._trained = {id(parameter) for group in optimizer.optimizer.param_groups for parameter in group["params"]}

    @staticmethod
    def _main(parameter: torch.nn.Parameter) -> torch.Tensor:
        main = getattr(parameter, "main_param", None)
        return parameter if main is None else main

    def owner(self, parameter: torch.nn.Parameter) -> int | None:
        return None

    def names(self, parameter: torch.nn.Parameter) -> tuple[str, ...]:
        main = self._main(parameter)
        if id(main) not in self._trained:
            return ()
        return MOMENTS if main is parameter else (MAIN, *MOMENTS)

    def _live(self, parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
        main = self._main(parameter)
        return main if name == MAIN else self.optimizer.optimizer.state[main][name]

    def collect(self, parameter: torch.nn.Parameter, name: str, owner: int) -> torch.Tensor | None:
        return self._live(parameter, name)

    def is_here(self, parameter: torch.nn.Parameter) -> bool:
        return bool(self.names(parameter))

    def restore(self, parameter: torch.nn.Parameter, name: str, full: torch.Tensor) -> None:
        self._live(parameter, name).data.copy_(full)


class ShardedStates(ParameterStates):
    """megatron-core's distributed optimizer: buffers of all parameters, cut into one flat piece per data-parallel rank."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        super().__init__(optimizer)
        self._group = optimizer.data_parallel_group
        self._rank: int = self._group.rank()
        self._pieces: dict[torch.nn.Parameter, list[tuple[int, int, int]]] = {}  # (rank, begin, end) within the parameter
        for buffer in optimizer.buffers:
            for parameter, (begin, end, bucket_number) in buffer.param_index_map.items():
                bucket = buffer.buckets[bucket_number]
                size = bucket.grad_data.numel() // self._group.size()
                self._pieces[parameter] = list(_pieces(begin, end, bucket.offset, size, self._group.size()))

    def owner(self, parameter: torch.nn.Parameter) -> int | None:
        pieces = self._pieces.get(parameter)
        return max(pieces, key=lambda piece: (piece[2] - piece[1], -piece[0]))[0] if pieces else None

    def names(self, parameter: torch.nn.Parameter) -> tuple[str, ...]:
        if parameter not in self._pieces:
            return ()
        return MOMENTS if parameter.dtype == torch.float32 else (MAIN, *MOMENTS)

    def _live(self, parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
        group, order = self.optimizer.model_param_group_index_map[parameter]
        main = self.optimizer.optimizer.param_groups[group]["params"][order]
        return main.detach() if name == MAIN else self.optimizer.optimizer.state[main][name]

    def collect(self, parameter: torch.nn.Parameter, name: str, owner: int) -> torch.Tensor | None:
        pieces = self._pieces[parameter]
        if self._rank != owner:
            if any(rank == self._rank for rank, _, _ in pieces):
                dist.send(self._live(parameter, name).contiguous(), group=self._group, group_dst=owner)
            return None
        full = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
        for rank, begin, end in pieces:
            if rank == owner:
                full[begin:end] = self._live(parameter, name)
            else:
                dist.recv(full[begin:end], group=self._group, group_src=rank)
        return full.view(parameter.shape)

    def is_here(self, parameter: torch.nn.Parameter) -> bool:
        return any(rank == self._rank for rank, _, _ in self._pieces.get(parameter, ()))

    def restore(self, parameter: torch.nn.Parameter, name: str, full: torch.Tensor) -> None:
        for rank, begin, end in self._pieces[parameter]:
            if rank == self._rank:
                self._live(parameter, name).copy_(full.reshape(-1)[begin:end])


def _pieces(begin: int, end: int, offset: int, size: int, ranks: int) -> Iterator[tuple[int, int, int]]:
    """The parts of [begin, end) that fall into each rank's cut of a bucket, counted from `begin`."""
    for rank in range(ranks):
        low, high = max(begin, offset + rank * size), min(end, offset + (rank + 1) * size)
        if low < high:
            yield rank, low - begin, high - begin


def states_of(megatron_optimizer: Any) -> list[ParameterStates]:
    """One view per optimizer in megatron-core's chain; none for a rank without trained parameters."""
    chain = getattr(megatron_optimizer, "chained_optimizers", [megatron_optimizer])
    real = [optimizer for optimizer in chain if not getattr(optimizer, "is_stub_optimizer", False)]
    return [ShardedStates(o) if isinstance(o, DistributedOptimizer) else WholeStates(o) for o in real]
