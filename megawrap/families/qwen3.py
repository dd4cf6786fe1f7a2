"""Qwen3: Qwen2 without biases, every head's query and key normalised before it is rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megawrap.families.qwen2 import Qwen2
from megawrap.models.architecture import Architecture


class Qwen3(Qwen2):
    """The family of `Qwen3ForCausalLM`."""

    name = "qwen3"
    model_type = "qwen3"
    hf_class = "Qwen3ForCausalLM"
    hf_defaults: ClassVar[Mapping[str, Any]] = {**Qwen2.hf_defaults, "head_dim": 128}

    def fixed(self) -> dict[str, tuple[Any, ...]]:
        """See `Llama.fixed`; megatron-core cannot give the attention output a bias and the MLP none."""
        return super().fixed() | {"attention_bias": (False,)}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Llama.settings`."""
        return super().settings(config) | {"qkv_bias": False, "qk_norm": True}

    def own_keys(self, architecture: Architecture) -> dict[str, Any]:
        """See `Llama.own_keys`."""
        return super().own_keys(architecture) | {"attention_bias": False}
