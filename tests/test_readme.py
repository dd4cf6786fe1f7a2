"""The README's commands: they exist, their flags exist, and `make demo` runs exactly them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megawrap import cli
from megawrap.arguments import parse
from megawrap.errors import EXIT_UNFINISHED

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^ *```bash\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_commands_were_found() -> None:
    assert len(COMMANDS) > 10 and COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("megawrap ")])
def test_megawrap_command_and_its_flags_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    name = next(name for name in cli.COMMANDS if words[: len(name.split())] == name.split())
    rest = words[len(name.split()) :]
    if "--config" in rest:
        parse(rest[rest.index("--config") :])
    done = subprocess.run(
        [sys.executable, "-m", "megawrap.cli", *name.split(), "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    flags = {word for word in rest if word.startswith("--")} - {"--nproc"}
    assert done.returncode == 0 and all(flag in done.stdout for flag in flags), done.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_target_exists(command: str) -> None:
    done = subprocess.run(["make", "-n", command.split()[1]], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", re.findall(r"`make (\w+)", README))
def test_make_target_in_the_text_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python ")])
def test_script_exists_and_has_help(command: str) -> None:
    words = shlex.split(command)
    done = subprocess.run([sys.executable, words[1], "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: ")


def test_job_script_of_the_readme_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    command = shlex.split(next(command for command in COMMANDS if command.startswith("python launch/finetune.py")))
    environment = {**os.environ, "STARCODERBASE": "/models/starcoderbase", "SPLITS": "splits.txt"}
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, cwd=ROOT, timeout=60, env=environment)
    assert done.returncode == 0 and "#SBATCH --nodes=8\n" in done.stdout and "#SBATCH --ntasks-per-node=8\n" in done.stdout, done.stderr


def test_demo_runs_the_commands_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's steps, recorded instead of run: all of them are in the README, in this order, and none is left out."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import demo  # type: ignore[import-not-found]

    recorded, expected_codes = [], []

    def record(self: object, title: str, *command: str, expect: int = 0, stop_at: int | None = None, keep: bool = False) -> str:
        recorded.append(shlex.join(command))
        expected_codes.append(expect)
        return "1.0 nats\n2.0 nats\n"

    monkeypatch.setattr(demo.Demo, "step", record)
    monkeypatch.setattr(demo, "table", lambda *_: 0)
    monkeypatch.setattr(demo, "read", lambda *_: [])
    assert demo.run(Path(demo.USUAL)) == 0
    once = [command for index, command in enumerate(recorded) if command not in recorded[:index]]
    steps = [command for command in COMMANDS if ".demo" in command or "stdlib-demo" in command]
    assert once == steps
    assert recorded.count("megawrap finetune --nproc 2 --config recipes/stdlib-demo.yaml") == 2
    assert expected_codes.count(EXIT_UNFINISHED) == 1


def test_tree_names_what_is_there() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
            assert folder.is_dir(), name
        else:
            assert (folder / name).exists(), name
        assert len(line.split()) > 2, f"{name} has no purpose"
