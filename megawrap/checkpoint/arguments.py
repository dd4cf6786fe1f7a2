"""A model under Megatron-LM's own argument names, and the differences between two models.

Comes in: an `Architecture`, or the common.pt of any Megatron checkpoint. Goes out: the `args` that other tools read, and a
table of what does not fit, before any tensor is read. No torch is imported here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megawrap.models.architecture import DEFAULTS, Architecture

CHECKPOINT_VERSION = 3.0
_FIELDS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "normalization": "norm",
    "add_qkv_bias": "qkv_bias",
    "add_bias_linear": "linear_bias",
}
"""Megatron's argument -> field of Architecture, for those that change shapes."""


def megatron_arguments(architecture: Architecture, padded_vocab_size: int, precision: str, *, tp: int = 1, pp: int = 1) -> Namespace:
    """The architecture as Megatron-LM's arguments.

    Args:
        architecture: the model.
        padded_vocab_size: rows of its embedding.
        precision: "fp32", "bf16" or "fp16".
        tp: tensor-parallel size it was saved at.
        pp: pipeline-parallel size it was saved at.
    """
    gated, scaling = architecture.gated, architecture.rope_scaling
    return Namespace(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        group_query_attention=architecture.num_query_groups != architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        max_position_embeddings=architecture.max_position_embeddings,
        seq_length=architecture.max_position_embeddings,
        vocab_size=architecture.vocab_size,
        padded_vocab_size=padded_vocab_size,
        position_embedding_type="learned_absolute" if architecture.position == "learned" else "rope",
        rotary_base=architecture.rope_theta,
        rotary_percent=architecture.rotary_fraction,
        rotary_interleaved=False,
        use_rope_scaling=scaling is not None and scaling.kind == "llama3",
        rope_scaling_factor=scaling.factor if scaling is not None and scaling.kind == "llama3" else 8.0,
        rotary_seq_len_interpolation_factor=scaling.factor if scaling is not None and scaling.kind == "linear" else None,
        window_size=None if architecture.sliding_window is None else (architecture.sliding_window - 1, 0),
        qk_layernorm=architecture.qk_norm,
        normalization="RMSNorm" if architecture.norm == "rmsnorm" else "LayerNorm",
        norm_epsilon=architecture.norm_epsilon,
        swiglu=gated and architecture.activation == "silu",
        add_bias_linear=architecture.linear_bias,
        add_qkv_bias=architecture.qkv_bias,
        untie_embeddings_and_output_weights=not architecture.tied,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        transformer_impl="local",
        ckpt_format="torch_dist",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
    )


def differences(common: Mapping[str, Any], architecture: Architecture, padded_vocab_size: int) -> list[tuple[str, Any, Any]]:
    """What a checkpoint and a model disagree on.

    Args:
        common: content of its common.pt; without megawrap's own description Megatron's `args` are compared.
        architecture: of the model.
        padded_vocab_size: rows of its embedding.

    Returns:
        (field, in the checkpoint, in the model), empty when they agree.
    """
    said = common.get("megawrap")
    described = said.get("architecture") if isinstance(said, dict) else None
    if isinstance(said, dict) and isinstance(described, dict):
        theirs, ours = {**DEFAULTS, **described}, architecture.to_dict()
        theirs["padded_vocab_size"], ours["padded_vocab_size"] = said.get("padded_vocab_size"), padded_vocab_size
        names = [*ours, *(name for name in theirs if name not in ours)]
        return [(name, theirs.get(name), ours.get(name)) for name in names if theirs.get(name) != ours.get(name)]
    args = vars(common["args"]) if isinstance(common.get("args"), Namespace) else {}
    own = vars(megatron_arguments(architecture, padded_vocab_size, "fp32"))
    names = [*_FIELDS, "padded_vocab_size", "untie_embeddings_and_output_weights"]
    if args.get("group_query_attention"):
        names.append("num_query_groups")
    found = [(name, args[name], own[name]) for name in names if args.get(name) is not None]
    return [(_FIELDS.get(name, name), theirs, ours) for name, theirs, ours in found if theirs != ours]


def table(rows: list[tuple[str, Any, Any]]) -> str:
    """Differences as aligned lines, the checkpoint's value first."""
    lines = [("", "checkpoint", "this model"), *((name, str(theirs), str(ours)) for name, theirs, ours in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)
