"""What a reader sees of a sample or a row: segments of tokens with their text, and which of them are trained on.

In: a document of a dataset, or a row as training takes it, and a tokenizer's `decode`. Out: `View`, the same for the
terminal, JSON and the page. A token is trained on when it is a label with a weight; the first of a segment never is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
        positions: positions it fills; one less than its tokens, whose last is a label only. All of padding's.
        ids: int64 [n], every token.
        weights: float32 [n], weight of each token as a label; 0 is context.
        pieces: of the text.
        parts: (first token, name) of every field of a sample; empty in a row.
        is_padding: it holds nothing.
    """

    title: str
    first_position: int
    positions: int
    ids: np.ndarray
    weights: np.ndarray
    pieces: list[Piece]
    parts: list[tuple[int, str]]
    is_padding: bool = False

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
            "is_padding": self.is_padding,
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


def of_row(row: Row, title: str, decode: Decode | None) -> View:
    """A row as training takes it, segment by segment.

    Args:
        row: tokens, labels, weights, segment_lengths and sample_ids, see `megawrap.data.rows`.
        title: what it is.
        decode: ids to text; None shows ids only.
    """
    bounds = np.concatenate([[0], np.cumsum(row["segment_lengths"], dtype=np.int64)]).tolist()
    documents = row["sample_ids"].tolist()
    number = len(bounds) - 1
    padded = number == len(documents) + 1
    segments = []
    for index, (first, last) in enumerate(pairwise(bounds)):
        if padded and index == number - 1:
            segments.append(_padding(first, last - first))
            continue
        ids = np.append(row["tokens"][first:last], row["labels"][last - 1])
        weights = np.append(np.float32(0), row["weights"][first:last]).astype(np.float32)
        held = f"document {documents[index]}" if number - padded == len(documents) else f"documents {', '.join(map(str, documents))}"
        segments.append(
            Segment(
                title=f"segment {index + 1} of {number - padded}, {held}",
                first_position=first,
                positions=last - first,
                ids=ids,
                weights=weights,
                pieces=pieces_of(ids, weights, decode, []),
                parts=[],
            )
        )
    trained, padding = sum(segment.trained for segment in segments), sum(one.positions for one in segments if one.is_padding)
    facts = f"{bounds[-1]:,} positions: {trained:,} trained, {bounds[-1] - trained - padding:,} context, {padding:,} padding"
    return View(title=title, facts=facts, segments=segments)


def _padding(first: int, positions: int) -> Segment:
    nothing = np.zeros(0, dtype=np.int64)
    return Segment(
        title="padding",
        first_position=first,
        positions=positions,
        ids=nothing,
        weights=nothing.astype(np.float32),
        pieces=[],
        parts=[],
        is_padding=True,
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
