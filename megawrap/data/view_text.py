"""Samples and rows for a terminal: trained tokens in one colour, context in another, and readable without any.

In: a `View`. Out: text. Every line has a gutter with the position its run begins at, and the word `trained` or `context`
with a bar of its own, so that colour adds nothing but ease. Control characters of the data never reach the terminal.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from megawrap.data.view import Segment, View

_TRAINED, _CONTEXT, _FAINT, _BOLD, _OFF = "\x1b[1;32m", "\x1b[36m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class Style:
    """How text is marked.

    Attributes:
        colour: write ANSI colours.
        newline, tab: what stands for them.
        context_bar, trained_bar, rule: of the gutter and of borders.
    """

    colour: bool = False
    newline: str = "↵"
    tab: str = "→   "
    context_bar: str = "│"
    trained_bar: str = "┃"
    rule: str = "─"

    def paint(self, text: str, code: str) -> str:
        """Text in a colour, where colours are on."""
        return f"{code}{text}{_OFF}" if self.colour and text else text


def style_for(stream: TextIO, colour: str) -> Style:
    """The style a stream can show.

    Args:
        stream: where the text goes.
        colour: always, never, or auto: on a terminal, unless NO_COLOR is set or the terminal is a dumb one.
    """
    is_terminal = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    style = Style(colour=colour == "always" or (colour == "auto" and is_terminal))
    try:
        "↵→│┃─".encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return Style(colour=style.colour, newline="\\n", tab="\\t  ", context_bar="|", trained_bar="#", rule="-")
    return style


def visible(text: str, style: Style) -> str:
    """Text that cannot move a cursor, hide or reorder anything: control and format characters as escapes."""
    return "".join(_visible(character, style) for character in text)


def _visible(character: str, style: Style) -> str:
    if character == "\n":
        return style.newline
    if character == "\t":
        return style.tab
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape", "backslashreplace").decode() if character != "\ufffd" else character


def render(view: View, style: Style, *, ids: bool = False) -> str:
    """A view as lines of text.

    Args:
        view: what to show.
        style: see `style_for`.
        ids: a line for every token, with position, id and weight, instead of running text.
    """
    lines = [style.paint(visible(view.title, style), _BOLD), view.facts]
    for segment in view.segments:
        if segment.title:
            lines.append(_border(segment, style))
        if not segment.is_padding:
            has_text = any(piece.text for piece in segment.pieces)
            lines += _token_lines(segment, style) if ids else _run_lines(segment, style) if has_text else _id_lines(segment, style)
    return "\n".join(lines)


def _border(segment: Segment, style: Style) -> str:
    text = f"{style.rule * 2} {visible(segment.title, style)}, {segment.where} "
    return style.paint(text + style.rule * max(2, 100 - len(text)), _FAINT)


def _gutter(segment: Segment, first: int, trained: bool, style: Style, name: str = "") -> str:
    word = f"{'trained' if trained else 'context'} {style.trained_bar if trained else style.context_bar} "
    return (
        style.paint(f"{segment.first_position + first:>7} ", _FAINT)
        + (f"{name} " if name else "")
        + style.paint(word, _TRAINED if trained else _CONTEXT)
    )


def _names(segment: Segment, style: Style) -> dict[int, str]:
    """Name of the field that begins at a token, all of one width; empty where a sample has one field, and in rows."""
    if len(segment.parts) < 2:
        return {}
    names = {first: visible(name, style) for first, name in segment.parts}
    width = max(map(len, names.values()))
    return {first: name.ljust(width) for first, name in names.items()}


def _run_lines(segment: Segment, style: Style) -> Iterator[str]:
    """Running text, a new line where a run begins and where the text has one."""
    names, name = _names(segment, style), ""
    for trained, run in segment.runs():
        name = names.get(run[0].first, name)
        text = "".join(piece.text for piece in run)
        code, first = _TRAINED if trained else _CONTEXT, True
        for line in _lines(text):
            head = _gutter(segment, run[0].first, trained, style, name)
            plain = _gutter(segment, run[0].first, trained, Style(), name)
            bar = style.trained_bar if trained else style.context_bar
            head = head if first else " " * (len(plain) - 2) + style.paint(f"{bar} ", code)
            yield head + style.paint(visible(line, style), code)
            first = False


def _lines(text: str) -> list[str]:
    """Lines with their newline, at least one; other characters that end a line somewhere stay inside."""
    lines = text.split("\n")
    return [f"{line}\n" for line in lines[:-1]] + lines[-1:] * (len(lines) == 1 or bool(lines[-1]))


def _id_lines(segment: Segment, style: Style) -> Iterator[str]:
    """Running ids, where no tokenizer is known."""
    names, name = _names(segment, style), ""
    for trained, run in segment.runs():
        name = names.get(run[0].first, name)
        numbers = " ".join(map(str, segment.ids[run[0].first : run[-1].last].tolist()))
        yield _gutter(segment, run[0].first, trained, style, name) + style.paint(numbers, _TRAINED if trained else _CONTEXT)


def _token_lines(segment: Segment, style: Style) -> Iterator[str]:
    """A line for every token; a quote sign repeats the text above, a character of several tokens."""
    names, name = _names(segment, style), ""
    yield style.paint(f"{'position':>8}  {'id':>7}  {'weight':>8}  text", _FAINT)
    for piece in segment.pieces:
        if piece.first in names:
            name = names[piece.first].strip()
            yield style.paint(f"{style.rule * 2} {name}", _FAINT)
        for token in range(piece.first, piece.last):
            weight = float(segment.weights[token])
            shown = f"'{visible(piece.text, style)}'" if token == piece.first else '"'
            mark = f"{weight:>8.4g}" if weight else f"{'context':>8}"
            code = _TRAINED if weight else _CONTEXT
            place = str(segment.first_position + token) if token < len(segment.ids) - 1 else "label"  # the last one is no input
            text = style.paint(f"{mark}  {shown if piece.text else ''}".rstrip(), code)
            yield f"{place:>8}  {segment.ids[token]:>7}  {text}"
