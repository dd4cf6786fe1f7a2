"""What is in a training checkpoint: weights, optimizer, random states, progress; written and read at any layout.

Comes in: the live model chunks and optimizer of every rank. Goes out: a torch_dist directory that megatron-core reads
too (weights under its names, `optimizer.state.*`, common.pt), with one `rng_*.pt` per rank beside it; and the same
put back into live objects, after everything that could be refused has been checked.

Where a shard lies in its tensor is megatron-core's own sharded state dict. Reading and writing go through `torch_dist`
and not through megatron-core's `load` and `save`: those unpickle without restriction, fork writers, and leave the other
ranks waiting when one fails.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megawrap import parallel
from megawrap.checkpoint import optimizer_state, random_state
from megawrap.checkpoint.arguments import CHECKPOINT_VERSION, differences, megatron_arguments, table
from megawrap.checkpoint.collective import Collective
from megawrap.checkpoint.optimizer_state import MAIN, MOMENTS, ParameterStates
from megawrap.checkpoint.torch_dist import (
    COMMON_FILE,
    FORMAT_FILE,
    METADATA_FILE,
    TorchDistReader,
    TorchDistWriter,
    save_object,
    write_common,
    write_index,
)
from megawrap.checkpoint.untrusted import load_plain
from megawrap.errors import CheckpointError
from megawrap.io import atomic_write
from megawrap.models.architecture import Architecture
from megawrap.parallel import Layout

logger = logging.getLogger(__name__)

OPTIMIZER_PREFIX = "optimizer.state."
_LAYERS = "decoder.layers."
_MAIN_ALTERNATIVES = (f"{OPTIMIZER_PREFIX}{MAIN}.", f"{OPTIMIZER_PREFIX}fp32_param.", "")


@dataclass(kw_only=True)
class TrainingState:
    """The live objects of a run on this rank.

    Attributes:
        chunks: model chunks, wrapped or bare.
        optimizer: megatron-core's optimizer over them; None saves and loads weights only.
        architecture: of the model.
        padded_vocab_size: rows of its embedding.
        layout: of the ranks.
        precision: fp32, bf16 or fp16.
        iteration: finished iterations.
        consumed_rows: rows of the training data that were used.
        extra: more that is to be kept under `megawrap` in common.pt (tokenizer, data fingerprint); plain types.
    """

    chunks: Sequence[Any]
    optimizer: Any | None
    architecture: Architecture
    padded_vocab_size: int
    layout: Layout
    precision: str
    iteration: int = 0
    consumed_rows: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a checkpoint says besides tensors.

    Attributes:
        iteration: finished iterations.
        consumed_rows: rows of the training data that were used.
        megawrap: the dictionary kept under that name: architecture, tokenizer, layout and more; empty in another project's.
        random_states: whether the random states were put back exactly.
    """

    iteration: int
    consumed_rows: int
    megawrap: dict[str, Any]
    random_states: bool


def save_state(directory: Path, state: TrainingState) -> list[str]:
    """Write this rank's part of a checkpoint; called on every rank, usually by `Store.save`.

    Returns:
        Names of the files this rank wrote.

    Raises:
        CheckpointError: on every rank, when one could not write (path and sizes are named).
    """
    collective = Collective()
    writer = TorchDistWriter(directory, rank=collective.rank)
    random_file = _random_file(collective.rank)

    def here() -> list[Any]:
        with writer:
            problem = _write_tensors(writer, state)
        if problem is not None:
            raise problem
        states = {"layout": asdict(state.layout), "rank": collective.rank, **random_state.capture()}
        atomic_write(directory / random_file, lambda file: save_object(states, file))
        return writer.entries

    entries = collective.gather(here, everywhere=False)

    def index() -> None:
        write_index(directory, (entry for part in entries for entry in part))
        write_common(directory, _common(state))

    collective.first(index)
    own = [METADATA_FILE, COMMON_FILE, FORMAT_FILE] if collective.rank == 0 else []
    return [*writer.files, random_file, *own]


def load_state(
    directory: Path, state: TrainingState, *, optimizer: bool = True, rng: bool = True, trust: bool = False, seed: int = 1234
) -> Loaded:
    """Put a checkpoint into live objects; called on every rank. The directory is verified before, by `Store`.

    Args:
        directory: of the checkpoint.
        state: where to; its chunks and optimizer are changed in place, nothing else.
        optimizer: also optimizer state; without, none of it is read and main parameters are taken from the weights.
        rng: also random states, exactly when the layout is the same, else drawn anew from `seed` and the iteration.
        trust: the directory has no manifest.
        seed: of the run.

    Raises:
        CheckpointError: on every rank and before any tensor is changed: another architecture or vocabulary (with a table),
            missing or unknown tensors, no optimizer state. While reading: a damaged file.
    """
    collective = Collective()
    reader, common = _open(collective, directory, state, trust)
    wanted = state.optimizer is not None and optimizer
    _check_keys(collective, reader, state, wanted)

    def here() -> None:
        with torch.no_grad():
            for chunk in _bare(state.chunks):
                for item in _items(chunk):
                    _read_item(reader, item, item.key, item.data)
            if wanted:
                _read_optimizer(reader, common, state)
            elif state.optimizer is not None:
                state.optimizer.reload_model_params()

    collective.gather(here)
    said = _section(common, "megawrap")
    iteration = int(common.get("iteration") or 0)
    exact = rng and _restore_random(collective, directory, state, said, seed, iteration)
    return Loaded(iteration=iteration, consumed_rows=int(said.get("consumed_rows", 0)), megawrap=said, random_states=exact)


# -- shards --------------------------------------------------------------------------------------------------------


def _bare(chunks: Sequence[Any]) -> list[Any]:
    bare = []
    for chunk in chunks:
        while not hasattr(chunk, "pg_collection") and hasattr(chunk, "module"):
            chunk = chunk.module
        bare.append(chunk)
    return bare


def _sharded(chunk: Any) -> list[Any]:
    return list(nested_values(chunk.sharded_state_dict(metadata={"dp_cp_group": chunk.pg_collection.dp_cp})))


def _items(chunk: Any) -> list[Any]:
    """A ShardedTensor or factory for every parameter of a chunk, in the same order on every data-parallel rank."""
    return [item for item in _sharded(chunk) if not isinstance(item, ShardedObject)]


def _shards(item: Any, key: str, data: torch.Tensor) -> Iterator[ShardedTensor]:
    """The shards of `data`, which has the shape of the item's parameter, under another key."""
    if isinstance(item, ShardedTensorFactory):  # a gated linear_fc1: gate and up apart
        yield from nested_values(replace(item, key=key, data=data).build())
    else:
        yield replace(item, key=key, data=data, dtype=data.dtype)


# -- writing -------------------------------------------------------------------------------------------------------


class _Spread:
    """Which data-parallel rank writes what: the one with the fewest bytes so far. All ranks come to the same answer."""

    def __init__(self, ranks: int) -> None:
        self.loads = [0] * ranks

    def give(self, num_bytes: int, to: int | None = None) -> int:
        rank = self.loads.index(min(self.loads)) if to is None else to
        self.loads[rank] += num_bytes
        return rank


def _write_tensors(writer: TorchDistWriter, state: TrainingState) -> Exception | None:
    """Write the shards that fall to this rank. A failed write is returned, not raised: other ranks wait for sends."""
    spread, dp_rank = _Spread(state.layout.dp), parallel.dp_rank()
    problem: Exception | None = None

    def write(item: Any, key: str, data: torch.Tensor | None, owner: int) -> None:
        nonlocal problem
        if data is None or owner != dp_rank or problem is not None:
            return
        try:
            for shard in _shards(item, key, data):
                if not any(shard.replica_id[:-1]):  # the last one counts data-parallel copies
                    local = shard.data.view((1,) * shard.prepend_axis_num + tuple(shard.local_shape))
                    writer.write_chunk(shard.key, local, shard.global_offset, shard.global_shape)
        except Exception as failure:
            problem = failure

    states = optimizer_state.states_of(state.optimizer) if state.optimizer is not None else []
    for chunk in _bare(state.chunks):
        for item in _sharded(chunk):
            if isinstance(item, ShardedObject):
                if problem is None and not any(item.replica_id):
                    writer.write_object(item.unique_key, item.data)
                continue
            write(item, item.key, item.data, spread.give(item.data.nbytes))
            for view in states:
                for name in view.names(item.data):
                    owner = spread.give(item.data.numel() * 4, view.owner(item.data))
                    write(item, f"{OPTIMIZER_PREFIX}{name}.{item.key}", view.collect(item.data, name, owner), owner)
    return problem


def _common(state: TrainingState) -> dict[str, Any]:
    """common.pt: what Megatron's tools look for, and megawrap's own."""
    layout = state.layout
    common: dict[str, Any] = {
        "args": megatron_arguments(state.architecture, state.padded_vocab_size, state.precision, tp=layout.tp, pp=layout.pp),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": state.iteration,
        "megawrap": {
            **state.extra,
            "architecture": state.architecture.to_dict(),
            "padded_vocab_size": state.padded_vocab_size,
            "consumed_rows": state.consumed_rows,
            "layout": asdict(layout),
        },
    }
    if state.optimizer is not None:
        common["content_metadata"] = {"distrib_optim_sharding_type": "fully_reshardable"}
        common["optimizer"] = _optimizer_common(optimizer_state.states_of(state.optimizer))
    return common


def _optimizer_common(states: list[ParameterStates]) -> dict[str, Any]:
    found: dict[str, Any] = {"param_state_sharding_type": "fully_reshardable", "optimizer": {"param_groups": []}}
    for view in states:
        inner = view.optimizer.optimizer
        step = optimizer_state.get_step(inner)
        plain = (bool, int, float, str, tuple, list, type(None), torch.Tensor)
        for group in inner.param_groups:
            values = {name: value for name, value in group.items() if name != "params" and isinstance(value, plain)}
            found["optimizer"]["param_groups"].append({**values, "step": step})
        scaler = getattr(view.optimizer, "grad_scaler", None)
        if scaler is not None:
            found["grad_scaler"] = scaler.state_dict()
    return found


# -- reading -------------------------------------------------------------------------------------------------------


def _open(collective: Collective, directory: Path, state: TrainingState, trust: bool) -> tuple[TorchDistReader, dict[str, Any]]:
    def here() -> tuple[TorchDistReader, dict[str, Any]]:
        reader = TorchDistReader(directory, trust=trust)
        common = reader.common()
        rows = differences(common, state.architecture, state.padded_vocab_size)
        if rows:
            message = f"{directory} does not fit this model:\n{table(rows)}\n"
            raise CheckpointError(message, hint="Give the model section of the recipe these values, or another checkpoint")
        return reader, common

    opened: list[tuple[TorchDistReader, dict[str, Any]]] = []
    collective.gather(lambda: opened.append(here()))
    return opened[0]


def _section(common: dict[str, Any], name: str) -> dict[str, Any]:
    section = common.get(name)
    return section if isinstance(section, dict) else {}


def _place(reader: TorchDistReader, shard: ShardedTensor, key: str) -> tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(key on disk, full shape, offsets, sizes) of a shard, for stacked layers and for layers written one by one."""
    offsets, shape = tuple(shard.global_offset), tuple(shard.global_shape)
    sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    single = key.replace(_LAYERS, f"{_LAYERS}{offsets[0]}.", 1)
    if shard.prepend_axis_num == 1 and key not in reader.shapes and single in reader.shapes:
        return single, shape[1:], offsets[1:], sizes[1:]
    return key, shape, offsets, sizes


def _expected(reader: TorchDistReader, state: TrainingState, wanted: bool) -> dict[str, tuple[int, ...]]:
    """Full shape by key on disk of everything this rank is going to read."""
    expected: dict[str, tuple[int, ...]] = {}
    states = optimizer_state.states_of(state.optimizer) if wanted else []
    for chunk in _bare(state.chunks):
        for item in _items(chunk):
            keys = [item.key]
            trained = any(view.names(item.data) for view in states)
            keys += [f"{OPTIMIZER_PREFIX}{name}.{item.key}" for name in MOMENTS] if trained else []
            for key in keys:
                for shard in _shards(item, key, item.data):
                    place, shape, _, _ = _place(reader, shard, shard.key)
                    expected[place] = shape
    return expected


def _check_keys(collective: Collective, reader: TorchDistReader, state: TrainingState, wanted: bool) -> None:
    """Refuse, on all ranks, a checkpoint that lacks something, has another shape, or holds weights nobody asks for."""

    def here() -> dict[str, tuple[int, ...]]:
        if wanted and not any(key.startswith(OPTIMIZER_PREFIX) for key in reader.shapes):
            message = f"{reader.path} has no optimizer state this megawrap can read"
            raise CheckpointError(message, hint="Load the weights alone with --no-load-optim")
        expected = _expected(reader, state, wanted)
        wrong = [f"{key} is missing" for key in expected if key not in reader.shapes]
        found = ((key, reader.shapes[key], shape) for key, shape in expected.items() if key in reader.shapes)
        wrong += [f"{key} has shape {list(theirs)} instead of {list(shape)}" for key, theirs, shape in found if theirs != shape]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(f"{reader.path} does not fit this model: {'; '.join(wrong[:5])}{more}")
        return expected

    known = {key for part in collective.gather(here) for key in part}
    unknown = sorted(key for key in reader.shapes if key not in known and not key.startswith(("optimizer.", "chained_")))
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        message = f"{reader.path} holds weights this model does not have: {', '.join(unknown[:5])}{more}"
        raise CheckpointError(message, hint="They would be dropped silently; use the architecture the checkpoint was made with")


def _read_item(reader: TorchDistReader, item: Any, key: str, target: torch.Tensor) -> None:
    """Fill `target`, of the shape of the item's parameter, from the tensor under `key`."""
    for shard in _shards(item, key, target.detach()):
        place, _, offsets, sizes = _place(reader, shard, shard.key)
        shard.data.copy_(reader.read_slice(place, offsets, sizes).view(shard.data.shape))


def _read_optimizer(reader: TorchDistReader, common: dict[str, Any], state: TrainingState) -> None:
    states = optimizer_state.states_of(state.optimizer)
    for chunk in _bare(state.chunks):
        for item in _items(chunk):
            for view in states:
                if not view.is_here(item.data):
                    continue
                for name in (MAIN, *MOMENTS):
                    key = _optimizer_key(reader, item, name)
                    if name == MAIN and key == item.key and name not in view.names(item.data):
                        continue  # the parameter itself, read already
                    full = torch.empty(item.data.shape, dtype=torch.float32, device=item.data.device)
                    _read_item(reader, item, key, full)
                    view.restore(item.data, name, full)
    saved = _section(common, "optimizer")
    for view in states:
        optimizer_state.set_step(view.optimizer.optimizer, _saved_step(saved))
        scaler = getattr(view.optimizer, "grad_scaler", None)
        if scaler is not None and "grad_scaler" in saved:
            scaler.load_state_dict(saved["grad_scaler"])


def _optimizer_key(reader: TorchDistReader, item: Any, name: str) -> str:
    """Key of a tensor of the optimizer; main parameters that were not saved apart are the weights."""
    if name != MAIN:
        return f"{OPTIMIZER_PREFIX}{name}.{item.key}"
    shard = next(_shards(item, item.key, item.data))
    found = (prefix for prefix in _MAIN_ALTERNATIVES if _place(reader, shard, prefix + shard.key)[0] in reader.shapes)
    return next(found) + item.key


def _saved_step(saved: dict[str, Any]) -> int:
    """Optimizer steps, from megawrap's common.pt or any of megatron-core's."""
    inner = saved.get("optimizer", saved)
    groups = inner.get("param_groups", []) if isinstance(inner, dict) else []
    counts = [int(group["step"]) for group in groups if group.get("step") is not None]
    common_step = inner.get("state", {}).get("common_step") if isinstance(inner, dict) else None
    return max([*counts, int(common_step or 0)])


# -- random states -------------------------------------------------------------------------------------------------


def _random_file(rank: int) -> str:
    return f"rng_{rank:05d}.pt"


def _restore_random(collective: Collective, directory: Path, state: TrainingState, said: dict[str, Any], seed: int, iteration: int) -> bool:
    """Whether the random states of every rank could be put back; else they are drawn anew on all."""
    same = said.get("layout") == asdict(state.layout)
    present = collective.gather(lambda: (directory / _random_file(collective.rank)).is_file())
    if same and all(present):
        collective.gather(lambda: random_state.restore(load_plain(directory / _random_file(collective.rank))))
        return True
    if collective.rank == 0:
        why = "has no random states" if not all(present) else f"was saved by ranks laid out as {said.get('layout')}"
        logger.warning("%s %s; dropout is drawn anew from seed %d and iteration %d", directory, why, seed, iteration)
    parallel.seed_all(seed + 7919 * (iteration + 1))
    return False
