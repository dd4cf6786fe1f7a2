"""Mistral: Llama with fewer key/value heads, no biases, and in its first version a sliding window of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megawrap.families import rotary
from megawrap.families.llama import Llama
from megawrap.models.architecture import Architecture


class Mistral(Llama):
    """The family of `MistralForCausalLM`."""

    name = "mistral"
    model_type = "mistral"
    hf_class = "MistralForCausalLM"
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.hf_defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Llama.settings`."""
        self.refuse(config, mapped=(*self.mapped_keys(), "sliding_window"), fixed=self.fixed())
        positions = config.get("max_position_embeddings", self.hf_defaults["max_position_embeddings"])
        return {"linear_bias": False, "qkv_bias": False, "sliding_window": rotary.window(config, 4096, positions)}

    def own_keys(self, architecture: Architecture) -> dict[str, Any]:
        """See `Llama.own_keys`."""
        return {"sliding_window": architecture.sliding_window}

    def tiny(self, **changes: Any) -> dict[str, Any]:
        """See `Family.tiny`; the window is shorter than the positions."""
        return super().tiny(**{"sliding_window": 19, **changes})
