"""`megawrap completion bash|zsh|tcsh`: a script that completes commands and flags, for the shell to source.

In: the name of a shell. Out: the script on stdout, made by shtab from the parsers of the commands themselves.
Use: `eval "$(megawrap completion bash)"`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from megawrap.cli import COMMANDS, Parser, run_command


def command_line() -> argparse.ArgumentParser:
    """One parser for all of `megawrap`: the commands as subparsers, each with its flags."""
    root = argparse.ArgumentParser(prog="megawrap")
    groups: dict[str, Any] = {"": root.add_subparsers()}
    for name, (target, text) in COMMANDS.items():
        *group, last = name.split()
        parent = group[0] if group else ""
        if parent not in groups:
            groups[parent] = groups[""].add_parser(parent, help=f"commands about {parent}").add_subparsers()
        parser = groups[parent].add_parser(last, help=text)
        if name == "finetune":
            _add_recipe_flags(parser)
            continue
        module = importlib.import_module(target.split(":")[0])
        if hasattr(module, "add_arguments"):
            module.add_arguments(parser)
    return root


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    from megawrap.arguments import MEGATRON_FLAGS, field_names

    for flag in ("--nproc", "--config", "--dry-run", "--print_config", *MEGATRON_FLAGS, *(f"--{name}" for name in field_names())):
        parser.add_argument(flag)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""

    def run(words: Sequence[str] | None) -> int:
        import shtab

        parser = Parser(prog="megawrap completion", description=(__doc__ or "").split("\n\n")[0])
        parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell that sources the script")
        print(shtab.complete(command_line(), shell=parser.parse_args(words).shell))
        return 0

    return run_command(run, argv)
