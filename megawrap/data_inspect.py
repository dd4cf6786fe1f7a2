"""`megawrap data inspect PREFIX`: look at samples, packed rows and batches as they are trained on, and at statistics.

In: a dataset, with the few settings rows depend on, or `--config RECIPE.yaml` with its overrides. Out: text (trained tokens
in one colour, context in another), JSON, a picture (`--png`) or a page for a browser (`--html`). Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megawrap.config import DataConfig, ObjectiveConfig, OverlongPolicy, PackingMode
from megawrap.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from megawrap.data.inspection import Inspection
    from megawrap.data.statistics_table import Account
    from megawrap.data.view import View

_FIRST = 8  # samples of a page for which none were chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags."""
    parser.add_argument("prefix", nargs="?", metavar="PREFIX", help="dataset; with --config it comes first, or is left out")
    _add_what(parser)
    parser.add_argument(
        "--config", metavar="RECIPE.yaml", help="settings and sources of a recipe; takes the flags of megawrap finetune as well"
    )
    data = DataConfig()
    parser.add_argument("--seq-length", type=_above_zero, default=data.seq_length, help="positions of a row (%(default)s)")
    parser.add_argument("--packing", choices=get_args(PackingMode), default=data.packing, help="how samples become rows (%(default)s)")
    parser.add_argument(
        "--overlong", choices=get_args(OverlongPolicy), default=data.overlong, help="samples longer than a row (%(default)s)"
    )
    parser.add_argument("--loss-on", choices=("outputs", "all"), help="trained tokens; default outputs, or all for files without modes")
    parser.add_argument("--seed", type=int, default=data.seed, help="seed of packing and order (%(default)s)")
    parser.add_argument("--global-batch-size", type=_above_zero, default=8, help="rows of a batch (%(default)s)")


def _add_what(parser: argparse.ArgumentParser) -> None:
    """What is shown, and how: the flags that a recipe does not decide."""
    parser.add_argument("--sample", nargs="+", type=_not_negative, metavar="N", help="samples of PREFIX, from 0")
    parser.add_argument("--row", nargs="+", type=_not_negative, metavar="N", help="packed rows, from 0, in the order they are drawn")
    parser.add_argument("--batch", type=_not_negative, metavar="N", help="all rows of global batch N; 0 is that of the first iteration")
    parser.add_argument("--group", default="train", metavar="NAME", help="group whose rows are shown (%(default)s)")
    parser.add_argument("--stats", action="store_true", help="length histogram, share of trained tokens, fill when packed, source mix")
    parser.add_argument("--tokenizer", metavar="DIR_OR_JSON", help="tokenizer that made the data, to show text")
    parser.add_argument("--ids", action="store_true", help="a line for every token: position, id, weight, text")
    parser.add_argument("--color", action=argparse.BooleanOptionalAction, help="default: on a terminal, unless NO_COLOR is set")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the statistics (needs megawrap[plots])")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write samples, rows and statistics to one page for a browser, offline, instead"
    )


def _above_zero(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 48:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code."""
    from megawrap.cli import run_command

    return run_command(_command, list(sys.argv[1:] if argv is None else argv))


def _command(words: Sequence[str]) -> int:
    from megawrap.cli import Parser

    about = (__doc__ or "").split("\n\n")[0]
    parser = Parser(prog="megawrap data inspect", description=about)
    with_recipe = any(word.split("=")[0] == "--config" for word in words)
    if not with_recipe or "--help" in words or "-h" in words:
        add_arguments(parser)
        args = parser.parse_args(words)
        if args.prefix is None:
            raise ConfigError("nothing to look at", hint="Give a PREFIX, or --config RECIPE.yaml")
        return run(args, _of_prefix(args))
    _add_what(parser)
    prefix = words[0] if not words[0].startswith("-") else None  # a word further on may be the value of a recipe's flag
    args, rest = parser.parse_known_args(words[prefix is not None :])
    return run(args, _of_recipe(args, rest, prefix))


def _of_prefix(args: argparse.Namespace) -> Inspection:
    """One dataset and the flags."""
    from megawrap.data.format import IndexedDataset
    from megawrap.data.inspection import Inspection, Settings, whole

    if args.group != "train":
        raise ConfigError(f"--group {args.group}: a dataset alone has the one group train", hint="Name a recipe with --config as well")
    prefix = Path(args.prefix)
    has_modes = IndexedDataset(prefix).modes is not None
    settings = Settings(
        splits=whole(prefix),
        data=DataConfig(seq_length=args.seq_length, packing=args.packing, overlong=args.overlong, seed=args.seed),
        objective=ObjectiveConfig(loss_on=args.loss_on or ("outputs" if has_modes else "all")),
        global_batch_size=args.global_batch_size if args.batch is not None else 1,
    )
    return Inspection(settings=settings, prefix=prefix, group=args.group, tokenizer=args.tokenizer)


def _of_recipe(args: argparse.Namespace, rest: Sequence[str], given: str | None) -> Inspection:
    """A recipe's data settings, on its own sources or on one dataset."""
    from megawrap.arguments import parse
    from megawrap.data.inspection import Inspection, Settings, whole

    config, _ = parse(rest, prog="megawrap data inspect")
    prefix = None if given is None else Path(given)
    settings = Settings(
        splits=config.data.splits if prefix is None else whole(prefix),
        data=config.data,
        objective=config.objective,
        global_batch_size=config.train.global_batch_size if args.batch is not None or prefix is None else 1,
        iterations=config.train.iterations,
        vocab_size=config.model.vocab_size,
        fallback_cache_dir=Path(config.run) / "cache",
    )
    return Inspection(settings=settings, prefix=prefix, group=args.group, tokenizer=args.tokenizer or config.data.tokenizer)


def run(args: argparse.Namespace, inspection: Inspection) -> int:
    """Show what the flags ask for.

    Raises:
        MegawrapError: there is no such sample, row or group, or the tokenizer is not the data's.
    """
    chosen = args.sample is not None or args.row is not None or args.batch is not None
    to_files = args.png is not None or args.html is not None
    default = not (chosen or args.stats or to_files)
    views = _views(args, inspection)
    if not chosen and (default or args.html is not None):
        views = _first_views(inspection, 1 if args.html is None else _FIRST)
    accounts = inspection.accounts() if args.stats or default or to_files else []
    if args.json:
        _print_json(views if chosen or default else [], accounts, inspection.notes)
    else:  # what goes to a page is not repeated here
        to_print = views if args.html is None and (chosen or default) else []
        _print_text(to_print, accounts if args.stats or default else [], inspection, args)
    _write_files(args, views, accounts, inspection)
    return EXIT_OK


def _views(args: argparse.Namespace, inspection: Inspection) -> list[View]:
    views = [inspection.sample(number) for number in args.sample or []]
    views += inspection.rows(args.row) if args.row else []
    return views + (inspection.batch(args.batch) if args.batch is not None else [])


def _first_views(inspection: Inspection, number: int) -> list[View]:
    """The first samples of a dataset, or the first rows of a recipe."""
    if inspection.prefix is None:
        return inspection.rows(range(min(number, 2)))
    return [inspection.sample(index) for index in range(min(number, inspection.dataset.num_documents))]


def _print_json(views: Sequence[View], accounts: Sequence[Account], notes: Sequence[str]) -> None:
    import orjson

    content: dict[str, Any] = {
        "views": [view.to_dict() for view in views],
        "statistics": [account.to_dict() for account in accounts],
        "notes": list(notes),
    }
    print(orjson.dumps(content, option=orjson.OPT_INDENT_2).decode())


def _print_text(views: Sequence[View], accounts: Sequence[Account], inspection: Inspection, args: argparse.Namespace) -> None:
    from megawrap.data.statistics_table import render as render_account
    from megawrap.data.view_text import render, style_for, visible

    style = style_for(sys.stdout, {None: "auto", True: "always", False: "never"}[args.color])
    blocks = [render_account(account, style) for account in accounts] + [render(view, style, ids=args.ids) for view in views]
    if len(views) > 1:
        trained = sum(segment.trained for view in views for segment in view.segments)
        blocks.append(f"{len(views):,} shown, {trained:,} trained tokens")
    blocks += [f"note: {visible(note, style)}" for note in inspection.notes]
    text = "\n\n".join(blocks)
    if text:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))


def _write_files(args: argparse.Namespace, views: Sequence[View], accounts: Sequence[Account], inspection: Inspection) -> None:
    from megawrap.data.view_text import Style, visible
    from megawrap.io import atomic_write

    said = sys.stderr if args.json else sys.stdout
    for path in (args.png, args.html):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.png is not None:
        from megawrap.data.statistics_plot import draw

        draw(accounts, args.png)
        print(f"picture: {visible(str(args.png), Style())}", file=said)
    if args.html is not None:
        from megawrap.data.page import render

        title = f"{inspection.prefix.name if inspection.prefix is not None else inspection.group} as it is trained on"
        atomic_write(args.html, render(title, views, accounts, inspection.notes).encode())
        print(f"page: {visible(str(args.html), Style())}", file=said)


if __name__ == "__main__":
    sys.exit(main())
