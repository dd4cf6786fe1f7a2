"""Opening a checkpoint of either format, and filling a live model from it.

In: a Hugging Face directory, a checkpoint root, an iter_* or release directory. Out: a `Source`; or model chunks of any
layout whose parameters hold its weights, read one tensor at a time. The training entry point initialises through this.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conversion.huggingface import ADAPTER_FILE, CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, HFDirectory
from conversion.source import Source
from megawrap.errors import ConversionError


def open_source(path: Path | str, *, trust: bool = False, verify: bool = True, allow_nonfinite: bool = False) -> Source:
    """Open a checkpoint whatever its format.

    Args:
        path: Hugging Face directory, checkpoint root (its tracker is followed), iter_* or release directory.
        trust: read a Megatron checkpoint that has no manifest to check it against.
        verify: compare a Megatron checkpoint with the sha256 of its manifest first; collective when ranks were started.
        allow_nonfinite: read NaN and Inf instead of refusing them.

    Raises:
        MegawrapError: neither format, damaged, or not mapped.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConversionError(f"{path} is not a directory", hint="Give a Hugging Face directory or a Megatron checkpoint")
    if any((path / name).exists() for name in (CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, ADAPTER_FILE)):
        return HFDirectory(path, allow_nonfinite=allow_nonfinite)
    from conversion.megatron import MegatronCheckpoint

    if not any(path.iterdir()):
        raise ConversionError(f"{path} is empty", hint="Give a Hugging Face directory or a Megatron checkpoint")
    return MegatronCheckpoint(path, trust=trust, verify=verify, allow_nonfinite=allow_nonfinite)


def initialise(chunks: Sequence[Any], source: Source) -> None:
    """Fill the parameters of model chunks in any layout with the weights of a source.

    Args:
        chunks: the bare (unwrapped) chunks of this rank; each parameter is cast to its own dtype when copied.
        source: of the same architecture. Vocabulary rows beyond its vocabulary become zero.

    Raises:
        ConversionError: the model has another architecture (the fields that differ are named).
        MegawrapError: a tensor is damaged or not finite.
    """
    from megawrap.models.weights import fill

    for chunk in chunks:
        ours, theirs = chunk.architecture.to_dict(), source.architecture.to_dict()
        differing = [f"{key} {ours[key]!r} against {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
        if differing:
            raise ConversionError(f"the model and {source.path} differ in {', '.join(differing)}")
    fill(chunks, lambda name, _: source.read(name))
