"""The `megawrap` command: chooses a subcommand, imports its module and calls it. No logic and no heavy import here.

In: the command line. Out: an exit code. Every subcommand is a module with `main(argv) -> int` that can also be run
alone with `python -m`; `run_command` is how each of them turns a user's mistake into one line and an exit code.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megawrap.errors import EXIT_OK, EXIT_USAGE, ConfigError, MegawrapError

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

# name: (module:function, one line of help). A module is imported only when its command is chosen.
COMMANDS: dict[str, tuple[str, str]] = {
    "preprocess": ("megawrap.preprocess:main", "JSONL -> PREFIX.bin, PREFIX.idx, PREFIX.manifest.json"),
    "finetune": ("megawrap.ranks:finetune", "fine-tune a model; --nproc N starts N ranks on this machine"),
    "convert": ("conversion.convert:main", "Hugging Face <-> Megatron checkpoints, at any tp x pp"),
    "diff": ("conversion.diff:main", "compare the weights of two directories bit for bit"),
    "verify": ("conversion.verify:main", "prove a checkpoint against a Hugging Face directory"),
    "completion": ("megawrap.completion:main", "a script that completes commands and flags: bash, zsh or tcsh"),
    "data plan": ("megawrap.data_plan:main", "what a recipe or a split string trains on: samples, tokens, rows"),
    "data inspect": ("megawrap.data_inspect:main", "samples, rows and batches as they are trained on, and statistics"),
    "data verify": ("megawrap.data_verify:main", "read every byte of a dataset again, against its manifest"),
    "data merge": ("megawrap.data_merge:main", "several datasets, or twin files, as one, without tokenizing again"),
    "data cut": ("megawrap.data_cut:main", "a range of the documents of a dataset as a dataset of its own"),
    "data stdlib": ("data_tools.stdlib:main", "instruction dataset from the Python standard library of this machine"),
    "data tokenizer": ("data_tools.train_tokenizer:main", "train a byte-level BPE tokenizer on JSONL"),
    "data unigram": ("data_tools.unigram:main", "entropy of validation outputs under the training counts"),
}

# Conditions of the machine or of a path, rather than of the code: they end in one line, not in a traceback.
_PATH_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR,
    errno.EISDIR,
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`s and name the nearest known flag."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting, so that every command ends the same way."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            given = message[len(prefix) :].split()[0]
            raise unknown("argument", given, [flag for action in self._actions for flag in action.option_strings])
        raise ConfigError(f"{self.prog}: {message}", hint=f"See {self.prog} --help")


def unknown(what: str, given: str, known: Sequence[str]) -> ConfigError:
    """The error for a name that is not known, with the nearest one that is."""
    name = given.split("=", 1)[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"The nearest known one is {near[0]}" if near else f"Known: {', '.join(known)}" if len(known) <= 12 else "See --help"
    return ConfigError(f"unknown {what} {name!r}", hint=hint)


def run_command(run: Callable[[Any], int | None], args: Any) -> int:
    """Call `run(args)` and return the exit code of the process.

    A `MegawrapError`, and a path that cannot be read or written, become one line on stderr; an interrupt becomes 130;
    a reader that went away (`| head`) ends quietly. Anything else is a defect and keeps its traceback.
    """
    try:
        code = run(args) or EXIT_OK
        sys.stdout.flush()
        return code
    except MegawrapError as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in _PATH_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        return _say(f"{where}{error.strerror}", EXIT_USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """The `megawrap` command."""
    return run_command(_dispatch, list(sys.argv[1:] if argv is None else argv))


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return EXIT_OK if argv else EXIT_USAGE
    if argv[0] == "--version":
        print(f"megawrap {_version()}")
        return EXIT_OK
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    words = 2 if argv[0] in groups else 1
    name = " ".join(argv[:words])
    if words == 2 and (len(argv) == 1 or argv[1] in ("-h", "--help")):
        print(_help(argv[0]))
        return EXIT_OK if len(argv) > 1 else EXIT_USAGE
    if name not in COMMANDS:
        known = {other.split()[0] if words == 1 else other for other in COMMANDS if words == 1 or other.startswith(argv[0] + " ")}
        raise unknown("command", name, sorted(known))
    module, function = COMMANDS[name][0].split(":")
    return getattr(importlib.import_module(module), function)(argv[words:])


def _help(group: str | None = None) -> str:
    shown = {name: text for name, (_, text) in COMMANDS.items() if group is None or name.startswith(group + " ")}
    width = max(map(len, shown))
    lines = [f"  {name:<{width}}  {text}" for name, text in shown.items()]
    usage = f"usage: megawrap {group + ' ' if group else ''}COMMAND [ARGUMENT ...]"
    about = "Fine-tuning with Megatron parallelism, from a laptop to a cluster by one code path."
    codes = "Exit codes: 0 done, 1 the two sides differ, 2 wrong input, 3 damaged file, 75 saved but not finished (run it again)."
    return "\n".join([usage, "", about, "", "commands:", *lines, "", "Help on one of them: megawrap COMMAND --help", codes])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("megawrap")
    except PackageNotFoundError:
        return "(not installed)"


def _say(message: str, code: int) -> int:
    print(f"megawrap: error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
