"""Rotary positions in config.json, both ways, and what a sliding window of attention says.

In: rope_parameters (transformers 5) or rope_theta with rope_scaling (4), in all the spellings found in published models.
Out: the fields of an `Architecture`, and back. Kinds of scaling that are not computed here are refused, not dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megawrap.errors import ConversionError
from megawrap.models.architecture import Architecture, RopeScaling

KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
"""The keys of config.json that `from_hf` reads."""
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
_PARAMETERS = {"default": {}, "linear": {"factor": "factor"}, "llama3": _LLAMA3}
"""rope_type -> its parameters in config.json, with the field of RopeScaling they become."""


def from_hf(
    config: Mapping[str, Any], *, older_theta: str = "rope_theta", older_share: str | None = None, share: float = 1.0
) -> dict[str, Any]:
    """The rotary fields of an architecture.

    Args:
        config: config.json.
        older_theta: name of the base beside rope_parameters.
        older_share: name of the share of a head that rotates, beside rope_parameters; none means that the whole head does.
        share: the share when it is not given.

    Raises:
        ConversionError: a kind of scaling that is not mapped, values that are no numbers, or two that contradict each other.
    """
    bases = [config[name] for name in {older_theta, "rope_theta"} if config.get(name) is not None]
    shares = [config[older_share]] if older_share is not None and config.get(older_share) is not None else []
    scalings: list[RopeScaling | None] = []
    for key in ("rope_parameters", "rope_scaling"):
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise ConversionError(f"{key} is {values!r}; it must be an object or null")
        scalings.append(_scaling(key, values))
        bases += [values["rope_theta"]] if values.get("rope_theta") is not None else []
        shares += [values["partial_rotary_factor"]] if values.get("partial_rotary_factor") is not None else []
    if any(scaling != scalings[0] for scaling in scalings):
        raise ConversionError(
            f"rope_parameters is {config['rope_parameters']!r} and rope_scaling is {config['rope_scaling']!r}; they contradict each other"
        )
    return {
        "position": "rope",
        "rope_theta": _one("the rotary base", bases, 10000.0),
        "rope_scaling": scalings[0] if scalings else None,
        "rotary_fraction": _share(shares, older_share, share),
    }


def _scaling(key: str, values: Mapping[str, Any]) -> RopeScaling | None:
    kind = values.get("rope_type", values.get("type", "default"))
    parameters = _PARAMETERS.get(kind)
    said = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    others = {name: value for name, value in values.items() if name not in said and value is not None}
    if parameters is None or others.keys() != parameters.keys():
        raise ConversionError(
            f"{key} is {dict(values)!r}; mapped are rope_type "
            + ", ".join(f"{name!r} with {', '.join(needed) or 'no parameters'}" for name, needed in _PARAMETERS.items()),
            hint="other rotary scaling is not mapped and will not be dropped silently",
        )
    for name, value in others.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ConversionError(f"{key} is {dict(values)!r}; its {name} must be a number above 0")
    if kind == "llama3" and others["high_freq_factor"] <= others["low_freq_factor"]:
        raise ConversionError(f"{key} is {dict(values)!r}; its high_freq_factor must be above its low_freq_factor")
    return RopeScaling(kind=kind, **{parameters[name]: value for name, value in others.items()}) if others else None


def _one(what: str, values: list[Any], default: float) -> float:
    if any(not isinstance(value, int | float) or isinstance(value, bool) or value <= 0 or value != values[0] for value in values):
        raise ConversionError(f"{what} is given as {values}; it must be one number above 0")
    return float(values[0]) if values else default


def _share(values: list[Any], name: str | None, default: float) -> float:
    value = _one("the share of a head that rotates (partial_rotary_factor)", values, default)
    if value > 1 or (name is None and value != 1):
        raise ConversionError(
            f"'partial_rotary_factor': {value}; it must be {'1' if name is None else 'at most 1'}",
            hint="this feature of the model is not mapped and will not be dropped silently",
        )
    return value


def to_hf(architecture: Architecture) -> dict[str, Any]:
    """rope_parameters of an architecture, as transformers 5 writes them."""
    scaling = architecture.rope_scaling
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    if architecture.rotary_fraction != 1:
        parameters["partial_rotary_factor"] = architecture.rotary_fraction
    if scaling is not None:
        parameters["rope_type"] = scaling.kind
        parameters |= {name: getattr(scaling, field) for name, field in _PARAMETERS[scaling.kind].items()}
    return {"rope_parameters": parameters}


def window(config: Mapping[str, Any], default: int | None, max_positions: Any) -> int | None:
    """Positions that a position attends to; none when sliding_window is none or reaches over all positions."""
    value = config.get("sliding_window", default)
    if value is None or (isinstance(value, int) and isinstance(max_positions, int) and value >= max_positions):
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConversionError(f"sliding_window is {value!r}; it must be a whole number or null")
    return value
