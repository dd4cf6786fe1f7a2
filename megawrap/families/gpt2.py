"""GPT-2: the architecture GPTBigCode comes from, multi-head, its matrices kept as [inputs, outputs].

transformers stores Conv1D weights, transposed against a linear layer's, and one matrix of all queries, all keys and all
values, where megatron-core has query, key and value head by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megawrap.errors import ConfigError
from megawrap.families.base import FusedQKV, Rule, Transposed
from megawrap.families.gpt_bigcode import GPTBigCode
from megawrap.models.architecture import Architecture

_OWN_KEYS = ("reorder_and_upcast_attn", "task_specific_params")  # how products are ordered; settings of a text generator


class GPT2(GPTBigCode):
    """The family of `GPT2LMHeadModel`."""

    name = "gpt2"
    model_type = "gpt2"
    hf_class = "GPT2LMHeadModel"
    tanh_gelu = "gelu_new"

    def groups(self, config: Mapping[str, Any]) -> int:
        """See `GPTBigCode.groups`."""
        positions = config.get("n_positions", 1024)
        fixed = {"scale_attn_by_inverse_layer_idx": (False,), "n_ctx": (positions,)}
        self.refuse(config, mapped=(*self.mapped_keys(), *_OWN_KEYS), fixed=self.fixed() | fixed)
        return config.get("n_head", 12)

    def own_keys(self, architecture: Architecture) -> dict[str, Any]:
        """See `GPTBigCode.own_keys`."""
        return {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False}

    def rules(self, architecture: Architecture) -> list[Rule]:
        """See `Family.rules`."""
        return [_laid_out(rule, architecture) for rule in super().rules(architecture)]

    def tiny(self, **changes: Any) -> dict[str, Any]:
        """See `Family.tiny`; loads at tp 1, 2, 4 and pp 1, 2."""
        config = super().tiny(activation_function="gelu_new")
        del config["multi_query"]
        return {**config, **changes}

    def defaults(self, **given: Any) -> Architecture:
        """See `Family.defaults`; an MLP of 4 x hidden_size, tied."""
        heads, groups = given.get("num_attention_heads"), given.get("num_query_groups")
        if groups not in (None, heads):
            raise ConfigError(f"num_query_groups is {groups}; gpt2 is multi-head: num_attention_heads {heads}")
        return super().defaults(**{**given, "num_query_groups": heads})


def _laid_out(rule: Rule, architecture: Architecture) -> Rule:
    """A rule of GPTBigCode as GPT-2 lays out its tensors."""
    (hf,) = rule.hf
    if ".c_attn." in hf:
        return FusedQKV(rule.megatron, hf, architecture, *rule.columns, transposed=hf.endswith(".weight"))
    if rule.per_layer and len(rule.megatron_shape) == 2:
        return Transposed(rule.megatron, hf, *rule.megatron_shape)
    return rule
