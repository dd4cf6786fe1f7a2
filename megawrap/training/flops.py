"""What a training step needs: floating-point operations, parameters and memory per rank, and what the machine can give.

In: an `Architecture`, counts of a batch, a `Layout`. Out: required FLOP (work that padding, masked attention, recompute
and logits of untrained positions do not add to), bytes per rank for the print before the first iteration, and the
measured matrix-product peak that achieved FLOP/s are a share of. torch is imported only to measure that peak.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megawrap.config import TrainConfig
from megawrap.models.architecture import Architecture
from megawrap.parallel import Layout

if TYPE_CHECKING:
    import torch

BACKWARD = 2  # a matrix product's gradients are two products of its own size: forward + backward = 3 x forward


def layer_matrices(architecture: Architecture) -> list[tuple[int, int]]:
    """(inputs, outputs) of the weight matrices of one layer: query/key/value, attention output, the MLP's two (fc1 gated: both halves)."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    query = architecture.num_attention_heads * architecture.head_dim
    keys_values = 2 * architecture.num_query_groups * architecture.head_dim
    return [(hidden, query + keys_values), (query, hidden), (hidden, ffn * (2 if architecture.gated else 1)), (ffn, hidden)]


def training_flops(architecture: Architecture, *, num_tokens: int, squared_lengths: int, num_targets: int) -> int:
    """FLOP that forward and backward of one batch require, a multiply-add counted as two.

    Weight matrices once per token that is not padding, attention inside each sample with its causal half
    (4 x query width x n^2 / 2 for a sample of n tokens), logits only where a label is trained; x3 for the backward pass
    (Narayanan et al. 2021, appendix, without their recompute). Norms, activations and the optimizer are not counted; positions
    outside a sliding window are, though they need no work.

    Args:
        architecture: the model, with its true vocabulary.
        num_tokens: positions that are not padding.
        squared_lengths: sum over samples of the square of their length in positions.
        num_targets: positions whose label is trained.
    """
    weights = sum(inputs * outputs for inputs, outputs in layer_matrices(architecture))
    query = architecture.num_attention_heads * architecture.head_dim
    layers = architecture.num_layers * (2 * weights * num_tokens + 2 * query * squared_lengths)
    return (1 + BACKWARD) * (layers + 2 * architecture.hidden_size * architecture.vocab_size * num_targets)


def parameters_per_rank(architecture: Architecture, layout: Layout, *, pp_rank: int = 0, vocab_divisor: int = 128) -> int:
    """Parameters that a rank of pipeline stage `pp_rank` holds, as megatron-core cuts the model.

    Matrices are cut over tp (row-parallel biases, norms and positions are not); with tied embeddings and pp above 1 the
    last stage holds a copy of its own.
    """
    tp, hidden = layout.tp, architecture.hidden_size
    (_, qkv), (query, _), (_, fc1), (ffn, _) = layer_matrices(architecture)
    column = (qkv + fc1) * hidden + (qkv if architecture.qkv_bias else 0) + (fc1 if architecture.linear_bias else 0)
    row = (query + ffn) * hidden
    weights_of_norm = 2 if architecture.norm == "layernorm" else 1
    norm = hidden * weights_of_norm
    layer = (column + row) // tp + 2 * norm + (2 * hidden if architecture.linear_bias else 0)
    layer += 2 * architecture.head_dim * weights_of_norm if architecture.qk_norm else 0
    total = architecture.num_layers // layout.pp * layer
    vocabulary = architecture.padded_vocab_size(vocab_divisor, tp) // tp * hidden
    if pp_rank == 0:
        total += vocabulary + (architecture.max_position_embeddings * hidden if architecture.position == "learned" else 0)
    if pp_rank == layout.pp - 1:
        total += norm + (vocabulary if layout.pp > 1 or not architecture.tied else 0)
    return total


def memory_estimate(
    architecture: Architecture,
    layout: Layout,
    train: TrainConfig,
    *,
    seq_length: int,
    precision: str,
    distributed_optimizer: bool,
    target_share: float = 1.0,
    pp_rank: int = 0,
    vocab_divisor: int = 128,
) -> dict[str, int]:
    """Bytes a rank needs at its peak, for the print before the first iteration.

    Weights, gradients and optimizer are exact for megatron-core's AdamW (fp32 gradients, main parameters and moments).
    Activations are what a pre-norm layer with fused attention keeps for its backward pass, times the micro-batches in
    flight on this stage (1F1B: pp - pp_rank); logits are one micro-batch's, in fp32 and in `precision`. Neither counts
    the allocator's waste, the libraries or communication buffers: expect a tenth or a fifth more.

    Args:
        architecture: the model.
        layout: the parallel sizes.
        train: micro_batch_size, global_batch_size and recompute.
        seq_length: positions of a row.
        precision: fp32, bf16 or fp16.
        distributed_optimizer: optimizer state is cut over dp.
        target_share: share of positions whose logits are computed.
        pp_rank: pipeline stage.
        vocab_divisor: the embedding is padded to a multiple of this x tp.

    Returns:
        parameters (a count), and bytes: weights, gradients, optimizer, activations, logits, total.
    """
    parameters = parameters_per_rank(architecture, layout, pp_rank=pp_rank, vocab_divisor=vocab_divisor)
    width = 4 if precision == "fp32" else 2
    shards = layout.dp if distributed_optimizer else 1
    sizes = {
        "weights": width * parameters,
        "gradients": 4 * parameters,
        "optimizer": (8 if precision == "fp32" else 12) * parameters // shards,
        "activations": width * _kept_values(architecture, layout, train, seq_length, pp_rank),
        "logits": 0,
    }
    if pp_rank == layout.pp - 1:
        rows = architecture.padded_vocab_size(vocab_divisor, layout.tp) // layout.tp
        sizes["logits"] = int(train.micro_batch_size * seq_length * target_share) * rows * (4 + width)
    return {"parameters": parameters, **sizes, "total": sum(sizes.values())}


def _kept_values(architecture: Architecture, layout: Layout, train: TrainConfig, seq_length: int, pp_rank: int) -> int:
    """Values kept between forward and backward on a stage (Korthikanti et al. 2022, 4, with fused attention).

    Per position and layer: both norms' inputs and outputs, query/key/value, attention output, the MLP before and after its
    activation. Full recompute keeps each layer's input, and one layer whole while it is computed again.
    """
    (_, qkv), (query, _), (_, fc1), (ffn, _) = layer_matrices(architecture)
    replicated = 4 * architecture.hidden_size // (layout.tp if layout.sequence_parallel else 1)
    attention = 0 if train.recompute == "selective" else query // layout.tp
    attention += (qkv + query) // (2 * layout.tp) if architecture.qk_norm else 0  # query and key before their norms
    whole = replicated + (qkv + fc1 + ffn) // layout.tp + attention
    layers = architecture.num_layers // layout.pp
    micro_batches = max(1, train.global_batch_size // (train.micro_batch_size * layout.dp))
    in_flight = min(micro_batches, layout.pp - pp_rank)
    per_position = layers * in_flight * whole
    if train.recompute == "full":
        per_position = layers * in_flight * replicated // 4 + whole
    return train.micro_batch_size * seq_length * per_position


Shape = tuple[int, int, int, int]
"""(m, k, n, count): `count` products of an [m, k] with a [k, n] matrix."""


def matrix_products(architecture: Architecture, *, num_tokens: int, num_targets: int, tp: int = 1) -> list[Shape]:
    """The products with weight matrices that forward and backward of a micro-batch make on one rank."""
    hidden = architecture.hidden_size
    qkv, projection, fc1, fc2 = layer_matrices(architecture)
    cut = [(qkv[0], qkv[1] // tp), (projection[0] // tp, hidden), (fc1[0], fc1[1] // tp), (fc2[0] // tp, hidden)]
    linears = [(num_tokens, *matrix, architecture.num_layers) for matrix in cut]
    linears.append((num_targets, hidden, architecture.vocab_size // tp, 1))
    return [
        shape
        for m, k, n, count in linears
        for shape in ((m, k, n, count), (m, n, k, count), (n, m, k, count))  # output, gradient of the input, gradient of the weight
    ]


def peak_flops(device: torch.device | str, dtype: torch.dtype, shapes: Iterable[Shape] | None = None) -> float:
    """FLOP/s this process reaches in matrix products alone, measured once per process (a fraction of a second a shape).

    Args:
        device: where.
        dtype: of both factors and the result.
        shapes: products to weigh by their FLOP (`matrix_products`); default one square product that fills the device.

    Returns:
        Total FLOP over total time, each shape at the best of its repetitions.
    """
    import torch

    device = torch.device(device)
    side = 8192 if device.type == "cuda" else 1024
    chosen = tuple(shapes) if shapes is not None else ((side, side, side, 1),)
    return _measure(device, dtype, chosen)


@functools.cache
def _measure(device: torch.device, dtype: torch.dtype, shapes: tuple[Shape, ...]) -> float:
    flops = seconds = 0.0
    for m, k, n, count in shapes:
        flops += 2.0 * m * k * n * count
        seconds += _best_time(device, dtype, (m, k, n)) * count
    return flops / seconds


def _best_time(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], *, budget_s: float = 0.1) -> float:
    """Seconds of the fastest of the products that fit in the budget (at least 3, after one to warm up)."""
    import torch

    m, k, n = shape
    generator = torch.Generator(device).manual_seed(0)  # a run's own random state must not move
    left, right = (torch.randn(rows, k, device=device, dtype=dtype, generator=generator) for rows in (m, n))
    batch = 10 if device.type == "cuda" else 1  # launches are asynchronous: time several between two synchronisations
    best, spent, repetitions = float("inf"), 0.0, -1
    while repetitions < 3 or spent < budget_s:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(batch):
            torch.nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = (time.perf_counter() - start) / batch
        repetitions += 1
        if repetitions > 0:
            best, spent = min(best, elapsed), spent + elapsed * batch
    return best
