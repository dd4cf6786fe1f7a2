"""An inputs/outputs corpus for the data benchmarks, made of the Python source that is installed: realistic and never downloaded.

    python benchmarks/corpus.py --out corpus.jsonl [--target-mb 160] [--seed 1234] [--roots DIR ...]

Each line is a sample of one of three kinds, as instruction data for code has them: the beginning of a file and its rest, a
signature and its body, an instruction made of a docstring and the whole function. Files come in the order of their
content's hash and every content once; draws are seeded by the content. So the same files and flags give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

FILE_BYTES = (300, 400_000)
"""Smaller files say nothing, larger ones are tables of data."""
INPUT_CHARACTERS, OUTPUT_CHARACTERS = 8_000, 24_000
"""Longest parts of a file sample; its outputs make the long tail that packing has to deal with."""


def sources(roots: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(sha256, text) of every distinct Python file in UTF-8 below the roots, in the order of the hashes."""
    found: dict[str, Path] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            try:
                content = path.read_bytes()
            except OSError:
                continue  # not ours to read
            if FILE_BYTES[0] <= len(content) <= FILE_BYTES[1]:
                found.setdefault(hashlib.sha256(content).hexdigest(), path)
    for digest in sorted(found):
        try:
            yield digest, found[digest].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # another encoding


def samples(text: str, draw: random.Random) -> Iterator[dict[str, str]]:
    """The samples of one file: `kind`, `inputs` and `outputs`; those with an empty side are left out."""
    for kind, inputs, outputs in _pairs(text, draw):
        if inputs.strip() and outputs.strip():
            yield {"inputs": inputs, "outputs": outputs, "kind": kind}


def _pairs(text: str, draw: random.Random) -> Iterator[tuple[str, str, str]]:
    lines = text.splitlines(keepends=True)
    cut = max(1, round(len(lines) * draw.uniform(0.1, 0.5)))
    yield "file", "".join(lines[:cut])[-INPUT_CHARACTERS:], "".join(lines[cut:])[:OUTPUT_CHARACTERS]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.split("\n")  # as the parser counts lines, unlike splitlines
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 3:
            yield _of_function(node, lines, draw)


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], draw: random.Random) -> tuple[str, str, str]:
    begin, end = node.lineno - 1, node.end_lineno or node.lineno
    documentation = ast.get_docstring(node)
    if documentation and draw.random() < 0.5:
        return "instruction", f"Write the Python function `{node.name}`.\n\n{documentation}\n", "\n".join(lines[begin:end]) + "\n"
    first = node.body[1 if documentation and len(node.body) > 1 else 0]
    body = max(begin + 1, first.lineno - 1)
    return "body", "\n".join(lines[begin:body]) + "\n", "\n".join(lines[body:end]) + "\n"


def write(out: Path, target_bytes: int, *, seed: int = 1234, roots: Sequence[Path] | None = None) -> dict[str, int]:
    """Write at least `target_bytes` of samples, or all there are; returns bytes, lines, and lines of each kind."""
    if roots is None:
        roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    written, kinds = 0, Counter[str]()
    with open(out, "wb") as file:
        for digest, text in sources(roots):
            if written >= target_bytes:
                break
            for sample in samples(text, random.Random(f"{seed} {digest}")):
                try:
                    written += file.write(json.dumps(sample, ensure_ascii=False).encode() + b"\n")
                except UnicodeEncodeError:
                    continue  # half a surrogate pair, which JSON in UTF-8 cannot hold
                kinds[sample["kind"]] += 1
    return {"bytes": written, "lines": kinds.total(), **kinds}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpus and say on standard error what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--target-mb", type=float, default=160, help="size in MB (default 160)")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws")
    parser.add_argument("--roots", type=Path, nargs="+", help="directories of Python files (default: this Python's own and its packages)")
    options = parser.parse_args(argv)
    print(json.dumps(write(options.out, int(options.target_mb * 1e6), seed=options.seed, roots=options.roots)), file=sys.stderr)


if __name__ == "__main__":
    main()
