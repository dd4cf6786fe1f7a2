"""Model families: one file per Hugging Face architecture.

`get` finds a family by its name, `from_hf_config` by the config.json of a model; `known` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megawrap.errors import ConfigError, ConversionError
from megawrap.families.base import Family
from megawrap.families.gpt2 import GPT2
from megawrap.families.gpt_bigcode import GPTBigCode
from megawrap.families.gpt_neox import GPTNeoX
from megawrap.families.llama import Llama
from megawrap.families.mistral import Mistral
from megawrap.families.qwen2 import Qwen2
from megawrap.families.qwen3 import Qwen3
from megawrap.families.starcoder2 import StarCoder2

_REGISTERED: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known under its name."""
    _REGISTERED[family.name] = family


def known() -> list[str]:
    """Names of the registered families, sorted."""
    return sorted(_REGISTERED)


def get(name: str) -> Family:
    """The family of that name.

    Raises:
        ConfigError: no such family; lists the known ones.
    """
    if name not in _REGISTERED:
        raise ConfigError(f"model family {name!r} is not known", hint=f"known are {', '.join(known())}")
    return _REGISTERED[name]


def from_hf_config(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config.json, by its model_type.

    Raises:
        ConversionError: no registered family has this model_type, or `architectures` names another class.
    """
    model_type, classes = config.get("model_type"), config.get("architectures") or []
    listed = ", ".join(f"{name} ({_REGISTERED[name].hf_class})" for name in known())
    for family in _REGISTERED.values():
        if family.model_type == model_type:
            if classes and classes != [family.hf_class]:
                raise ConversionError(
                    f"architectures is {classes!r}; {model_type} models are {family.hf_class}", hint=f"known are {listed}"
                )
            return family
    raise ConversionError(f"model_type is {model_type!r} (architectures {classes!r}), which no family maps", hint=f"known are {listed}")


for _family in (GPT2(), GPTBigCode(), GPTNeoX(), Llama(), Mistral(), Qwen2(), Qwen3(), StarCoder2()):
    register(_family)
