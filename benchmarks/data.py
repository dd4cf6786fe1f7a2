"""Preprocessing, packing and loading beside the tokenizer alone, megatron-core, Megatron-LM and the BigCode fork.

    python benchmarks/data.py                                      ours, the limits and megatron-core, about 10 minutes
    python benchmarks/data.py --megatron-lm DIR --bigcode DIR      also the scripts of these checkouts, 10 minutes more
    python benchmarks/data.py --quick                              a smoke test on a megabyte, no bars

Every program runs in a process of its own; wall, CPU and peak memory (PSS of the process tree) are of the whole program,
or of the part that it times itself where the table says so. Programs take turns, round after round, and a ratio is the
median over the rounds with its interval; a bar inside the interval is unresolved. Absolute bars hold for 2 cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):  # started as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import corpus, process_tree
from benchmarks.ratios import ratio

ROOT = Path(__file__).resolve().parent.parent
SEQ_LENGTH, ROW_LENGTH = 2048, 8192
VOCAB_SIZE, TRAINING_BYTES = 32_768, 16_000_000
GPT2, STARCODER = "byte-level BPE", "StarCoder-style BPE"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A program: how it is started in a folder of its own, and whether it times itself."""

    label: str
    command: Callable[[Path], list[list[str]]]
    """Commands that run one after the other; the costs add up, the peak is the largest."""
    timed_inside: bool = False
    env: dict[str, str] | None = None
    cwd: Path | None = None
    rounds: int | None = None
    """Fewer than --rounds for what takes long."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a quantity of `ours`, or its ratio to that of `theirs`, has to be."""

    ours: str
    quantity: str
    at: float | None
    theirs: str | None = None
    at_most: bool = False
    whole_corpus: bool = False
    """An absolute bar that holds for 160 MB only."""


def bars() -> list[Bar]:
    """All bars; those of programs that were not run are left out of the table."""
    ours, star = f"megawrap, {GPT2}", f"megawrap, {STARCODER}"
    return [
        Bar(ours=ours, quantity="seconds", at=2.0, at_most=True, whole_corpus=True),
        Bar(ours=ours, quantity="cpu_seconds", at=2.5, at_most=True, whole_corpus=True),
        Bar(ours=ours, quantity="peak_mib", at=300, at_most=True, whole_corpus=True),
        Bar(ours=ours, theirs=f"gigatoken alone, {GPT2}", quantity="tokens_per_s", at=0.5),
        Bar(ours=ours, theirs="Megatron-LM preprocess_data.py", quantity="seconds", at=1 / 15, at_most=True),
        Bar(ours=ours, theirs="Megatron-LM preprocess_data.py, gigatoken", quantity="seconds", at=None),
        Bar(ours=ours, theirs="Megatron-LM preprocess_data_fast.py", quantity="seconds", at=1 / 3.5, at_most=True),
        Bar(ours=ours, theirs="BigCode preprocess_data.py, two passes", quantity="seconds", at=None),
        Bar(ours=ours, theirs=f"tokenizers alone, {GPT2}", quantity="seconds", at=None),
        Bar(ours=star, theirs=f"tiktoken alone, {STARCODER}", quantity="seconds", at=1.15, at_most=True),
        Bar(ours=f"{star}, tiktoken", theirs=f"tiktoken alone, {STARCODER}", quantity="seconds", at=1.15, at_most=True),
        Bar(ours=star, theirs=f"tokenizers alone, {STARCODER}", quantity="seconds", at=1 / 2.5, at_most=True),
        Bar(ours="packing 5 M samples at 2048", quantity="cpu_seconds", at=1.5, at_most=True),
        Bar(ours="packing 5 M samples at 2048", quantity="fill", at=0.999),
        Bar(ours="packing the corpus at 2048", quantity="fill", at=0.995, whole_corpus=True),
        Bar(ours="packing the corpus at 2048", quantity="lost", at=0, at_most=True),
        Bar(ours="writing, megawrap", theirs="writing, megatron-core", quantity="seconds", at=None),
        Bar(ours="a row of 8192, megawrap", quantity="row_ms", at=0.2, at_most=True),
        Bar(ours="a row of 8192, megawrap", theirs="a row of 8192, megatron-core", quantity="row_ms", at=None),
        Bar(ours="a row of 8192, megawrap", theirs="a row of 8192, megatron-core without its mask", quantity="row_ms", at=None),
        Bar(ours="megawrap, ten times the input", theirs=ours, quantity="peak_mib", at=1.1, at_most=True),
    ]


class Bench:
    """The programs, their runs and what they showed."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.corpus = options.corpus or folder / "corpus.jsonl"
        self.tokenizers = {GPT2: folder / "byte-level", STARCODER: folder / "starcoder"}
        self.runs: dict[str, list[dict[str, float]]] = {}
        self.failed: dict[str, str] = {}

    def prepare(self) -> None:
        """The corpus, a tokenizer of each kind trained on its beginning, and the dataset that packing and loading read."""
        if self.options.corpus is None:
            facts = corpus.write(self.corpus, int(self.options.target_mb * 1e6))
            print(f"corpus: {facts}", flush=True)
        for kind, directory in self.tokenizers.items():
            _train(self.corpus, directory, split_digits=kind == STARCODER, vocab_size=512 if self.options.quick else VOCAB_SIZE)
        if self._wants("packing", "loading", "writing"):
            for command in self._preprocess(GPT2)(self.folder):
                cost = process_tree.run(command, log_path=self.folder / "prepare.log", cwd=ROOT)
                if cost.exit_code:
                    raise SystemExit((self.folder / "prepare.log").read_text())

    def _wants(self, *sections: str) -> bool:
        return not self.options.only or bool(set(sections) & set(self.options.only))

    def measure(self) -> None:
        """Run everything, in turns."""
        wanted = self.options.programs or [""]
        contenders = [one for one in self._contenders() if any(text in one.label for text in wanted)]
        for number in range(self.options.rounds):
            for contender in contenders if number % 2 == 0 else contenders[::-1]:
                if contender.label not in self.failed and number < (contender.rounds or self.options.rounds):
                    self._run(contender)

    def _run(self, contender: Contender) -> None:
        work = Path(tempfile.mkdtemp(dir=self.folder))
        costs = []
        for command in contender.command(work):
            cost = process_tree.run(command, log_path=work / "log", env=contender.env, cwd=contender.cwd or ROOT)
            if cost.exit_code:
                lines = (work / "log").read_text(errors="replace").strip().splitlines()
                self.failed[contender.label] = f"exit code {cost.exit_code}: {lines[-1][:200] if lines else ''}"
                print(f"  {contender.label}: {self.failed[contender.label]}", flush=True)
                return
            costs.append(cost)
        said = costs[-1].said if contender.timed_inside else {}
        run = {
            "seconds": sum(cost.seconds for cost in costs), "cpu_seconds": sum(cost.cpu_seconds for cost in costs),
            "peak_mib": max(cost.peak_mib for cost in costs), "load": os.getloadavg()[0],
            **{name: value for name, value in said.items() if isinstance(value, int | float)},
        }  # fmt: skip
        if "tokens" not in run:
            run["tokens"] = _tokens_written(work)
        run["tokens_per_s"] = run["tokens"] / run["seconds"]
        if "rows" in run:
            run["row_ms"] = run["seconds"] / run["rows"] * 1000
        self.runs.setdefault(contender.label, []).append(run)
        print(
            f"  {contender.label}: {run['seconds']:.2f} s, {run['cpu_seconds']:.2f} CPU s, {run['peak_mib']:.0f} MiB,"
            f" {run['tokens_per_s'] / 1e6:.2f} M tokens/s, load {run['load']:.1f}",
            flush=True,
        )
        shutil.rmtree(work)

    # ---- the programs -----------------------------------------------------------------------------------------------

    def _contenders(self) -> list[Contender]:
        found: list[Contender] = []
        if self._wants("preprocess"):
            for kind in self.tokenizers:
                found.append(Contender(label=f"megawrap, {kind}", command=self._preprocess(kind)))
                libraries = ["gigatoken", "tokenizers"] if kind == GPT2 else ["tiktoken", "tokenizers"]
                found += [self._alone(library, kind) for library in libraries]
            label = f"megawrap, {STARCODER}, tiktoken"
            found.append(Contender(label=label, command=self._preprocess(STARCODER, "--tokenizer-backend", "tiktoken")))
            found += self._peers()
        if self._wants("growth") and (self.options.only or self.options.growth):
            found.append(Contender(label="megawrap, ten times the input", command=self._ten_times, rounds=1))
        if self._wants("packing"):
            samples = 50_000 if self.options.quick else 5_000_000
            found.append(self._inside("packing 5 M samples at 2048", "packing", {"samples": samples, "seq_length": SEQ_LENGTH}))
            found.append(self._inside("packing the corpus at 2048", "pack_dataset", {"seq_length": SEQ_LENGTH}))
        if self._wants("writing"):
            found += [
                self._inside(f"writing, {name}", f"write_{key}", {}) for name, key in (("megawrap", "ours"), ("megatron-core", "megatron"))
            ]
        if self._wants("loading"):
            rows, few = (20, 2) if self.options.quick else (5000, 20)
            found.append(self._inside("a row of 8192, megawrap", "load_ours", {"seq_length": ROW_LENGTH, "rows": rows}))
            for label, mask in (("megatron-core", True), ("megatron-core without its mask", False)):
                spec = {"seq_length": ROW_LENGTH, "rows": few if mask else rows, "mask": mask, "eod": 0, "vocab_size": VOCAB_SIZE}
                found.append(self._inside(f"a row of 8192, {label}", "load_megatron", spec))
        return found

    def _preprocess(self, kind: str, *flags: str) -> Callable[[Path], list[list[str]]]:
        return lambda work: [
            [
                sys.executable, "-m", "megawrap.preprocess", "--input", str(self.corpus), "--tokenizer", str(self.tokenizers[kind]),
                "--output-prefix", str(work / "data"), *flags,
            ]
        ]  # fmt: skip

    def _ten_times(self, work: Path) -> list[list[str]]:
        large = work / "large.jsonl"
        with open(large, "wb") as out:
            for _ in range(10):
                with open(self.corpus, "rb") as part:
                    shutil.copyfileobj(part, out, 1 << 22)
        (command,) = self._preprocess(GPT2)(work)
        return [[str(large) if word == str(self.corpus) else word for word in command]]

    def _inside(self, label: str, name: str, spec: dict[str, Any]) -> Contender:
        def command(work: Path) -> list[list[str]]:
            whole = {"prefix": str(self.folder / "data"), "out": str(work / "out"), **spec}
            return [[sys.executable, "-m", "benchmarks.data_contenders", name, json.dumps(whole)]]

        return Contender(label=label, command=command, timed_inside=True)

    def _alone(self, library: str, kind: str) -> Contender:
        spec = {"library": library, "tokenizer": str(self.tokenizers[kind]), "corpus": str(self.corpus), "threads": _num_cores()}
        return self._inside(f"{library} alone, {kind}", "tokenizer_alone", spec)

    def _peers(self) -> list[Contender]:
        """Scripts of checkouts given by flag; each writes both fields, as ours does."""
        directory = str(self.tokenizers[GPT2])
        found = []
        if self.options.megatron_lm is not None:
            source = self.options.megatron_lm.resolve()
            env = {"PYTHONPATH": str(source), "TOKENIZERS_PARALLELISM": "false"}

            def script(name: str, *flags: str) -> Callable[[Path], list[list[str]]]:
                return lambda work: [
                    [
                        self.options.peer_python, str(source / "tools" / name), "--input", str(self.corpus),
                        "--json-keys", "inputs", "outputs",
                        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", directory, "--append-eod",
                        "--output-prefix", str(work / "data"), *flags,
                    ]
                ]  # fmt: skip

            workers = ("--workers", str(_num_cores()), "--log-interval", "100000")
            for name, flags in (
                ("preprocess_data.py", workers),
                ("preprocess_data.py", (*workers, "--use-gigatoken")),
                ("preprocess_data_fast.py", ("--use-gigatoken",)),
            ):
                with_gigatoken = ", gigatoken" if "--use-gigatoken" in flags and "fast" not in name else ""
                found.append(Contender(label=f"Megatron-LM {name}{with_gigatoken}", command=script(name, *flags), env=env, cwd=source))
        if self.options.bigcode is not None:
            fork = self.options.bigcode.resolve()

            def passes(work: Path) -> list[list[str]]:
                return [
                    [
                        self.options.peer_python, str(fork / "tools" / "preprocess_data.py"), "--input", str(self.corpus),
                        "--json-keys", key,
                        "--tokenizer-type", "TokenizerFromFile", "--tokenizer-file", f"{directory}/tokenizer.json", "--append-eod",
                        "--output-prefix", str(work / "data"), "--workers", str(_num_cores()), "--chunk-size", "25",
                        "--log-interval", "100000",
                    ]
                    for key in ("inputs", "outputs")
                ]  # fmt: skip

            found.append(Contender(label="BigCode preprocess_data.py, two passes", command=passes, env={"PYTHONPATH": str(fork)}, cwd=fork))
        return found

    # ---- what it says -----------------------------------------------------------------------------------------------

    def judged(self) -> list[dict[str, Any]]:
        """Every bar whose programs were run, with the figure and the verdict."""
        results = []
        for bar in bars():
            ours, theirs = self.runs.get(bar.ours), self.runs.get(bar.theirs or bar.ours)
            if not ours or not theirs or bar.quantity not in ours[0]:
                continue
            at = None if self.options.quick or (bar.whole_corpus and self.options.target_mb < 150) else bar.at
            pairs = min(len(ours), len(theirs))
            values = [run[bar.quantity] for run in ours[:pairs]]
            others = [run[bar.quantity] for run in theirs[:pairs]] if bar.theirs else [1.0] * pairs
            found = ratio(values, others)
            verdict = "pass" if at is not None and found.high == at else found.verdict(at, at_most=bar.at_most)
            results.append({**asdict(bar), **asdict(found), "at": at, "verdict": verdict})
        return results

    def medians(self) -> dict[str, dict[str, float]]:
        """Of every quantity of every program."""
        return {label: {name: median(run[name] for run in runs) for name in runs[0]} for label, runs in self.runs.items()}


def _train(source: Path, directory: Path, *, split_digits: bool, vocab_size: int) -> None:
    """A byte-level BPE with StarCoder's special tokens, trained on the beginning of the corpus, in `directory`."""
    from data_tools.train_tokenizer import save, train

    directory.mkdir(exist_ok=True)

    def texts() -> Any:
        with open(source, "rb") as file:
            for line in file.readlines(TRAINING_BYTES):
                sample = json.loads(line)
                yield sample["inputs"]
                yield sample["outputs"]

    tokenizer = train(texts(), vocab_size)
    if not split_digits:  # the vocabulary is StarCoder's, the way of splitting GPT-2's
        tokenizer.pre_tokenizer = tokenizer.pre_tokenizer[1]
    save(tokenizer, directory)


def _tokens_written(work: Path) -> int:
    """The sum of all lengths in the .idx files that a program left: counted, not believed."""
    import numpy as np

    total = 0
    for index in work.rglob("*.idx"):
        (count,) = np.fromfile(index, dtype=np.int64, count=1, offset=18).tolist()  # behind magic, version and dtype
        total += int(np.fromfile(index, dtype=np.int32, count=count, offset=34).sum(dtype=np.int64))
    return total


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def table(summary: dict[str, Any]) -> str:
    """A summary for the terminal."""
    lines = [f"\n  {'median of each':54}{'wall s':>9}{'CPU s':>9}{'peak MiB':>10}{'M tokens/s':>12}"]
    for label, row in summary["contenders"].items():
        speed = f"{row['tokens_per_s'] / 1e6:12.2f}"
        lines.append(f"  {label:54}{row['seconds']:9.2f}{row['cpu_seconds']:9.2f}{row['peak_mib']:10.0f}{speed}")
    lines += [f"  {label:54}{reason}" for label, reason in summary["failed"].items()]
    lines.append(f"\n  {'bar':90}{'median':>9}  {'interval':20}{'allowed':>9}  verdict")
    for row in summary["bars"]:
        name = f"{row['ours']}" + (f" / {row['theirs']}" if row["theirs"] else "") + f", {row['quantity']}"
        allowed = "" if row["at"] is None else ("<=" if row["at_most"] else ">=") + f"{row['at']:.3g}"
        interval = f"{row['low']:.3g} .. {row['high']:.3g}"
        lines.append(f"  {name:90}{row['median']:9.3g}  {interval:20}{allowed:>9}  {row['verdict']}")
    return "\n".join(lines)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and load, for the reader of the figures."""
    versions = {}
    for name in ("numpy", "orjson", "tokenizers", "gigatoken", "tiktoken", "megatron-core", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cores": _num_cores(), "machine": platform.machine(), "python": platform.python_version(), "versions": versions,
        "load": os.getloadavg()[0], "rounds": options.rounds, "target_mb": options.target_mb, "quick": options.quick,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a corpus made before (default: one is made)")
    parser.add_argument("--target-mb", type=float, default=160, help="size of the corpus (default 160, which the bars are for)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each program runs (default 5)")
    parser.add_argument("--only", nargs="+", choices=("preprocess", "packing", "writing", "loading", "growth"), help="some parts")
    parser.add_argument("--programs", nargs="+", metavar="TEXT", help="only those with one of these texts in their name")
    parser.add_argument("--growth", action="store_true", help="also preprocess ten times the corpus, for its peak memory")
    parser.add_argument("--megatron-lm", type=Path, metavar="DIR", help="a checkout of NVIDIA/Megatron-LM")
    parser.add_argument("--bigcode", type=Path, metavar="DIR", help="a checkout of bigcode-project/Megatron-LM")
    parser.add_argument("--peer-python", default=sys.executable, metavar="FILE", help="the interpreter that has what these scripts import")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--json", type=Path, default=Path("data_benchmark.json"), help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    options = parser.parse_args(argv)
    if options.quick:
        options.target_mb, options.rounds = min(options.target_mb, 1.0), min(options.rounds, 2)
    begin = time.monotonic()
    before = environment(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        bench = Bench(options, Path(name))
        bench.prepare()
        bench.measure()
        summary = {"environment": before, "contenders": bench.medians(), "runs": bench.runs, "failed": bench.failed, "bars": bench.judged()}
    options.json.write_text(json.dumps(summary, indent=1) + "\n")
    print(table(summary))
    print(f"\n  {time.monotonic() - begin:.0f} s on {before['cores']} cores, load {before['load']:.1f} before; figures in {options.json}")
    return summary


if __name__ == "__main__":
    main()
