"""StarCoder2: grouped-query attention with rotary positions and a sliding window, LayerNorm, biases, tied head.

transformers keeps query, key and value apart, as Llama does, and names the MLP as GPT-2 does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megawrap.errors import ConversionError
from megawrap.families import rotary
from megawrap.families.base import LAYER, QKV, TRANSFORMERS_VERSION, Copy, Family, Rule, Vocab, flag, positive
from megawrap.models.architecture import Activation, Architecture

_ACTIVATIONS: dict[str, Activation] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",  # the same formula, written out
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "norm_epsilon", "tie_word_embeddings", "use_bias", "sliding_window", "attention_dropout",
    "residual_dropout", "embedding_dropout", *rotary.KEYS,
)  # fmt: skip


class StarCoder2(Family):
    """The family of `Starcoder2ForCausalLM`."""

    name = "starcoder2"
    model_type = "starcoder2"
    hf_class = "Starcoder2ForCausalLM"
    ignored_tensors = (".rotary_emb.inv_freq",)

    def from_hf(self, config: Mapping[str, Any]) -> Architecture:
        """See `Family.from_hf`; missing keys have the defaults of transformers."""
        no = (False,)
        self.refuse(
            config,
            mapped=_KEYS,
            fixed={
                "hidden_act": tuple(_ACTIVATIONS),
                "norm_type": ("layer_norm",),
                "mlp_type": ("default",),
                "is_encoder_decoder": no,
                "add_cross_attention": no,
            },
        )
        heads, hidden = config.get("num_attention_heads", 24), config.get("hidden_size", 3072)
        if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0 and hidden % heads == 0):
            raise ConversionError(
                f"hidden_size {hidden!r} is not a multiple of num_attention_heads {heads!r}",
                hint="config.json does not describe a StarCoder2 model",
            )
        bias, positions = flag(config, "use_bias", True), config.get("max_position_embeddings", 4096)
        return Architecture(
            family=self.name,
            num_layers=config.get("num_hidden_layers", 30),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads", 2),
            head_dim=hidden // heads,
            ffn_hidden_size=config.get("intermediate_size", 12288),
            vocab_size=config.get("vocab_size", 49152),
            max_position_embeddings=positions,
            **rotary.from_hf(config),
            sliding_window=rotary.window(config, None, positions),
            norm="layernorm",
            norm_epsilon=positive(config, "norm_epsilon", 1e-5),
            activation=_ACTIVATIONS[config.get("hidden_act", "gelu_pytorch_tanh")],
            gated=False,
            linear_bias=bias,
            qkv_bias=bias,
            tied=flag(config, "tie_word_embeddings", True),
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
            "hidden_act": "gelu_pytorch_tanh" if architecture.activation == "gelu_tanh" else architecture.activation,
            "max_position_embeddings": architecture.max_position_embeddings,
            "norm_epsilon": architecture.norm_epsilon,
            "use_bias": architecture.linear_bias,
            "sliding_window": architecture.sliding_window,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
            "tie_word_embeddings": architecture.tied,
            "initializer_range": 0.018042,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "transformers_version": TRANSFORMERS_VERSION,
            **rotary.to_hf(architecture),
        }

    def rules(self, architecture: Architecture) -> list[Rule]:
        """See `Family.rules`."""
        hidden, ffn, vocab = architecture.hidden_size, architecture.ffn_hidden_size, architecture.vocab_size
        hf = "model.layers.{layer}."

        def layer(megatron: str, name: str, *shape: int) -> Rule:
            return Copy(LAYER + megatron, hf + name, *shape)

        def qkv(kind: str, *columns: int) -> Rule:
            names = (f"{hf}self_attn.q_proj.{kind}", f"{hf}self_attn.k_proj.{kind}", f"{hf}self_attn.v_proj.{kind}")
            return QKV(f"{LAYER}self_attention.linear_qkv.{kind}", names, architecture, *columns)

        rules: list[Rule] = [
            Vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab, hidden),
            layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", hidden),
            layer("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias", hidden),
            qkv("weight", hidden),
            qkv("bias"),
            layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", hidden, hidden),
            layer("self_attention.linear_proj.bias", "self_attn.o_proj.bias", hidden),
            layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", hidden),
            layer("mlp.linear_fc1.layer_norm_bias", "post_attention_layernorm.bias", hidden),
            layer("mlp.linear_fc1.weight", "mlp.c_fc.weight", ffn, hidden),
            layer("mlp.linear_fc1.bias", "mlp.c_fc.bias", ffn),
            layer("mlp.linear_fc2.weight", "mlp.c_proj.weight", hidden, ffn),
            layer("mlp.linear_fc2.bias", "mlp.c_proj.bias", hidden),
            Copy("decoder.final_layernorm.weight", "model.norm.weight", hidden),
            Copy("decoder.final_layernorm.bias", "model.norm.bias", hidden),
        ]
        if not architecture.tied:
            rules.append(Vocab("output_layer.weight", self.head, vocab, hidden))
        return [rule for rule in rules if architecture.linear_bias or not rule.megatron.endswith(".bias") or "norm" in rule.megatron]

    def tiny(self, **changes: Any) -> dict[str, Any]:
        """See `Family.tiny`; loads at tp 1, 2, 4 and pp 1, 2; the window is shorter than the positions."""
        config: dict[str, Any] = {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            "vocab_size": 131,
            "hidden_size": 48,
            "intermediate_size": 100,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 64,
            "norm_epsilon": 1e-5,
            "initializer_range": 0.018042,
            "sliding_window": 19,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "use_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return {**config, **changes}

    def defaults(self, **given: Any) -> Architecture:
        """See `Family.defaults`; multi-head, an MLP of 4 x hidden_size, tied, no sliding window."""
        values = self.needed(given)
        tied = given.get("tie_word_embeddings")
        return Architecture(
            **values,
            num_query_groups=given.get("num_query_groups") or values["num_attention_heads"],
            ffn_hidden_size=given.get("ffn_hidden_size") or 4 * values["hidden_size"],
            position="rope",
            norm="layernorm",
            norm_epsilon=1e-5,
            activation="gelu_tanh",
            gated=False,
            linear_bias=True,
            qkv_bias=True,
            tied=True if tied is None else tied,
        )
