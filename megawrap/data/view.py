"""What a reader sees of a sample or a row: segments of tokens with their text, and which of them are trained on.

In: a document of a dataset, or a row as training takes it, and a tokenizer's `decode`. Out: `View`, the same for the
terminal, JSON and the page. A token is trained on when it is a label with a weight; the first of a segment never is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megawrap.data.format import IndexedDataset
from megawrap.data.rows import Row

Decode = Callable[[Sequence[int]], str]
_LONGEST_CHARACTER = 8  # tokens; what has not become a character by then is shown as it is


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The smallest stretch of tokens that is text by itself: one token, or the few that make up one character.

    Attributes:
        first, last: tokens of the segment, last excluded.
        text: what they decode to; empty when no tokenizer is known.
    """

    first: int
    last: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens that see each other, in a row or alone.

    Attributes:
        title: what it is.
        first_position: where it begins in the row.
        positions: positions it takes in the row.
        padding: how many of them, at its end, hold nothing; the others are one fewer than its tokens, whose last is a label only.
        ids: int64 [n], every token.
        weights: float32 [n], weight of each token as a label; 0 is context.
        pieces: of the text.
        parts: (first token, name) of every field of a sample; empty in a row.
    """

    title: str
    first_position: int
    positions: int
    ids: np.ndarray
    weights: np.ndarray
    pieces: list[Piece]
    parts: list[tuple[int, str]]
    padding: int = 0

    @property
    def is_padding(self) -> bool:
        """It holds nothing."""
        return 0 < self.padding == self.positions

    @property
    def where(self) -> str:
        """Its place in the row and what that holds, for a border."""
        last = self.first_position + self.positions - 1
        parts = [f"positions {self.first_position}-{last} ({self.positions:,})"]
        if not self.is_padding:
            parts += [f"{self.trained:,} trained", *([f"{self.padding:,} padding"] if self.padding else [])]
        return ", ".join(parts)

    @property
    def trained(self) -> int:
        """Tokens that are trained on."""
        return int(np.count_nonzero(self.weights))

    def runs(self) -> Iterator[tuple[bool, list[Piece]]]:
        """Stretches of pieces that are all trained on or all context, split where a field begins."""
        borders = {first for first, _ in self.parts}
        run: list[Piece] = []
        for piece in self.pieces:
            if run and (self.is_trained(run[-1]) != self.is_trained(piece) or piece.first in borders):
                yield self.is_trained(run[0]), run
                run = []
            run.append(piece)
        if run:
            yield self.is_trained(run[0]), run

    def is_trained(self, piece: Piece) -> bool:
        """Whether the tokens of a piece are trained on; pieces never cross that border."""
        return bool(self.weights[piece.first] > 0)

    def to_dict(self) -> dict[str, Any]:
        """In plain types, for JSON."""
        return {
            "title": self.title,
            "first_position": self.first_position,
            "positions": self.positions,
            "padding": self.padding,
            "trained_tokens": self.trained,
            "ids": self.ids.tolist(),
            "weights": [round(weight, 6) for weight in self.weights.tolist()],
            "pieces": [[piece.first, piece.last, piece.text] for piece in self.pieces],
            "parts": [list(part) for part in self.parts],
        }


@dataclass(frozen=True, kw_only=True)
class View:
    """A sample or a row.

    Attributes:
        title: what it is.
        facts: a sentence about it.
        segments: what it holds.
    """

    title: str
    facts: str
    segments: list[Segment]

    def to_dict(self) -> dict[str, Any]:
        """In plain types, for JSON."""
        return {"title": self.title, "facts": self.facts, "segments": [segment.to_dict() for segment in self.segments]}


def of_sample(dataset: IndexedDataset, document: int, decode: Decode | None, *, loss_on: str = "outputs") -> View:
    """A document, whole, field by field.

    Args:
        dataset: where it is.
        document: its number.
        decode: ids to text; None shows ids only.
        loss_on: as in the objective: outputs, or all.
    """
    sequences = range(int(dataset.document_indices[document]), int(dataset.document_indices[document + 1]))
    lengths = np.array([dataset.lengths[sequence] for sequence in sequences], dtype=np.int64)
    modes = (
        np.ones(len(lengths)) if loss_on == "all" or dataset.modes is None else np.asarray(dataset.modes[sequences.start : sequences.stop])
    )
    parts = [np.asarray(dataset.sequence(sequence), dtype=np.int64) for sequence in sequences]
    ids = np.concatenate([*parts, np.zeros(0, dtype=np.int64)])
    weights = np.repeat(modes, lengths).astype(np.float32)
    weights[:1] = 0  # nothing comes before it that it could be predicted from
    starts = np.cumsum(lengths) - lengths
    fields = list(zip(starts.tolist(), _field_names(dataset, len(lengths)), strict=True))
    segment = Segment(
        title="",
        first_position=0,
        positions=max(0, len(ids) - 1),
        ids=ids,
        weights=weights,
        pieces=pieces_of(ids, weights, decode, starts.tolist()),
        parts=fields,
    )
    facts = f"{len(ids):,} tokens in {len(lengths)} field{'s' * (len(lengths) != 1)}, {segment.trained:,} trained"
    return View(title=f"sample {document} of {dataset.prefix.name}", facts=facts, segments=[segment])


def _field_names(dataset: IndexedDataset, number: int) -> list[str]:
    """Names of the fields as preprocessing recorded them, when there are as many; else their numbers."""
    fields = ((dataset.manifest or {}).get("options") or {}).get("fields")
    if isinstance(fields, list) and len(fields) == number and all(isinstance(field, str) for field in fields):
        return fields
    return [f"field {index}" for index in range(number)]


def of_row(row: Row, title_of_row: str, decode: Decode | None) -> View:
    """A row as training takes it, segment by segment.

    Args:
        row: see `megawrap.data.rows`.
        title_of_row: what it is.
        decode: ids to text; None shows ids only.
    """
    places, documents = row["segment_lengths"].tolist(), row["sample_ids"].tolist()
    held = row.get("sample_lengths", row["segment_lengths"][: len(documents)]).tolist()  # positions of each real segment
    segments, first = [], 0
    for index, place in enumerate(places):
        if index < len(held):
            whose = [documents[index]] if len(held) == len(documents) else documents
            title = f"segment {index + 1} of {len(held)}, document{'s' * (len(whose) != 1)} {', '.join(map(str, whose))}"
            segments.append(_segment(row, title, first, place, held[index], decode))
        else:
            nothing = np.zeros(0, dtype=np.int64)
            segments.append(
                Segment(
                    title="padding", first_position=first, positions=place, padding=place, ids=nothing, weights=nothing, pieces=[], parts=[]
                )
            )
        first += place
    trained, padding = sum(segment.trained for segment in segments), sum(segment.padding for segment in segments)
    facts = f"{first:,} positions: {trained:,} trained, {first - trained - padding:,} context, {padding:,} padding"
    if "fim" in row:
        rearranged, kept, outgrown = row["fim"].tolist()
        facts += f"; fill-in-the-middle: {rearranged:,} rearranged, {kept:,} not drawn, {outgrown:,} kept because they outgrew their place"
    return View(title=title_of_row, facts=facts, segments=segments)


def _segment(row: Row, title: str, first: int, place: int, held: int, decode: Decode | None) -> Segment:
    """The segment at position `first`: `held` positions with tokens, then padding, `place` in all."""
    span = slice(first, first + held)
    ids = np.append(row["tokens"][span], row["labels"][first + held - 1])
    weights = np.append(np.float32(0), row["weights"][span]).astype(np.float32)
    return Segment(
        title=title,
        first_position=first,
        positions=place,
        padding=place - held,
        ids=ids,
        weights=weights,
        pieces=pieces_of(ids, weights, decode, []),
        parts=[],
    )


def pieces_of(ids: np.ndarray, weights: np.ndarray, decode: Decode | None, borders: Sequence[int]) -> list[Piece]:
    """Cut tokens into pieces whose texts, one after the other, are the text of the whole.

    A token is decoded after the piece before it, for tokenizers whose decoding depends on what comes before (spaces at
    the start), and joined with its followers while it is part of a character. No piece crosses a border.

    Args:
        ids: [n].
        weights: [n]; where they change between 0 and more is a border.
        decode: ids to text; None gives one piece per token without text.
        borders: more of them, token numbers.
    """
    tokens = ids.tolist()
    if decode is None:
        return [Piece(first=index, last=index + 1, text="") for index in range(len(tokens))]
    ends = {*borders, *(np.flatnonzero(np.diff(weights > 0)) + 1).tolist(), len(tokens)}
    pieces: list[Piece] = []
    known, before = 0, ""  # tokens[known:done] decode to `before`
    done = 0
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[known:end])
        if text.endswith("\ufffd") and end not in ends and end - done < _LONGEST_CHARACTER:
            continue
        pieces.append(Piece(first=done, last=end, text=text[len(before) :]))
        known, done = done, end
        before = decode(tokens[known:done])
    return pieces
