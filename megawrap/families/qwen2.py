"""Qwen2 and Qwen2.5: Llama with biases of query, key and value; small ones share embedding and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megawrap.errors import ConversionError
from megawrap.families import rotary
from megawrap.families.base import flag
from megawrap.families.llama import Llama
from megawrap.models.architecture import Architecture

_WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


class Qwen2(Llama):
    """The family of `Qwen2ForCausalLM`."""

    name = "qwen2"
    model_type = "qwen2"
    hf_class = "Qwen2ForCausalLM"
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.hf_defaults,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    }
    epsilon = 1e-6

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Llama.settings`."""
        self.refuse(config, mapped=(*self.mapped_keys(), *_WINDOW_KEYS), fixed=self.fixed())
        return {"linear_bias": False, "qkv_bias": True, "sliding_window": self.window(config)}

    def window(self, config: Mapping[str, Any]) -> int | None:
        """The sliding window when every layer has it, none when no layer has.

        Raises:
            ConversionError: some layers have it and others have not.
        """
        positions = config.get("max_position_embeddings", self.hf_defaults["max_position_embeddings"])
        on = flag(config, "use_sliding_window", False)
        window = rotary.window(config, 4096, positions) if on else None
        layers, full = config.get("num_hidden_layers", self.hf_defaults["num_hidden_layers"]), config.get("max_window_layers", 28)
        kinds = config.get("layer_types")
        if kinds is None and isinstance(layers, int) and isinstance(full, int):
            kinds = ["sliding_attention" if on and number >= full else "full_attention" for number in range(layers)]
        if not isinstance(kinds, list | tuple):
            raise ConversionError(
                f"layer_types is {kinds!r}, num_hidden_layers {layers!r} and max_window_layers {full!r}; a list is needed"
            )
        different = sorted({str(kind) for kind in kinds})
        if window is not None and different == ["sliding_attention"]:
            return window
        if different == ["full_attention"] or (on and window is None and set(different) <= {"full_attention", "sliding_attention"}):
            return None
        raise ConversionError(
            f"layer_types is {different} with use_sliding_window {on} and max_window_layers {full}; {self.name} maps one kind only",
            hint="this feature of the model is not mapped and will not be dropped silently",
        )

    def own_keys(self, architecture: Architecture) -> dict[str, Any]:
        """See `Llama.own_keys`."""
        window = architecture.sliding_window
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 28 if window is None else 0,
            "layer_types": ["full_attention" if window is None else "sliding_attention"] * architecture.num_layers,
        }
