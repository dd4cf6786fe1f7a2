"""`megawrap data plan`: print what a recipe, or split strings alone, would train on. Nothing is written.

In: `--config RECIPE.yaml` with its overrides, or `--splits` with the few settings a plan depends on. Out: the table of
`megawrap.data.plan`, or JSON. Reads indices and manifests, never a model, and imports no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megawrap.config import DataConfig, FimConfig, ObjectiveConfig, OverlongPolicy, PackingMode
from megawrap.data.plan import Plan, build
from megawrap.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a plan without a recipe; defaults are those of the configuration."""
    data, objective = DataConfig(), ObjectiveConfig()
    parser.add_argument("--splits", nargs="+", required=True, metavar="FILE_OR_GROUP", help="a splits file, or groups, one argument each")
    parser.add_argument("--seq-length", type=_positive, default=data.seq_length, help="positions of a row (%(default)s)")
    parser.add_argument(
        "--overlong", choices=get_args(OverlongPolicy), default=data.overlong, help="samples longer than a row (%(default)s)"
    )
    parser.add_argument("--packing", choices=get_args(PackingMode), default=data.packing, help="how samples become rows (%(default)s)")
    parser.add_argument(
        "--pad-to-multiple", type=_positive, default=data.pad_to_multiple, help="segments get a multiple of this (%(default)s)"
    )
    parser.add_argument(
        "--fim-rate", type=float, default=data.fim.rate, help="share of samples rearranged; needs --tokenizer (%(default)s)"
    )
    parser.add_argument("--tokenizer", help="of the data, for --fim-rate")
    parser.add_argument("--loss-on", choices=("outputs", "all"), default=objective.loss_on, help="supervised tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=data.seed, help="seed of packing and order (%(default)s)")
    parser.add_argument("--global-batch-size", type=_positive, default=1, help="rows of an optimizer step (%(default)s)")
    parser.add_argument("--iterations", type=_positive, default=1, help="optimizer steps (%(default)s)")
    parser.add_argument("--vocab-size", type=_positive, help="of the model; default the data's tokenizer's")
    parser.add_argument("--cache-dir", help="look for packings here instead of beside the data")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def run(args: argparse.Namespace) -> None:
    """Build the plan of parsed flags and print it.

    Raises:
        ConfigError: the settings do not go together.
        DataError: see `megawrap.data.plan.build`.
    """
    splits = args.splits[0] if len(args.splits) == 1 else args.splits
    data = DataConfig(
        splits=splits, seq_length=args.seq_length, overlong=args.overlong, seed=args.seed, cache_dir=args.cache_dir,
        packing=args.packing, pad_to_multiple=args.pad_to_multiple, tokenizer=args.tokenizer, fim=FimConfig(rate=args.fim_rate),
    )  # fmt: skip
    problems = data.problems()
    if problems:
        raise ConfigError("; ".join(problems))
    plan = build(
        splits,
        data,
        ObjectiveConfig(loss_on=args.loss_on),
        global_batch_size=args.global_batch_size,
        iterations=args.iterations,
        vocab_size=args.vocab_size,
        build_cache=False,
    )
    _show(plan, args.json)


def _run_recipe(argv: Sequence[str]) -> None:
    from megawrap.arguments import parse

    as_json = "--json" in argv
    config, _ = parse([argument for argument in argv if argument != "--json"], prog="megawrap data plan")
    plan = build(
        config.data.splits,
        config.data,
        config.objective,
        global_batch_size=config.train.global_batch_size,
        iterations=config.train.iterations,
        vocab_size=config.model.vocab_size,
        evaluate=config.eval.interval > 0,
        build_cache=False,
        fallback_cache_dir=Path(config.run) / "cache",
    )
    _show(plan, as_json)


def _show(plan: Plan, as_json: bool) -> None:
    if as_json:
        import orjson

        print(orjson.dumps(plan.to_dict(), option=orjson.OPT_INDENT_2).decode())
    else:
        print("\n".join([plan.table(), *plan.notes]))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; errors are shown by the caller, `megawrap.cli.run_command`."""
    from megawrap.cli import Parser

    arguments = list(argv) if argv is not None else None
    if arguments is not None and any(argument.split("=")[0] == "--config" for argument in arguments):
        _run_recipe(arguments)
        return 0
    parser = Parser(prog="megawrap data plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="plan of a recipe instead; takes the flags of megawrap finetune")
    add_arguments(parser)
    run(parser.parse_args(arguments))
    return 0
