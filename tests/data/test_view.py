"""What a reader is shown is what is there: texts that add up, every token once, trained exactly where training is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megawrap.config import DataConfig, ObjectiveConfig
from megawrap.data.format import IndexedDataset, IndexedWriter
from megawrap.data.plan import build
from megawrap.data.tokenizer import Tokenizer
from megawrap.data.view import Segment, View, of_row, of_sample, pieces_of
from megawrap.data.view_text import Style, render, style_for, visible
from tests.data import documents
from tests.tiny_tokenizer import write_tokenizer

TEXTS = [
    "def f(x):\n    return x  # ok\n", "naïve café — 日本語 🙂 👩‍👩‍👧", "\u202eabc\x1b[31m\x00\x7f", "  \t\r\n ", "",
    "�", "🙂🙂🙂", "a" * 50,
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text], escape_special=False)[0].tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_every_token(tokenizer: Tokenizer, text: str) -> None:
    ids = encode(tokenizer, text)
    pieces = pieces_of(np.array(ids), np.zeros(len(ids)), tokenizer.decode, [])
    assert "".join(piece.text for piece in pieces) == text == tokenizer.decode(ids)
    assert [token for piece in pieces for token in range(piece.first, piece.last)] == list(range(len(ids)))
    assert not any(piece.text.endswith("�") and "�" not in text for piece in pieces)


def test_a_character_of_several_tokens_is_one_piece_unless_a_border_is_inside(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "🙂")
    assert len(ids) == 4
    none = np.zeros(4, dtype=np.float32)
    assert [(piece.first, piece.last) for piece in pieces_of(np.array(ids), none, tokenizer.decode, [])] == [(0, 4)]
    assert [(piece.first, piece.last) for piece in pieces_of(np.array(ids), none, tokenizer.decode, [2])] == [(0, 2), (2, 4)]
    half = np.array([0, 0, 0, 1], dtype=np.float32)
    assert [(piece.first, piece.last) for piece in pieces_of(np.array(ids), half, tokenizer.decode, [])] == [(0, 3), (3, 4)]


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece"])
def test_spaces_are_kept_by_tokenizers_that_decode_by_context(tmp_path: Path, kind: str) -> None:
    """Decoded one by one, their tokens lose the spaces between words."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    if kind == "metaspace":
        vocabulary = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁fox": 3, "es": 4}
        backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        vocabulary = {"[UNK]": 0, "[EOS]": 1, "the": 2, "fox": 3, "##es": 4}
        backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    pieces = pieces_of(np.array([2, 3, 4]), np.zeros(3), tokenizer.decode, [])
    assert "".join(piece.text for piece in pieces) == tokenizer.decode([2, 3, 4]) == "the foxes"
    assert [piece.text for piece in pieces] == ["the", " fox", "es"]


@pytest.mark.parametrize("loss_on", ["outputs", "all"])
@pytest.mark.parametrize("overlong", ["truncate-inputs-left", "split"])
def test_rows_show_every_sample_as_training_sees_it(tmp_path: Path, loss_on: str, overlong: str) -> None:
    """Against the oracle that knows rows token by token: ids of a window, and which of them are labels with a weight."""
    given = documents.samples(1, 60, longest=30, chat=True)
    data = documents.write(tmp_path / "data", given)
    plan = build(
        [f"train: 1 0:1 {data.prefix}"],
        DataConfig(seq_length=48, overlong=overlong),  # type: ignore[arg-type]
        ObjectiveConfig(loss_on=loss_on),  # type: ignore[arg-type]
        global_batch_size=1,
        iterations=1,
        build_cache=False,
    )
    expected = {}
    for number, document in enumerate(given):
        for start, length in documents.windows(document, 48, overlong, loss_on):
            weights = [weight for *_, weight in documents.segment(document, start, length, loss_on, "token")]
            expected[number, tuple(documents.flat(document)[0][start : start + length])] = [0.0, *weights]
    seen = set()
    for row in plan.train.rows(np.arange(len(plan.train.sources[0]))):
        view = of_row(row, "row", None)
        assert sum(segment.positions for segment in view.segments) == 48
        for segment in view.segments:
            if segment.is_padding:
                assert segment.trained == 0 and len(segment.ids) == 0
                continue
            number = int(segment.title.rpartition(" ")[2])
            key = (number, tuple(segment.ids.tolist()))
            assert segment.weights.tolist() == expected[key]
            assert segment.trained == sum(weight > 0 for weight in expected[key])
            seen.add(key)
    assert seen == set(expected)


@pytest.mark.parametrize(("packing", "multiple"), [("none", 1), ("none", 8), ("best_fit", 16), ("concat", 1)])
def test_rows_of_every_kind_show_every_label(tmp_path: Path, packing: str, multiple: int) -> None:
    """Padding inside and at the end, rows of their own length, one stream: what is shown as trained are the labels with a weight."""
    given = documents.samples(2, 30, longest=20)
    data = documents.write(tmp_path / "data", given)
    plan = build(
        [f"train: 1 0:1 {data.prefix}"],
        DataConfig(seq_length=64, packing=packing, pad_to_multiple=multiple),  # type: ignore[arg-type]
        ObjectiveConfig(),
        global_batch_size=1,
        iterations=1,
        build_cache=False,
    )
    padding = 0
    for row in plan.train.rows(np.arange(len(plan.train.sources[0]))):
        view = of_row(row, "row", None)
        assert sum(segment.positions for segment in view.segments) == len(row["tokens"])
        padding += sum(segment.padding for segment in view.segments)
        shown = [(int(token), float(weight)) for one in view.segments for token, weight in zip(one.ids, one.weights, strict=True) if weight]
        assert shown == [(int(label), float(weight)) for label, weight in zip(row["labels"], row["weights"], strict=True) if weight]
        if packing != "concat":
            for segment in view.segments:
                if not segment.is_padding:
                    number = int(segment.title.rpartition(" ")[2])
                    assert segment.ids.tolist() == documents.flat(given[number])[0]
    assert padding > 0 or (packing, multiple) == ("none", 1)


def test_samples_show_their_fields(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [("def f():\n", "    pass\n"), ("", "x = '🙂'")]
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        for pair in texts:
            parts = [encode(tokenizer, text) for text in pair]
            writer.add(np.concatenate(parts).astype(np.int64), np.array([len(part) for part in parts]), np.array([2]), np.array([0, 1]))
        writer.commit({"options": {"fields": ["prompt", "answer"]}})
    data = IndexedDataset(tmp_path / "data")
    for number, pair in enumerate(texts):
        (segment,) = of_sample(data, number, tokenizer.decode).segments
        runs = [(trained, "".join(piece.text for piece in run)) for trained, run in segment.runs()]
        assert "".join(text for _, text in runs) == "".join(pair)
        assert [name for _, name in segment.parts] == ["prompt", "answer"]
        if number == 0:
            assert runs == [(False, pair[0]), (True, pair[1])]
        else:  # the first token of a sample follows nothing: it is never trained on
            assert runs[0] == (False, "x") and all(trained for trained, _ in runs[1:])
    assert json.loads(json.dumps(of_sample(data, 0, None).to_dict()))["segments"][0]["parts"][1][1] == "answer"


def segment_of(text: str, weights: list[float], tokenizer: Tokenizer) -> Segment:
    ids = np.array(encode(tokenizer, text))
    whole = np.array((weights * len(ids))[: len(ids)], dtype=np.float32)
    pieces = pieces_of(ids, whole, tokenizer.decode, [])
    return Segment(title="", first_position=0, positions=len(ids) - 1, ids=ids, weights=whole, pieces=pieces, parts=[])


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_nothing_in_the_data_reaches_the_terminal_as_a_command(tokenizer: Tokenizer, colour: bool, ids: bool) -> None:
    """Every control and format character there is, shown as an escape; with colours only our own sequences are left."""
    bad = [chr(code) for code in (*range(32), *range(127, 160), 0xAD, 0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F),
                                  *range(0x2066, 0x206A), 0xFEFF, 0xE0001) if chr(code) not in "\n\t"]  # fmt: skip
    text = "a".join(bad) + "\x1b]0;title\x07\x1b[2J"
    shown = render(View(title="t", facts="f", segments=[segment_of(text, [0, 1], tokenizer)]), Style(colour=colour), ids=ids)
    for code in ("\x1b[1;32m", "\x1b[36m", "\x1b[2m", "\x1b[1m", "\x1b[0m"):
        shown = shown.replace(code, "")
    assert not any(character in shown for character in bad)
    assert "\\x1b]0;title\\x07" in visible(text, Style())


def test_plain_text_says_what_is_trained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts = [encode(tokenizer, "one\ntwo"), encode(tokenizer, "three\n")]
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add(np.concatenate(parts).astype(np.int64), np.array([len(part) for part in parts]), np.array([2]), np.array([0, 1]))
        writer.commit({})
    lines = render(of_sample(IndexedDataset(tmp_path / "data"), 0, tokenizer.decode), Style()).splitlines()[2:]
    assert [line.split(maxsplit=1)[1] for line in lines if "context" in line or "trained" in line] == [
        "field 0 context │ one↵",
        "field 1 trained ┃ three↵",
    ]
    assert lines[1].strip() == "│ two"


class Stream:
    """As much of a text stream as the choice of a style looks at."""

    def __init__(self, *, terminal: bool, encoding: str = "utf-8") -> None:
        self.terminal, self.encoding = terminal, encoding

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("colour", "terminal", "environment", "expected"),
    [
        ("auto", True, {}, True),
        ("auto", False, {}, False),
        ("auto", True, {"NO_COLOR": "1"}, False),
        ("auto", True, {"NO_COLOR": ""}, True),
        ("auto", True, {"TERM": "dumb"}, False),
        ("always", False, {"NO_COLOR": "1"}, True),
        ("never", True, {}, False),
    ],
)
def test_when_colours_are_written(
    monkeypatch: pytest.MonkeyPatch, colour: str, terminal: bool, environment: dict[str, str], expected: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert style_for(Stream(terminal=terminal), colour).colour is expected  # type: ignore[arg-type]


def test_a_terminal_without_our_characters_gets_plain_ones(tokenizer: Tokenizer) -> None:
    style = style_for(Stream(terminal=True, encoding="ascii"), "never")  # type: ignore[arg-type]
    rng = random.Random(0)
    text = "".join(rng.choice("ab\n\t ") for _ in range(50))
    assert render(View(title="t", facts="f", segments=[segment_of(text, [0, 0, 1], tokenizer)]), style).isascii()
