"""`python -m megawrap.finetune`: what every rank of a run executes, started by hand, torchrun, `megawrap finetune` or a job.

In: a recipe and flags. Out: a run directory with configuration, metrics, checkpoints and plots. Puts the parts together
and decides where a run starts: its own progress first, then `model.init_from`, then fresh weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megawrap.arguments import Options, parse, to_yaml
from megawrap.config import Config
from megawrap.errors import EXIT_OK, EXIT_UNFINISHED, ConfigError

if TYPE_CHECKING:
    from megawrap.checkpoint.state import TrainingState
    from megawrap.checkpoint.store import Checkpoint, Store
    from megawrap.data.plan import Plan
    from megawrap.device import Choices
    from megawrap.models.architecture import Architecture
    from megawrap.parallel import Layout
    from megawrap.training.loop import Progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run this rank; returns the exit code of RELIABILITY: 0 finished, 75 saved but not finished."""
    from megawrap.cli import run_command

    return run_command(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    config, options = parse(argv)
    if options.print_config:
        print(to_yaml(config), end="")
        return EXIT_OK
    return run(config, options)


def run(config: Config, options: Options) -> int:
    """Carry out a configuration on this rank.

    Raises:
        MegawrapError: anything wrong with the input; before the first collective where it can be found there.
    """
    from megawrap import device, parallel
    from megawrap.training.signals import StopRequest

    stop = StopRequest()
    rank, world = parallel.world_from_environment()
    if options.dry_run:
        world = max(world, config.parallel.tp * config.parallel.pp)
    layout = parallel.Layout.from_config(config.parallel, world)
    choices = device.choose(config, dp=layout.dp)
    layout = parallel.Layout.from_config(config.parallel, world, sequence_parallel=choices.sequence_parallel)
    try:
        if not options.dry_run:
            stop.install()
            parallel.start(layout, timeout_minutes=config.train.timeout_minutes, seed=config.train.seed)
        start = _find_start(config, rank)
        architecture = _architecture(config, start)
        _check(config, layout, architecture)
        plan = _plan(config, architecture, rank, alone=options.dry_run)
        if rank == 0:
            from megawrap.training import preflight

            print(preflight.describe(config, to_yaml(config), choices, layout, architecture, plan, start=start.sentence), flush=True)
        if options.dry_run:
            return EXIT_OK
        return _train(config, layout, choices, architecture, plan, start, stop, rank)
    finally:
        parallel.stop()


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the weights and the rest of the state come from."""

    sentence: str
    """For the reader."""
    resume: Checkpoint | None = None
    """The run's own newest checkpoint: everything is taken from it."""
    init_from: Path | None = None
    """A Hugging Face directory or a Megatron checkpoint of another run."""
    checkpoint: Checkpoint | None = None
    """init_from, when it is a Megatron checkpoint."""
    restart: bool = False
    """Progress in the save directory is set aside."""


def _find_start(config: Config, rank: int) -> Start:
    from megawrap.checkpoint.store import Store

    options = config.checkpoint
    root = Path(config.run) / "checkpoints"
    latest = None
    if root.is_dir():
        latest = Store(root, verify=options.verify, on_corrupt=options.on_corrupt).latest()
    if latest is not None and not options.allow_restart:
        ignored = [f"--{name.replace('_', '-')}" for name in ("finetune", "reset_progress") if getattr(options, name)]
        ignored += [f"--no-{name.replace('_', '-')}" for name in ("load_optim", "load_rng") if not getattr(options, name)]
        ignored += [f"model.init_from {config.model.init_from}"] if config.model.init_from else []
        note = f"; {', '.join(ignored)} apply to a first start and are ignored" if ignored else ""
        return Start(sentence=f"resumes {latest.path} in full{note}", resume=latest)
    note = f"; the progress in {root} is set aside (--allow-restart)" if latest is not None else ""
    if config.model.init_from is None:
        return Start(sentence=f"fresh weights, seed {config.train.seed}{note}", restart=latest is not None)
    path = Path(config.model.init_from)
    if (path / "config.json").exists() or not path.is_dir():
        if not path.is_dir():
            raise ConfigError(
                f"model.init_from is {path}, which is not a directory", hint="Give a Hugging Face directory or a Megatron checkpoint."
            )
        return Start(sentence=f"weights of the Hugging Face directory {path}{note}", init_from=path, restart=latest is not None)
    checkpoint = Store.open(path, trust=options.trust, verify=options.verify)
    start = Start(sentence="", init_from=path, checkpoint=checkpoint, restart=latest is not None)
    parts = ["weights"]
    if not _weights_only(config, start):
        parts += ["optimizer"] * options.load_optim + ["random states"] * options.load_rng + ["progress"] * (not options.reset_progress)
    return replace(start, sentence=f"{', '.join(parts)} of {checkpoint.path}{note}")


def _weights_only(config: Config, start: Start) -> bool:
    """Megatron's --finetune, and any release: nothing but weights is taken."""
    return config.checkpoint.finetune or (start.checkpoint is not None and start.checkpoint.iteration == "release")


def _architecture(config: Config, start: Start) -> Architecture:
    """From the checkpoint or directory the run starts from, else from the recipe."""
    source_path = start.resume.path if start.resume is not None else start.init_from
    if source_path is None:
        return _from_scratch(config)
    from conversion.load import open_source

    with open_source(source_path, trust=config.checkpoint.trust, verify=False) as source:  # the store has verified it
        architecture = source.architecture
    given = {name: getattr(config.model, name) for name in _SHAPE_FIELDS if getattr(config.model, name) is not None}
    tied = config.model.tie_word_embeddings
    different = [f"model.{name} is {value}, there it is {getattr(architecture, name)}" for name, value in given.items()
                 if getattr(architecture, name) != value]  # fmt: skip
    if tied is not None and tied != architecture.tied:
        different.append(f"model.tie_word_embeddings is {tied}, there it is {architecture.tied}")
    if different:
        raise ConfigError(
            f"the recipe and {source_path} describe different models: {'; '.join(different)}",
            hint="Leave these fields out of the recipe, or start from another checkpoint.",
        )
    return architecture


_SHAPE_FIELDS = (
    "family", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "max_position_embeddings",
    "vocab_size",
)  # fmt: skip


def _from_scratch(config: Config) -> Architecture:
    from megawrap import families
    from megawrap.data.tokenizer import Tokenizer

    assert config.model.family is not None, "Config.problems() asks for it"
    given = {name: getattr(config.model, name) for name in _SHAPE_FIELDS[1:] if getattr(config.model, name) is not None}
    given.setdefault("max_position_embeddings", config.data.seq_length)
    if config.model.tie_word_embeddings is not None:
        given["tie_word_embeddings"] = config.model.tie_word_embeddings
    if "vocab_size" not in given:
        if config.data.tokenizer is None:
            raise ConfigError("a model from scratch needs its vocabulary size", hint="Give data.tokenizer (or model.vocab_size).")
        given["vocab_size"] = Tokenizer(config.data.tokenizer).vocab_size
    return families.get(config.model.family).defaults(**given)


def _check(config: Config, layout: Layout, architecture: Architecture) -> None:
    from megawrap import objectives
    from megawrap.training.schedule import Schedule

    objectives.get(config.objective.name)
    Schedule.from_config(config.optim, config.schedule, config.train)
    rows_differ = config.data.packing == "none"  # they are padded to what sequence parallelism needs
    problems = layout.problems(
        architecture, seq_length=layout.tp if rows_differ else config.data.seq_length, micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
    )  # fmt: skip
    if config.data.seq_length > architecture.max_position_embeddings:
        problems.append(f"data.seq_length {config.data.seq_length} is above the model's {architecture.max_position_embeddings} positions")
    if problems:
        raise ConfigError("; ".join(problems))


def _plan(config: Config, architecture: Architecture, rank: int, *, alone: bool) -> Plan:
    from megawrap.data import plan

    barrier = None
    if not alone:
        import torch.distributed as dist

        barrier = dist.barrier
    made = plan.build(
        config.data.splits, config.data, config.objective, global_batch_size=config.train.global_batch_size,
        iterations=config.train.iterations, vocab_size=architecture.vocab_size, evaluate=config.eval.interval > 0,
        build_cache=rank == 0 and not alone, barrier=barrier, fallback_cache_dir=Path(config.run) / "cache",
    )  # fmt: skip
    if config.data.tokenizer is not None and made.tokenizer is not None:
        from megawrap.data.tokenizer import Tokenizer

        given, used = Tokenizer(config.data.tokenizer), made.tokenizer.get("sha256")
        if used is not None and given.sha256 != used:
            raise ConfigError(
                f"data.tokenizer {given.path} has sha256 {given.sha256[:12]}, the data was made with {used[:12]}",
                hint="Preprocess the data with this tokenizer, or name the one it was made with.",
            )
    return made


def _train(
    config: Config, layout: Layout, choices: Choices, architecture: Architecture, plan: Plan, start: Start, stop: Any, rank: int
) -> int:
    from megawrap import device, objectives, parallel
    from megawrap.checkpoint.store import Store
    from megawrap.data.loader import EvalLoader, Loader, RowPadding
    from megawrap.training.flops import matrix_products, peak_flops
    from megawrap.training.loggers import MetricsWriter, Record, console_line
    from megawrap.training.loop import Progress, Trainer
    from megawrap.training.plots import draw_curves
    from megawrap.training.schedule import Schedule

    _deterministic(config)
    folder = Path(config.run)
    if rank == 0:
        _prepare(folder, config, start)
    chunks, optimizer = _model(config, layout, choices, architecture, start)
    state = _restore(config, layout, choices, architecture, plan, start, chunks, optimizer)
    progress = Progress(iteration=state.iteration, consumed_rows=state.consumed_rows)
    place: dict[str, Any] = {
        "dp_rank": parallel.dp_rank(), "dp_size": layout.dp, "micro_batch_size": config.train.micro_batch_size,
        "global_batch_size": config.train.global_batch_size,
    }  # fmt: skip
    if config.data.packing == "none":
        multiple = math.lcm(config.data.pad_to_multiple, layout.tp if layout.sequence_parallel else 1)
        place["padding"] = RowPadding(multiple=multiple, whole_batch=layout.pp > 1)
    hardware = device.detect()
    products = matrix_products(
        architecture, num_tokens=round(config.train.micro_batch_size * plan.positions_per_iteration / config.train.global_batch_size),
        num_targets=max(1, round(plan.trained_tokens_per_iteration / config.train.global_batch_size)), tp=layout.tp,
    )  # fmt: skip
    peak = peak_flops(hardware.torch_device(), _dtype(choices.precision), products) * layout.world
    writer = MetricsWriter(folder / "logs" / "metrics.jsonl", resumed_iteration=progress.iteration or None) if rank == 0 else None
    if writer and writer.notice:
        print(writer.notice, flush=True)

    def report(record: Record) -> None:
        if writer is not None and writer.write(record):
            print(console_line(record, config.train.iterations), flush=True)

    store = Store(
        folder / "checkpoints", keep=config.checkpoint.keep, verify=config.checkpoint.verify, on_corrupt=config.checkpoint.on_corrupt
    )
    tokenizer = _tokenizer_dir(config, start)
    with store.writing():
        trainer = Trainer(
            config=config, architecture=architecture, chunks=chunks, optimizer=optimizer,
            schedule=Schedule.from_config(config.optim, config.schedule, config.train), objective=objectives.get(config.objective.name),
            train_loader=Loader(plan.train, prefetch=choices.prefetch, **place),
            eval_loaders={name: EvalLoader(rows, batches=config.eval.batches, **place) for name, rows in plan.valid.items()}
            if config.eval.interval else {},
            progress=progress, save=lambda at: _save(store, state, at, tokenizer, config), report=report, stop=stop, peak=peak,
        )  # fmt: skip
        finished = trainer.run()
    if writer is not None:
        writer.close()
        if config.log.plots:
            print(draw_curves(folder / "logs" / "metrics.jsonl", folder / "plots" / "curves.png"), flush=True)
        _farewell(config, stop.name, trainer.progress.iteration, finished)
    return EXIT_OK if finished else EXIT_UNFINISHED


def _farewell(config: Config, signal_name: str, iteration: int, finished: bool) -> None:
    where = f"checkpoint in {Path(config.run) / 'checkpoints'}"
    if finished:
        print(f"finished {iteration} iterations; {where}", flush=True)
        return
    why = f"stopped by {signal_name or 'a signal to another rank'} after iteration {iteration} of {config.train.iterations}"
    print(f"{why}; {where}; the same command goes on", flush=True)


def _model(config: Config, layout: Layout, choices: Choices, architecture: Architecture, start: Start) -> tuple[list[Any], Any]:
    """Wrapped chunks with the weights of the start, and their optimizer; a resumed run fills both later."""
    import torch

    from megawrap.models import gpt, weights
    from megawrap.training.optimizer import Optimizer, wrap

    build = gpt.Build(
        precision=choices.precision, layers=choices.layers, attention=choices.attention, recompute=config.train.recompute,
        attention_dropout=config.model.attention_dropout, hidden_dropout=config.model.hidden_dropout,
        vocab_divisor=config.model.make_vocab_size_divisible_by, padded_vocab_size=_padded_vocab_size(config, start, layout),
    )  # fmt: skip
    bare = gpt.build_chunks(architecture, layout, build)
    if start.resume is not None or (start.checkpoint is not None and not _weights_only(config, start)):
        for chunk in bare:  # every value is overwritten from the checkpoint; until then zeros, so that nothing is undefined
            for parameter in chunk.parameters():
                torch.nn.init.zeros_(parameter)
    elif start.init_from is not None:
        from conversion.load import initialise, open_source

        with open_source(start.init_from, trust=config.checkpoint.trust, verify=False) as source:
            initialise(bare, source)
    else:
        weights.fill(bare, weights.random_source(architecture, seed=config.train.seed, std=config.model.init_method_std))
    chunks = wrap(bare, distributed=choices.distributed_optimizer, overlap=choices.overlap)
    return chunks, Optimizer(chunks, config.optim, distributed=choices.distributed_optimizer, overlap=choices.overlap)


def _padded_vocab_size(config: Config, start: Start, layout: Layout) -> int | None:
    """Rows of the embedding when the checkpoint that is loaded in full has them fixed."""
    checkpoint = start.resume or start.checkpoint
    if checkpoint is None or (start.resume is None and _weights_only(config, start)):
        return None
    from megawrap.checkpoint.torch_dist import TorchDistReader

    said = TorchDistReader(checkpoint.path, trust=config.checkpoint.trust).common().get("megawrap") or {}
    rows = said.get("padded_vocab_size")
    if rows is not None and rows % layout.tp:
        raise ConfigError(
            f"{checkpoint.path} has {rows} embedding rows, which cannot be split over parallel.tp {layout.tp}",
            hint="Use a tp that divides them, or take the weights alone with --finetune into a new run.",
        )
    return rows


def _restore(
    config: Config, layout: Layout, choices: Choices, architecture: Architecture, plan: Plan, start: Start, chunks: list[Any],
    optimizer: Any,
) -> TrainingState:  # fmt: skip
    """The state of this rank, filled from the run's own checkpoint or from init_from as far as the flags say."""
    from megawrap.checkpoint.state import TrainingState, load_state
    from megawrap.training.optimizer import unwrap

    rows = unwrap(chunks)[0].vocab_size
    state = TrainingState(
        chunks=chunks, optimizer=optimizer.megatron, architecture=architecture, padded_vocab_size=rows, layout=layout,
        precision=choices.precision,
        extra={"tokenizer": plan.tokenizer or {}, "data_fingerprint": plan.fingerprint, **_origin(config, start)},
    )  # fmt: skip
    checkpoint, options = start.resume or start.checkpoint, config.checkpoint
    if checkpoint is None or (start.resume is None and _weights_only(config, start)):
        return state
    whole = start.resume is not None
    loaded = load_state(
        checkpoint.path, state, optimizer=whole or options.load_optim, rng=whole or options.load_rng, trust=options.trust,
        seed=config.train.seed,
    )  # fmt: skip
    used = loaded.megawrap.get("data_fingerprint")
    if whole and used != plan.fingerprint:
        raise ConfigError(
            f"{checkpoint.path} was trained on other rows than this configuration gives (data fingerprint {str(used)[:12]}, "
            f"now {plan.fingerprint[:12]})",
            hint="Restore data.splits, seq_length, packing, overlong, fim and seed; or start a new run with model.init_from.",
        )
    if whole or not options.reset_progress:
        state.iteration, state.consumed_rows = loaded.iteration, loaded.consumed_rows
    return state


def _save(store: Store, state: TrainingState, at: Progress, tokenizer: Path | None, config: Config) -> None:
    """Commit the state of all ranks, with the tokenizer beside it so that the checkpoint can be exported alone."""
    import torch.distributed as dist

    from megawrap.checkpoint.state import save_state

    state.iteration, state.consumed_rows = at.iteration, at.consumed_rows

    def write(directory: Path) -> list[str]:
        if tokenizer is not None and dist.get_rank() == 0:
            from conversion.megatron import keep_tokenizer

            keep_tokenizer(tokenizer, directory)
        return save_state(directory, state)

    info = {
        "layout": asdict(state.layout), "consumed_rows": at.consumed_rows, "data_fingerprint": state.extra["data_fingerprint"],
        "config_sha256": hashlib.sha256(to_yaml(config).encode()).hexdigest(),
    }  # fmt: skip
    store.save(at.iteration, write, info)


def _tokenizer_dir(config: Config, start: Start) -> Path | None:
    """Where the tokenizer files are that go into every checkpoint."""
    if config.data.tokenizer is not None:
        path = Path(config.data.tokenizer)
        return path if path.is_dir() else path.parent
    origin = start.resume.path if start.resume is not None else start.init_from
    if origin is None:
        return None
    from conversion.load import open_source

    with open_source(origin, trust=config.checkpoint.trust, verify=False) as source:
        return source.record.tokenizer_dir


def _origin(config: Config, start: Start) -> dict[str, Any]:
    """The config.json the model was first imported from; it travels from checkpoint to checkpoint until the export."""
    path = start.resume.path if start.resume is not None else start.init_from
    if path is None:
        return {}
    from conversion.load import open_source
    from conversion.megatron import origin

    with open_source(path, trust=config.checkpoint.trust, verify=False) as source:
        return origin(source.record)


def _dtype(precision: str) -> Any:
    from megawrap.models.gpt import DTYPES

    return DTYPES[precision]


def _deterministic(config: Config) -> None:
    """Refuse operations whose result depends on timing; only CUDA has any that are used here."""
    import torch

    if config.train.deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def _prepare(folder: Path, config: Config, start: Start) -> None:
    """Make the run directory with its configuration and environment, or set old progress aside."""
    from megawrap.io import atomic_write

    for name in ("logs", "checkpoints", "plots"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if start.restart:
        aside = next(path for n in range(1, 10_000) if not (path := folder / f"checkpoints.aside-{n}").exists())
        (folder / "checkpoints").rename(aside)
        (folder / "checkpoints").mkdir()
        print(f"old checkpoints are in {aside}", flush=True)
    atomic_write(folder / "config.yaml", to_yaml(config).encode())
    atomic_write(folder / "environment.json", (json.dumps(_environment(), indent=1) + "\n").encode())


def _environment() -> dict[str, Any]:
    """What a result may depend on beside the configuration; no secrets."""
    from megawrap import device

    packages = {}
    for name in ("megawrap", "torch", "megatron-core", "transformers", "tokenizers", "numpy", "transformer-engine", "flash-attn"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": packages, "hardware": asdict(device.detect())}


if __name__ == "__main__":
    sys.exit(main())
