"""What a run will do, in words and numbers, before its first iteration.

In: the resolved configuration, layout, data plan and architecture. Out: text for the console. Nothing is built for it, so
`--dry-run` prints it for a model of any size on any machine.
"""

from __future__ import annotations

from megawrap import device
from megawrap.config import Config
from megawrap.data.plan import Plan
from megawrap.device import Choices
from megawrap.models.architecture import Architecture
from megawrap.parallel import Layout
from megawrap.training.flops import memory_estimate, parameters_per_rank


def describe(
    config: Config, config_yaml: str, choices: Choices, layout: Layout, architecture: Architecture, plan: Plan, *, start: str
) -> str:
    """The whole pre-flight text.

    Args:
        config: the run.
        config_yaml: the same as a recipe.
        choices: what was left to the hardware.
        layout: parallel sizes.
        architecture: of the model.
        plan: of the data.
        start: one sentence: from scratch, from where, or resumed.
    """
    parts = [
        ("configuration", config_yaml.rstrip()),
        ("chosen for this machine", _chosen(choices)),
        ("layout", _layout(config, layout, plan)),
        ("model", _model(config, choices, layout, architecture, plan)),
        ("data", "\n".join([plan.table(), *plan.notes])),
        ("start", start),
    ]
    return "\n\n".join(f"== {title} ==\n{text}" for title, text in parts)


def _chosen(choices: Choices) -> str:
    hardware = device.detect()
    count = f"{hardware.count} GPU(s)" if hardware.kind == "cuda" else f"{hardware.count} core(s)"
    width = max(len(name) for name, _, _ in choices.reasons)
    lines = [f"{hardware.kind}: {hardware.name}, {count}, {hardware.memory / 2**30:.0f} GiB; collectives over {hardware.backend}"]
    return "\n".join(lines + [f"{name:<{width}}  {value:<7} {why}" for name, value, why in choices.reasons])


def _layout(config: Config, layout: Layout, plan: Plan) -> str:
    train, rows = config.train, config.train.micro_batch_size * layout.dp
    micro_batches = train.global_batch_size // rows
    positions, about = round(plan.positions_per_iteration), "about " if plan.packing == "none" else ""
    return (
        f"{layout}: {layout.world} rank(s)\n"
        f"global batch {train.global_batch_size} rows = micro-batch {train.micro_batch_size} x dp {layout.dp} "
        f"x {micro_batches} micro-batch(es)"
        f" = {about}{positions:,} positions; {train.iterations:,} iterations = {about}{positions * train.iterations:,} positions"
    )


def _model(config: Config, choices: Choices, layout: Layout, architecture: Architecture, plan: Plan) -> str:
    a, divisor = architecture, config.model.make_vocab_size_divisible_by
    whole = parameters_per_rank(a, Layout(), vocab_divisor=divisor)
    trained = plan.trained_tokens_per_iteration / plan.positions_per_iteration
    lines = [
        f"{a.family}: {a.num_layers} layers, hidden {a.hidden_size}, {a.num_attention_heads} heads over "
        f"{a.num_query_groups} key/value head(s), "
        f"vocabulary {a.vocab_size} padded to {a.padded_vocab_size(divisor, layout.tp)}; {whole:,} parameters",
        f"{trained:.1%} of positions are trained on: {plan.trained_tokens_per_iteration:,.0f} tokens per iteration",
    ]
    for stage in range(layout.pp):
        sizes = memory_estimate(
            a, layout, config.train, seq_length=config.data.seq_length, precision=choices.precision,
            distributed_optimizer=choices.distributed_optimizer, target_share=trained, pp_rank=stage, vocab_divisor=divisor,
        )  # fmt: skip
        kinds = ", ".join(f"{name} {sizes[name] / 2**20:,.0f}" for name in ("weights", "gradients", "optimizer", "activations", "logits"))
        where = f"stage {stage}: " if layout.pp > 1 else ""
        lines.append(f"{where}{sizes['parameters']:,} parameters and about {sizes['total'] / 2**20:,.0f} MiB per rank ({kinds})")
    return "\n".join(lines)
