"""How ranks share the model: the layout, its process groups and its random seeds.

In: sizes of a configuration and the world torch.distributed was started with. Out: a validated `Layout`, started
groups, and this rank's place in them. The only user of megatron-core's parallel_state.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megawrap import device
from megawrap.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist

    from megawrap.config import ParallelConfig
    from megawrap.models.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel dimensions; their product is the number of ranks."""

    tp: int = 1
    """Tensor parallel: every matrix is cut."""
    pp: int = 1
    """Pipeline parallel: layers are cut into stages."""
    vpp: int | None = None
    """Virtual stages per rank (interleaved schedule)."""
    dp: int = 1
    """Data parallel: copies of the model."""
    sequence_parallel: bool = False
    """Norms and dropout are split over the sequence inside a tensor-parallel group."""

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world: int, *, sequence_parallel: bool = False) -> Layout:
        """The layout of `world` ranks; dp is what tp x pp leaves.

        Raises:
            ConfigError: tp x pp does not divide the number of ranks.
        """
        if world % (parallel.tp * parallel.pp):
            raise ConfigError(
                f"parallel.tp {parallel.tp} x parallel.pp {parallel.pp} = {parallel.tp * parallel.pp} does not divide {world} rank(s)",
                hint=f"Start a multiple of {parallel.tp * parallel.pp} ranks (megawrap finetune --nproc N), or change tp or pp.",
            )
        dp = world // (parallel.tp * parallel.pp)
        return cls(tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, dp=dp, sequence_parallel=sequence_parallel)

    @property
    def world(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.dp

    @property
    def stages(self) -> int:
        """Pipeline stages, virtual ones counted."""
        return self.pp * (self.vpp or 1)

    def __str__(self) -> str:
        virtual = f" vpp{self.vpp}" if self.vpp else ""
        return f"tp{self.tp} pp{self.pp}{virtual} dp{self.dp}{' sp' if self.sequence_parallel else ''}"

    def problems(self, architecture: Architecture, *, seq_length: int, micro_batch_size: int, global_batch_size: int) -> list[str]:
        """Every reason why a model of this architecture cannot be trained in this layout, a sentence each."""
        found = []

        def check(ok: bool, sentence: str) -> None:
            if not ok:
                found.append(sentence)

        heads, groups, qkv = architecture.num_attention_heads, architecture.num_query_groups, _qkv_rows(architecture)
        check(heads % self.tp == 0, f"{heads} attention heads cannot be split over tp {self.tp}")
        check(
            groups % self.tp == 0 or self.tp % groups == 0,
            f"{groups} key/value heads cannot be split over tp {self.tp}: one must divide the other",
        )
        check(qkv % self.tp == 0, f"the {qkv} rows of the query/key/value matrix cannot be split over tp {self.tp}")
        ffn = architecture.ffn_hidden_size
        check(ffn % self.tp == 0, f"ffn_hidden_size {ffn} cannot be split over tp {self.tp}")
        check(
            architecture.num_layers % self.stages == 0,
            f"{architecture.num_layers} layers cannot be split evenly over {self.stages} pipeline stages "
            f"(pp {self.pp} x vpp {self.vpp or 1})",
        )
        check(self.vpp is None or self.pp > 1, f"vpp {self.vpp} needs pp above 1, but pp is {self.pp}")
        rows = micro_batch_size * self.dp
        check(
            global_batch_size % rows == 0,
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x dp {self.dp} = {rows}",
        )
        microbatches = global_batch_size // rows
        check(
            self.vpp is None or microbatches % self.pp == 0,
            f"virtual stages need a multiple of pp {self.pp} micro-batches, but there are {microbatches} "
            f"(global_batch_size {global_batch_size} / (micro_batch_size {micro_batch_size} x dp {self.dp}))",
        )
        tokens = micro_batch_size * seq_length
        check(
            not self.sequence_parallel or tokens % self.tp == 0,
            f"sequence parallelism cannot split micro_batch_size {micro_batch_size} x seq_length {seq_length} = {tokens} positions "
            f"over tp {self.tp}",
        )
        return found


def _qkv_rows(architecture: Architecture) -> int:
    return (architecture.num_attention_heads + 2 * architecture.num_query_groups) * architecture.head_dim


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun, `megawrap finetune --nproc` or a launcher set them; (0, 1) when nobody did."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(layout: Layout, *, timeout_minutes: float = 10.0, seed: int = 1234) -> None:
    """Start torch.distributed (unless it is), megatron-core's groups and the random states of this rank.

    Raises:
        ConfigError: the world has another size than the layout.
    """
    device.adapt()  # before megatron-core is imported anywhere: it warns while it is
    import torch.distributed as dist
    from megatron.core import parallel_state

    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        rank, world = world_from_environment()
        store = None if "MASTER_ADDR" in os.environ and world > 1 else dist.HashStore()
        if store is None:
            dist.init_process_group(device.detect().backend, rank=rank, world_size=world, timeout=timeout)
        else:
            dist.init_process_group(device.detect().backend, store=store, rank=0, world_size=1, timeout=timeout)
    if dist.get_world_size() != layout.world:
        raise ConfigError(f"the layout {layout} needs {layout.world} rank(s), but {dist.get_world_size()} were started")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    seed_all(seed)


def seed_all(seed: int) -> None:
    """Set every random state of this rank: stages differ, tensor-parallel ranks differ where megatron-core wants it."""
    import torch
    from megatron.core import tensor_parallel

    stage_seed = seed + 100 * pp_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def reset() -> None:
    """Forget the layout and its groups, so that another can be started in the same world."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def stop() -> None:
    """Leave all groups; harmless when none was started."""
    import torch.distributed as dist

    reset()
    if dist.is_initialized():
        dist.destroy_process_group()
    # Models refer to their groups in cycles; a gloo group that outlives its peers polls their closed sockets without rest.
    gc.collect()


def groups() -> Any:
    """megatron-core's ProcessGroupCollection of this rank."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def tp_rank() -> int:
    """Place in the tensor-parallel group."""
    return _state().get_tensor_model_parallel_rank()


def pp_rank() -> int:
    """Pipeline stage of this rank."""
    return _state().get_pipeline_model_parallel_rank()


def dp_rank() -> int:
    """Place in the data-parallel group."""
    return _state().get_data_parallel_rank()


def tp_group() -> dist.ProcessGroup:
    """The tensor-parallel group."""
    return _state().get_tensor_model_parallel_group()


def pp_group() -> dist.ProcessGroup:
    """The pipeline group."""
    return _state().get_pipeline_model_parallel_group()


def dp_group() -> dist.ProcessGroup:
    """The data-parallel group."""
    return _state().get_data_parallel_group()


def is_first_stage(vp_stage: int | None = None) -> bool:
    """Whether this rank (its virtual stage, when there are several) embeds the tokens."""
    return pp_rank() == 0 and vp_stage in (None, 0)


def is_last_stage(vp_stage: int | None = None) -> bool:
    """Whether this rank (its virtual stage, when one is named) computes the loss."""
    last_virtual = (_state().get_virtual_pipeline_model_parallel_world_size() or 1) - 1
    return pp_rank() == _state().get_pipeline_model_parallel_world_size() - 1 and vp_stage in (None, last_virtual)


def last_stage_rank() -> int:
    """Global rank of the last stage of this rank's pipeline."""
    return _state().get_pipeline_model_parallel_last_rank()


def _state() -> Any:
    from megatron.core import parallel_state

    return parallel_state
