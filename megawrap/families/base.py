"""What a model family is: a config map, parameter rules, a tiny config for tests, and defaults for training from scratch.

A rule names the Hugging Face tensors that make one megatron tensor and how their rows are laid out; both directions are
read from that one description, so an inverse cannot disagree with its rule. Names may hold `{layer}`. torch is imported
only when a tensor is re-laid-out.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megawrap.errors import ConfigError, ConversionError
from megawrap.models.architecture import LAYERS, Architecture

if TYPE_CHECKING:
    from torch import Tensor

LAYER = LAYERS + "{layer}."  # the beginning of megatron names in a layer's rule
TRANSFORMERS_VERSION = "5.23.0"  # the release whose config.json is written


@dataclass(frozen=True)
class Rule:
    """One megatron tensor made of the rows of one or more Hugging Face tensors.

    The rows of source i are `groups` blocks of `rows[i]`. The megatron tensor holds, group after group, the block of the
    first source, then of the second, and so on: `cat([t.view(groups, rows[i], *columns) ...], dim=1)`. One name for several
    `rows` is a tensor in which the sources lie one after the other.
    """

    megatron: str
    """Canonical megatron name, with `{layer}` in a layer's rule."""
    hf: tuple[str, ...]
    """Hugging Face tensor names, in the order of their blocks."""
    groups: int
    """Blocks of each source."""
    rows: tuple[int, ...]
    """Rows of a block, for each source."""
    columns: tuple[int, ...]
    """What follows the first dimension; the same for all."""
    vocab: bool = False
    """The first dimension is the vocabulary: megatron checkpoints pad it."""
    transposed: bool = False
    """A matrix lies as [inputs, outputs] on the Hugging Face side: its rows here are its columns there."""

    @property
    def per_layer(self) -> bool:
        """Whether the rule stands for one tensor in every layer."""
        return "{layer}" in self.megatron

    @property
    def megatron_shape(self) -> tuple[int, ...]:
        """Shape of the megatron tensor, without vocabulary padding."""
        return (self.groups * sum(self.rows), *self.columns)

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every Hugging Face tensor."""
        rows = self.rows if len(self.hf) == len(self.rows) else (sum(self.rows),)
        shapes = {name: (self.groups * count, *self.columns) for name, count in zip(self.hf, rows, strict=True)}
        return {name: shape[::-1] for name, shape in shapes.items()} if self.transposed else shapes

    def at(self, layer: int) -> Rule:
        """The rule of one layer, its names written out."""
        hf = tuple(name.replace("{layer}", str(layer)) for name in self.hf)
        return self.changed(megatron=self.megatron.replace("{layer}", str(layer)), hf=hf)

    def changed(self, **fields: Any) -> Rule:
        """The same kind of rule with other fields (`dataclasses.replace` would call the constructor of the kind)."""
        rule = copy.copy(self)
        for name, value in fields.items():
            object.__setattr__(rule, name, value)
        return rule

    def from_hf(self, tensors: Sequence[Tensor]) -> Tensor:
        """Lay Hugging Face tensors (in the order of `hf`) out as the megatron tensor."""
        if self.transposed:
            tensors = [tensor.t().contiguous() if tensor.ndim == 2 else tensor for tensor in tensors]
        if len(self.rows) == 1:
            return tensors[0]
        import torch

        if len(tensors) == 1:
            tensors = tensors[0].split([self.groups * count for count in self.rows])
        blocks = [tensor.view(self.groups, count, *self.columns) for tensor, count in zip(tensors, self.rows, strict=True)]
        return torch.cat(blocks, dim=1).view(self.megatron_shape)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """Cut the megatron tensor into its Hugging Face tensors, in the order of `hf`."""
        parts = [tensor]
        if len(self.rows) > 1:
            blocks = tensor.view(self.groups, sum(self.rows), *self.columns).split(self.rows, dim=1)
            parts = [block.reshape(-1, *self.columns) for block in blocks]
        if len(self.hf) < len(parts):
            import torch

            parts = [torch.cat(parts)]
        return [part.t().contiguous() if part.ndim == 2 else part for part in parts] if self.transposed else parts


class Copy(Rule):
    """The same tensor on both sides."""

    def __init__(self, megatron: str, hf: str, *shape: int) -> None:
        super().__init__(megatron, (hf,), 1, shape[:1], shape[1:])


class Vocab(Rule):
    """The same tensor on both sides, its first dimension the vocabulary."""

    def __init__(self, megatron: str, hf: str, *shape: int) -> None:
        super().__init__(megatron, (hf,), 1, shape[:1], shape[1:], vocab=True)


class QKV(Rule):
    """Query, key and value interleaved by group: [Q of the group's heads, K, V] for every key/value head."""

    def __init__(self, megatron: str, hf: tuple[str, str, str], architecture: Architecture, *columns: int) -> None:
        heads_per_group = architecture.num_attention_heads // architecture.num_query_groups
        width = architecture.head_dim
        super().__init__(megatron, hf, architecture.num_query_groups, (heads_per_group * width, width, width), columns)


class Transposed(Rule):
    """A matrix that lies as [inputs, outputs] on the Hugging Face side (transformers' Conv1D); `shape` is [outputs, inputs]."""

    def __init__(self, megatron: str, hf: str, *shape: int) -> None:
        super().__init__(megatron, (hf,), 1, shape[:1], shape[1:], transposed=True)


class FusedQKV(Rule):
    """One Hugging Face tensor of all queries, all keys and all values; [Q, K, V] head by head in megatron (multi-head)."""

    def __init__(self, megatron: str, hf: str, architecture: Architecture, *columns: int, transposed: bool = False) -> None:
        width = architecture.head_dim
        super().__init__(megatron, (hf,), architecture.num_attention_heads, (width,) * 3, columns, transposed=transposed)


class GatedMLP(Rule):
    """linear_fc1 of a gated MLP: all of gate, then all of up."""

    def __init__(self, megatron: str, hf: tuple[str, str], architecture: Architecture, *columns: int) -> None:
        super().__init__(megatron, hf, 1, (architecture.ffn_hidden_size,) * 2, columns)


# Keys of any config.json that do not change what a model computes without dropout.
HARMLESS_KEYS = frozenset({
    "architectures", "attn_pdrop", "bos_token_id", "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "id2label",
    "initializer_range", "label2id", "model_type", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id",
    "problem_type", "resid_pdrop", "return_dict", "tokenizer_class", "torch_dtype", "transformers_version", "unsloth_version", "use_cache",
})  # fmt: skip


class Family(ABC):
    """One Hugging Face architecture: a subclass in a file of its own, registered in `megawrap.families`."""

    name: ClassVar[str]
    """Name in recipes and checkpoints."""
    model_type: ClassVar[str]
    """`model_type` of config.json."""
    hf_class: ClassVar[str]
    """The transformers class, as in `architectures` of config.json."""
    head: ClassVar[str] = "lm_head.weight"
    """Name of the output layer on disk, which a tied model may carry a second time."""
    base_prefix: ClassVar[str] = ""
    """What all names but the head's begin with, and lack in files of the model without its head (as GPT-2 was published)."""
    ignored_tensors: ClassVar[tuple[str, ...]] = ()
    """Endings of names in old weight files that are constants, not parameters."""

    @abstractmethod
    def from_hf(self, config: Mapping[str, Any]) -> Architecture:
        """Map a config.json to an architecture.

        Raises:
            ConversionError: a key changes what the model computes in a way that is not mapped.
        """

    @abstractmethod
    def to_hf(self, architecture: Architecture) -> dict[str, Any]:
        """A complete config.json. Token ids are none: they belong to the tokenizer, not to the architecture."""

    @abstractmethod
    def rules(self, architecture: Architecture) -> list[Rule]:
        """Every parameter of the model exactly once, layers written with `{layer}`."""

    @abstractmethod
    def tiny(self, **changes: Any) -> dict[str, Any]:
        """A config.json of a very small model in which no two sizes are equal by chance."""

    @abstractmethod
    def defaults(self, **given: Any) -> Architecture:
        """An architecture for training from scratch.

        Args:
            given: any of num_layers, hidden_size, num_attention_heads, vocab_size, max_position_embeddings (these are
                needed), ffn_hidden_size, num_query_groups, tie_word_embeddings; none takes the family's default.

        Raises:
            ConfigError: a needed size is missing, or the family cannot have these sizes.
        """

    def expanded_rules(self, architecture: Architecture) -> list[Rule]:
        """The rules with every layer written out, in the order of the model: embedding, layers, final norm, head."""
        rules = self.rules(architecture)
        layered = [index for index, rule in enumerate(rules) if rule.per_layer]
        first, last = layered[0], layered[-1]
        middle = [rule.at(layer) for layer in range(architecture.num_layers) for rule in rules[first : last + 1]]
        return [*rules[:first], *middle, *rules[last + 1 :]]

    def needed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes that a model from scratch must be given, with the family and the head size.

        Raises:
            ConfigError: one is missing or not known, or heads do not divide the width.
        """
        optional = ("ffn_hidden_size", "num_query_groups", "tie_word_embeddings")
        names = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
        missing = [name for name in names if given.get(name) is None]
        unknown = sorted(set(given) - {*names, *optional})
        if unknown:
            raise ConfigError(f"a {self.name} model has no {', '.join(unknown)}; known are {', '.join((*names, *optional))}")
        if missing:
            raise ConfigError(f"a {self.name} model from scratch needs {', '.join(names)}; not given: {', '.join(missing)}")
        hidden, heads = given["hidden_size"], given["num_attention_heads"]
        if hidden % heads:
            raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        return {"family": self.name, "head_dim": hidden // heads, **{name: given[name] for name in names}}

    def refuse(self, config: Mapping[str, Any], *, mapped: Iterable[str], fixed: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse what this family does not map.

        Args:
            config: the config.json.
            mapped: keys that `from_hf` reads.
            fixed: keys that may only have the given values; a missing key is fine.

        Raises:
            ConversionError: naming the key and its value.
        """
        if config.get("auto_map"):
            raise ConversionError(
                f"auto_map is {config['auto_map']!r}: this model runs code of its own, which is never executed",
                hint="convert it with the tool of its authors to a plain transformers architecture first",
            )
        if config.get("quantization_config") is not None:
            raise ConversionError(
                f"quantization_config is {config['quantization_config']!r}; quantised weights cannot be converted without loss",
                hint="use the unquantised model",
            )
        for key, allowed in fixed.items():
            if key in config and config[key] not in allowed:
                raise ConversionError(
                    f"{key} is {config[key]!r}; {self.name} maps {' or '.join(repr(value) for value in allowed)}",
                    hint="this feature of the model is not mapped and will not be dropped silently",
                )
        known = HARMLESS_KEYS | set(mapped) | set(fixed) | {"auto_map", "quantization_config"}
        for key, value in config.items():
            if key not in known and not key.startswith("_") and value not in (None, False):
                raise ConversionError(
                    f"{key} is {value!r}; {self.name} does not know this key",
                    hint="if it does not change what the model computes, remove it from a copy of config.json",
                )


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """A true/false value of config.json.

    Raises:
        ConversionError: it is something else.
    """
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ConversionError(f"{key} is {value!r}; it must be true or false")
    return value


def positive(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number above 0 of config.json.

    Raises:
        ConversionError: it is something else.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConversionError(f"{key} is {value!r}; it must be a number above 0")
    return float(value)
