"""The architecture of a decoder: everything that decides the shape and the function of a model, and nothing else.

A family makes one from a Hugging Face config, the recipe makes one for training from scratch, the model builder and
the converters read it, and every checkpoint carries it as a plain dictionary. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

from megawrap.errors import ConfigError

Position = Literal["learned", "rope"]
Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]

LAYERS = "decoder.layers."
"""What the canonical name of every tensor of a layer begins with; its index and the rest follow."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched so that a model reaches further than it was first trained."""

    kind: Literal["linear", "llama3"]
    """linear: all by the factor; llama3: only the slow ones, with a smooth passage between two wavelengths."""
    factor: float
    """What slow frequencies are divided by."""
    low_frequency_factor: float = 1.0
    """llama3: frequencies with a wavelength above original_max_position_embeddings over this are divided."""
    high_frequency_factor: float = 4.0
    """llama3: those with a wavelength below original_max_position_embeddings over this are kept."""
    original_max_position_embeddings: int = 8192
    """llama3: positions of the model before it was stretched."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shape and function of a pre-norm decoder-only transformer.

    Raises:
        ConfigError: sizes that cannot be built (not positive, or query heads that do not divide into groups).
    """

    family: str
    """Name of a registered family (`megawrap.families.known()`)."""
    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads: 1 is multi-query, num_attention_heads is multi-head."""
    head_dim: int
    """Width of one head; num_attention_heads x head_dim need not be hidden_size."""
    ffn_hidden_size: int
    """Width inside the MLP (of one of the two halves when gated)."""
    vocab_size: int
    """Tokens of the vocabulary, without padding."""
    max_position_embeddings: int
    """Longest position the model knows."""
    position: Position
    """Learned absolute positions, or rotary positions."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are stretched; none leaves them."""
    rotary_fraction: float = 1.0
    """Share of a head that rotates; its first int(head_dim x share) elements do."""
    sliding_window: int | None = None
    """Positions a position attends to, itself counted; none is all before it."""
    qk_norm: bool = False
    """Every head's query and key is normalised (over head_dim) before it is rotated."""
    parallel_residual: bool = False
    """Attention and MLP both read the layer's input, and both are added to it."""
    norm: Norm
    """LayerNorm with weight and bias, or RMSNorm with weight."""
    norm_epsilon: float
    """Epsilon of every norm."""
    activation: Activation
    """Activation of the MLP; gelu is the erf form, gelu_tanh the tanh approximation."""
    gated: bool
    """The MLP multiplies activation(gate) with up."""
    linear_bias: bool
    """Biases of the attention output and of the MLP."""
    qkv_bias: bool
    """Biases of the query, key and value projections."""
    tied: bool
    """The output layer shares the input embedding."""

    def __post_init__(self) -> None:
        sizes = (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "head_dim",
            "ffn_hidden_size",
            "vocab_size",
            "max_position_embeddings",
        )
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number above 0")
        for name, allowed in (("position", Position), ("norm", Norm), ("activation", Activation)):
            value, known = getattr(self, name), get_args(allowed)
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; known are {', '.join(known)}")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}",
                hint="every key/value head serves the same number of query heads",
            )
        if self.position == "rope" and (self.rotary_width % 2 or not 0 < self.rotary_width <= self.head_dim):
            raise ConfigError(
                f"head_dim is {self.head_dim}, of which {self.rotary_width} elements rotate; rotary positions need an even number of them"
            )
        window = self.sliding_window
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise ConfigError(f"sliding_window is {window!r}; it must be a whole number above 0, or none")

    @property
    def rotary_width(self) -> int:
        """Elements of a head that rotate."""
        return int(self.head_dim * self.rotary_fraction)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for checkpoints and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a field is missing or not known; fields with a default may be missing.
        """
        names = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - names)
        missing = sorted(names - set(DEFAULTS) - set(values))
        if unknown or missing:
            raise ConfigError(
                f"the architecture has unknown fields {unknown} and misses {missing}; allowed are {sorted(names)}",
                hint="it was written by another version of megawrap",
            )
        scaling = values.get("rope_scaling")
        return cls(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})

    def padded_vocab_size(self, divisor: int, tp: int) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of `divisor` x `tp`."""
        multiple = divisor * tp
        return -(-self.vocab_size // multiple) * multiple


DEFAULTS: Mapping[str, Any] = {item.name: item.default for item in fields(Architecture) if item.default is not MISSING}
"""Fields that descriptions written by earlier versions do not have, with the value they then mean."""
