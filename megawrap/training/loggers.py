"""metrics.jsonl, the source of truth of what a run measured, and the console lines made from the same records.

In: one `Record` per log interval and per evaluated group. Out: one flushed JSON line each. A resumed run continues the
file and never holds an iteration twice: lines past the resumed iteration are taken out atomically, and how many is said.
Plots and every other form of the curves derive from this file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson

from megawrap.errors import DataError
from megawrap.io import atomic_write, explain_write_errors

PHASES = ("data", "forward_backward", "optimizer", "eval", "checkpoint")  # keys of Record.seconds, in the order of a step


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of metrics.jsonl. Fields that are None are left out of the line; a number that is not finite is null there.

    Rates are over all ranks and over the wall time of the interval spent in data, forward_backward and optimizer.
    """

    iteration: int
    """Finished iterations."""
    phase: Literal["train", "eval"]
    """What was measured."""
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""
    group: str | None = None
    """eval: name of the valid group."""
    loss: float | None = None
    """nats per supervised token: sum over count of the global batch of this iteration, or of the whole group."""
    grad_norm: float | None = None
    """Global L2 norm of the gradient before clipping."""
    lr: float | None = None
    """Learning rate of this iteration."""
    skipped: int | None = None
    """Steps skipped for a loss or gradient that was not finite, since the last line."""
    loss_scale: float | None = None
    """fp16 only."""
    tokens: int | None = None
    """Positions of the interval, padding included."""
    useful_tokens: int | None = None
    """Positions that are not padding."""
    target_tokens: int | None = None
    """Positions whose label is trained (eval: scored)."""
    tokens_per_s: float | None = None
    """Positions per second."""
    useful_tokens_per_s: float | None = None
    """Positions that are not padding, per second."""
    target_tokens_per_s: float | None = None
    """Trained labels per second."""
    flops_per_s: float | None = None
    """Required FLOP per second (training/flops.py)."""
    peak_share: float | None = None
    """flops_per_s over the measured matrix-product peak of all ranks."""
    memory_mib: float | None = None
    """Largest peak memory of a rank so far, MiB."""
    seconds: Mapping[str, float] | None = None
    """Wall seconds of the interval by phase, keys of PHASES."""
    fim: Mapping[str, int] | None = None
    """Samples of the interval that fill-in-the-middle transformed, kept, and kept because they outgrew their place."""
    metrics: Mapping[str, float] | None = None
    """What the objective adds."""

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, in the order above."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values if value is not None}


class MetricsWriter:
    """Appends records to a metrics.jsonl; of several ranks only one may have it open.

    Args:
        path: the file; its directory must exist.
        resumed_iteration: iteration the run continues from; None for a run that starts anew, which keeps no old line.

    Attributes:
        removed: lines of an earlier attempt that were taken out of the file.
        notice: a sentence about them for the console; empty when there were none.

    Raises:
        MegawrapError: the file cannot be written.
    """

    def __init__(self, path: Path, *, resumed_iteration: int | None = None) -> None:
        self.path = Path(path)
        self.removed = 0
        self.notice = ""
        self._last: set[tuple[int, str, str | None]] = set()
        if self.path.exists():
            self._continue(resumed_iteration)
        with explain_write_errors(self.path):
            self._file: BinaryIO = open(self.path, "ab")  # noqa: SIM115 - closed by close()

    def write(self, record: Record) -> bool:
        """Append a line and flush it. False, and nothing is written, when the file already has this iteration, phase and group."""
        key = (record.iteration, record.phase, record.group)
        if key in self._last:
            return False
        self._last = {kept for kept in self._last if kept[0] == record.iteration} | {key}
        with explain_write_errors(self.path):
            self._file.write(orjson.dumps(record.to_dict(), option=orjson.OPT_APPEND_NEWLINE))
            self._file.flush()
        return True

    def close(self) -> None:
        """Close the file; further writes fail."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _continue(self, resumed_iteration: int | None) -> None:
        """Take out lines past the resumed iteration and lines that cannot be read; remember what stands at it."""
        limit = -1 if resumed_iteration is None else resumed_iteration
        past = unreadable = 0
        for _, values in _lines(self.path):
            if values is None:
                unreadable += 1
            elif values["iteration"] > limit:
                past += 1
            elif values["iteration"] == limit:
                self._last.add((limit, values["phase"], values.get("group")))
        self.removed = past + unreadable
        if not self.removed:
            return
        atomic_write(
            self.path, lambda out: out.writelines(line for line, values in _lines(self.path) if values and values["iteration"] <= limit)
        )
        where = "of an earlier run" if resumed_iteration is None else f"past iteration {resumed_iteration}, where the run resumes"
        parts = [f"{past} line(s) {where}"] * bool(past) + [f"{unreadable} incomplete line(s)"] * bool(unreadable)
        self.notice = f"{self.path.name}: took out {' and '.join(parts)}"


def read_records(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl; a last line that is still being written is left out.

    Raises:
        DataError: the file is missing, or a line in the middle is not a record (file:line).
    """
    if not Path(path).is_file():
        raise DataError(f"{path} is not a file", hint="Give a metrics.jsonl that a run wrote under RUN/logs/.")
    records = []
    for number, (line, values) in enumerate(_lines(path), start=1):
        if values is not None:
            records.append(values)
        elif line.endswith(b"\n"):
            raise DataError(f"{path}:{number} is not a line of metrics: {line[:60]!r}", corrupt=True)
    return records


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """(line, its values or None when it is no complete record)."""
    with open(path, "rb") as file:
        for line in file:
            try:
                values = orjson.loads(line)
            except orjson.JSONDecodeError:
                values = None
            complete = line.endswith(b"\n") and isinstance(values, dict) and isinstance(values.get("iteration"), int) and "phase" in values
            yield line, values if complete else None


def console_line(record: Record, iterations: int | None = None) -> str:
    """A record for a reader, in one line.

    Args:
        record: what was measured.
        iterations: iterations of the whole run, to show how far it is.
    """
    width = len(str(iterations or 0))
    parts = [f"iteration {record.iteration:>{width}}" + (f"/{iterations}" if iterations else "")]
    if record.phase == "eval":
        parts.append(f"eval {record.group}")
    for name, value, form in (("loss", record.loss, ".4f"), ("grad norm", record.grad_norm, ".3f"), ("lr", record.lr, ".2e")):
        if value is not None:
            parts.append(f"{name} {value:{form}}")
    if record.metrics:
        parts += [f"{name} {value:.4g}" for name, value in record.metrics.items()]
    if record.skipped:
        parts.append(f"skipped {record.skipped}")
    if record.useful_tokens_per_s is not None:
        targets = f" ({_short(record.target_tokens_per_s)} targets)" if record.target_tokens_per_s is not None else ""
        parts.append(f"{_short(record.useful_tokens_per_s)} tokens/s{targets}")
    if record.flops_per_s is not None:
        share = f" {record.peak_share:.0%} of peak" if record.peak_share is not None else ""
        parts.append(f"{_short(record.flops_per_s)}FLOP/s{share}")
    if record.memory_mib is not None:
        parts.append(f"{record.memory_mib / 1024:.2f} GiB")
    if record.seconds:
        parts.append(
            " ".join(f"{phase.split('_')[0]} {record.seconds[phase]:.2f}s" for phase in PHASES if record.seconds.get(phase, 0) >= 0.005)
        )
    return " | ".join(part for part in parts if part)


def _short(value: float) -> str:
    """Three digits and a prefix of the SI: 12345 -> "12.3 k"."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}" if prefix else f"{value:.3g} "
        value /= 1000
    return f"{value:.4g} P"
