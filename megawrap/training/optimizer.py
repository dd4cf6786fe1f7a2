"""The optimizer of a run: megatron-core's, split into the moments the loop needs to look between.

In: bare model chunks and the optimizer section. Out: the chunks wrapped for mixed precision and data parallelism, and an
`Optimizer` that gives the gradient norm before a step is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from megawrap import parallel
from megawrap.config import OptimConfig
from megawrap.training.adam import GroupStepAdamW


def wrap(chunks: Sequence[Any], *, distributed: bool, overlap: bool) -> list[Any]:
    """Chunks ready for training: mixed precision, then data parallelism with fp32 gradient sums."""
    config = get_model_config(chunks[0])
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        # Gathering parameters under the next forward pass waits in hooks of modules; the output matrix is used without one.
        overlap_param_gather=False,
        use_distributed_optimizer=distributed,
        average_in_collective=False,
    )
    wrapped = []
    for number, chunk in enumerate(chunks):
        module = Float16Module(config, chunk) if config.bf16 or config.fp16 else chunk
        wrapped.append(DistributedDataParallel(config, options, module, disable_bucketing=number > 0, pg_collection=parallel.groups()))
    return wrapped


class Optimizer:
    """AdamW over wrapped chunks.

    Args:
        chunks: what `wrap` returned.
        config: the optim section.
        distributed: shard the state over data-parallel ranks.
        overlap: reduce gradients of finished layers while the backward pass goes on.
    """

    def __init__(self, chunks: Sequence[Any], config: OptimConfig, *, distributed: bool, overlap: bool) -> None:
        model = get_model_config(chunks[0])
        self.config = config
        if megatron_optimizer.USING_PYTORCH_OPTIMIZER:  # neither Apex nor TransformerEngine brings a fused Adam
            megatron_optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
            megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        options = OptimizerConfig(
            optimizer="adam", lr=config.lr, min_lr=config.min_lr, weight_decay=config.weight_decay, adam_beta1=config.beta1,
            adam_beta2=config.beta2, adam_eps=config.eps, clip_grad=config.clip_grad, fp16=model.fp16, bf16=model.bf16,
            params_dtype=model.params_dtype, use_distributed_optimizer=distributed,
            loss_scale=config.loss_scale, initial_loss_scale=2**16, log_num_zeros_in_grad=False,
        )  # fmt: skip
        self.megatron = get_megatron_optimizer(options, list(chunks))
        (self._inner,) = self.megatron.chained_optimizers  # dense models have one
        model.finalize_model_grads_func = finalize_model_grads
        model.grad_scale_func = self.megatron.scale_loss
        if overlap:
            self._overlap(chunks, model)

    @staticmethod
    def _overlap(chunks: Sequence[Any], model: Any) -> None:
        def one_or_list(functions: list[Any]) -> Any:
            return functions if len(functions) > 1 else functions[0]

        model.no_sync_func = one_or_list([chunk.no_sync for chunk in chunks])
        model.grad_sync_func = one_or_list([chunk.start_grad_sync for chunk in chunks]) if len(chunks) > 1 else None

    def gradient_norm(self) -> float:
        """Unscale the finished gradients, clip them, and return their global L2 norm before clipping; not finite on overflow."""
        if self._inner.prepare_grads():
            return float("inf")
        norm = float(self._inner.get_grad_norm())
        if self.config.clip_grad > 0:
            clip(self._inner.get_parameters(), norm, self.config.clip_grad)
        return norm

    def step(self, lr: float) -> None:
        """Update parameters from the gradients of which `gradient_norm` was just taken."""
        for group in self.megatron.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.config.weight_decay * group.get("wd_mult", 1.0)
        self._inner.step_with_ready_grads()

    def zero(self) -> None:
        """Forget gradients of the inner optimizer; the buffers of wrapped chunks are zeroed by the loop."""
        self.megatron.zero_grad()

    @property
    def loss_scale(self) -> float:
        """The factor of fp16 training; 1 otherwise."""
        return float(self.megatron.get_loss_scale().item())

    @property
    def scales_dynamically(self) -> bool:
        """fp16 with a dynamic scale: overflow is expected now and then and skips the step."""
        return getattr(self._inner, "grad_scaler", None) is not None and self.config.loss_scale is None


@torch.no_grad()
def clip(parameters: Sequence[torch.Tensor], norm: float, largest: float) -> None:
    """Scale gradients in place so that their global norm is at most `largest`.

    Own code because without Apex megatron-core scales a copy of every gradient and copies it back, three times the traffic.

    Args:
        parameters: of this rank; those without a gradient are passed over.
        norm: L2 norm over all gradients of all ranks.
        largest: above 0.
    """
    factor = largest / (norm + 1e-6)  # megatron-core's formula
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if factor < 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)


def unwrap(chunks: Sequence[Any]) -> list[torch.nn.Module]:
    """The bare chunks inside their wrappers."""
    bare = []
    for chunk in chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        bare.append(chunk)
    return bare
