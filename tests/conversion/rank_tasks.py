"""What the ranks of the conversion tests run; importable, because ranks are processes of their own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from conversion.load import initialise, open_source
from conversion.parity import RankReport, check_shards, logits
from megawrap import parallel
from megawrap.errors import MegawrapError
from megawrap.parallel import Layout


def build(directory: Path, tp: int, pp: int, padded: int = 256) -> tuple[Any, Any]:
    """The opened source, and this rank's chunk with weights still to be filled."""
    from megawrap.models.gpt import Build, build_chunks

    layout = Layout(tp=tp, pp=pp)
    parallel.start(layout)
    source = open_source(directory, trust=True)
    (chunk,) = build_chunks(source.architecture, layout, Build(padded_vocab_size=padded))
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(float("nan"))  # what is not loaded shows
    return source, chunk.eval()


def sharded(chunk: Any) -> dict[str, Any]:
    return chunk.sharded_state_dict(metadata={"dp_cp_group": chunk.pg_collection.dp_cp})


def logits_from(directory: Path, tp: int, pp: int, sequences: list[list[int]]) -> np.ndarray | None:
    """Logits of the model initialised by megawrap, from either format."""
    source, chunk = build(directory, tp, pp)
    initialise([chunk], source)
    result = logits(chunk, sequences)
    return None if result is None else result.numpy()


def logits_by_megatron(directory: Path, tp: int, pp: int, sequences: list[list[int]]) -> np.ndarray | None:
    """Logits of the model loaded by megatron-core's own reader at its default strictness."""
    from megatron.core import dist_checkpointing

    _, chunk = build(directory, tp, pp)
    names = set(sharded(chunk))
    state = dist_checkpointing.load(sharded(chunk), str(directory))
    chunk.load_state_dict({name: value for name, value in state.items() if name in names}, strict=True)
    result = logits(chunk, sequences)
    return None if result is None else result.numpy()


def save_by_megatron(source: Path, target: Path, tp: int, pp: int, common: dict[str, Any]) -> None:
    """Write a checkpoint with megatron-core's own writer, from tp x pp ranks."""
    from megatron.core import dist_checkpointing

    opened, chunk = build(source, tp, pp)
    initialise([chunk], opened)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # it starts a process, which daemons may not
    with mock.patch.object(torch.cuda, "synchronize"):  # it synchronises a device that is not there
        dist_checkpointing.save(sharded(chunk) | common, str(target))


def report(directory: Path, tp: int, pp: int, spoil_rank: int, spoil: str) -> RankReport:
    """The shard report after one parameter of one rank was changed by the smallest possible amount."""
    source, chunk = build(directory, tp, pp)
    initialise([chunk], source)
    if torch.distributed.get_rank() == spoil_rank:
        with torch.no_grad():
            flat = dict(chunk.named_parameters())[spoil].view(-1)
            flat[-1] = torch.nextafter(flat[-1], flat[-1] + 1)
    return check_shards([chunk], source)


def many_logits(directories: list[Path], sequences: list[list[int]]) -> list[np.ndarray]:
    """Logits of several checkpoints on one rank."""
    found = []
    for directory in directories:
        source, chunk = build(directory, 1, 1)
        initialise([chunk], source)
        result = logits(chunk, sequences)
        assert result is not None
        found.append(result.numpy())
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return found


def refusal(directory: Path, other: Path) -> str:
    """What is said when a model is to be filled from a checkpoint of another architecture."""
    _, chunk = build(directory, 1, 1)
    with open_source(other) as source:
        try:
            initialise([chunk], source)
        except MegawrapError as problem:
            return problem.message
    return ""
