"""GPTBigCode: SantaCoder, StarCoder and StarCoderBase. Multi-query or multi-head attention, learned positions, LayerNorm.

transformers fuses query, key and value as megatron-core does ([Q; K; V] for multi-query, head by head for multi-head),
so every parameter is copied as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megawrap.errors import ConfigError, ConversionError
from megawrap.families.base import LAYER, TRANSFORMERS_VERSION, Copy, Family, Rule, Vocab, flag, positive
from megawrap.models.architecture import Activation, Architecture

_ACTIVATIONS: dict[str, Activation] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",  # the same formula, written out
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_KEYS = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon",
    "tie_word_embeddings",
    # settings of a classification head that the model does not have
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
)  # fmt: skip
_OWN_KEYS = (
    "multi_query",
    # settings of the implementation
    "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner", "max_batch_size", "max_sequence_length",
    "pad_key_length", "pre_allocate_kv_cache", "validate_runner_input",
)  # fmt: skip


class GPTBigCode(Family):
    """The family of `GPTBigCodeForCausalLM`."""

    name = "gpt_bigcode"
    model_type = "gpt_bigcode"
    hf_class = "GPTBigCodeForCausalLM"
    base_prefix = "transformer."
    ignored_tensors = (".attn.bias", ".attn.masked_bias")

    tanh_gelu = "gelu_pytorch_tanh"
    """What config.json calls the activation when it is the tanh approximation."""

    def groups(self, config: Mapping[str, Any]) -> int:
        """Key/value heads, once the keys that only this family has are checked.

        Raises:
            ConversionError: a key has a value that is not mapped, or is not known.
        """
        multi_query, heads = flag(config, "multi_query", True), config.get("n_head", 12)
        groups = 1 if multi_query else heads
        self.refuse(config, mapped=(*_KEYS, *_OWN_KEYS), fixed=self.fixed() | {"num_key_value_heads": (groups,)})
        return groups

    def own_keys(self, architecture: Architecture) -> dict[str, Any]:
        """The inverse of `groups`: what config.json has besides the keys of GPT-2."""
        return {
            "multi_query": architecture.num_query_groups == 1,
            "num_key_value_heads": architecture.num_query_groups,
            "attention_softmax_in_fp32": True,
            "scale_attention_softmax_in_fp32": True,
        }

    def mapped_keys(self) -> tuple[str, ...]:
        """Keys that `from_hf` reads, apart from those of `groups`."""
        return _KEYS

    def fixed(self) -> dict[str, tuple[Any, ...]]:
        """Keys that may only have these values."""
        return {
            "scale_attn_weights": (True,),
            "add_cross_attention": (False,),
            "is_encoder_decoder": (False,),
            "activation_function": tuple(_ACTIVATIONS),
        }

    def from_hf(self, config: Mapping[str, Any]) -> Architecture:
        """See `Family.from_hf`; missing keys have the defaults of transformers."""
        config = {_ALIASES.get(key, key): value for key, value in config.items()}
        heads, hidden = config.get("n_head", 12), config.get("n_embd", 768)
        groups = self.groups(config)
        if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0 and hidden % heads == 0):
            raise ConversionError(
                f"n_embd {hidden!r} is not a multiple of n_head {heads!r}", hint=f"config.json does not describe a {self.name} model"
            )
        return Architecture(
            family=self.name,
            num_layers=config.get("n_layer", 12),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=hidden // heads,
            ffn_hidden_size=config.get("n_inner") or 4 * hidden,
            vocab_size=config.get("vocab_size", 50257),
            max_position_embeddings=config.get("n_positions", 1024),
            position="learned",
            norm="layernorm",
            norm_epsilon=positive(config, "layer_norm_epsilon", 1e-5),
            activation=_ACTIVATIONS[config.get("activation_function", self.tanh_gelu)],
            gated=False,
            linear_bias=True,
            qkv_bias=True,
            tied=flag(config, "tie_word_embeddings", True),
        )

    def to_hf(self, architecture: Architecture) -> dict[str, Any]:
        """See `Family.to_hf`."""
        return {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            "vocab_size": architecture.vocab_size,
            "n_positions": architecture.max_position_embeddings,
            "n_embd": architecture.hidden_size,
            "n_layer": architecture.num_layers,
            "n_head": architecture.num_attention_heads,
            "n_inner": architecture.ffn_hidden_size,
            "activation_function": self.tanh_gelu if architecture.activation == "gelu_tanh" else architecture.activation,
            "layer_norm_epsilon": architecture.norm_epsilon,
            "tie_word_embeddings": architecture.tied,
            "scale_attn_weights": True,
            "add_cross_attention": False,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "transformers_version": TRANSFORMERS_VERSION,
            **self.own_keys(architecture),
        }

    def rules(self, architecture: Architecture) -> list[Rule]:
        """See `Family.rules`."""
        hidden, ffn, vocab = architecture.hidden_size, architecture.ffn_hidden_size, architecture.vocab_size
        qkv = hidden + 2 * architecture.num_query_groups * architecture.head_dim

        def layer(megatron: str, hf: str, *shape: int) -> Rule:
            return Copy(LAYER + megatron, "transformer.h.{layer}." + hf, *shape)

        rules: list[Rule] = [
            Vocab("embedding.word_embeddings.weight", "transformer.wte.weight", vocab, hidden),
            Copy("embedding.position_embeddings.weight", "transformer.wpe.weight", architecture.max_position_embeddings, hidden),
            layer("self_attention.linear_qkv.layer_norm_weight", "ln_1.weight", hidden),
            layer("self_attention.linear_qkv.layer_norm_bias", "ln_1.bias", hidden),
            layer("self_attention.linear_qkv.weight", "attn.c_attn.weight", qkv, hidden),
            layer("self_attention.linear_qkv.bias", "attn.c_attn.bias", qkv),
            layer("self_attention.linear_proj.weight", "attn.c_proj.weight", hidden, hidden),
            layer("self_attention.linear_proj.bias", "attn.c_proj.bias", hidden),
            layer("mlp.linear_fc1.layer_norm_weight", "ln_2.weight", hidden),
            layer("mlp.linear_fc1.layer_norm_bias", "ln_2.bias", hidden),
            layer("mlp.linear_fc1.weight", "mlp.c_fc.weight", ffn, hidden),
            layer("mlp.linear_fc1.bias", "mlp.c_fc.bias", ffn),
            layer("mlp.linear_fc2.weight", "mlp.c_proj.weight", hidden, ffn),
            layer("mlp.linear_fc2.bias", "mlp.c_proj.bias", hidden),
            Copy("decoder.final_layernorm.weight", "transformer.ln_f.weight", hidden),
            Copy("decoder.final_layernorm.bias", "transformer.ln_f.bias", hidden),
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
            "n_positions": 64,
            "n_embd": 48,
            "n_layer": 4,
            "n_head": 4,
            "n_inner": 100,
            "activation_function": "gelu_pytorch_tanh",
            "multi_query": True,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return {**config, **changes}

    def defaults(self, **given: Any) -> Architecture:
        """See `Family.defaults`; multi-query, an MLP of 4 x hidden_size, tied."""
        values = self.needed(given)
        heads = values["num_attention_heads"]
        groups = given.get("num_query_groups") or 1
        if groups not in (1, heads):
            raise ConfigError(f"num_query_groups is {groups}; gpt_bigcode has 1 (multi-query) or num_attention_heads {heads} (multi-head)")
        tied = given.get("tie_word_embeddings")
        return Architecture(
            **values,
            num_query_groups=groups,
            ffn_hidden_size=given.get("ffn_hidden_size") or 4 * values["hidden_size"],
            position="learned",
            norm="layernorm",
            norm_epsilon=1e-5,
            activation="gelu_tanh",
            gated=False,
            linear_bias=True,
            qkv_bias=True,
            tied=True if tied is None else tied,
        )
