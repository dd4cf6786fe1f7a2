"""The scorecard: what the fault and resume tests showed, printed before pytest's own last line.

A test named `test_rN_...` counts one for line RN; one that injects many faults itself says how many it survived with
`record_property("RN", (survived, injected))` as its last statement, and counts one failure when it does not get there.
"""

from __future__ import annotations

import re
import signal
from collections import defaultdict
from typing import Any

_NAME = re.compile(r"::test_r(\d+)_")
_LINE = re.compile(r"R(\d+)$")


def pytest_configure() -> None:
    """Let programs under test meet the signals of a terminal also when the tests were started by nohup or in the background.

    An ignored signal is inherited as ignored; one with a handler is at its default again in a new program.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print one line per row of the scorecard that was tested."""
    shown: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if report.when != "call":
                continue
            said = {int(found[1]): value for name, value in report.user_properties if (found := _LINE.match(name))}
            if not said and (found := _NAME.search(report.nodeid)):
                said = {int(found[1]): (int(outcome == "passed"), 1)}
            for line, (good, of) in said.items():
                shown[line][0] += good
                shown[line][1] += of
    if shown:
        terminalreporter.section("scorecard")
        for line, (good, of) in sorted(shown.items()):
            terminalreporter.write_line(f"R{line:<3} {good}/{of}")
