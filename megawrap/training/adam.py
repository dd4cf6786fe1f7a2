"""AdamW with PyTorch's fused kernel and the state layout of NVIDIA Apex's FusedAdam.

Own code because megatron-core's distributed optimizer keeps one step count per parameter group, as Apex's and
TransformerEngine's Adam do; torch.optim.AdamW keeps one per parameter, so megatron-core can save a run trained with it but
not load it (KeyError 'step'), and it is built without its fused kernel. The arithmetic is torch's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class GroupStepAdamW(Optimizer):
    """Decoupled weight decay Adam (Loshchilov and Hutter, 2019); fp32 moments, `step` in the parameter group.

    Args:
        params: parameters or groups; a group may set lr, weight_decay, betas, eps.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay.
        adam_w_mode: always true; megatron-core passes it to fused optimizers.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            step = torch.tensor(float(group["step"]), device=params[0].device)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [step] * len(params),
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False,
            )  # fmt: skip
