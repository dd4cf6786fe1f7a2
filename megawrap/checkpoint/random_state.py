"""The random states of a rank: torch's CPU and GPU generators and megatron-core's named ones.

Comes in: this process. Goes out: a dictionary of tensors that `restore` puts back bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def capture() -> dict[str, Any]:
    """Copies of every random state of this rank, as uint8 tensors."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "tracker": {}}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states["tracker"][name] = (state if isinstance(state, torch.Tensor) else state.get_state()).clone()
    return states


def restore(states: dict[str, Any]) -> None:
    """Put back what `capture` returned."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    current = tracker.get_states()
    for name, state in states["tracker"].items():
        if isinstance(current.get(name), torch.Generator):
            current[name].set_state(state)
        else:
            current[name] = state.clone()
    tracker.set_states(current)
