"""An instruction dataset from the Python standard library installed on this machine: signature and docstring -> body.

In: the interpreter's own library. Out: train.jsonl, valid_files.jsonl (held-out files of packages that are trained on)
and valid_packages.jsonl (packages never trained on), each line {"inputs", "outputs", "source"}. The same interpreter
gives the same bytes; no text is on two sides; every function seen is counted as kept or left out with its reason.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megawrap.errors import DataError
from megawrap.io import atomic_write

SIDES = ("train", "valid_files", "valid_packages")
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "turtledemo"}
VALID_SHARE = 0.04  # of all samples, for each of the two validation sets
MAX_CHARACTERS = 6000  # of inputs or outputs; longer functions are tables rather than code
MIN_CHARACTERS = 12  # of outputs; shorter ones are `return x`


@dataclass(frozen=True)
class Function:
    """One documented function: where it is from, and the two fields of a sample."""

    path: str
    name: str
    inputs: str
    outputs: str

    @property
    def package(self) -> str:
        """The top-level package or module, `json` for json/decoder.py and `ast` for ast.py."""
        return self.path.split("/", 1)[0].removesuffix(".py")

    def line(self) -> bytes:
        """The sample as one line of JSONL."""
        sample = {"inputs": self.inputs, "outputs": self.outputs, "source": f"{self.path}:{self.name}"}
        return orjson.dumps(sample) + b"\n"


def source_files(root: Path) -> list[Path]:
    """Every Python file of a library, tests and installed packages left out, in the order of their relative paths."""
    found = [
        path
        for path in root.rglob("*.py")
        if not LEFT_OUT.intersection(path.relative_to(root).parts) and not path.is_symlink() and path.is_file()
    ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def functions(text: str, path: str, counts: Counter[str]) -> Iterator[Function]:
    """The documented functions and methods of one file, in the order of the text.

    Args:
        text: source text.
        path: its path relative to the library, with slashes.
        counts: what was left out, by reason, is added here.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # odd escapes in old modules
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        counts["file is not valid Python"] += 1
        return
    lines = text.splitlines(keepends=True)
    for prefix, node in _definitions(tree.body, ""):
        counts["functions seen"] += 1
        reason, found = _function(node, prefix + node.name, path, lines)
        if found is None:
            counts[reason] += 1
        else:
            yield found


def _definitions(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix, node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse], prefix)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, path: str, lines: Sequence[str]) -> tuple[str, Function | None]:
    """Cut the source of one function after its docstring; else the reason why it is left out."""
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    if not is_text:
        return "left out: no docstring", None
    if len(node.body) == 1:
        return "left out: docstring only", None
    border, end = first.end_lineno or 0, node.end_lineno or 0
    if node.body[1].lineno <= border:
        return "left out: body on the line of the docstring", None
    indent = len(lines[node.lineno - 1]) - len(lines[node.lineno - 1].lstrip())
    inputs = _dedented(lines[node.lineno - 1 : border], indent)
    outputs = _dedented(lines[border:end], indent)
    if len(outputs.strip()) < MIN_CHARACTERS:
        return f"left out: body under {MIN_CHARACTERS} characters", None
    if max(len(inputs), len(outputs)) > MAX_CHARACTERS:
        return f"left out: over {MAX_CHARACTERS} characters", None
    return "", Function(path, name, inputs, outputs)


def _dedented(lines: Sequence[str], indent: int) -> str:
    """Lines without their first `indent` characters, where these are white space, and without empty lines around them."""
    cut = [line[indent:] if not line[:indent].strip() else line for line in lines]
    return "".join(line if line.strip() else "\n" for line in cut).strip("\n").rstrip() + "\n"


def collect(root: Path, limit: int | None = None) -> tuple[list[Function], Counter[str]]:
    """All samples of a library, no inputs and no outputs twice, with counts by reason that add up.

    Raises:
        DataError: there is no documented function below `root`.
    """
    counts: Counter[str] = Counter()
    kept: list[Function] = []
    seen: set[bytes] = set()
    for path in source_files(root):
        if limit is not None and len(kept) >= limit:
            break
        counts["files read"] += 1
        text = path.read_bytes().decode("utf-8", errors="replace")
        for function in functions(text, path.relative_to(root).as_posix(), counts):
            keys = {_key(function.inputs), _key(function.outputs)}
            if limit is not None and len(kept) >= limit:
                counts["left out: over --limit"] += 1
            elif keys & seen:
                counts["left out: text already seen"] += 1
            else:
                seen |= keys
                kept.append(function)
    if not kept:
        raise DataError(f"{root} has no documented Python function", hint="Give the directory of a Python library with --library")
    return kept, counts


def split(samples: Sequence[Function]) -> dict[str, list[Function]]:
    """Samples by side: whole packages, then whole files of the other packages, are held out; the rest is for training."""
    target = int(VALID_SHARE * len(samples))
    held_packages = _draw(Counter(sample.package for sample in samples), target)
    rest = [sample for sample in samples if sample.package not in held_packages]
    files = Counter(sample.path for sample in rest if "/" in sample.path)
    held_files = _draw(files, target)
    sides: dict[str, list[Function]] = {side: [] for side in SIDES}
    for sample in samples:
        held = sample.package in held_packages
        sides["valid_packages" if held else "valid_files" if sample.path in held_files else "train"].append(sample)
    return sides


def write(sides: dict[str, list[Function]], output_dir: Path) -> None:
    """Write OUTPUT/SIDE.jsonl for each side, each file whole or not at all."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for side, samples in sides.items():
        atomic_write(output_dir / f"{side}.jsonl", b"".join(sample.line() for sample in samples))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m data_tools.stdlib --output DIR`."""
    from megawrap.cli import Parser, run_command

    def run(arguments: Sequence[str] | None) -> int:
        parser = Parser(prog="megawrap data stdlib", description=(__doc__ or "").split("\n\n")[0])
        parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of train.jsonl and the validation files")
        parser.add_argument("--library", type=Path, default=None, metavar="DIR", help="another Python library (default: the interpreter's)")
        parser.add_argument("--limit", type=int, default=None, metavar="N", help="stop after N samples")
        return _run(parser.parse_args(arguments))

    return run_command(run, argv)


def _run(args: Any) -> int:
    if args.limit is not None and args.limit < 3:
        raise DataError(f"--limit is {args.limit}; it must be 3 or more, one sample for each of {', '.join(SIDES)}")
    root = args.library or Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise DataError(f"--library {root} is not a directory")
    samples, counts = collect(root, args.limit)
    sides = split(samples)
    write(sides, args.output)
    print(f"Python {sys.version.split()[0]}, {root}")
    for reason, count in counts.items():
        print(f"{count:>8,}  {reason}")
    for side, kept in sides.items():
        packages = len({sample.package for sample in kept})
        size = sum(len(sample.outputs) for sample in kept)
        print(f"{len(kept):>8,}  samples in {args.output / side}.jsonl ({packages} packages, {size:,} characters of outputs)")
    return 0


def _key(text: str) -> bytes:
    """Identity of a text apart from white space, so that a moved or re-indented copy is the same text."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def _draw(sizes: Counter[str], target: int) -> set[str]:
    """Names in the order of their hash whose sizes add up to at most `target`, and at least one where there are two."""
    order = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    drawn: set[str] = set()
    total = 0
    for name in order:
        if total + sizes[name] <= target:
            drawn.add(name)
            total += sizes[name]
    if not drawn and len(order) > 1:
        drawn.add(min(order, key=lambda name: sizes[name]))
    return drawn


if __name__ == "__main__":
    sys.exit(main())
