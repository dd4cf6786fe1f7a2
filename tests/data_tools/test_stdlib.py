"""The standard-library dataset: fields cut where Python says, nothing on two sides, every function counted, same bytes."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from data_tools import stdlib

SOURCE = '''
import os

def plain(a, b=2):
    """Add two numbers."""
    total = a + b
    return total

class Box:
    """A box."""

    async def open(self, *, far):
        """Open it.

        Unusual: second paragraph.
        """
        if far:

            text = """kept
as it is"""
        return await self.lid(text)

    def silent(self):
        return None or self.silent()

if os.name:
    def guarded(x):
        "Only here."
        return [x for x in x if x]

def one_line(): "doc"; return 5
def only():
    """Nothing but this."""
def short():
    """Short."""
    return 1
def twice(a):
    """Another docstring."""
    total = a + b
    return total
'''


def library(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_fields_are_cut_after_the_docstring() -> None:
    counts: Counter[str] = Counter()
    found = {one.name: one for one in stdlib.functions(SOURCE, "pkg/a.py", counts)}
    assert list(found) == ["plain", "Box.open", "guarded", "twice"]
    assert found["plain"].inputs == 'def plain(a, b=2):\n    """Add two numbers."""\n'
    assert found["plain"].outputs == "    total = a + b\n    return total\n"
    assert found["Box.open"].inputs.startswith("async def open(self, *, far):\n    " + '"""Open it.\n\n')
    assert '    """kept\nas it is"""\n' in found["Box.open"].outputs.replace("text = ", ""), "text inside strings is not touched"
    assert counts["functions seen"] == 8
    assert sum(count for reason, count in counts.items() if reason != "functions seen") == 4


def test_inputs_and_outputs_together_are_the_function() -> None:
    """Oracle: Python's own parser sees the same function in inputs + outputs as in the file."""
    whole = {node.name: node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for one in stdlib.functions(SOURCE, "a.py", Counter()):
        again = ast.parse(one.inputs + one.outputs).body[0]
        same = ast.dump(whole[one.name.rsplit(".", 1)[-1]])
        assert re.sub(r"(\\n|\s)+", " ", ast.dump(again)) == re.sub(r"(\\n|\s)+", " ", same), one.name  # docstrings are dedented


def test_a_text_is_kept_once(tmp_path: Path) -> None:
    kept, counts = stdlib.collect(library(tmp_path, {"pkg/a.py": SOURCE, "pkg/b.py": textwrap.indent(SOURCE, "", lambda _: True)}))
    assert [one.name for one in kept] == ["plain", "Box.open", "guarded"], "`twice` has the body of `plain`"
    assert counts["left out: text already seen"] == 5
    seen = counts["functions seen"]
    assert seen == len(kept) + sum(count for reason, count in counts.items() if reason.startswith("left out"))


def many(root: Path) -> Path:
    """60 packages of 1 to 4 files, each with one function of its own."""
    files = {}
    for package in range(60):
        for part in range(1 + package % 4):
            name = f"p{package}/m{part}.py" if package % 4 else f"p{package}.py"
            files[name] = f'def f{package}_{part}(a):\n    """Number {package} {part}."""\n    return a * {package} + {part} - a\n'
    return library(root, files)


def test_sides_share_no_package_no_file_and_no_text(tmp_path: Path) -> None:
    kept, _ = stdlib.collect(many(tmp_path))
    sides = stdlib.split(kept)
    assert sum(map(len, sides.values())) == len(kept) == 150
    assert all(sides.values())
    packages = {side: {one.package for one in samples} for side, samples in sides.items()}
    files = {side: {one.path for one in samples} for side, samples in sides.items()}
    assert not packages["valid_packages"] & (packages["train"] | packages["valid_files"])
    assert not files["valid_files"] & files["train"]
    assert max(len(sides["valid_files"]), len(sides["valid_packages"])) <= stdlib.VALID_SHARE * len(kept)


def test_command_writes_the_same_bytes_twice_and_prints_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = many(tmp_path / "library")
    digests = []
    for name in ("one", "two"):
        assert stdlib.main(["--library", str(root), "--output", str(tmp_path / name)]) == 0
        digests.append([hashlib.sha256((tmp_path / name / f"{side}.jsonl").read_bytes()).hexdigest() for side in stdlib.SIDES])
    assert digests[0] == digests[1]
    lines = [json.loads(line) for side in stdlib.SIDES for line in (tmp_path / "one" / f"{side}.jsonl").read_text().splitlines()]
    assert len(lines) == 150 and all(set(line) == {"inputs", "outputs", "source"} for line in lines)
    out = capsys.readouterr().out
    assert "150  functions seen" in out and "samples in" in out


def test_the_library_of_this_interpreter(tmp_path: Path) -> None:
    """The real thing, in part: there is real text, and no test file or installed package among it."""
    assert stdlib.main(["--output", str(tmp_path), "--limit", "400"]) == 0
    samples = [json.loads(line) for side in stdlib.SIDES for line in (tmp_path / f"{side}.jsonl").read_text().splitlines()]
    assert len(samples) == 400
    assert not any("site-packages" in sample["source"] or sample["source"].startswith("test/") for sample in samples)
    assert len({sample["outputs"] for sample in samples}) == 400


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--limit", "2"], ["--limit is 2", "3 or more"]),
        (["--library", "/no/such"], ["--library /no/such is not a directory"]),
        (["--library", "EMPTY"], ["has no documented Python function"]),
        (["--limt", "2"], ["unknown argument '--limt'", "--limit"]),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    arguments: list[str], facts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    given = [str(tmp_path / "empty") if word == "EMPTY" else word for word in arguments]
    assert stdlib.main(["--output", str(tmp_path / "out"), *given]) == 2
    told = capsys.readouterr().err
    assert all(fact in told for fact in facts), told
    assert not (tmp_path / "out").exists()
