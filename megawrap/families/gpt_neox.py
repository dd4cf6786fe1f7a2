"""GPT-NeoX and Pythia: attention and MLP beside each other, positions that rotate a part of each head, LayerNorm, untied head.

transformers fuses query, key and value head by head as megatron-core does, so every parameter is copied as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megawrap.errors import ConfigError, ConversionError
from megawrap.families import rotary
from megawrap.families.base import LAYER, TRANSFORMERS_VERSION, Copy, Family, Rule, Vocab, flag, positive
from megawrap.models.architecture import Activation, Architecture

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",  # the same formula, written out
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "layer_norm_eps", "tie_word_embeddings", "use_parallel_residual", "rotary_pct", "rotary_emb_base", "attention_dropout",
    "hidden_dropout", "classifier_dropout", *rotary.KEYS,
    "is_decoder",  # says nothing: the class is a decoder whatever it is
)  # fmt: skip
_ROTARY_SHARE = 0.25


class GPTNeoX(Family):
    """The family of `GPTNeoXForCausalLM`."""

    name = "gpt_neox"
    model_type = "gpt_neox"
    hf_class = "GPTNeoXForCausalLM"
    head = "embed_out.weight"
    ignored_tensors = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")

    def from_hf(self, config: Mapping[str, Any]) -> Architecture:
        """See `Family.from_hf`; missing keys have the defaults of transformers."""
        no = (False,)
        self.refuse(
            config,
            mapped=_KEYS,
            fixed={
                "hidden_act": tuple(_ACTIVATIONS),
                "attention_bias": (True,),  # megatron-core has one switch for these biases and the MLP's
                "is_encoder_decoder": no,
                "add_cross_attention": no,
            },
        )
        heads, hidden = config.get("num_attention_heads", 64), config.get("hidden_size", 6144)
        if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0 and hidden % heads == 0):
            raise ConversionError(
                f"hidden_size {hidden!r} is not a multiple of num_attention_heads {heads!r}",
                hint="config.json does not describe a GPT-NeoX model",
            )
        return Architecture(
            family=self.name,
            num_layers=config.get("num_hidden_layers", 44),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=heads,
            head_dim=hidden // heads,
            ffn_hidden_size=config.get("intermediate_size", 24576),
            vocab_size=config.get("vocab_size", 50432),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            **rotary.from_hf(config, older_theta="rotary_emb_base", older_share="rotary_pct", share=_ROTARY_SHARE),
            norm="layernorm",
            norm_epsilon=positive(config, "layer_norm_eps", 1e-5),
            activation=_ACTIVATIONS[config.get("hidden_act", "gelu")],
            gated=False,
            linear_bias=True,
            qkv_bias=True,
            tied=flag(config, "tie_word_embeddings", False),
            parallel_residual=flag(config, "use_parallel_residual", True),
        )

    def to_hf(self, architecture: Architecture) -> dict[str, Any]:
        """See `Family.to_hf`."""
        parameters = rotary.to_hf(architecture)["rope_parameters"]
        return {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            "vocab_size": architecture.vocab_size,
            "hidden_size": architecture.hidden_size,
            "intermediate_size": architecture.ffn_hidden_size,
            "num_hidden_layers": architecture.num_layers,
            "num_attention_heads": architecture.num_attention_heads,
            "hidden_act": "gelu_pytorch_tanh" if architecture.activation == "gelu_tanh" else architecture.activation,
            "max_position_embeddings": architecture.max_position_embeddings,
            "layer_norm_eps": architecture.norm_epsilon,
            "rope_parameters": {**parameters, "partial_rotary_factor": architecture.rotary_fraction},
            "use_parallel_residual": architecture.parallel_residual,
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "tie_word_embeddings": architecture.tied,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "transformers_version": TRANSFORMERS_VERSION,
        }

    def rules(self, architecture: Architecture) -> list[Rule]:
        """See `Family.rules`."""
        hidden, ffn, vocab = architecture.hidden_size, architecture.ffn_hidden_size, architecture.vocab_size

        def layer(megatron: str, hf: str, *shape: int) -> Rule:
            return Copy(LAYER + megatron, "gpt_neox.layers.{layer}." + hf, *shape)

        rules: list[Rule] = [
            Vocab("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight", vocab, hidden),
            layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", hidden),
            layer("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias", hidden),
            layer("self_attention.linear_qkv.weight", "attention.query_key_value.weight", 3 * hidden, hidden),
            layer("self_attention.linear_qkv.bias", "attention.query_key_value.bias", 3 * hidden),
            layer("self_attention.linear_proj.weight", "attention.dense.weight", hidden, hidden),
            layer("self_attention.linear_proj.bias", "attention.dense.bias", hidden),
            layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", hidden),
            layer("mlp.linear_fc1.layer_norm_bias", "post_attention_layernorm.bias", hidden),
            layer("mlp.linear_fc1.weight", "mlp.dense_h_to_4h.weight", ffn, hidden),
            layer("mlp.linear_fc1.bias", "mlp.dense_h_to_4h.bias", ffn),
            layer("mlp.linear_fc2.weight", "mlp.dense_4h_to_h.weight", hidden, ffn),
            layer("mlp.linear_fc2.bias", "mlp.dense_4h_to_h.bias", hidden),
            Copy("decoder.final_layernorm.weight", "gpt_neox.final_layer_norm.weight", hidden),
            Copy("decoder.final_layernorm.bias", "gpt_neox.final_layer_norm.bias", hidden),
        ]
        if not architecture.tied:
            rules.append(Vocab("output_layer.weight", self.head, vocab, hidden))
        return rules

    def tiny(self, **changes: Any) -> dict[str, Any]:
        """See `Family.tiny`; loads at tp 1, 2, 4 and pp 1, 2; a third of a head rotates."""
        config: dict[str, Any] = {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            "vocab_size": 131,
            "hidden_size": 48,
            "intermediate_size": 100,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "hidden_act": "gelu",
            "max_position_embeddings": 64,
            "layer_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.34},
            "use_parallel_residual": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return {**config, **changes}

    def defaults(self, **given: Any) -> Architecture:
        """See `Family.defaults`; an MLP of 4 x hidden_size, untied, a quarter of each head rotates."""
        values = self.needed(given)
        heads, tied = values["num_attention_heads"], given.get("tie_word_embeddings")
        if given.get("num_query_groups") not in (None, heads):
            raise ConfigError(f"num_query_groups is {given['num_query_groups']}; gpt_neox is multi-head: num_attention_heads {heads}")
        return Architecture(
            **values,
            num_query_groups=heads,
            ffn_hidden_size=given.get("ffn_hidden_size") or 4 * values["hidden_size"],
            position="rope",
            rotary_fraction=_ROTARY_SHARE,
            norm="layernorm",
            norm_epsilon=1e-5,
            activation="gelu",
            gated=False,
            linear_bias=True,
            qkv_bias=True,
            tied=False if tied is None else tied,
            parallel_residual=True,
        )
