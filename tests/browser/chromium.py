"""Real Chromium, headless, for pages opened from disk: their document after scripts have run, a picture, and what they asked for.

In: the path of a page. Out: text of the document, or PNG bytes. Without Chromium tests are skipped with the reason; with
MW_REQUIRE_BROWSER=1 they fail instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# No GPU, nothing kept between runs, and no name of the network resolves, so that the browser itself reaches nobody either.
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--force-color-profile=srgb",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # fmt: skip


def find() -> str:
    """Path of the browser; skips, or fails where it is required."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = f"none of {', '.join(NAMES)} is installed (apt-get install chromium)"
        (pytest.fail if os.environ.get("MW_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)
        raise AssertionError  # neither returns
    return path


def run(page: Path, folder: Path, *flags: str) -> str:
    """Open a page with more flags; returns what the browser printed."""
    command = [find(), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def dom(page: Path, folder: Path, *flags: str) -> str:
    """The document after the page's scripts have run."""
    return run(page, folder, "--dump-dom", *flags)


def screenshot(page: Path, folder: Path, *, dark: bool = False, width: int = 900, height: int = 1200) -> bytes:
    """The page as a PNG."""
    target = folder / "shot.png"
    scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ("--blink-settings=preferredColorScheme=1",)
    run(page, folder, f"--screenshot={target}", f"--window-size={width},{height}", *scheme)
    return target.read_bytes()


def requests(page: Path, folder: Path) -> set[str]:
    """Addresses, other than files, that a page asked for, from the browser's log of its network; not what it asks for itself."""
    log = folder / "net.json"
    run(page, folder, "--dump-dom", f"--log-net-log={log}", "--net-log-capture-mode=Everything")
    text = log.read_text()
    try:
        events = json.loads(text)["events"]
    except ValueError:  # the browser ended before it closed the list
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    jobs = [event["params"] for event in events if "initiator" in event.get("params", {})]
    return {str(job["url"]) for job in jobs if job["initiator"] != "not an origin" and not str(job["url"]).startswith(("file:", "data:"))}
