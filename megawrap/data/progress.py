"""How far a long read is: a bar with rate and remaining time on a terminal, a line per interval in a log.

In: bytes read and lines counted. Out: text on standard error.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

LOG_SECONDS = 30.0


class Progress:
    """Shows the progress of one command.

    Args:
        total_bytes: of all inputs; 0 when unknown.
        done_bytes: read by an earlier run.
        name: of the command.
    """

    def __init__(self, total_bytes: int, done_bytes: int = 0, *, name: str = "preprocess") -> None:
        self._total, self._first, self._name = total_bytes, done_bytes, name
        self._started = self._last = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            with suppress(ImportError):
                from tqdm import tqdm

                options = {"unit": "B", "unit_scale": True, "desc": name, "file": sys.stderr}
                self._bar = tqdm(total=total_bytes or None, initial=done_bytes, **options)

    def update(self, done_bytes: int, lines: int) -> None:
        """Show how far reading is."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{lines:,} lines", refresh=False)
            self._bar.update(done_bytes - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last < LOG_SECONDS:
            return
        self._last, elapsed = now, now - self._started
        rate = max(done_bytes - self._first, 1) / elapsed
        share = f" of {self._total / 2**20:.0f}" if self._total else ""
        left = f", {max(0.0, self._total - done_bytes) / rate:.0f} s left" if self._total else ""
        print(
            f"{self._name}: {done_bytes / 2**20:.0f}{share} MiB, {lines:,} lines, {elapsed:.0f} s, {rate / 2**20:.1f} MiB/s{left}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
