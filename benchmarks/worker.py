"""A contender in a process of its own, run for a few steps at a time.

The driver (`Worker`) starts the process, or several ranks of one contender, and asks for windows of k steps by a JSON line;
the process (`Port`) does them, answers with time, work done and peak memory, and sleeps until the next. So memory is each
contender's own, and windows of two contenders can alternate closely without paying their start again.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent


class Port:
    """The contender's end. Call `ready()` once, then `did(...)` after each step; it returns when the next may start."""

    def __init__(self, commands: IO[str], answers: IO[str]) -> None:
        self._commands, self._answers = commands, answers
        self._left = 0
        self._work: dict[str, float] = {}
        self._started = (0.0, 0.0)

    def ready(self, **facts: Any) -> None:
        """Say that everything is built, and wait for the first window."""
        self._answer({"ready": True, **facts})
        self._begin()

    def did(self, **work: float) -> None:
        """Add the work of a step; at the end of a window answer and wait."""
        for name, value in work.items():
            self._work[name] = self._work.get(name, 0) + value
        self._left -= 1
        if self._left == 0:
            _synchronize()
            wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
            self._answer({"seconds": wall, "cpu_seconds": cpu, "peak_mib": _peak_mib(), **self._work})
            self._begin()

    def _begin(self) -> None:
        command = json.loads(self._commands.readline() or "{}")
        if "steps" not in command:
            self._leave()
        self._left, self._work = command["steps"], {}
        self._started = (time.perf_counter(), time.process_time())

    def _leave(self) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # a contender in the middle of its own training loop has nothing left to finish

    def _answer(self, values: dict[str, Any]) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_mib() -> float:
    """Peak memory of the process: allocated on the GPU where it uses one, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Worker:
    """The driver's end: one contender, as one process or as several ranks.

    Args:
        spec: what `main` of this file hands to the contender; "contender" names it.
        ranks: processes; each gets `threads` threads.
        threads: OpenMP threads of a process.
        log_path: where everything goes that the contender prints.
    """

    def __init__(self, spec: dict[str, Any], *, ranks: int, threads: int, log_path: Path) -> None:
        self.name = spec["contender"]
        self._log_path = log_path
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._processes = []
        with open(log_path, "w", encoding="utf-8") as log:
            for rank in range(ranks):
                environment = {
                    **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
                command = [sys.executable, "-m", "benchmarks.worker", json.dumps(spec)]
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT
                )  # fmt: skip
                self._processes.append(process)
        self.facts = self._answers()[0]

    def window(self, steps: int) -> dict[str, float]:
        """Run `steps` steps; work of rank 0, the slowest rank's time, CPU seconds and memory of all ranks together."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"steps": steps}) + "\n")
            process.stdin.flush()
        answers = self._answers()
        total = {name: sum(answer[name] for answer in answers) for name in ("cpu_seconds", "peak_mib")}
        return {**answers[0], **total, "seconds": max(answer["seconds"] for answer in answers)}

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
            if process.stdout is not None:
                process.stdout.close()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                tail = "".join(self._log_path.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
                self.close()
                raise RuntimeError(f"{self.name} ended while it was measured; the end of {self._log_path}:\n{tail}")
            answers.append(json.loads(line))
        return answers


def main() -> None:
    """Entry point of the process: build the contender named by the JSON argument and serve its windows."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print goes to the log, not into the answers
    port = Port(sys.stdin, answers)
    if spec["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(1234)
    from benchmarks import contenders

    contenders.get(spec["contender"])(spec, port)


if __name__ == "__main__":
    main()
