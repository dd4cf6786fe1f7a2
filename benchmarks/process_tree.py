"""What a command costs: wall and CPU seconds of all its processes, and the peak of their memory together.

In: a command. Out: `Cost`. Memory is sampled; a page that several processes share is counted once (PSS).
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERVAL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run.

    Attributes:
        seconds, cpu_seconds: of the whole command.
        peak_mib: largest sum of PSS seen.
        exit_code: of the command.
        said: what the command reported: its last line of output that is a JSON object.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float
    exit_code: int
    said: dict[str, Any]


def run(command: Sequence[str], *, log_path: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end; output goes to `log_path`, `env` is added to this process's environment."""
    stop = threading.Event()
    peak = 0
    with open(log_path, "wb") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=cwd, env={**os.environ, **(env or {})})

        def watch() -> None:
            nonlocal peak
            while not stop.is_set():
                peak = max(peak, sum(_pss(pid) for pid in tree(process.pid)))
                stop.wait(INTERVAL_SECONDS)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)  # of the command and every child that it waited for
        seconds = time.perf_counter() - begin
        stop.set()
        watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    return Cost(
        seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime, peak_mib=peak / 2**20, exit_code=process.returncode,
        said=_last_object(log_path),
    )  # fmt: skip


def tree(pid: int) -> list[int]:
    """A process and its descendants that are alive."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    except OSError:
        return found  # gone meanwhile
    return found


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # gone meanwhile
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _last_object(log_path: Path) -> dict[str, Any]:
    for line in reversed(log_path.read_text(errors="replace").splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            return found if isinstance(found, dict) else {}
    return {}
