"""Training speed and memory beside Hugging Face Trainer, packed transformers, TRL and the machine's own limit.

    python benchmarks/train.py                        CPU: the table of README and its bars, about 25 minutes
    python benchmarks/train.py --quick                a smoke test of everything, a minute, no bars
    python benchmarks/train.py --device cuda          1.3 B in bf16 at 2048 and 8192, with MFU

Every figure of a ratio comes from one run: windows of ours and of a peer alternate, each in a process of its own that
sleeps while the other runs, and each ratio is the median over at least 5 such pairs with its interval. A bar inside the
interval is reported as unresolved. On a machine that others use too, the ratio per CPU second (of all threads, least
disturbed with --threads 1) says more than the one by the clock. Peers need `pip install accelerate trl datasets`; one that
is missing is named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):  # started as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import ours, peers
from benchmarks.models import architecture
from benchmarks.ratios import Ratio, ratio
from benchmarks.worker import Worker
from megawrap import device
from megawrap.training.flops import training_flops

PUBLISHED_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 without sparsity, the denominator of published MFU


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A program that trains, and how it is started."""

    key: str
    label: str
    ranks: int = 1
    needs: tuple[str, ...] = ()
    spec: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What the ratio ours / theirs of a quantity has to be."""

    ours: str
    theirs: str
    quantity: str = "tokens_per_s"
    at: float | None = None
    at_most: bool = False


CONTENDERS = {
    contender.label: contender
    for contender in (
        Contender(key="megawrap", label="megawrap bf16", spec={"dtype": "bf16"}),
        Contender(key="megawrap", label="megawrap fp32", spec={"dtype": "fp32"}),
        Contender(key="megawrap", label="megawrap bf16 tp2", ranks=2, spec={"dtype": "bf16", "tp": 2}),
        Contender(key="hf-padded", label="HF Trainer fp32, padded (its defaults)", needs=("accelerate",), spec={"dtype": "fp32"}),
        Contender(key="hf-padded", label="HF Trainer bf16, padded", needs=("accelerate",), spec={"dtype": "bf16"}),
        Contender(
            key="hf-grouped", label="HF Trainer bf16 group_by_length, batch 8", needs=("accelerate",),
            spec={"dtype": "bf16", "rows": 8, "group_by_length": True},
        ),
        Contender(key="hf-packed", label="HF packed bf16", spec={"dtype": "bf16"}),
        Contender(key="hf-packed", label="HF packed fp32", spec={"dtype": "fp32"}),
        Contender(key="trl-packing", label="TRL packing bf16", needs=("accelerate", "trl", "datasets"), spec={"dtype": "bf16"}),
        Contender(key="gemm", label="GEMM bf16", spec={"dtype": "bf16"}),
        Contender(key="gemm", label="GEMM fp32", spec={"dtype": "fp32"}),
    )
}  # fmt: skip


def cpu_bars(vocab_size: int) -> list[Bar]:
    """The bars of the CPU benchmark at a vocabulary; the peers that have none are measured for the reader."""
    defaults, grouped = (4.5, 1.5) if vocab_size > 20_000 else (3.5, 1.1)
    return [
        Bar(ours="megawrap bf16", theirs="GEMM bf16", quantity="flops_per_s", at=0.42),
        Bar(ours="megawrap bf16", theirs="HF Trainer fp32, padded (its defaults)", at=defaults),
        Bar(ours="megawrap bf16", theirs="HF Trainer bf16 group_by_length, batch 8", at=grouped),
        Bar(ours="megawrap bf16", theirs="HF packed bf16", at=1.9),
        Bar(ours="megawrap bf16", theirs="HF packed bf16", quantity="peak_mib", at=0.9, at_most=True),
        Bar(ours="megawrap bf16", theirs="HF Trainer bf16, padded"),
        Bar(ours="megawrap bf16", theirs="TRL packing bf16"),
        Bar(ours="megawrap bf16 tp2", theirs="megawrap bf16", at=0.9),
        Bar(ours="megawrap fp32", theirs="GEMM fp32", quantity="flops_per_s", at=0.75),
        Bar(ours="megawrap fp32", theirs="HF packed fp32"),
    ]


def cuda_bars(seq_length: int) -> list[Bar]:
    """The bars of the GPU benchmark; MFU is judged against the published peak of the GPU."""
    return [
        Bar(ours="megawrap bf16", theirs="published peak", quantity="flops_per_s", at=0.46 if seq_length <= 2048 else 0.44),
        Bar(ours="megawrap bf16", theirs="GEMM bf16", quantity="flops_per_s"),
        Bar(ours="megawrap bf16", theirs="TRL packing bf16", at=1.15),
        Bar(ours="megawrap bf16", theirs="TRL packing bf16", quantity="peak_mib", at=1.0, at_most=True),
        Bar(ours="megawrap bf16", theirs="HF Trainer bf16, padded", at=2.5),
    ]


class Bench:
    """One model at one row length: its workers, its windows and what they showed.

    Args:
        options: of the command line.
        model: size, vocab_size and positions.
        rows: packed rows of a step (padded peers: samples of a batch).
        folder: for datasets, run directories and logs.
    """

    def __init__(self, options: argparse.Namespace, model: dict[str, Any], rows: int, folder: Path) -> None:
        self.options, self.model, self.rows, self.folder = options, model, rows, folder
        self.shape = architecture(model)
        self.windows: dict[str, list[dict[str, float]]] = {}
        self.missing: dict[str, str] = {}
        self.results: list[dict[str, Any]] = []
        self._workers: dict[str, Worker] = {}
        self._steps: dict[str, int] = {}
        spec = {"model": model, "seq_length": model["positions"]}
        ours.write_dataset(peers.samples(spec), folder / "samples", model["vocab_size"])

    def run(self, bars: list[Bar]) -> None:
        """Measure every pair that a bar names; bars of one pair share its windows."""
        measured: dict[tuple[str, str], list[tuple[dict[str, float], dict[str, float]]]] = {}
        for bar in bars:
            pair = (bar.ours, bar.theirs)
            if pair not in measured:
                self._keep(set(pair))
                measured[pair] = self._alternate(*pair) if all(self._start(label) for label in pair) else []
            if measured[pair]:
                self._judge(bar, measured[pair])
        self._keep(set())

    def _alternate(self, first: str, second: str) -> list[tuple[dict[str, float], dict[str, float]]]:
        """A B A B ...; which of the two goes first changes from pair to pair, so that a trend favours neither."""
        pairs = []
        for number in range(self.options.pairs):
            order = (first, second) if number % 2 == 0 else (second, first)
            window = {label: self._window(label) for label in order}
            pairs.append((window[first], window[second]))
        return pairs

    def _start(self, label: str) -> bool:
        """Have a worker warm; False, with the reason noted, when it cannot be had."""
        if label == "published peak":
            if math.isnan(_published_peak()):
                self.missing[label] = f"not known for {device.detect().name}"
            return label not in self.missing
        if label in self._workers:
            return True
        contender = CONTENDERS[label]
        absent = [name for name in contender.needs if importlib.util.find_spec(name) is None]
        if absent:
            self.missing[label] = f"not installed: {', '.join(absent)}"
            return False
        name = label.replace(" ", "-")
        spec = {
            "contender": contender.key, "model": self.model, "seq_length": self.model["positions"], "rows": self.rows,
            "device": self.options.device, "data_prefix": str(self.folder / "samples"), "run_dir": str(self.folder / name),
            **contender.spec,
        }  # fmt: skip
        threads = max(1, self.options.threads // contender.ranks)
        worker = Worker(spec, ranks=contender.ranks, threads=threads, log_path=self.folder / f"{name}.log")
        self._workers[label] = worker
        worker.window(1)
        warm = worker.window(2)
        self._steps[label] = max(1, math.ceil(self.options.window / (warm["seconds"] / 2)))
        return True

    def _keep(self, labels: set[str]) -> None:
        """End the workers that the next pair does not use, so that at most two hold memory."""
        for label in set(self._workers) - labels:
            self._workers.pop(label).close()

    def _window(self, label: str) -> dict[str, float]:
        if label == "published peak":
            return {"seconds": 1.0, "cpu_seconds": 1.0, "flops": _published_peak(), "peak_mib": 0.0}
        work = self._workers[label].window(self._steps[label])
        if "flops" not in work:
            work["flops"] = float(training_flops(
                self.shape, num_tokens=int(work["tokens"]), squared_lengths=int(work["squared"]), num_targets=int(work["targets"]),
            ))  # fmt: skip
        work["load"] = os.getloadavg()[0]
        self.windows.setdefault(label, []).append(work)
        print(
            f"  {label}: {_rate(work, 'tokens'):.0f} tokens/s, {_rate(work, 'flops') / 1e9:.1f} GFLOP/s, load {work['load']:.1f}",
            flush=True,
        )
        return work

    def _judge(self, bar: Bar, pairs: list[tuple[dict[str, float], dict[str, float]]]) -> None:
        def values(side: int, clock: str = "seconds") -> list[float]:
            if bar.quantity == "peak_mib":
                return [max(pair[side]["peak_mib"] for pair in pairs)] * len(pairs)
            return [pair[side][bar.quantity.removesuffix("_per_s")] / pair[side][clock] for pair in pairs]

        found: Ratio = ratio(values(0), values(1))
        result = {**asdict(bar), **asdict(found), "verdict": found.verdict(bar.at, at_most=bar.at_most)}
        if bar.quantity != "peak_mib" and bar.theirs != "published peak":
            result["by_cpu_seconds"] = asdict(ratio(values(0, "cpu_seconds"), values(1, "cpu_seconds")))
        self.results.append(result)

    def summary(self) -> dict[str, Any]:
        """Medians over all windows of each contender, the ratios, and every window."""
        contenders = {
            label: {
                "tokens_per_s": median(_rate(work, "tokens") for work in works),
                "targets_per_s": median(_rate(work, "targets") for work in works),
                "flops_per_s": median(_rate(work, "flops") for work in works),
                "peak_mib": max(work["peak_mib"] for work in works),
                "windows": works,
            }
            for label, works in self.windows.items()
        }
        return {"model": self.model, "rows": self.rows, "contenders": contenders, "ratios": self.results, "missing": self.missing}


def _rate(work: dict[str, float], name: str) -> float:
    return work.get(name, 0.0) / work["seconds"]


def _published_peak() -> float:
    name = device.detect().name
    return next((peak for key, peak in PUBLISHED_PEAK.items() if key in name), math.nan)


def table(summary: dict[str, Any]) -> str:
    """A summary for the terminal."""
    model = summary["model"]
    lines = [
        f"\n{model['size']} GPTBigCode, vocabulary {model['vocab_size']}, {summary['rows']} rows of {model['positions']} positions",
        f"  {'':42}{'tokens/s':>10}{'targets/s':>11}{'GFLOP/s':>10}{'peak MiB':>10}",
    ]
    for label, row in summary["contenders"].items():
        speed = f"{row['tokens_per_s']:10.0f}{row['targets_per_s']:11.0f}" if row["tokens_per_s"] else f"{'':21}"
        lines.append(f"  {label:42}{speed}{row['flops_per_s'] / 1e9:10.1f}{row['peak_mib']:10.0f}")
    lines += [f"  {label:42}{reason}" for label, reason in summary["missing"].items()]
    lines.append(f"  {'ratio':64}{'median':>8}  {'interval':14}{'bar':>8}  {'verdict':12}per CPU second")
    for row in summary["ratios"]:
        quantity = {"tokens_per_s": "", "flops_per_s": ", required FLOP/s", "peak_mib": ", peak memory"}[row["quantity"]]
        bar = "" if row["at"] is None else ("<=" if row["at_most"] else ">=") + f"{row['at']:.2f}"
        name = f"{row['ours']} / {row['theirs']}{quantity}"
        interval = f"{row['low']:.2f} .. {row['high']:.2f}"
        by_cpu = f"{row['by_cpu_seconds']['median']:.2f}" if "by_cpu_seconds" in row else ""
        lines.append(f"  {name:64}{row['median']:8.2f}  {interval:14}{bar:>8}  {row['verdict']:12}{by_cpu}")
    return "\n".join(lines)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and load, for the reader of the figures."""
    hardware = device.detect()
    names = ("torch", "megatron-core", "transformers", "accelerate", "trl", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names if _is_installed(name)}
    return {
        "hardware": hardware.name, "count": hardware.count, "threads": options.threads, "python": platform.python_version(),
        "versions": versions, "load": os.getloadavg()[0], "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "pairs": options.pairs, "window_s": options.window,
    }  # fmt: skip


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cases(options: argparse.Namespace) -> list[tuple[dict[str, Any], int, list[Bar]]]:
    """(model, rows, bars) of this command line."""
    if options.device == "cuda":
        lengths = [2048, 8192]
        return [({"size": "1.3b", "vocab_size": 49152, "positions": n}, max(1, 16384 // n), cuda_bars(n)) for n in lengths]
    size, positions = ("tiny", 128) if options.quick else ("small", 1024)
    return [
        ({"size": size, "vocab_size": vocabulary, "positions": positions}, 2, cpu_bars(vocabulary))
        for vocabulary in ([512] if options.quick else options.vocab_size)
    ]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short windows: does everything still run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender, shared by its ranks (%(default)s)")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs of each ratio, at least 5 (%(default)s)")
    parser.add_argument("--window", type=float, default=5.0, metavar="S", help="seconds of a window (%(default)s)")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[49152, 8192], help="CPU: vocabularies (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="only ratios whose names contain one of these")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/train.json"), help="where the figures go (%(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.window = 5, 0.05
    if options.pairs < 5:
        parser.error(f"--pairs is {options.pairs}; a ratio needs at least 5")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device.detect().kind != "cuda":
        parser.error("--device is cuda, but there is no GPU here; leave it out to measure on the CPU")
    report: dict[str, Any] = {"environment": environment(options), "cases": []}
    print(json.dumps(report["environment"]))
    with tempfile.TemporaryDirectory(prefix="megawrap-benchmark-") as folder:
        for number, (model, rows, bars) in enumerate(cases(options)):
            case_dir = Path(folder) / str(number)
            case_dir.mkdir()
            bench = Bench(options, model, rows, case_dir)
            if options.quick:
                bars = [replace(bar, at=None) for bar in bars]
            bench.run([bar for bar in bars if not options.only or any(text in f"{bar.ours} / {bar.theirs}" for text in options.only)])
            report["cases"].append(bench.summary())
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1))
    print("\n".join(table(case) for case in report["cases"]))
    print(f"\nload at the end {os.getloadavg()[0]:.1f}; all windows in {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
