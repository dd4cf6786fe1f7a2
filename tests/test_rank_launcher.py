"""The launcher of ranks, with real processes of tiny modules: exit codes, signals, the first failing rank, no orphans."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megawrap import ranks
from megawrap.errors import LaunchError

ROOT = Path(__file__).resolve().parents[1]

# Each program of this file runs this first: it answers `up R` on a pipe of its own, so that a test never sleeps.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
rank, world, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])
def up(text="up"):
    with open(folder / "fifo", "w") as fifo:
        fifo.write(f"{text} {rank} {os.getpid()}\\n")
def forever():
    while True:
        signal.pause()
"""


@pytest.fixture
def launch(tmp_path: Path):
    """Starts `megawrap.ranks.start` in a process of its own on the given program, and ends it if it is still there."""
    started: list[subprocess.Popen[str]] = []
    os.mkfifo(tmp_path / "fifo")

    def launch(world: int, program: str, **environment: str) -> subprocess.Popen[str]:
        (tmp_path / "tiny.py").write_text(PROGRAM + program)
        code = f"import sys; from megawrap import ranks; sys.exit(ranks.start('tiny', [{str(tmp_path)!r}], {world}))"
        given = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **environment}
        process = subprocess.Popen([sys.executable, "-c", code], env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def wait_up(folder: Path, count: int) -> dict[int, int]:
    """Process ids by rank, once `count` ranks said that they are up."""
    found: dict[int, int] = {}
    with open(os.open(folder / "fifo", os.O_RDWR)) as fifo:  # also a writer, so that it never ends and nothing is lost in between
        while len(found) < count:
            _, rank, pid = fifo.readline().split()
            found[int(rank)] = int(pid)
    return found


def gone(pid: int) -> bool:
    """Whether a process ended; a zombie that nobody collects counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_environment_of_each_rank(launch, tmp_path: Path) -> None:
    program = "(folder / f'{rank}.json').write_text(json.dumps({**os.environ, 'group': os.getpgrp() - os.getpid()}))\nprint('rank', rank)"
    process = launch(3, program, OMP_NUM_THREADS="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "rank 0\n", "only rank 0 speaks"
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [one["RANK"] for one in seen] == [one["LOCAL_RANK"] for one in seen] == ["0", "1", "2"]
    assert {one["WORLD_SIZE"] for one in seen} == {one["LOCAL_WORLD_SIZE"] for one in seen} == {"3"}
    assert {one["MASTER_ADDR"] for one in seen} == {"127.0.0.1"}
    assert len({one["MASTER_PORT"] for one in seen}) == 1
    assert {one["OMP_NUM_THREADS"] for one in seen} == {"1"}
    assert {one["group"] for one in seen} == {0}, "a Ctrl-C of the terminal reaches a rank through the launcher alone, so once"


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert ranks.environment(0, 1, 1)["OMP_NUM_THREADS"] == str(cores)
    assert ranks.environment(0, 1000, 1)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("codes", "expected"), [("0 0 0", 0), ("75 75 75", 75), ("0 75 0", 75)])
def test_exit_code_when_nothing_failed(launch, codes: str, expected: int) -> None:
    process = launch(3, f"sys.exit(int({codes!r}.split()[rank]))")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (expected, "")


@pytest.mark.fault
def test_first_failing_rank_is_named_with_its_tail(launch, tmp_path: Path) -> None:
    """Rank 1 raises; rank 2 would wait for ever and is ended; rank 0 fails because rank 1 went away, and may even exit before it."""
    program = """
if rank == 1:
    held = open(folder / "one", "w")
    print("about to fail", flush=True)
    raise RuntimeError("rank one's own trouble")
if rank == 0:
    (folder / "one").read_bytes()  # until rank 1 is gone
    raise ConnectionError("Connection closed by peer")
forever()
"""
    os.mkfifo(tmp_path / "one")
    process = launch(3, program)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "[rank 1] RuntimeError: rank one's own trouble" in err
    assert "[rank 1] about to fail" in err
    assert "rank 1 of 3 failed first: it ended with exit code 1; rank 2 did not end by itself and was ended" in err
    assert "ConnectionError: Connection closed by peer" in err, "rank 0 is passed through"


@pytest.mark.fault
def test_killed_rank_ends_the_others(launch, tmp_path: Path) -> None:
    process = launch(3, "up()\nforever()")
    pids = wait_up(tmp_path, 3)
    os.kill(pids[2], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 2 of 3 failed first: it was killed by SIGKILL; ranks 0, 1 did not end by themselves and were ended" in err
    assert all(map(gone, pids.values()))


@pytest.mark.fault
def test_no_orphan_when_the_launcher_is_killed(launch, tmp_path: Path) -> None:
    process = launch(2, "up()\nforever()")
    pids = wait_up(tmp_path, 2)
    watched = [os.pidfd_open(pid) for pid in pids.values()]
    process.kill()
    process.communicate(timeout=60)  # returns when the last holder of its pipes is gone: rank 0 holds stdout
    for descriptor in watched:
        assert select.select([descriptor], [], [], 60)[0], "a rank outlived its launcher"
        os.close(descriptor)


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP])
def test_signals_reach_every_rank_once(launch, tmp_path: Path, number: signal.Signals) -> None:
    program = f"""
got = []
signal.signal({int(number)}, lambda number, frame: got.append(number))
signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])
up()
signal.sigwait([{int(number)}])
(folder / f"got-{{rank}}").write_text(str(len(signal.sigpending()) + 1))
sys.exit(75)
"""
    process = launch(2, program)
    wait_up(tmp_path, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert [(tmp_path / f"got-{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_a_mistake_every_rank_finds_is_told_once(launch) -> None:
    process = launch(3, "print('megawrap: error: told by all', file=sys.stderr)\nsys.exit(2)")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "megawrap: error: told by all\n")


def test_free_port_is_free_and_below_the_ephemeral_range() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = {ranks.free_port() for _ in range(20)}
    assert len(found) > 1 and max(found) < low
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", found.pop()))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--config a.yaml", (None, ["--config", "a.yaml"])),
        ("--nproc 2 --config a.yaml", (2, ["--config", "a.yaml"])),
        ("--config a.yaml --nproc=3", (3, ["--config", "a.yaml"])),
    ],
)
def test_nproc_is_taken_out(argv: str, expected: tuple[int | None, list[str]]) -> None:
    assert ranks.take_nproc(argv.split()) == expected


@pytest.mark.parametrize("given", ["0", "-1", "two", "", "1e3", "5000"])
def test_wrong_nproc_is_refused(given: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(f"--nproc is {given!r}; it must be a whole number from 1 to 1024")):
        ranks.take_nproc(["--nproc", given])


def test_wrong_recipe_is_told_before_any_rank_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megawrap.cli", "finetune", "--nproc", "2", "--config", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "none.yaml cannot be read" in done.stderr
