"""A request to stop, from a signal: the first is remembered until the next iteration boundary, the second ends at once.

In: SIGTERM, SIGINT, SIGUSR2 or SIGHUP to any rank. Out: `StopRequest.name`, which the loop reduces over all ranks, so that
all of them save the same iteration.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Remembers the first signal; `install` makes it the handler of SIGNALS in the main thread."""

    def __init__(self) -> None:
        self.name = ""

    def install(self) -> StopRequest:
        """Handle SIGNALS from now on."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.name:
            os.write(2, f"megawrap: {signal.Signals(number).name} after {self.name}: ending without saving\n".encode())
            os._exit(128 + number)
        self.name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.name)
