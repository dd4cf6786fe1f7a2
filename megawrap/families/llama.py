"""Llama: grouped-query attention with rotary positions, RMSNorm, gated silu MLP, tied or untied head.

transformers' rotary halves are megatron-core's (`rotary_interleaved=False`), so query and key rows are interleaved by
group and never permuted inside a head. Families that differ from Llama in a few settings are its subclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megawrap.errors import ConversionError
from megawrap.families import rotary
from megawrap.families.base import LAYER, QKV, TRANSFORMERS_VERSION, Copy, Family, GatedMLP, Rule, Vocab, flag, positive
from megawrap.models.architecture import Activation, Architecture

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_TO_HF = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "head_dim", "attention_dropout", *rotary.KEYS,
)  # fmt: skip


class Llama(Family):
    """The family of `LlamaForCausalLM`."""

    name = "llama"
    model_type = "llama"
    hf_class = "LlamaForCausalLM"
    ignored_tensors = (".rotary_emb.inv_freq",)
    epsilon: ClassVar[float] = 1e-5
    """Of the norms of a model from scratch."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    }  # fmt: skip
    """Sizes of a config.json that does not give them, as in transformers."""

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Where a family differs: the fields linear_bias, qkv_bias, qk_norm and sliding_window of its architecture.

        Raises:
            ConversionError: a setting is not mapped, or a key is not known.
        """
        self.refuse(
            config, mapped=(*_KEYS, "attention_bias", "mlp_bias", "pretraining_tp"), fixed=self.fixed() | {"sliding_window": (None,)}
        )
        attention_bias, mlp_bias = flag(config, "attention_bias", False), flag(config, "mlp_bias", False)
        if attention_bias != mlp_bias:
            raise ConversionError(
                f"attention_bias is {attention_bias} and mlp_bias is {mlp_bias}; llama maps both true or both false",
                hint="megatron-core has one switch for the biases of the attention output and of the MLP",
            )
        return {"linear_bias": mlp_bias, "qkv_bias": attention_bias}

    def own_keys(self, architecture: Architecture) -> dict[str, Any]:
        """The inverse of `settings`: what config.json has besides the keys of all these families."""
        return {"attention_bias": architecture.qkv_bias, "mlp_bias": architecture.linear_bias, "pretraining_tp": 1}

    def mapped_keys(self) -> tuple[str, ...]:
        """Keys that `from_hf` reads in all these families."""
        return _KEYS

    def fixed(self) -> dict[str, tuple[Any, ...]]:
        """Keys that may only have these values in all these families."""
        no = (False,)
        return {
            "hidden_act": tuple(_ACTIVATIONS),
            "is_encoder_decoder": no,
            "add_cross_attention": no,
            "partial_rotary_factor": (1, 1.0),
        }

    def from_hf(self, config: Mapping[str, Any]) -> Architecture:
        """See `Family.from_hf`; missing keys have the defaults of transformers."""
        settings = self.settings(config)
        sizes = {name: config.get(name, default) for name, default in self.hf_defaults.items()}
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0):
            raise ConversionError(f"hidden_size is {hidden!r} and num_attention_heads {heads!r}; they must be whole numbers above 0")
        groups = sizes["num_key_value_heads"]
        return Architecture(
            family=self.name,
            num_layers=sizes["num_hidden_layers"],
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=heads if groups is None else groups,
            head_dim=sizes["head_dim"] or hidden // heads,
            ffn_hidden_size=sizes["intermediate_size"],
            vocab_size=sizes["vocab_size"],
            max_position_embeddings=sizes["max_position_embeddings"],
            **rotary.from_hf(config),
            norm="rmsnorm",
            norm_epsilon=positive(config, "rms_norm_eps", 1e-6),
            activation=_ACTIVATIONS[config.get("hidden_act", "silu")],
            gated=True,
            tied=flag(config, "tie_word_embeddings", False),
            **settings,
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
            "attention_dropout": 0.0,
            "tie_word_embeddings": architecture.tied,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "transformers_version": TRANSFORMERS_VERSION,
            **rotary.to_hf(architecture),
            **self.own_keys(architecture),
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

        norms_of_heads = [
            Copy(f"{LAYER}self_attention.{kind}_layernorm.weight", f"{hf}self_attn.{kind}_norm.weight", architecture.head_dim)
            for kind in ("q", "k")
        ]
        rules: list[Rule] = [
            Vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab, hidden),
            Copy(f"{LAYER}self_attention.linear_qkv.layer_norm_weight", f"{hf}input_layernorm.weight", hidden),
            qkv("weight", hidden),
            *([qkv("bias")] if architecture.qkv_bias else []),
            *(norms_of_heads if architecture.qk_norm else []),
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
        """See `Family.defaults`; multi-head, an MLP of 8/3 x hidden_size rounded up to 64, untied; biases as in published models."""
        values = self.needed(given)
        tied = given.get("tie_word_embeddings")
        return Architecture(
            **values,
            num_query_groups=given.get("num_query_groups") or values["num_attention_heads"],
            ffn_hidden_size=given.get("ffn_hidden_size") or -(-(8 * values["hidden_size"]) // (3 * 64)) * 64,
            position="rope",
            norm="rmsnorm",
            norm_epsilon=self.epsilon,
            activation="silu",
            gated=True,
            tied=False if tied is None else tied,
            **self.settings({"sliding_window": None}),
        )
