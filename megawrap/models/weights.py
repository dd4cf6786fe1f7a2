"""Fill the weights of live model chunks from full tensors under canonical names, whatever the layout.

In: model chunks and a source that gives a full tensor for a canonical name. Out: nothing; the parameters hold their
shard of each. Where a shard lies in its full tensor is read from megatron-core's own sharded state dict, so tensor,
pipeline and virtual stages need no rules here. `random_source` draws the weights of a model from scratch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megawrap.models.architecture import LAYERS, Architecture

Source = Callable[[str, tuple[int, ...]], torch.Tensor]
"""(canonical name, full shape with padded vocabulary) -> full tensor; vocabulary tensors may come without padding."""

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def shards(chunks: Sequence[Any]) -> Iterator[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    """(canonical name, full shape, where this shard lies in it, the live tensor) for every parameter of the chunks.

    Tied copies of the embedding appear under the embedding's name.
    """
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata={"dp_cp_group": chunk.pg_collection.dp_cp})
        apply_factories(state)
        for item in nested_values(state):
            if not isinstance(item, ShardedTensor):
                continue
            name, skip = item.key, item.prepend_axis_num
            if skip:
                name = f"{LAYERS}{item.global_offset[0]}.{name.removeprefix(LAYERS)}"
            offsets, sizes = item.global_offset[skip:], item.local_shape
            where = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
            yield name, tuple(item.global_shape[skip:]), where, item.data


@torch.no_grad()
def fill(chunks: Sequence[Any], source: Source) -> None:
    """Write every parameter of the chunks; vocabulary rows that the source does not have become zero."""
    for name, shape, where, live in shards(chunks):
        full = source(name, shape)
        if name in VOCABULARY and full.size(0) < shape[0]:
            full = torch.cat([full, full.new_zeros(shape[0] - full.size(0), *full.shape[1:])])
        if tuple(full.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(full.shape)}, the model wants {shape}")
        live.copy_(full[where])


def random_source(architecture: Architecture, *, seed: int, std: float) -> Source:
    """Fresh weights: N(0, std), N(0, std / sqrt(2 x layers)) into the residual stream, norms 1, biases 0.

    The draw of a tensor depends on the seed and its name alone, so that every layout starts from the same weights
    (GPT-2's scheme, Radford et al. 2019; megatron-core's own depends on the layout).
    """

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "norm" in name:
            return torch.ones(shape)
        number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
        into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        scale = std / math.sqrt(2 * architecture.num_layers) if into_residual else std
        rows = architecture.vocab_size if name in VOCABULARY else shape[0]
        generator = torch.Generator().manual_seed(number)
        return torch.empty(rows, *shape[1:]).normal_(0.0, scale, generator=generator)

    return draw
