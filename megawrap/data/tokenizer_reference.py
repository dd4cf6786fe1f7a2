"""The libraries whose ids count: `tokenizers` for Hugging Face's formats, `sentencepiece` for a .model file.

In: the files found. Out: a `Reference` each, slower than what stands in tokenizer_backends and right by definition.
Without truncation, padding, or begin and end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path
from sys import stderr
from typing import Any, Protocol

import numpy as np

from megawrap.data.added_tokens import AddedToken, Cutter, Encoded
from megawrap.data.tokenizer_files import TokenizerFiles
from megawrap.errors import DataError
from megawrap.io import read_json


class Reference(Protocol):
    """What every tokenizer can do.

    Attributes:
        name: of the library.
        vocab_size: largest token id + 1, added tokens included.
        added: tokens that are matched as a whole, by id.
        eos_id, pad_id: what the file itself names, or None.
    """

    name: str
    vocab_size: int
    added: tuple[AddedToken, ...]
    eos_id: int | None
    pad_id: int | None

    def id_of(self, token: str) -> int | None:
        """Id of a token by its text, or None."""

    def token_of(self, index: int) -> str | None:
        """Text of a token by its id, or None."""

    def encode(self, texts: Sequence[str], escape_special: bool) -> Encoded:
        """Ids int32 [sum], back to back, and lengths int32 [n]; special tokens in texts as characters or as tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""


def open_reference(files: TokenizerFiles) -> Reference:
    """Read the tokenizer.

    Raises:
        DataError: damaged, of a format that the library does not know, or the library is missing.
    """
    if files.kind == "sentencepiece":
        return SentencePiece(files.path)
    return HuggingFace(files.path, convert=files.kind == "transformers")


def flatten(lists: Sequence[Sequence[int]]) -> Encoded:
    """Lists of ids as ids int32 [sum] and lengths int32 [n]."""
    lengths = np.fromiter(map(len, lists), dtype=np.int32, count=len(lists))
    return np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(lengths.sum(dtype=np.int64))), lengths


class HuggingFace:
    """A tokenizer.json, or a directory without one that transformers converts, through the `tokenizers` library.

    Args:
        path: the file, or the directory.
        convert: it is a directory for transformers; its own code is never run.
    """

    name = "tokenizers"
    eos_id: int | None
    pad_id: int | None

    def __init__(self, path: Path, *, convert: bool) -> None:
        self._tokenizer, self.eos_id, self.pad_id = _converted(path) if convert else (_read(path), None, None)
        self._source = None if convert else path
        self._tokenizer.no_truncation()  # a stored limit would cut samples without a word
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path}: the vocabulary is empty", corrupt=True)
        self.vocab_size = max(vocabulary.values()) + 1
        added = sorted(self._tokenizer.get_added_tokens_decoder().items())
        self.added = tuple(
            AddedToken(
                text=token.content,
                id=index,
                special=token.special,
                plain=not (token.lstrip or token.rstrip or token.single_word),
                normalized=token.normalized,
            )
            for index, token in added
        )

    def definition(self) -> bytes:
        """The tokenizer as the content of a tokenizer.json."""
        return bytes(self._tokenizer.to_str().encode()) if self._source is None else self._source.read_bytes()

    def id_of(self, token: str) -> int | None:
        """Id of a token by its text, or None."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def token_of(self, index: int) -> str | None:
        """Text of a token by its id, or None."""
        token: str | None = self._tokenizer.id_to_token(index)
        return token

    def encode(self, texts: Sequence[str], escape_special: bool) -> Encoded:
        """Encode in parallel."""
        self._tokenizer.encode_special_tokens = escape_special
        return flatten([encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _read(path: Path) -> Any:
    from tokenizers import Tokenizer as Library

    content = read_json(path, error=DataError)
    if not isinstance(content, dict) or "model" not in content:
        raise DataError(f"{path}: no `model` inside: not a tokenizer.json", hint="Give the file that save_pretrained wrote", corrupt=True)
    try:
        return Library.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise DataError(f"{path}: the tokenizers library cannot read it: {error}", corrupt=True) from error


def _converted(path: Path) -> tuple[Any, int | None, int | None]:
    """The library's tokenizer, and the end and padding ids that its class knows."""
    from transformers import AutoTokenizer

    try:
        with redirect_stdout(stderr):
            loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever is wrong with the files, of whatever class
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: transformers cannot read the tokenizer in this directory: {reason}", hint=_DIRECTORY_HINT) from error
    library = getattr(loaded, "backend_tokenizer", None)
    if library is None:
        raise DataError(f"{path}: transformers reads this directory as {type(loaded).__name__}, in Python only", hint=_DIRECTORY_HINT)
    return library, loaded.eos_token_id, loaded.pad_token_id


_DIRECTORY_HINT = "Give the directory a tokenizer.json, or name its SentencePiece .model file itself"


class SentencePiece:
    """A SentencePiece model with its own ids; control and unknown pieces are its special tokens.

    Special tokens are never read from text by SentencePiece. Where they are allowed the text is cut at them, and every
    piece encoded as a text of its own, as Hugging Face's tokenizers of these models do.
    """

    name = "sentencepiece"

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            hint = "Install it: pip install 'megawrap[sentencepiece]'"
            raise DataError(f"{path} is a SentencePiece model and the package sentencepiece is not installed", hint=hint) from error
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: the sentencepiece library cannot read it: {' '.join(str(error).split())}", corrupt=True) from error
        self.vocab_size = int(self._model.get_piece_size())
        indices = [index for index in range(self.vocab_size) if self._model.is_control(index) or self._model.is_unknown(index)]
        self.added = tuple(AddedToken(text=self._model.id_to_piece(index), id=index, special=True) for index in indices)
        self._special_ids = {token.id: token.text for token in self.added}
        self.eos_id = _given(self._model.eos_id())
        self.pad_id = _given(self._model.pad_id())
        self._cutter = Cutter(self.added, fast=self._plain, reference=lambda texts, escape: self._plain(texts), can_cut=True)

    def id_of(self, token: str) -> int | None:
        """Id of a token by its text, or None."""
        index = int(self._model.piece_to_id(token))
        return index if self._model.id_to_piece(index) == token else None

    def token_of(self, index: int) -> str | None:
        """Text of a token by its id, or None."""
        return str(self._model.id_to_piece(index)) if 0 <= index < self.vocab_size else None

    def encode(self, texts: Sequence[str], escape_special: bool) -> Encoded:
        """Encode in parallel."""
        return self._cutter.encode(texts, escape_special)

    def _plain(self, texts: Sequence[str]) -> Encoded:
        return flatten(self._model.encode(list(texts), out_type=int)) if texts else flatten([])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        parts: list[str] = []
        start = 0
        for position, index in enumerate(ids):
            if index in self._special_ids:
                parts += [self._model.decode(list(ids[start:position])), self._special_ids[index]]
                start = position + 1
        return "".join([*parts, self._model.decode(list(ids[start:]))])


def _given(index: int) -> int | None:
    return int(index) if index >= 0 else None
