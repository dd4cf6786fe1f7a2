"""State on real ranks: bitwise resume, resharding, and agreement with megatron-core's own reader and writer."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megawrap.checkpoint.state import load_state
from megawrap.checkpoint.store import Store
from megawrap.checkpoint.torch_dist import TorchDistReader
from megawrap.errors import CheckpointError
from tests import ranks
from tests.checkpoint.tiny_run import TinyRun

pytestmark = pytest.mark.dist


def _world(options: dict[str, Any]) -> int:
    return options.get("tp", 1) * options.get("pp", 1) * options.get("dp", 1)


def _uninterrupted(options: dict[str, Any], root: str, before: int) -> tuple[Any, str, str]:
    run = TinyRun(**options)
    run.train(before)
    directory = run.save(root)
    return run.train(2), run.digest(), directory


def _resumed(options: dict[str, Any], directory: str) -> tuple[Any, str, bool]:
    run = TinyRun(**{**options, "seed": 99})  # other weights and random states, all of which must be replaced
    run.seed = 7
    exact = run.load(directory).random_states
    return run.train(2), run.digest(), exact


BITWISE = [
    {},
    {"precision": "bf16"},
    {"tp": 2, "family": "llama"},
    {"pp": 2, "precision": "bf16"},
    {"tp": 2, "pp": 2},
    {"dp": 2},
    {"dp": 2, "distributed": True},
    {"dp": 2, "distributed": True, "precision": "bf16", "family": "llama"},
    {"tp": 2, "dp": 2, "distributed": True, "precision": "bf16"},
    {"pp": 2, "vpp": 2, "family": "llama"},
]


@pytest.mark.parametrize("options", BITWISE, ids=lambda options: "-".join(f"{k}{v}" for k, v in options.items()) or "single")
def test_resume_is_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    whole = ranks.run(_world(options), _uninterrupted, options, str(tmp_path), 2)
    again = ranks.run(_world(options), _resumed, options, whole[0][2])
    for (expected, expected_digest, _), (found, digest, exact) in zip(whole, again, strict=True):
        assert found == expected
        assert digest == expected_digest
        assert exact


@pytest.mark.parametrize("options", [{}, {"dp": 2, "distributed": True, "precision": "bf16"}], ids=["fp32", "distributed"])
def test_state_can_be_saved_before_the_first_step(options: dict[str, Any], tmp_path: Path) -> None:
    whole = ranks.run(_world(options), _uninterrupted, options, str(tmp_path), 0)
    again = ranks.run(_world(options), _resumed, options, whole[0][2])
    assert [part[:2] for part in whole] == [part[:2] for part in again]


# -- resharding ----------------------------------------------------------------------------------------------------

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]


def _save_at(options: dict[str, Any], root: str) -> tuple[Any, str]:
    run = TinyRun(**options, dropout=0.0)
    run.train(2)
    directory = run.save(root)
    return run.train(1), directory


def _load_from(options: dict[str, Any], sources: list[str], root: str) -> list[tuple[Any, str]]:
    run = TinyRun(**options, dropout=0.0, seed=5)
    found = []
    for number, source in enumerate(sources):
        run.load(source)
        again = run.save(f"{root}/{number}")
        found.append((run.train(1), again))
    return found


def _tensors(directory: str) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(Path(directory))
    return {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118 (a method, not a mapping)


def _assert_same_tensors(one: str, other: str) -> None:
    first, second = _tensors(one), _tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def saved_layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], tuple[Any, str]]:
    saved = {}
    for tp, pp in LAYOUTS:
        results = ranks.run(tp * pp, _save_at, {"tp": tp, "pp": pp}, str(tmp_path_factory.mktemp(f"tp{tp}pp{pp}")))
        saved[tp, pp] = results[0]
    return saved


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"to-tp{layout[0]}-pp{layout[1]}")
def test_r3_resharding_keeps_every_tensor_and_the_next_loss(
    layout: tuple[int, int], saved_layouts: Any, tmp_path: Path, record_property: Any
) -> None:
    sources = [other for other in LAYOUTS if other != layout]
    directories = [saved_layouts[other][1] for other in sources]
    found = ranks.run(layout[0] * layout[1], _load_from, {"tp": layout[0], "pp": layout[1]}, directories, str(tmp_path))[0]
    for source, directory, (steps, again) in zip(sources, directories, found, strict=True):
        _assert_same_tensors(directory, again)
        (expected, expected_norm), (loss, norm) = saved_layouts[source][0][0], steps[0]
        assert abs(loss - expected) <= 1e-6, (source, layout)
        assert abs(norm - expected_norm) <= 1e-4
    record_property("R3", (len(found), len(sources)))


CHAIN = [
    {"dp": 1, "precision": "bf16"},
    {"dp": 2, "precision": "bf16", "distributed": True},
    {"dp": 4, "precision": "bf16", "distributed": True},
    {"tp": 2, "dp": 2, "precision": "bf16", "distributed": True},
    {"pp": 2, "dp": 2, "precision": "bf16"},
    {"tp": 2, "pp": 2, "precision": "bf16"},
]


def test_data_parallel_size_and_optimizer_class_may_change(tmp_path: Path) -> None:
    steps, directory = ranks.run(1, _save_at, {**CHAIN[0], "family": "llama"}, str(tmp_path / "first"))[0]
    for number, options in enumerate(CHAIN[1:]):
        options = {**options, "family": "llama"}
        (found, again) = ranks.run(_world(options), _load_from, options, [directory], str(tmp_path / str(number)))[0][0]
        _assert_same_tensors(directory, again)
        assert abs(found[0][0] - steps[0][0]) <= 2e-2, options  # bf16 sums in another order
        directory = again


def test_fp32_may_become_bf16_and_its_main_parameters_are_the_fp32_ones(tmp_path: Path) -> None:
    _, directory = ranks.run(1, _save_at, {}, str(tmp_path / "fp32"))[0]
    options = {"dp": 2, "precision": "bf16", "distributed": True}
    (_, again) = ranks.run(2, _load_from, options, [directory], str(tmp_path / "bf16"))[0][0]
    before, after = _tensors(directory), _tensors(again)
    for key in before:
        if not key.startswith("optimizer."):
            assert torch.equal(after[f"optimizer.state.param.{key}"], before[key])
            assert torch.equal(after[key], before[key].bfloat16())


# -- megatron-core -------------------------------------------------------------------------------------------------


def _as_with_apex() -> None:
    """megawrap's Adam has Apex's state layout; megatron-core looks for the package to know that layout."""
    from megatron.core.optimizer import distrib_optimizer

    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _megatron_reads(options: dict[str, Any], directory: str) -> bool:
    """Load with megatron-core's own `load` at its strictest, and compare with what megawrap loads."""
    from megatron.core import dist_checkpointing

    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    _as_with_apex()
    run = TinyRun(**options, dropout=0.0, seed=11)
    run.train(1)
    bare = [chunk.module.module if hasattr(chunk.module, "module") else chunk.module for chunk in run.chunks]
    (chunk,) = bare
    model = chunk.sharded_state_dict(metadata={"dp_cp_group": chunk.pg_collection.dp_cp})
    wanted = {"model": model}
    if options.get("distributed"):
        wanted["optimizer"] = run.optimizer.megatron.sharded_state_dict(model, is_loading=True, metadata=metadata)
    else:
        wanted["moments"] = run.optimizer.megatron.sharded_state_dict(model, is_loading=True)["state"]
    state = dist_checkpointing.load(wanted, directory, strict=dist_checkpointing.validation.StrictHandling.RAISE_ALL)
    chunk.load_state_dict(state["model"])
    if options.get("distributed"):
        run.optimizer.megatron.load_state_dict(state["optimizer"])
    else:
        inner = run.optimizer.megatron.chained_optimizers[0].optimizer
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        for number, moments in state["moments"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                inner.state[parameters[int(number)]][name].copy_(moments[name])
        inner.param_groups[0]["step"] = inner.param_groups[1]["step"] = 2
    parallel_stop()
    ours = TinyRun(**options, dropout=0.0, seed=11)
    ours.load(directory, rng=False)
    return _without_random(run) == _without_random(ours)


def _without_random(run: TinyRun) -> list[bytes]:
    tensors = [parameter for chunk in run.chunks for parameter in chunk.parameters()]
    for chained in run.optimizer.megatron.chained_optimizers:
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                tensors += [parameter, chained.optimizer.state[parameter]["exp_avg"], chained.optimizer.state[parameter]["exp_avg_sq"]]
    return [tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def parallel_stop() -> None:
    """Leave megatron-core's groups but stay in torch.distributed, to build a second run in one task."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


READERS = [
    ({}, {}),
    ({"tp": 2, "pp": 2}, {}),
    ({"tp": 2, "pp": 2, "family": "llama"}, {"family": "llama"}),
    ({"dp": 2, "precision": "bf16", "distributed": True}, {"tp": 2, "precision": "bf16", "distributed": True}),
]


@pytest.mark.parametrize(("reader", "writer"), READERS, ids=["same", "tp2-pp2", "llama", "distributed"])
def test_megatron_core_reads_what_is_saved(reader: dict[str, Any], writer: dict[str, Any], tmp_path: Path) -> None:
    _, directory = ranks.run(_world(writer), _save_at, writer, str(tmp_path))[0]
    assert all(ranks.run(_world(reader), _megatron_reads, reader, directory))


def _megatron_saves(options: dict[str, Any], directory: str) -> list[bytes]:
    from argparse import Namespace

    from megatron.core import dist_checkpointing

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # its writer forks
    torch.cuda.synchronize = lambda *_: None  # and waits for a GPU
    _as_with_apex()
    run = TinyRun(**options, dropout=0.0)
    run.train(2)
    (chunk,) = [chunk.module.module if hasattr(chunk.module, "module") else chunk.module for chunk in run.chunks]
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    model = chunk.sharded_state_dict(metadata={"dp_cp_group": chunk.pg_collection.dp_cp})
    optimizer = run.optimizer.megatron.sharded_state_dict(model, metadata=metadata)
    a = run.architecture
    args = Namespace(num_layers=a.num_layers, hidden_size=a.hidden_size, padded_vocab_size=144, kv_channels=a.head_dim)
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model, "optimizer": optimizer, "iteration": 2, "args": args}, directory)
    return _without_random(run)


def _reads_megatron(options: dict[str, Any], directory: str) -> tuple[list[bytes], bool, int]:
    run = TinyRun(**options, dropout=0.0, seed=3)
    loaded = run.load(directory, trust=True)
    step = run.optimizer.megatron.chained_optimizers[0].optimizer.param_groups[0]["step"]
    return _without_random(run), loaded.random_states, step + 10 * loaded.iteration


@pytest.mark.parametrize(
    "options",
    [{}, {"tp": 2, "precision": "bf16"}, {"dp": 2, "distributed": True, "precision": "bf16"}],
    ids=["fp32", "bf16", "distributed"],
)
def test_what_megatron_core_saves_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    written = ranks.run(_world(options), _megatron_saves, options, str(tmp_path))
    read = ranks.run(_world(options), _reads_megatron, options, str(tmp_path))
    for expected, (found, exact, counts) in zip(written, read, strict=True):
        assert found == expected
        assert not exact
        assert counts == 22


# -- what is refused, and what is not read -------------------------------------------------------------------------


def _refused(options: dict[str, Any], directory: str, how: dict[str, Any]) -> tuple[str, bool]:
    run = TinyRun(**options)
    before = _without_random(run) if run.optimizer.megatron.chained_optimizers[0].optimizer.state else None
    parameters = [parameter.clone() for chunk in run.chunks for parameter in chunk.parameters()]
    try:
        run.load(directory, **how)
    except CheckpointError as problem:
        now = [parameter for chunk in run.chunks for parameter in chunk.parameters()]
        return str(problem), before is None and all(map(torch.equal, parameters, now))
    return "", False


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ranks.run(2, _save_at, {"tp": 2}, str(tmp_path_factory.mktemp("checkpoint")))[0][1]


REFUSALS = [
    ({"changes": {"n_layer": 2}}, ["num_layers", "4", "2"]),
    ({"changes": {"vocab_size": 127}}, ["vocab_size", "131", "127"]),
    ({"family": "llama"}, ["family", "gpt_bigcode", "llama"]),
    ({"changes": {"n_inner": 64}}, ["ffn_hidden_size", "100", "64"]),
]


@pytest.mark.parametrize(("options", "facts"), REFUSALS, ids=["depth", "vocabulary", "family", "width"])
def test_another_architecture_is_refused_with_a_table(options: dict[str, Any], facts: list[str], checkpoint: str) -> None:
    for message, untouched in ranks.run(2, _refused, {"tp": 2, **options}, checkpoint, {}):
        assert untouched
        assert all(fact in message for fact in ["checkpoint", "this model", *facts]), message


def _damage(directory: str, prefix: str, copy: Path) -> str:
    """A copy whose tensors under a prefix are garbage on disk."""
    shutil.copytree(directory, copy)
    reader = TorchDistReader(copy)
    for index, place in reader._places.items():
        if index.fqn.startswith(prefix):
            with open(copy / place.relative_path, "r+b") as file:
                file.seek(place.offset)
                file.write(b"\xff" * place.length)
    return str(copy)


def _loads_weights_only(directory: str) -> bool:
    run = TinyRun(precision="bf16", dropout=0.0, changes={})
    load_state(Path(directory), run.state(), optimizer=False, rng=False)
    inner = run.optimizer.megatron.chained_optimizers[0]
    mains = [main for group in inner.fp32_from_float16_groups for main in group]
    models = [parameter for group in inner.float16_groups for parameter in group]
    return all(torch.equal(main, model.float()) for main, model in zip(mains, models, strict=True)) and bool(mains)


def test_weights_only_reads_no_optimizer_tensor_and_renews_main_parameters(checkpoint: str, tmp_path: Path) -> None:
    damaged = _damage(checkpoint, "optimizer.", tmp_path / "copy")
    assert ranks.run(1, _loads_weights_only, damaged) == [True]
    (message, _) = ranks.run(1, _refused, {}, damaged, {})[0]
    assert ".distcp is damaged where optimizer.state." in message


def _saves_weights(root: str) -> str:
    run = TinyRun()
    from megawrap.checkpoint.state import save_state

    return str(Store(Path(root)).save(0, lambda path: save_state(path, run.state(optimizer=False))).path)


def test_an_optimizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    directory = ranks.run(1, _saves_weights, str(tmp_path))[0]
    message, untouched = ranks.run(1, _refused, {}, directory, {})[0]
    assert untouched and "has no optimizer state" in message and "--no-load-optim" in message


def test_missing_and_unknown_weights_are_refused(checkpoint: str, tmp_path: Path) -> None:
    from tests.checkpoint.test_torch_dist import rewrite

    missing = rewrite(Path(checkpoint), tmp_path / "missing", drop="decoder.final_layernorm.bias")
    unknown = rewrite(Path(checkpoint), tmp_path / "unknown", add={"decoder.layers.self_attention.q_norm.weight": torch.ones(4, 12)})
    for directory, fact in ((missing, "decoder.final_layernorm.bias is missing"), (unknown, "q_norm.weight")):
        message, untouched = ranks.run(1, _refused, {}, str(directory), {"trust": True})[0]
        assert untouched and fact in message


def test_layers_written_one_by_one_are_read(checkpoint: str, tmp_path: Path) -> None:
    from tests.checkpoint.test_torch_dist import rewrite

    single = rewrite(Path(checkpoint), tmp_path / "single", unstack=True)
    (_, again) = ranks.run(1, _load_from_trusted, str(single), str(tmp_path / "again"))[0]
    _assert_same_tensors(checkpoint, again)


def _load_from_trusted(source: str, root: str) -> tuple[Any, str]:
    run = TinyRun(dropout=0.0, seed=5)
    loaded = run.load(source, trust=True)
    return loaded.iteration, run.save(root)


def _another_layout(directory: str) -> tuple[bool, list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megawrap.checkpoint.state").addHandler(handler)
    run = TinyRun()
    return run.load(directory).random_states, messages


def test_random_states_of_another_layout_are_drawn_anew_with_a_notice(checkpoint: str) -> None:
    exact, messages = ranks.run(1, _another_layout, checkpoint)[0]
    assert not exact
    assert any("'tp': 2" in message and "drawn anew" in message for message in messages)


def _loss_scale(directory: str | None, root: str) -> tuple[float, str]:
    run = TinyRun(precision="fp16")
    scaler = run.optimizer.megatron.chained_optimizers[0].grad_scaler
    if directory is None:
        scaler._scale.fill_(512.0)
        return 512.0, run.save(root)
    run.load(directory)
    return float(scaler.scale.item()), directory


def test_the_loss_scale_travels(tmp_path: Path) -> None:
    _, directory = ranks.run(1, _loss_scale, None, str(tmp_path))[0]
    assert ranks.run(1, _loss_scale, directory, str(tmp_path))[0][0] == 512.0


def _one_rank_cannot_write(root: str) -> tuple[str, list[str]]:
    import os

    run = TinyRun(tp=2)
    run.train(1)
    rank = torch.distributed.get_rank()
    from megawrap.checkpoint.state import save_state

    def write(path: Path) -> list[str]:
        if rank == 1:
            (path / "__1_0.distcp").mkdir()  # opening it for writing fails
        return save_state(path, run.state())

    try:
        Store(Path(root)).save(1, write)
    except (CheckpointError, OSError, RuntimeError) as problem:
        torch.distributed.barrier()
        return str(problem), sorted(os.listdir(root))
    return "", []


def test_a_failure_on_one_rank_fails_the_save_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = ranks.run(2, _one_rank_cannot_write, str(tmp_path))
    assert "rank 1" in first[0] and "__1_0.distcp" in first[0]
    assert "__1_0.distcp" in second[0]
    assert first[1] == second[1] == []
