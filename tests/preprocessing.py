"""Random samples, one run of the command, and what it left: for the tests of preprocessing."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from megawrap import preprocess
from tests.tiny_tokenizer import END, PAD

OUTPUTS = {"out.bin", "out.idx", "out.manifest.json"}


def random_text(rng: random.Random) -> str:
    pieces = ["def f(x):\n", "    return x\n", " ", "\t", "é", "日本", "😀", "0", '"', "\\", "quick brown", END, PAD, "\r\n", "\x00"]
    return "".join(rng.choices(pieces, k=rng.randint(0, 12)))


def write_samples(path: Path, samples: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"inputs": a, "outputs": b, "id": i}) + "\n" for i, (a, b) in enumerate(samples)))
    return path


def run(source: Path | str, tokenizer: Path, out: Path, *flags: str) -> int:
    return preprocess.main(["--input", str(source), "--tokenizer", str(tokenizer), "--output-prefix", str(out), *flags])


def left(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()} if out.parent.exists() else set()


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.parent.iterdir() if not path.name.startswith(".")}
