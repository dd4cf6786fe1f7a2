"""The limit: matrix products alone, at the shapes of the model's own weights, weighted by their FLOP.

In: the model and the positions and targets of a micro-batch. Out: windows that count FLOP; a step makes the forward
product and both gradient products of every weight matrix once for each layer that has it.
"""

from __future__ import annotations

from typing import Any

from benchmarks.worker import Port


def run(spec: dict[str, Any], port: Port) -> None:
    """Serve windows of products in spec["dtype"] (fp32 or bf16)."""
    import torch

    from benchmarks.models import architecture
    from megawrap.training.flops import matrix_products

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["dtype"]]
    shapes = matrix_products(
        architecture(spec["model"]), num_tokens=spec["rows"] * spec["seq_length"], num_targets=spec["rows"] * spec["seq_length"] // 2
    )
    flops = sum(2.0 * m * k * n * count for m, k, n, count in shapes)
    factors = [
        (torch.randn(m, k, dtype=dtype, device=spec["device"]), torch.randn(n, k, dtype=dtype, device=spec["device"]), count)
        for m, k, n, count in shapes
    ]
    port.ready()
    while True:
        for left, right, count in factors:
            for _ in range(count):
                torch.nn.functional.linear(left, right)
        port.did(flops=flops)
