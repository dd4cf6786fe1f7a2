"""Start N ranks of a module on this machine: what `megawrap finetune --nproc N ...` does.

In: a module name, its arguments and N. Out: one exit code. Each rank is a process with RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT set; rank 0 speaks, the others are kept quiet until they fail. The rank that fails first is
named with the tail of what it wrote, the rest are ended, and no rank outlives this process. torchrun is not used here
because it answers a signal by killing its workers, reports every rank's death alike and takes seconds to start.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from megawrap.errors import EXIT_CORRUPT, EXIT_OK, EXIT_UNFINISHED, EXIT_USAGE, LaunchError

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
TAIL_LINES = 40
SETTLE_SECONDS = 5.0  # after the first failure, how long the other ranks may take to end by themselves
STOP_SECONDS = 120.0  # after the first rank saved and stopped, how long the others may take
# What gloo and NCCL say on a rank whose peer went away: a consequence, even where that rank's exit is seen first.
_LOST_PEER = re.compile(
    rb"connection (closed|reset|refused)|broken pipe|pair closure|remote process exited|ncclRemoteError|timed out waiting", re.IGNORECASE
)
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PR_SET_PDEATHSIG = 1


def finetune(argv: Sequence[str] | None = None) -> int:
    """`megawrap finetune [--nproc N] ...`: without --nproc in this process, with it in N ranks of this machine."""
    from megawrap.cli import run_command

    return run_command(_finetune, list(sys.argv[1:] if argv is None else argv))


def _finetune(argv: list[str]) -> int:
    nproc, rest = take_nproc(argv)
    if nproc is None or "RANK" in os.environ:
        return importlib.import_module("megawrap.finetune").main(rest)
    from megawrap import arguments

    _, options = arguments.parse(rest)  # a mistake is told once, before any rank exists
    if options.print_config or options.dry_run:
        os.environ["WORLD_SIZE"] = str(nproc)  # the layout is that of N ranks, told by one
        return importlib.import_module("megawrap.finetune").main(rest)
    return start("megawrap.finetune", rest, nproc)


def take_nproc(argv: Sequence[str]) -> tuple[int | None, list[str]]:
    """The value of --nproc, none when it is not given, and the other arguments.

    Raises:
        LaunchError: --nproc is not a whole number from 1 to 1024.
    """
    rest, nproc, position = list(argv), None, 0
    while position < len(rest):
        flag, has_value, value = rest[position].partition("=")
        if flag != "--nproc":
            position += 1
            continue
        if not has_value:
            value = rest[position + 1] if position + 1 < len(rest) else ""
        if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 1024:
            raise LaunchError(
                f"--nproc is {value!r}; it must be a whole number from 1 to 1024", hint="It is tp x pp x the data-parallel size"
            )
        nproc = int(value)
        del rest[position : position + (1 if has_value else 2)]
    return nproc, rest


def free_port() -> int:
    """A TCP port of this machine that nothing uses, below the range the kernel hands out by itself."""
    try:
        low = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        low = 32768
    draw = random.SystemRandom()
    for _ in range(200):
        port = draw.randrange(min(15000, low - 1000), low)
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
    raise LaunchError(f"no free port found below {low} on this machine", hint="End what listens on them, or set MASTER_PORT")


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment of one rank of `world` on this machine; cores are shared out unless OMP_NUM_THREADS is set."""
    given = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given.setdefault("OMP_NUM_THREADS", str(max(1, cores // world)))
    given.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), PYTHONUNBUFFERED="1",
    )  # fmt: skip
    return given


def start(module: str, argv: Sequence[str], nproc: int) -> int:
    """Run `python -m module argv...` as `nproc` ranks and wait for all of them.

    Returns:
        0 when every rank finished, 75 when all saved and stopped before the end, else the exit code of the rank that
        failed first (128 + signal number when a signal killed it).
    """
    return _Ranks([sys.executable, "-m", module, *argv], nproc).run()


class _Ranks:
    """The processes of one start and what they said."""

    def __init__(self, command: list[str], world: int) -> None:
        self.command, self.world = command, world
        self.processes: list[subprocess.Popen[bytes]] = []
        self.tails: list[deque[bytes]] = [deque(maxlen=TAIL_LINES) for _ in range(world)]
        self.ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.codes: dict[int, int] = {}  # in the order in which ranks ended
        self.forwarded: set[int] = set()

    def run(self) -> int:
        previous = {number: signal.getsignal(number) for number in FORWARDED}
        threads: list[threading.Thread] = []
        try:
            for number, handler in previous.items():
                if not (number == signal.SIGHUP and handler is signal.SIG_IGN):  # nohup keeps its meaning
                    signal.signal(number, self._forward)
            port = int(os.environ.get("MASTER_PORT") or free_port())
            for rank in range(self.world):  # before any thread exists: the child runs Python between fork and exec
                self.processes.append(self._spawn(rank, port))
            threads = [self._thread(self._watch, rank) for rank in range(self.world)]
            self._wait()
        finally:
            self._end(signal.SIGKILL)
            for thread in threads:
                thread.join()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._verdict()

    def _spawn(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            env=environment(rank, self.world, port),
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.PIPE,
            stderr=subprocess.PIPE if rank == 0 else subprocess.STDOUT,
            process_group=0,  # a Ctrl-C of the terminal reaches the ranks once, through _forward
            preexec_fn=_die_with_parent(),
        )

    def _thread(self, target: Callable[[int], None], rank: int) -> threading.Thread:
        thread = threading.Thread(target=target, args=(rank,), name=f"rank-{rank}", daemon=True)
        thread.start()
        return thread

    def _watch(self, rank: int) -> None:
        """Keep the tail of a rank's output, pass rank 0's on, and report its end."""
        process = self.processes[rank]
        stream: IO[bytes] | None = process.stderr if rank == 0 else process.stdout
        reader = threading.Thread(target=self._read, args=(rank, stream), daemon=True)
        reader.start()
        code = process.wait()
        reader.join(timeout=2)  # a grandchild may hold the pipe open
        self.ended.put((rank, code))

    def _read(self, rank: int, stream: Any) -> None:
        for line in iter(stream.readline, b""):
            self.tails[rank].append(line)
            if rank == 0:
                with contextlib.suppress(OSError):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()

    def _wait(self) -> None:
        """Until every rank ended, or one failed or stopped and the others had their time."""
        deadline: float | None = None
        while len(self.codes) < self.world:
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                rank, code = self.ended.get(timeout=left)
            except queue.Empty:
                return
            self.codes[rank] = code
            if code not in (EXIT_OK, EXIT_UNFINISHED):
                deadline = min(deadline or float("inf"), time.monotonic() + SETTLE_SECONDS)
            elif code == EXIT_UNFINISHED and deadline is None:
                deadline = time.monotonic() + STOP_SECONDS

    def _forward(self, number: int, _frame: Any) -> None:
        self.forwarded.add(number)
        self._end(number)

    def _end(self, number: int) -> None:
        for process in self.processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def _verdict(self) -> int:
        late = [rank for rank in range(self.world) if rank not in self.codes]
        failed = [(rank, code) for rank, code in self.codes.items() if code not in (EXIT_OK, EXIT_UNFINISHED)]
        if not failed and late:
            stopped = next(rank for rank, code in self.codes.items() if code == EXIT_UNFINISHED)
            self._say(f"rank {stopped} stopped, but {_ranks(late)} did not within {STOP_SECONDS:.0f} s, and the run was ended")
            return 128 + signal.SIGKILL
        if not failed:
            return EXIT_UNFINISHED if EXIT_UNFINISHED in self.codes.values() else EXIT_OK
        own = [(rank, code) for rank, code in failed if not _LOST_PEER.search(b"".join(self.tails[rank]))]
        rank, code = (own or failed)[0]
        same_for_all = not late and code in (EXIT_USAGE, EXIT_CORRUPT) and set(self.codes.values()) == {code}
        if not same_for_all:  # a mistake that every rank found was already told by rank 0
            if rank != 0 and self.tails[rank]:
                self._say(f"the last lines of rank {rank}:")
                for line in self.tails[rank]:
                    self._say(line.decode(errors="replace").rstrip("\n"), prefix=f"[rank {rank}] ")
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            if -code in self.forwarded:
                how += ", which came from outside before the ranks were ready to save"
            others = (
                f"; {_ranks(late)} did not end by {'itself and was' if len(late) == 1 else 'themselves and were'} ended" if late else ""
            )
            self._say(f"rank {rank} of {self.world} failed first: it {how}{others}")
        return 128 - code if code < 0 else code

    def _say(self, text: str, prefix: str = "megawrap: ") -> None:
        print(f"{prefix}{text}", file=sys.stderr, flush=True)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _die_with_parent() -> Callable[[], None] | None:
    """What a rank does between fork and exec so that it dies when this process does, even by kill -9 (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(128 + signal.SIGKILL)

    return ask
