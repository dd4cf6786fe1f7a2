"""One HTML file with the samples and rows of a dataset and its statistics, to be opened from disk, offline.

In: `View`s and `Account`s. Out: the text of the page. Nothing is requested from anywhere, which the page's own content
security policy enforces; all text of the data is escaped; it reads in light and dark, and by keyboard alone.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape

from megawrap.data.page_assets import CSS, SCRIPT
from megawrap.data.statistics import Statistics
from megawrap.data.statistics_table import Account, Part, facts
from megawrap.data.view import Piece, Segment, View
from megawrap.data.view_text import Style, visible

MAX_TOKENS = 200_000  # about 15 MB: what a browser still scrolls through with ease
_STYLE = Style(newline="↵\n", tab="→\t")
_BAR, _GAP, _HEIGHT, _LEFT, _LABELS = 40, 6, 170, 44, 34  # of the histogram, in pixels


def render(title: str, views: Sequence[View], accounts: Sequence[Account], notes: Sequence[str] = ()) -> str:
    """The page.

    Args:
        title: of the page.
        views: shown in order until `MAX_TOKENS` tokens are on the page; the page says how many are left out.
        accounts: statistics.
        notes: sentences for its head.
    """
    shown, left_out = _that_fit(views)
    body = [
        *_head(title, shown, accounts, notes, left_out),
        *(line for number, account in enumerate(accounts) for line in _account(account, number)),
        *(line for number, view in enumerate(shown) for line in _view(view, number)),
    ]
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {_source(CSS)}; script-src {_source(SCRIPT)}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title><style>{CSS}</style></head>",
            f'<body><main>{"".join(body)}</main><output id="detail" aria-live="polite" aria-label="Token under the cursor">'
            "Point at a token, or move with Tab and the arrow keys.</output>",
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )


def _source(text: str) -> str:
    """The name of an inline text in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(text: str) -> str:
    """Names and titles: escaped, on one line."""
    return escape(visible(text, Style(newline="\\n", tab="\\t")))


def _that_fit(views: Sequence[View]) -> tuple[list[View], int]:
    """Views up to the limit, at least one, and how many are left out."""
    tokens, shown = 0, 0
    for view in views:
        tokens += sum(len(segment.ids) for segment in view.segments)
        if shown and tokens > MAX_TOKENS:
            break
        shown += 1
    return list(views[:shown]), len(views) - shown


def _head(title: str, views: Sequence[View], accounts: Sequence[Account], notes: Sequence[str], left_out: int) -> Iterator[str]:
    yield f"<h1>{_text(title)}</h1>"
    for note in (*notes, *([f"{left_out} more are not on this page, which would become too large for a browser"] * bool(left_out))):
        yield f'<p class="faint">{_text(note)}</p>'
    links = [(f"statistics-{n}", f"Statistics of {account.statistics.name}") for n, account in enumerate(accounts)]
    links += [(f"view-{n}", view.title) for n, view in enumerate(views)]
    items = "".join(f'<li><a href="#{anchor}">{_text(name)}</a></li>' for anchor, name in links)
    yield f'<nav aria-label="On this page"><ul>{items}</ul></nav>'
    if views:
        yield (
            '<div class="controls"><span><span class="key trained">trained</span> <span class="key context">context</span></span>'
            '<label><input type="checkbox" id="show-ids"> token ids</label>'
            '<label><input type="checkbox" id="show-borders"> token borders</label></div>'
        )
    else:
        yield '<div hidden><input type="checkbox" id="show-ids"><input type="checkbox" id="show-borders"></div>'


def _account(account: Account, number: int) -> Iterator[str]:
    """Numbers, histogram and mix of a dataset."""
    yield f'<section id="statistics-{number}" aria-labelledby="statistics-{number}-title">'
    yield f'<h2 id="statistics-{number}-title">Statistics of {_text(account.statistics.name)}</h2><div class="scroll"><table><tbody>'
    for name, value in facts(account):
        yield f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>'
    yield "</tbody></table></div>"
    yield from _histogram(account.statistics)
    yield from _mix(account.mix)
    yield "</section>"


def _histogram(statistics: Statistics) -> Iterator[str]:
    """Documents by length, as a picture and, for who cannot see it, as a table."""
    bars = statistics.histogram()
    most = max(bar["documents"] for bar in bars)
    width = _LEFT + len(bars) * (_BAR + _GAP)
    yield f'<svg viewBox="0 0 {width} {_HEIGHT + _LABELS}" width="{width}" role="img" aria-label="Documents by their number of tokens">'
    for place, bar in enumerate(bars):
        height = max(1 if bar["documents"] else 0, round((_HEIGHT - 20) * bar["documents"] / most))
        x, middle = _LEFT + place * (_BAR + _GAP), _LEFT + place * (_BAR + _GAP) + _BAR / 2
        told = f"{_range(bar)} tokens: {bar['documents']:,} documents"
        yield f'<rect x="{x}" y="{_HEIGHT - height}" width="{_BAR}" height="{height}"><title>{told}</title></rect>'
        yield f'<text x="{middle}" y="{_HEIGHT - height - 4}" text-anchor="middle">{_short(bar["documents"])}</text>'
        yield f'<text class="faint" x="{middle}" y="{_HEIGHT + 14}" text-anchor="middle">{bar["from"]:,}</text>'
    yield f'<text class="faint" x="{_LEFT}" y="{_HEIGHT + 30}">tokens of a document, from</text></svg>'
    rows = "".join(f'<tr><td>{_range(bar)}</td><td class="number">{bar["documents"]:,}</td></tr>' for bar in bars)
    head = '<tr><th scope="col">tokens</th><th scope="col" class="number">documents</th></tr>'
    yield f"<details><summary>The histogram as a table</summary><table><thead>{head}</thead><tbody>{rows}</tbody></table></details>"


def _range(bar: dict[str, int]) -> str:
    return f"{bar['from']:,}-{bar['below'] - 1:,}"


def _short(number: int) -> str:
    """A count that fits above a bar: 5681 -> 5.7k; nothing for 0."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= limit:
            return f"{number / {'G': 10**9, 'M': 10**6, 'k': 10**3}[unit]:.3g}{unit}"
    return f"{number:,}" if number else ""


def _mix(mix: Sequence[Part]) -> Iterator[str]:
    if not mix:
        return
    columns = list(dict.fromkeys(name for part in mix for name in part.numbers))
    head = "".join(f'<th scope="col" class="number">{_text(column)}</th>' for column in columns)
    yield f'<div class="scroll"><table><thead><tr><th scope="col">source</th>{head}</tr></thead><tbody>'
    for part in mix:
        cells = "".join(f'<td class="number">{_text(part.numbers.get(column, ""))}</td>' for column in columns)
        yield f'<tr><th scope="row">{_text(part.name)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _view(view: View, number: int) -> Iterator[str]:
    """A sample or a row."""
    yield f'<section id="view-{number}" aria-labelledby="view-{number}-title"><h2 id="view-{number}-title">{_text(view.title)}</h2>'
    yield f"<p>{_text(view.facts)}</p>"
    for segment in view.segments:
        yield from _segment(segment, view.title)
    yield "</section>"


def _segment(segment: Segment, title: str) -> Iterator[str]:
    name = ", ".join(filter(None, [segment.title, segment.where]))
    yield f'<div class="segment"><h3>{_text(name)}</h3>'
    if not segment.is_padding:
        yield f'<div class="text" tabindex="0" role="group" aria-label="{_text(segment.title or title)}">{"".join(_runs(segment))}</div>'
    yield "</div>"


def _runs(segment: Segment) -> Iterator[str]:
    names = dict(segment.parts) if len(segment.parts) > 1 else {}
    for trained, run in segment.runs():
        if run[0].first in names:
            yield f'<span class="part">{_text(names[run[0].first])}</span>'
        yield f'<span class="{"trained" if trained else "context"}">{"".join(_piece(segment, piece) for piece in run)}</span>'


def _piece(segment: Segment, piece: Piece) -> str:
    """A piece with what the script shows of it: position, ids, weight."""
    ids = " ".join(map(str, segment.ids[piece.first : piece.last].tolist()))
    place = segment.first_position + piece.first
    position = str(place) if piece.first < len(segment.ids) - 1 else "(label only)"
    weight = float(segment.weights[piece.first])
    shown = escape(visible(piece.text, _STYLE)) if piece.text else f"{ids} "
    shown = shown.replace("↵", '<span class="mark">↵</span>')
    return f'<i data-p="{position}" data-i="{ids}" data-w="{weight:.4g}">{shown}</i>'
