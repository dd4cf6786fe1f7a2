"""The models of the training benchmarks, for megawrap and for transformers.

In: the name of a size and a vocabulary. Out: an `Architecture`, or transformers' model of the same shape, dropout 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megawrap import families
from megawrap.models.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
    "small": {"num_layers": 6, "hidden_size": 512, "num_attention_heads": 8},  # the model of the CPU benchmark
    "1.3b": {"num_layers": 28, "hidden_size": 2048, "num_attention_heads": 16},
}


def architecture(model: dict[str, Any]) -> Architecture:
    """Multi-query GPTBigCode (StarCoder) of model["size"], with model["vocab_size"] tokens and model["positions"] positions."""
    return families.get("gpt_bigcode").defaults(
        **SIZES[model["size"]], vocab_size=model["vocab_size"], max_position_embeddings=model["positions"]
    )


def hugging_face(model: dict[str, Any], **options: Any) -> PreTrainedModel:
    """transformers' model of the same configuration, randomly initialised, fp32, in training mode, dropout 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    mapped = families.get("gpt_bigcode").to_hf(architecture(model))
    dropouts = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = AutoConfig.for_model(**{**mapped, **dropouts, "use_cache": False})
    return AutoModelForCausalLM.from_config(config, **options).train()
