"""Whether a fast backend may stand in for the reference: same ids on the user's text and on text made to tell them apart.

In: the two encoders, a batch of the user's texts and the added tokens. Out: None, or the first difference in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megawrap.data.added_tokens import AddedToken, Encoded
from megawrap.data.tokenizer_backends import UnusableError

MAX_TEXTS, MAX_CHARACTERS, LONGEST = 200, 256 << 10, 4096
"""Bounds of the sample; a longer text is cut, which leaves a text all the same."""
MAX_ADDED = 64
"""Added tokens that are tried; there may be thousands, all made alike."""

Encode = Callable[[Sequence[str], bool], Encoded]

ADVERSARIAL: tuple[str, ...] = (
    # spaces and line ends
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", " \n", "\n ", "a\r\nb\r\n\r\nc", "a\n\n\n  b",
    "a \n \n b", "\t\tif x:\n\t\t\ty", "x" + " " * 50, " " * 50 + "x", "x" + " " * 257 + "y" + "\t" * 33 + "z",
    "a" + "\n" * 100 + "b", "  leading", "trailing  ", "a  b   c    d",
    # words and contractions
    "I'm you're he'll they've it's we'd don't I'M YOU'RE 'tis ''s 'S", "can't’t’s", "__init__", "snake_case_name",
    "camelCaseName", "ALLCAPS",
    # numbers
    "1", "12", "123", "1234", "12345678901234567890", "3.14159", "1,000,000", "0x1F", "1e-5", "a1b2c3",
    "v1.2.3-rc4", " 1", "  1", " 12 34", "\n1", "x  1  y", "x\t1", "1  ", "1\n",
    # numbers outside ASCII
    "½ ¼ ² ³ ⁴ ₅", "٠١٢٣٤", "१२३", "Ⅷ ⅻ", "①②③", "一二三 〇", "௧௨௩", "𝟘𝟙𝟚", "x²+y³=½", "  ٣", "〡〢〣",
    # normal forms and combining marks
    "café", "cafe\u0301", "a\u0301\u0302\u0303\u0304", "\u0301", " \u0301x", "e\u0301" * 40, "Å Å A\u030a", "ﬁ ﬂ ﬃ",
    "ｆｕｌｌｗｉｄｔｈ １２３", "ǅ ǈ ǋ",
    # scripts
    "\u1100\u1161\u11a8 각", "가나다", "日本語のテキスト", "中文字符，标点。", "ภาษาไทย", "हिन्दी क्षत्रिय",
    "العربية ١٢٣", "שָׁלוֹם", "Ελληνικά ς σ", "русский", "ß ẞ SS", "İstanbul ı",
    # emoji and what joins them
    "👩‍👩‍👧‍👦", "👍🏽👍🏿", "🏳️‍🌈", "🇩🇪🇫🇷", "😀😃😄 x😀y", "☺️ ☺︎", "#️⃣1️⃣",
    # widthless, odd spaces, line separators
    "a\u200bb", "a\u200db", "a\u200cb", "\ufeffbom", "a\u00adb", "\u2060x", "a\u00a0b", "\u00a0\u00a0x",
    "a\u2003b\u2009c", "\u3000x\u3000", "a\u2028b\u2029c", "\u0085x", "x\u0085\u0085y",
    # control and private characters
    "\x1c\x1d\x1e\x1f", "a\x0bb\x0cc", "\x00", "a\x00b", "\x01\x02\x03", "\x1b[31mred\x1b[0m", "\x7f", "\x80\x9f",
    "\u202eright to left\u202c", "\ue000\uf8ff", "\uffff", "\U0010ffff", "\ufdd0", "\ufdd0\ufdd1", "a\ufdd0\ufdd1b",
    "\ufdd1", "\U0001e030", "\U000e0041", "�",
    # punctuation
    "!!!", "...", "…", "———", "«»", "“quotes” ‘single’", "->=>!=<=>=", "/* comment */", "// x",
    "# -*- coding: utf-8 -*-", "$$$ €€ ££", "a.b.c", "(((", ")))",
    # almost special tokens
    "<", "<|", "|>", "<|endoftext", "endoftext|>", "< |endoftext|>", "<s", "[CLS", "&lt;|endoftext|&gt;",
    "http://user:pw@host:80/p?q=1&r=%20#f",
    # long words
    "x" * 20_000, "ab" * 700, "a" * 9 + "b" * 9 + "é" * 300, "あ" * 300, "😀" * 100, "9" * 300, "." * 300,
    "=" * 80 + "\n" + "-" * 80, "'" * 60, "Donaudampfschiff" * 40,
    # programs
    "def f(x):\n    return {'a': [1, 2.5, None], \"b\": lambda y: y ** 2}\n\n\nclass A(B):\n    pass\n",
    '{"k": "v\\n\\u00e9", "n": -1.5e+10}', "int main(void) {\r\n\tprintf(\"%d\\n\", 0x7fff);\r\n}\r\n",
    "SELECT * FROM t WHERE a='b' AND c<>1;--", "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → ∞", "x₁ + x₂ ≠ x¹",
)  # fmt: skip


def special_texts(added: Sequence[AddedToken]) -> list[str]:
    """Texts that spell out added tokens: alone, side by side, within words, between spaces, cut short, among numbers."""
    texts = []
    chosen = [added[index] for index in np.linspace(0, len(added) - 1, min(len(added), MAX_ADDED)).astype(int)] if added else []
    for token in chosen:
        word = token.text
        texts += [
            word,
            f"a{word}b",
            f"  {word}  x",
            f"x\n{word}\n1",
            f"{word}{word}",
            word[:-1],
            f"{word[:-1]} {word[-1:]}",
            f"7{word}7é{word} ",
        ]
    return [*texts, "".join(token.text for token in chosen), " ".join(token.text for token in chosen)]


def sample(texts: Sequence[str]) -> list[str]:
    """A bounded selection of the user's texts, evenly spaced."""
    chosen: list[str] = []
    left = MAX_CHARACTERS
    for index in np.linspace(0, len(texts) - 1, min(len(texts), MAX_TEXTS)).astype(int) if texts else ():
        text = texts[index][: min(LONGEST, left)]
        chosen.append(text)
        left -= len(text)
        if left <= 0:
            break
    return chosen


def difference(fast: Encode, reference: Encode, texts: Sequence[str], added: Sequence[AddedToken]) -> str | None:
    """The first difference between two encoders, as a sentence part; None when there is none.

    Args:
        fast, reference: (texts, escape_special) -> ids, lengths.
        texts: of the user, already bounded.
        added: the tokenizer's added tokens.
    """
    hostile = [*ADVERSARIAL, *special_texts(added)]
    for escape, batch in ((True, [*texts, *hostile]), (False, hostile)):
        try:
            found = fast(batch, escape)
        except UnusableError as error:
            return str(error)
        expected = reference(batch, escape)
        if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
            return _first(found, expected, batch)
    return None


def _first(found: Encoded, expected: Encoded, texts: Sequence[str]) -> str:
    ours, theirs = (np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in (found, expected))
    for text, one, other in zip(texts, ours, theirs, strict=True):
        if not np.array_equal(one, other):
            short = text if len(text) <= 40 else text[:40] + "..."
            return f"it gives {_few(one)} for {short!r}, not {_few(other)}"
    raise AssertionError("different arrays of equal parts")


def _few(ids: np.ndarray) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"
