"""The whole of megawrap on this machine, in minutes: what `make demo` runs. Every step is a command of the README.

In: a folder for everything that is made (--output, default .demo). Out: printed commands with the time each took, the
folder with data, run, curves and exported model, a table of figures, and exit code 0 only if every promise was kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/stdlib-demo.yaml"
USUAL = ".demo"
MARK = "made-by-make-demo"
GROUPS = ("valid_files", "valid_packages")
UNFINISHED = 75
NATS_BELOW_UNIGRAM = 1.0


@dataclass
class Demo:
    """The steps that were run, and the commands they consist of."""

    folder: Path
    times: list[tuple[str, float]] = field(default_factory=list)

    def overrides(self) -> list[str]:
        """Flags that move the recipe's paths into another folder; none for the usual one."""
        if self.folder == Path(USUAL):
            return []
        splits = [f"{name}: 1.0 0:1 '{self.folder / 'data' / name}'" for name in ("train", *GROUPS)]
        return ["--run", str(self.folder / "run"), "--data.tokenizer", str(self.folder / "tokenizer"), "--data.splits", json.dumps(splits)]

    def step(self, title: str, *command: str, expect: int = 0, stop_at: int | None = None, keep: bool = False) -> str:
        """Print and run one command, and note how long it took.

        Args:
            title: what it is for.
            command: the words of the command, as a user types them.
            expect: its exit code.
            stop_at: send SIGTERM when metrics.jsonl reaches this iteration.
            keep: return its output, which is shown at the end.
        """
        print(f"\n## {len(self.times) + 1}. {title}\n$ {shlex.join(command)}", flush=True)
        started = time.monotonic()
        words = [sys.executable, "-m", "megawrap.cli", *command[1:]] if command[0] == "megawrap" else [sys.executable, *command[1:]]
        process = subprocess.Popen(words, stdout=subprocess.PIPE if keep else None, text=True)
        try:
            if stop_at is not None:
                self._stop(process, stop_at)
            output = process.communicate()[0] or ""
        except BaseException:
            process.terminate()  # nothing goes on when the demonstration is stopped
            process.wait()
            raise
        self.times.append((title, time.monotonic() - started))
        print(output, end="")
        print(f"({self.times[-1][1]:.1f} s, exit code {process.returncode})", flush=True)
        if process.returncode != expect:
            raise SystemExit(f"demo: step {len(self.times)} ended with exit code {process.returncode} instead of {expect}")
        return output

    def _stop(self, process: subprocess.Popen[str], iteration: int) -> None:
        metrics = self.folder / "run" / "logs" / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and any(record["iteration"] >= iteration for record in read(metrics)):
                print(f"(SIGTERM at iteration {iteration}, as a cluster does at the end of a job's time)", flush=True)
                process.send_signal(signal.SIGTERM)
                return
            time.sleep(0.2)


def read(metrics: Path) -> list[dict[str, Any]]:
    """Complete records of a metrics.jsonl that may still be growing."""
    return [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def prepare(folder: Path) -> None:
    """An empty folder that is the demo's own; what an earlier demo made there is thrown away."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise SystemExit(f"demo: {folder} holds something that no demo made; give another --output")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).write_text("Everything in this folder is thrown away by the next demo.\n")


def run(folder: Path) -> int:
    """All steps and the table; returns the exit code."""
    demo = Demo(folder)
    data, tokenizer, exported = folder / "data", folder / "tokenizer", folder / "hf"
    checkpoints, metrics = folder / "run" / "checkpoints", folder / "run" / "logs" / "metrics.jsonl"
    recipe = ["--config", RECIPE, *demo.overrides()]
    demo.step("An instruction dataset from this machine's Python", "megawrap", "data", "stdlib", "--output", str(data))
    demo.step("A tokenizer, from the training part only", "megawrap", "data", "tokenizer", "--input", str(data / "train.jsonl"),
              "--vocab-size", "8192", "--output", str(tokenizer))  # fmt: skip
    for name in ("train", *GROUPS):
        demo.step(f"Preprocess {name}", "megawrap", "preprocess", "--input", str(data / f"{name}.jsonl"), "--tokenizer", str(tokenizer),
                  "--output-prefix", str(data / name))  # fmt: skip
    demo.step("Every byte of the training data again", "megawrap", "data", "verify", str(data / "train"))
    page = str(folder / "inspect.html")
    demo.step(
        "The first batch, as it will be trained on", "megawrap", "data", "inspect", "--batch", "0", "--stats", "--html", page, *recipe
    )
    demo.step("What will be trained on", "megawrap", "data", "plan", *recipe)
    valid = [str(data / name) for name in GROUPS]
    counted = demo.step("What counting tokens alone would score", "megawrap", "data", "unigram", "--train", str(data / "train"), "--valid",
                        *valid, keep=True)  # fmt: skip
    unigram = {name: float(line.split()[0]) for name, line in zip(GROUPS, counted.splitlines(), strict=True)}
    finetune = ["megawrap", "finetune", "--nproc", "2", *recipe]
    half = iterations() // 2
    demo.step(f"Fine-tune with TP=2 on two processes, stopped at iteration {half}", *finetune, expect=UNFINISHED, stop_at=half)
    demo.step("The same command resumes", *finetune)
    demo.step("Convert to Hugging Face", "megawrap", "convert", str(checkpoints), str(exported), "--to", "hf")
    verify = ["megawrap", "verify", str(checkpoints), "--against", str(exported), "--tp", "2"]
    proof = demo.step("Prove the conversion: weights, replicas, logits", *verify, keep=True)
    demo.step("Three completions by transformers", "python", "recipes/complete.py", str(exported), str(data / "valid_files.jsonl"))
    return table(demo, read(metrics), unigram, proof)


def iterations() -> int:
    """Iterations of the recipe."""
    sys.path.insert(0, str(ROOT))
    from megawrap.arguments import parse

    return parse(["--config", str(ROOT / RECIPE)])[0].train.iterations


def table(demo: Demo, records: list[dict[str, Any]], unigram: dict[str, float], proof: str) -> int:
    """Print the figures; returns 0 when validation is far enough below the unigram entropy."""
    trained = [record for record in records if record["phase"] == "train"]
    last = {record["group"]: record["loss"] for record in records if record["phase"] == "eval"}
    first = {record["group"]: record["loss"] for record in reversed(records) if record["phase"] == "eval"}
    steps = sum(record["seconds"]["forward_backward"] + record["seconds"]["optimizer"] + record["seconds"]["data"] for record in trained)
    useful, targets = (sum(record[name] for record in trained) for name in ("useful_tokens", "target_tokens"))
    rows = [("iterations", f"{trained[-1]['iteration']}, stopped and resumed once"), ("tokens trained on", f"{targets:,} of {useful:,}"),
            ("useful tokens/s", f"{useful / steps:,.0f}"), ("target tokens/s", f"{targets / steps:,.0f}")]  # fmt: skip
    enough = True
    for name in GROUPS:
        below = unigram[name] - last[name]
        enough = enough and below >= NATS_BELOW_UNIGRAM
        rows.append(
            (f"loss on {name}", f"{first[name]:.3f} -> {last[name]:.3f} nats, {below:.2f} below the unigram entropy {unigram[name]:.3f}")
        )
    rows += [(words[1], words[2]) for line in proof.splitlines() if (words := line.split(maxsplit=2))[:1] == ["ok"]]
    rows += [(f"{title}", f"{seconds:.1f} s") for title, seconds in demo.times]
    rows.append(("all steps", f"{sum(seconds for _, seconds in demo.times):.0f} s"))
    width = max(len(name) for name, _ in rows)
    print("\n## Figures\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    print(f"\ncurves {demo.folder / 'run' / 'plots' / 'curves.png'}, metrics {demo.folder / 'run' / 'logs' / 'metrics.jsonl'}")
    if not enough:
        print(f"demo: a validation loss is less than {NATS_BELOW_UNIGRAM} nat below the unigram entropy", file=sys.stderr)
    return 0 if enough else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; runs in the checkout, where the recipe's paths start."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(USUAL), metavar="DIR", help=f"folder of everything (default: {USUAL})")
    folder = parser.parse_args(argv).output
    folder = Path(USUAL) if folder.resolve() == (ROOT / USUAL).resolve() else folder.absolute()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    prepare(folder)
    return run(folder)


if __name__ == "__main__":
    sys.exit(main())
