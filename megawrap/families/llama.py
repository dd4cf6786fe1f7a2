"""Llama: grouped-query attention with rotary positions, RMSNorm, gated silu MLP, tied or untied head.

transformers' rotary halves are megatron-core's (`rotary_interleaved=False`), so query and key rows are interleaved by
group and never permuted inside a head. Rotary scaling is refused, not dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megawrap.errors import ConversionError
from megawrap.families.base import LAYER, QKV, TRANSFORMERS_VERSION, Copy, Family, GatedMLP, Rule, Vocab, flag, positive
from megawrap.models.architecture import Activation, Architecture

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_TO_HF = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias",
    "mlp_bias", "head_dim", "pretraining_tp", "attention_dropout",
)  # fmt: skip


class Llama(Family):
    """The family of `LlamaForCausalLM`."""

    name = "llama"
    model_type = "llama"
    hf_class = "LlamaForCausalLM"
    ignored_tensors = (".rotary_emb.inv_freq",)

    def from_hf(self, config: Mapping[str, Any]) -> Architecture:
        """See `Family.from_hf`; missing keys have the defaults of transformers' LlamaConfig."""
        self.refuse(
            config,
            mapped=_KEYS,
            fixed={
                "hidden_act": tuple(_ACTIVATIONS),
                "is_encoder_decoder": (False,),
                "add_cross_attention": (False,),
                "sliding_window": (None,),
                "partial_rotary_factor": (1, 1.0),
            },
        )
        attention_bias, mlp_bias = flag(config, "attention_bias", False), flag(config, "mlp_bias", False)
        if attention_bias != mlp_bias:
            raise ConversionError(
                f"attention_bias is {attention_bias} and mlp_bias is {mlp_bias}; llama maps both true or both false",
                hint="megatron-core has one switch for the biases of the attention output and of the MLP",
            )
        heads, hidden = config.get("num_attention_heads", 32), config.get("hidden_size", 4096)
        if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0):
            raise ConversionError(f"hidden_size is {hidden!r} and num_attention_heads {heads!r}; they must be whole numbers above 0")
        groups = config.get("num_key_value_heads")
        return Architecture(
            family=self.name,
            num_layers=config.get("num_hidden_layers", 32),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=heads if groups is None else groups,
            head_dim=config.get("head_dim") or hidden // heads,
            ffn_hidden_size=config.get("intermediate_size", 11008),
            vocab_size=config.get("vocab_size", 32000),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            position="rope",
            rope_theta=_rope_theta(config),
            norm="rmsnorm",
            norm_epsilon=positive(config, "rms_norm_eps", 1e-6),
            activation=_ACTIVATIONS[config.get("hidden_act", "silu")],
            gated=True,
            linear_bias=mlp_bias,
            qkv_bias=attention_bias,
            tied=flag(config, "tie_word_embeddings", False),
        )

    def to_hf(self, architecture: Architecture) -> dict[str, Any]:
        """See `Family.to_hf`."""
        return {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            "vocab_size": architecture.vocab_size,
            "hidden_size": architecture.hidden_size,
            "intermediate_size": architecture.ffn_hidden_size,
            "num_hidden_layers": architecture.num_layers,
            "num_attention_heads": architecture.num_attention_heads,
            "num_key_value_heads": architecture.num_query_groups,
            "head_dim": architecture.head_dim,
            "hidden_act": _TO_HF[architecture.activation],
            "max_position_embeddings": architecture.max_position_embeddings,
            "rms_norm_eps": architecture.norm_epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": architecture.rope_theta},
            "attention_bias": architecture.qkv_bias,
            "mlp_bias": architecture.linear_bias,
            "attention_dropout": 0.0,
            "tie_word_embeddings": architecture.tied,
            "initializer_range": 0.02,
            "pretraining_tp": 1,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "transformers_version": TRANSFORMERS_VERSION,
        }

    def rules(self, architecture: Architecture) -> list[Rule]:
        """See `Family.rules`."""
        hidden, ffn, vocab = architecture.hidden_size, architecture.ffn_hidden_size, architecture.vocab_size
        width = architecture.num_attention_heads * architecture.head_dim
        hf = "model.layers.{layer}."

        def qkv(kind: str, *columns: int) -> Rule:
            return QKV(
                f"{LAYER}self_attention.linear_qkv.{kind}",
                (f"{hf}self_attn.q_proj.{kind}", f"{hf}self_attn.k_proj.{kind}", f"{hf}self_attn.v_proj.{kind}"),
                architecture,
                *columns,
            )

        def fc1(kind: str, *columns: int) -> Rule:
            names = (f"{hf}mlp.gate_proj.{kind}", f"{hf}mlp.up_proj.{kind}")
            return GatedMLP(f"{LAYER}mlp.linear_fc1.{kind}", names, architecture, *columns)

        rules: list[Rule] = [
            Vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab, hidden),
            Copy(f"{LAYER}self_attention.linear_qkv.layer_norm_weight", f"{hf}input_layernorm.weight", hidden),
            qkv("weight", hidden),
            *([qkv("bias")] if architecture.qkv_bias else []),
            Copy(f"{LAYER}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight", hidden, width),
            *([Copy(f"{LAYER}self_attention.linear_proj.bias", f"{hf}self_attn.o_proj.bias", hidden)] if architecture.linear_bias else []),
            Copy(f"{LAYER}mlp.linear_fc1.layer_norm_weight", f"{hf}post_attention_layernorm.weight", hidden),
            fc1("weight", hidden),
            *([fc1("bias")] if architecture.linear_bias else []),
            Copy(f"{LAYER}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", hidden, ffn),
            *([Copy(f"{LAYER}mlp.linear_fc2.bias", f"{hf}mlp.down_proj.bias", hidden)] if architecture.linear_bias else []),
            Copy("decoder.final_layernorm.weight", "model.norm.weight", hidden),
        ]
        if not architecture.tied:
            rules.append(Vocab("output_layer.weight", "lm_head.weight", vocab, hidden))
        return rules

    def tiny(self, **changes: Any) -> dict[str, Any]:
        """See `Family.tiny`; loads at tp 1, 2, 4 and pp 1, 2."""
        config: dict[str, Any] = {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            "vocab_size": 131,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return {**config, **changes}

    def defaults(self, **given: Any) -> Architecture:
        """See `Family.defaults`; multi-head, an MLP of 8/3 x hidden_size rounded up to 64, untied, no biases."""
        values = self.needed(given)
        tied = given.get("tie_word_embeddings")
        return Architecture(
            **values,
            num_query_groups=given.get("num_query_groups") or values["num_attention_heads"],
            ffn_hidden_size=given.get("ffn_hidden_size") or -(-(8 * values["hidden_size"]) // (3 * 64)) * 64,
            position="rope",
            norm="rmsnorm",
            norm_epsilon=1e-5,
            activation="silu",
            gated=True,
            linear_bias=False,
            qkv_bias=False,
            tied=False if tied is None else tied,
        )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base from either spelling: rope_parameters (transformers 5) or rope_theta with rope_scaling (4)."""
    bases = [config["rope_theta"]] if config.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise ConversionError(f"{key} is {values!r}; it must be an object or null")
        kind = values.get("rope_type", values.get("type", "default"))
        others = {name: value for name, value in values.items() if name not in ("rope_type", "type", "rope_theta") and value is not None}
        if kind != "default" or (others and others != {"partial_rotary_factor": 1.0}):
            raise ConversionError(
                f"{key} is {dict(values)!r}; only rope_type 'default' is mapped",
                hint="rotary scaling is not mapped and will not be dropped silently",
            )
        if values.get("rope_theta") is not None:
            bases.append(values["rope_theta"])
    if any(not isinstance(base, int | float) or isinstance(base, bool) or base <= 0 or base != bases[0] for base in bases):
        raise ConversionError(f"the rotary base is given as {bases}; it must be one number above 0")
    return float(bases[0]) if bases else 10000.0
