"""The page of `megawrap data inspect --html` in real Chromium: it shows what is trained, asks for nothing, and obeys keys."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from megawrap import data_inspect
from megawrap.data.format import IndexedWriter
from megawrap.data.tokenizer import Tokenizer
from tests.browser import chromium
from tests.tiny_tokenizer import write_tokenizer

OWNED = "document.title='owned'"
HOSTILE = f'</i></div><script>{OWNED}</script><img src="http://127.0.0.1:9/x" onerror="{OWNED}">&lt;b&gt;'
SAMPLES = [("def add(a, b):\n", "    return a + b  # 🙂\n"), (HOSTILE, f"{HOSTILE}\n"), ("x" * 3, "日本語\u202e\x1b[31m\n")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three samples, one of which tries to become part of it, as are the names of its fields."""
    chromium.find()
    folder = tmp_path_factory.mktemp("page")
    write_tokenizer(folder / "tokenizer")
    backend = Backend.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    backend.add_tokens([HOSTILE])  # one token, so that nothing of ours stands between its characters
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer = Tokenizer(folder / "tokenizer")
    with IndexedWriter(folder / "data", np.uint16) as writer:
        for pair in SAMPLES:
            ids, lengths = tokenizer.encode(list(pair), escape_special=True)
            ids, lengths = np.append(ids, tokenizer.eos_id), lengths + np.array([0, 1])
            writer.add(ids, lengths, np.array([2]), np.array([0, 1]))
        fields = [f"<script>{OWNED}</script>", "outputs"]
        writer.commit({"tokenizer": tokenizer.facts(), "options": {"fields": fields}, "sources": [{"path": HOSTILE, "bytes": 7}]})
    assert data_inspect.main([str(folder / "data"), "--html", str(folder / "page.html"), "--sample", "0", "1", "2"]) == 0
    return folder / "page.html"


def spans(document: str, kind: str) -> str:
    """Text of all stretches of a kind, in order, as a reader sees it."""
    found = re.findall(rf'<span class="{kind}">(.*?)</span>(?=<span class="|</div>)', document, re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", "", "".join(found)))


def test_the_page_shows_the_samples_and_what_is_trained(page: Path, tmp_path: Path) -> None:
    document = chromium.dom(page, tmp_path)
    assert 'data-ready="yes"' in document  # its script ran to the end
    trained, context = spans(document, "trained"), spans(document, "context")
    assert trained.replace("↵", "") == "".join(
        pair[1].replace("\u202e", "\\u202e").replace("\x1b", "\\x1b") + "<|endoftext|>" for pair in SAMPLES
    )
    assert context.replace("↵", "") == "".join(pair[0] for pair in SAMPLES)
    assert document.count('<section id="view-') == 3 and 'id="statistics-0"' in document


def test_text_of_the_data_stays_text(page: Path, tmp_path: Path) -> None:
    document = chromium.dom(page, tmp_path)
    assert "<title>data as it is trained on</title>" in document
    assert document.count("<script") == 1 and "<img" not in document


def test_nothing_is_asked_of_anyone(page: Path, tmp_path: Path) -> None:
    """By the text of the page without that of the data, which holds every bad word, and by the browser's own account."""
    own = re.sub(r'<div class="text".*?</div>|&lt;.*?&gt;', "", page.read_text(), flags=re.DOTALL)
    assert not re.search(r"<link|<img|<iframe|@import|url\(|src=|\bfetch\(|XMLHttpRequest|https?:", own)
    assert not chromium.requests(page, tmp_path)


def test_the_request_log_sees_a_page_that_does_ask(tmp_path: Path) -> None:
    """The check above can fail: a page with an image of another host is seen."""
    other = tmp_path / "other.html"
    other.write_text('<!doctype html><img src="http://127.0.0.1:9/picture.png">')
    assert any("127.0.0.1:9" in url for url in chromium.requests(other, tmp_path))


def test_the_policy_stops_a_script_that_would_get_into_the_page(page: Path, tmp_path: Path) -> None:
    """Were escaping broken one day: an inline script and a handler that are not ours do not run."""
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("<main>", f'<main><script>{OWNED}</script><img src="x" onerror="{OWNED}">'))
    assert "<title>data as it is trained on</title>" in chromium.dom(broken, tmp_path)
    broken.write_text(re.sub("<meta http-equiv.*?>", "", broken.read_text()))
    assert "<title>owned</title>" in chromium.dom(broken, tmp_path)  # without the policy they would


DRIVER = """
const key = (name) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true}));
const told = [];
const text = document.querySelector(".text");
text.focus();
for (const name of ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "End", "Home"]) {
  key(name);
  told.push(name + ": " + document.activeElement.textContent + " | " + document.getElementById("detail").textContent);
}
for (const box of ["show-ids", "show-borders"]) document.getElementById(box).click();
const log = document.createElement("pre");
log.id = "log";
log.textContent = told.join("\\n") + "\\nbody: " + document.body.className
  + "\\nreachable: " + Array.from(document.querySelectorAll(".text")).every((one) => one.tabIndex === 0)
  + "\\nlabelled: " + Array.from(document.querySelectorAll("input")).every((one) => one.labels.length > 0);
document.body.append(log);
"""


def with_script(page: Path, script: str, folder: Path) -> Path:
    """A copy of the page that runs a script of a test at its end, which its policy is told to allow."""
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = page.read_text().replace("script-src ", f"script-src 'sha256-{allowed}' ")
    (folder / "driven.html").write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    return folder / "driven.html"


def test_keys_move_from_token_to_token(page: Path, tmp_path: Path) -> None:
    """Arrow keys, Home and End tell position, id and weight of a token; what they do is asked of the page itself."""
    log = re.search(r'<pre id="log">(.*?)</pre>', chromium.dom(with_script(page, DRIVER, tmp_path), tmp_path), re.DOTALL)
    assert log is not None
    lines = unescape(log[1]).splitlines()
    told = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert told["ArrowRight"].split(" | ")[1].startswith("position 1 ")
    assert told["ArrowLeft"].split(" | ")[1].startswith("position 0 ")
    assert "trained, weight 1" in told["ArrowDown"]  # the next stretch
    assert told["End"].startswith("<|endoftext|>") and "position (label only)" in told["End"]
    assert "position 0 " in told["Home"] and "context" in told["Home"]
    assert (told["body"], told["reachable"], told["labelled"]) == ("ids borders", "true", "true")


def test_it_reads_in_light_and_dark(page: Path, tmp_path: Path) -> None:
    """Paper and ink change places, and trained text stands out from context in both, by the browser's own pixels."""
    pixels = {dark: decoded(chromium.screenshot(page, tmp_path, dark=dark)) for dark in (False, True)}
    brightness = {dark: float(np.median(image.mean(axis=2))) for dark, image in pixels.items()}
    assert brightness[False] > 240 and brightness[True] < 40
    for dark, trained in ((False, (0xD3, 0xF5, 0xE4)), (True, (0x0B, 0x3D, 0x2C))):
        assert (np.abs(pixels[dark].astype(int) - trained).max(axis=2) <= 2).sum() > 500
    for name, ink, paper in contrasts(page.read_text()):
        assert contrast(ink, paper) >= 4.5, name


def decoded(png: bytes) -> np.ndarray:
    """Pixels of a PNG, [height, width, 3] of 0..255."""
    matplotlib_image = pytest.importorskip("matplotlib.image")
    return (matplotlib_image.imread(io.BytesIO(png), format="png")[:, :, :3] * 255).round()


def contrasts(text: str) -> list[tuple[str, str, str]]:
    """Every pair of text and background colour of both schemes."""
    found = []
    for scheme in re.findall(r":root \{(.*?)\}", text, re.DOTALL):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", scheme))
        pairs = [("ink", "paper"), ("faint", "paper"), ("faint", "panel"), ("ink", "panel"), ("trained-ink", "trained"),
                 ("context-ink", "paper"), ("focus", "paper")]  # fmt: skip
        found += [(f"{ink} on {paper}", colours[ink], colours[paper]) for ink, paper in pairs]
    assert len(found) == 14
    return found


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours as WCAG 2.1 defines it."""

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_a_narrow_window_needs_no_sideways_scrolling(page: Path, tmp_path: Path) -> None:
    """A phone's width: no element is wider than the window, except those that scroll by themselves."""
    script = "document.body.dataset.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth ? 'yes' : 'no';"
    assert 'data-wide="no"' in chromium.dom(with_script(page, script, tmp_path), tmp_path, "--window-size=500,800")
