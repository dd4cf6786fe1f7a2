"""Where a tokenizer's files are, what they are, and which special tokens the files beside it name.

In: a path the user gave. Out: `TokenizerFiles`, which says how to read it and identifies it by sha256.
Nothing is downloaded and no code of a directory is run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megawrap.errors import DataError
from megawrap.io import read_json, sha256_file

# What transformers builds a tokenizer from where there is no tokenizer.json; these together identify it.
VOCABULARY_FILES = (
    "added_tokens.json", "bpe.codes", "merges.txt", "sentencepiece.bpe.model", "sentencepiece.model",
    "special_tokens_map.json", "spiece.model", "spm.model", "tekken.json", "tiktoken.model", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
_NOT_A_VOCABULARY = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
_HINT = "Give a tokenizer.json, a SentencePiece .model, or a local directory that holds one; nothing is downloaded"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What to read.

    Attributes:
        kind: how: a tokenizer.json, a SentencePiece model, or a directory that transformers converts.
        path: the file; for `transformers` the directory.
        configs: the JSON files beside it that name special tokens.
    """

    kind: Literal["tokenizer.json", "sentencepiece", "transformers"]
    path: Path
    configs: Configs

    def sha256(self) -> str:
        """Of the file, hex; of a directory that transformers reads, over the names and sha256 of its vocabulary files."""
        if self.kind != "transformers":
            return sha256_file(self.path)
        present = [self.path / name for name in VOCABULARY_FILES if (self.path / name).is_file()]
        listing = "".join(f"{sha256_file(path)}  {path.name}\n" for path in present)
        return hashlib.sha256(listing.encode()).hexdigest()


class Configs:
    """The JSON files beside a tokenizer that name its special tokens; any of them may be missing."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, dict[str, Any]] = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
            path = directory / name
            content = read_json(path, error=DataError) if path.is_file() else {}
            self._files[name] = content if isinstance(content, dict) else {}

    def token(self, role: str) -> str | None:
        """Text of a token by role (`eos_token`, `pad_token`): a string, or an object with `content`."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            value = self._files[name].get(role)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
        return None

    def eos_ids(self) -> list[int]:
        """`eos_token_id` of the model's configuration files: one id or a list."""
        for name in ("generation_config.json", "config.json"):
            value = self._files[name].get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            found = [index for index in values if isinstance(index, int) and not isinstance(index, bool) and index >= 0]
            if found:
                return found
        return []


def find(path: Path) -> TokenizerFiles:
    """What `path` is.

    A directory is read by its tokenizer.json; without one by transformers when it has the files of a slow tokenizer beside
    a configuration; and by SentencePiece when it holds one .model and no configuration.

    Raises:
        DataError: nothing there, or nothing that could be a tokenizer.
    """
    if path.is_file():
        kind: Literal["tokenizer.json", "sentencepiece"] = "sentencepiece" if path.suffix == ".model" else "tokenizer.json"
        return TokenizerFiles(kind=kind, path=path, configs=Configs(path.parent))
    if not path.is_dir():
        raise DataError(f"{path}: no such tokenizer", hint=_HINT)
    inside = path / "tokenizer.json"
    if inside.is_file():
        return TokenizerFiles(kind="tokenizer.json", path=inside, configs=Configs(path))
    names = sorted(entry.name for entry in path.iterdir())
    configured = "tokenizer_config.json" in names or "config.json" in names
    if configured and set(names) & (set(VOCABULARY_FILES) - set(_NOT_A_VOCABULARY)):
        return TokenizerFiles(kind="transformers", path=path, configs=Configs(path))
    models = [name for name in names if name.endswith(".model")]
    if len(models) == 1:
        return TokenizerFiles(kind="sentencepiece", path=path / models[0], configs=Configs(path))
    raise DataError(
        f"{path}: no tokenizer.json in this directory; it holds {', '.join(names[:10]) or 'nothing'}",
        hint="Write one with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), or give the file itself",
    )


def holds_tokenizer(directory: Path) -> bool:
    """Whether a directory has the files of a tokenizer."""
    try:
        return directory.is_dir() and find(directory) is not None
    except DataError:
        return False
