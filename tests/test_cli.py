"""The megawrap command: fast help, unknown commands, and how every kind of end becomes an exit code."""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megawrap import cli
from megawrap.errors import CheckpointError, ConfigError, MegawrapError

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "megatron", "megatron.core", "transformers"}


def megawrap(*argv: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megawrap.cli", *argv], capture_output=True, text=True, cwd=ROOT, timeout=60, **options)


def imported_by(*argv: str) -> set[str]:
    command = [sys.executable, "-X", "importtime", "-m", "megawrap.cli", *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
    return {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    out = megawrap("--help").stdout
    assert all(f"  {name} " in out and text in out for name, (_, text) in cli.COMMANDS.items())
    assert not imported_by("--help") & (HEAVY | {"numpy", "yaml", "jsonargparse"})


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_help_of_each_command_imports_no_torch(name: str) -> None:
    assert not imported_by(*name.split(), "--help") & HEAVY


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_each_command_is_there(name: str) -> None:
    module, function = cli.COMMANDS[name][0].split(":")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    assert next(iter(signature.parameters)) == "argv"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_unknown_flag_of_each_command_is_refused_in_one_line(name: str) -> None:
    done = megawrap(*name.split(), "--no-such-flag", "1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[0].startswith("megawrap: error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["finetun"], "finetune"),
        (["verfy"], "verify"),
        (["data", "plann"], "data plan"),
        (["dat"], "data"),
        (["xyz"], "Known: completion"),
    ],
)
def test_unknown_command_names_the_nearest(argv: list[str], near: str) -> None:
    done = megawrap(*argv)
    assert done.returncode == 2 and near in done.stderr and done.stderr.count("\n") == 1


def test_no_command_shows_help_and_is_wrong_usage() -> None:
    assert (megawrap().returncode, megawrap("data").returncode) == (2, 2)
    assert megawrap("data", "--help").returncode == 0 and megawrap("--version").stdout.startswith("megawrap ")


def raising(error: BaseException):
    def run(_args: object) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("a is 1; it must be 2", hint="Write 2"), 2, "megawrap: error: a is 1; it must be 2. Write 2\n"),
        (CheckpointError("x is damaged", corrupt=True), 3, "megawrap: error: x is damaged\n"),
        (KeyboardInterrupt(), 130, "megawrap: error: interrupted\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk"), 2, "megawrap: error: /full/disk: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/locked"), 2, "megawrap: error: /locked: Permission denied\n"),
    ],
)
def test_an_end_becomes_a_line_and_a_code(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(raising(error), None) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ValueError("defect"), OSError(errno.EIO, "I/O"), AssertionError()])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        cli.run_command(raising(error), None)


def test_exit_codes_of_a_command_are_kept() -> None:
    assert [cli.run_command(lambda code: code, code) for code in (None, 0, 1, 75)] == [0, 0, 1, 75]


def test_a_reader_that_went_away_ends_quietly() -> None:
    program = "import sys; from megawrap import cli; sys.exit(cli.run_command(lambda _: print('x' * 99999999), None))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_parser_names_the_nearest_flag() -> None:
    parser = cli.Parser(prog="thing")
    parser.add_argument("--seq-length", type=int)
    with pytest.raises(MegawrapError, match=r"unknown argument '--seqlength'. The nearest known one is --seq-length"):
        parser.parse_args(["--seqlength", "3"])
    with pytest.raises(MegawrapError, match="invalid int value: 'x'"):
        parser.parse_args(["--seq-length", "x"])


@pytest.mark.parametrize(
    "words", ["megawrap fine", "megawrap finetune --tensor-model", "megawrap preprocess --output-p", "megawrap data pl"]
)
def test_bash_completes_commands_and_flags(words: str, tmp_path: Path) -> None:
    """Bash itself is asked, through the function that the script registers."""
    script = megawrap("completion", "bash").stdout
    (tmp_path / "script").write_text(script)
    ask = f"""
source "$1"
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE="{words}"; COMP_POINT=${{#COMP_LINE}}
function=$(complete -p megawrap | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function" megawrap "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", ask, "bash", str(tmp_path / "script")], capture_output=True, text=True, timeout=60)
    expected = {"fine": "finetune", "--tensor-model": "--tensor-model-parallel-size", "--output-p": "--output-prefix", "pl": "plan"}
    assert done.stdout.split() == [expected[words.split()[-1]]], done.stderr
