"""A process that saves checkpoints until it is done, or kills itself (SIGKILL) before moment number N of its work.

`python -m tests.faults.saver ROOT MODE lines|effects N` prints `saved I` after each commit and `moments M` at the end. A
moment is a line of megawrap, shutil or this file, or an effect on the filesystem (open for writing, rename, remove, mkdir).
Counting them makes the time of death random for the test and the same in every run. N = 0 lives.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from megawrap.checkpoint.store import TRACKER_FILE, Store

INTERVAL, LAST = 10, 50
FILES = ("__0_0.distcp", "common.pt", ".metadata", "deep/extra.bin")


def content(iteration: int, name: str) -> bytes:
    """What a file of an iteration holds."""
    return hashlib.sha256(f"{iteration} {name}".encode()).digest() * 40


def write(iteration: int, directory: Path) -> None:
    """Write the files of an iteration in several pieces."""
    (directory / "deep").mkdir()
    for name in FILES:
        data = content(iteration, name)
        with open(directory / name, "wb", buffering=0) as file:
            for start in range(0, len(data), 256):
                file.write(data[start : start + 256])


def run(root: Path, mode: str) -> None:
    """Go on from the newest checkpoint to LAST, saving at every interval."""
    store = Store(root, keep=1 if mode == "pruning" else 2, on_corrupt="fallback" if mode == "replacing" else "refuse")
    latest = store.latest()
    start = int(latest.iteration) if latest else 0
    with store.writing():
        for iteration in range(start + INTERVAL, LAST + 1, INTERVAL):
            store.save(iteration, lambda directory, iteration=iteration: write(iteration, directory))
            if mode == "again":  # a run that lost its tracker and comes by once more
                (root / TRACKER_FILE).unlink()
                store.save(iteration, lambda directory, iteration=iteration: write(iteration, directory))
            if mode == "replacing" and iteration > INTERVAL:  # damage is found when the iteration is saved once more
                os.truncate(root / f"iter_{iteration:07d}" / FILES[0], 5)
                store.save(iteration, lambda directory, iteration=iteration: write(iteration, directory))
            print("saved", iteration, flush=True)


EFFECTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


class Killer:
    """Counts moments and kills the process before the chosen one."""

    def __init__(self, at: int) -> None:
        self.at, self.count, self.counting = at, 0, True
        self.here = (os.sep + "megawrap" + os.sep, os.sep + "shutil.py", os.sep + "saver.py")

    def moment(self) -> None:
        """One more moment; the last one for the chosen number."""
        self.count += self.counting
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def line(self, frame: FrameType, event: str, argument: Any) -> Any:
        """For sys.settrace."""
        if not any(part in frame.f_code.co_filename for part in self.here):
            return None
        if event == "line":
            self.moment()
        return self.line

    def effect(self, event: str, arguments: tuple[Any, ...]) -> None:
        """For sys.addaudithook."""
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in EFFECTS or writing:
            self.moment()


if __name__ == "__main__":
    killer = Killer(int(sys.argv[4]))
    if sys.argv[3] == "lines":
        sys.settrace(killer.line)
    else:
        sys.addaudithook(killer.effect)
    run(Path(sys.argv[1]), sys.argv[2])
    killer.counting = False
    sys.settrace(None)
    print("moments", killer.count, flush=True)
