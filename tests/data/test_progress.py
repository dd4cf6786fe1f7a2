"""Progress: a line per interval in a log, a bar on a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from megawrap.data import progress
from megawrap.data.progress import Progress


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with Progress(100 << 20) as shown:
        shown.update(25 << 20, 1234)
    with Progress(0) as shown:
        shown.update(1 << 20, 5)
    known, unknown = capsys.readouterr().err.splitlines()
    assert known.startswith("preprocess: 25 of 100 MiB, 1,234 lines, 0 s, ")
    assert "MiB/s" in known
    assert known.endswith(" s left")
    assert unknown.startswith("preprocess: 1 MiB, 5 lines")
    assert "left" not in unknown


def test_nothing_before_the_interval_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100) as shown:
        shown.update(50, 1)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal() -> None:
    """On a pseudo-terminal, with a part of the work done before."""
    code = "from megawrap.data.progress import Progress\nwith Progress(1000, 200) as p: p.update(600, 7); p.update(1000, 9)"
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = subprocess.run([sys.executable, "-c", code], stderr=writer, check=True)
    os.close(writer)
    written = b""
    try:
        while block := os.read(reader, 4096):
            written += block
    except OSError:  # how Linux says that the other end is closed
        os.close(reader)
    assert done.returncode == 0
    text = written.decode()
    assert "preprocess: 100%" in text
    assert "1.00k/1.00k" in text
    assert "B/s" in text
