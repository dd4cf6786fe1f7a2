"""Reading Hugging Face directories that may come from anywhere: nothing in them is executed, trusted or guessed.

In: a directory with config.json and safetensors, in one file or in shards. Out: an `HFDirectory`, whose tensors are
read one at a time. Everything that can be known from names, shapes and flags is checked before the first tensor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.source import Record, Source
from megawrap import families
from megawrap.errors import ConversionError, MegawrapError
from megawrap.families.base import Rule
from megawrap.io import read_json, safe_join

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
_MAPPED_BYTES = 64 << 20  # read through one mapping before it is dropped: pages once touched would count as memory
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class HFDirectory(Source):
    """A Hugging Face model on disk.

    Args:
        path: directory with config.json and safetensors.
        allow_nonfinite: read NaN and Inf instead of refusing them.

    Raises:
        ConversionError: no such directory; an adapter; quantised; an architecture or a setting that is not mapped; tensors
            missing, left over, of the wrong shape, or contradicting tie_word_embeddings; file names that lead elsewhere.
    """

    format = "hf"

    def __init__(self, path: Path, *, allow_nonfinite: bool = False) -> None:
        self.path = Path(path)
        self.allow_nonfinite = allow_nonfinite
        self._open: dict[Path, Any] = {}
        self._mapped = 0
        if not self.path.is_dir():
            raise ConversionError(f"{self.path} is not a directory")
        if (self.path / ADAPTER_FILE).exists():
            raise ConversionError(
                f"{self.path} holds {ADAPTER_FILE}: it is an adapter, not a model", hint="Merge it into its base model first"
            )
        self.config = _object(self.path / CONFIG_FILE)
        try:
            self.family = families.from_hf_config(self.config)
            self.architecture = self.family.from_hf(self.config)
        except MegawrapError as problem:
            raise ConversionError(f"{self.path / CONFIG_FILE}: {problem.message}", hint=problem.hint) from problem
        generation = _object(self.path / GENERATION_FILE) if (self.path / GENERATION_FILE).is_file() else None
        has_tokenizer = (self.path / "tokenizer.json").is_file()
        self.record = Record(hf_config=self.config, generation_config=generation, tokenizer_dir=self.path if has_tokenizer else None)
        self._rules = super().rules
        self._files, self._prefix = self._located()
        self._check_names()
        self._types = self._check_shapes()
        self._check_tie()

    @property
    def rules(self) -> dict[str, Rule]:
        """See `Source.rules`."""
        return self._rules

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """See `Source.dtypes`."""
        return {name: self._types[rule.hf[0]] for name, rule in self.rules.items()}

    def read_padded(self, name: str) -> torch.Tensor:
        """See `Source.read_padded`; the parts are laid out by the family's rule."""
        rule = self.rules[name]
        return rule.from_hf([self.read_hf(part) for part in rule.hf])

    def read_hf(self, name: str) -> torch.Tensor:
        """A tensor under its Hugging Face name, backed by the file.

        Raises:
            ConversionError: the file is damaged.
        """
        from safetensors import SafetensorError

        path = self._files[name]
        try:
            tensor = self._handle(path).get_tensor(name.removeprefix(self._prefix))
            self._mapped += tensor.nbytes
            if self._mapped > _MAPPED_BYTES:
                self.close()
            return tensor
        except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
            raise ConversionError(f"{path} is damaged where {name} should be: {problem}", corrupt=True) from problem

    def close(self) -> None:
        """See `Source.close`."""
        self._open.clear()
        self._mapped = 0

    def _handle(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as problem:
                raise ConversionError(f"{path} is damaged or not safetensors: {problem}", corrupt=True) from problem
        return self._open[path]

    def _located(self) -> tuple[dict[str, Path], str]:
        """The file of every tensor under the names of the model with its head, and the beginning that they lack in the files."""
        files, prefix = self._locate(), self.family.base_prefix
        if not prefix or any(name.startswith(prefix) for name in files):
            return files, ""
        return {name if name == self.family.head else prefix + name: path for name, path in files.items()}, prefix

    def _locate(self) -> dict[str, Path]:
        """The file of every tensor, from the index or from the single file."""
        single, index = self.path / WEIGHTS_FILE, self.path / INDEX_FILE
        if index.exists() and single.exists():
            raise ConversionError(f"{self.path} holds both {WEIGHTS_FILE} and {INDEX_FILE}", hint="Remove the one that is not the model")
        if index.exists():
            return self._locate_shards(index)
        if not single.exists():
            others = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"))
            found = f"only {', '.join(others[:3])}, which may execute code or be lossy" if others else "no weights"
            raise ConversionError(
                f"{self.path} holds {found}; {WEIGHTS_FILE} or {INDEX_FILE} is needed",
                hint="Save the model with transformers (save_pretrained) as safetensors first" if others else "Is it the right directory?",
            )
        path = self._weight_file(WEIGHTS_FILE)
        return dict.fromkeys(self._handle(path).keys(), path)

    def _locate_shards(self, index: Path) -> dict[str, Path]:
        weight_map = _object(index, unique=True).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConversionError(f"{index} has no weight_map of tensor names to file names", corrupt=True)
        files: dict[str, Path] = {}
        shards = {name: self._weight_file(name, index) for name in sorted(set(weight_map.values()))}
        for shard, path in shards.items():
            for key in self._handle(path).keys():  # noqa: SIM118 - a file handle, not a dictionary
                if key in files:
                    raise ConversionError(f"tensor {key} is in both {files[key].name} and {shard} of {self.path}", corrupt=True)
                if key not in weight_map:
                    raise ConversionError(f"tensor {key} of {path} is not in {INDEX_FILE}", corrupt=True)
                files[key] = path
        for key, shard in weight_map.items():
            if files.get(key) != shards[shard]:
                raise ConversionError(f"{index} says that {key} is in {shard}, but it is not", corrupt=True)
        return files

    def _weight_file(self, name: str, index: Path | None = None) -> Path:
        """A file named by untrusted JSON: inside the directory, or a blob of the hub cache the directory is a snapshot of."""
        direct = self.path / name
        if self.path.resolve().parent.name == "snapshots" and Path(name).name == name and direct.is_symlink():
            blobs = self.path.resolve().parent.parent / "blobs"
            path = direct if direct.resolve().parent == blobs else safe_join(self.path, name, error=ConversionError)
        else:
            path = safe_join(self.path, name, error=ConversionError)
        if not path.is_file():
            where = f"; {index} names it" if index else ""
            raise ConversionError(f"{path} is missing{where}", hint="Download the model again", corrupt=True)
        return path

    def _check_names(self) -> None:
        expected = {hf for rule in self.rules.values() for hf in rule.hf}
        if self.architecture.tied:
            expected |= self._tied_names() & set(self._files)
        missing = expected - set(self._files)
        extra = {name for name in set(self._files) - expected if not name.endswith(self.family.ignored_tensors or ("\0",))}
        if missing:
            tie = f" (tie_word_embeddings is {str(self.architecture.tied).lower()})" if missing & self._tied_names() else ""
            raise ConversionError(
                f"{self.path} misses {_some(missing)} of the {len(expected)} tensors that {CONFIG_FILE} asks for{tie}",
                hint="Nothing is ever initialised at random; config.json and weights do not belong together",
            )
        if extra:
            raise ConversionError(
                f"{self.path} holds {_some(extra)}, which {self.family.name} with this {CONFIG_FILE} does not have",
                hint="Nothing is dropped silently; config.json and weights do not belong together",
            )

    def _tied_names(self) -> set[str]:
        """Names under which a tied model may carry its head a second time."""
        return {self.family.head}

    def _check_shapes(self) -> dict[str, torch.dtype]:
        import torch

        types: dict[str, torch.dtype] = {}
        for rule in self.rules.values():
            for name, shape in rule.hf_shapes.items():
                part = self._handle(self._files[name]).get_slice(name.removeprefix(self._prefix))
                found, kind = tuple(part.get_shape()), part.get_dtype()
                if found != shape:
                    raise ConversionError(f"{name} of {self.path} has shape {list(found)}; {CONFIG_FILE} asks for {list(shape)}")
                if kind not in _DTYPES:
                    raise ConversionError(
                        f"{name} of {self.path} is {kind}; {', '.join(_DTYPES)} can be converted without loss",
                        hint="Use unquantised weights",
                    )
                types[name] = getattr(torch, _DTYPES[kind])
            kinds = {types[name] for name in rule.hf}
            if len(kinds) > 1:
                raise ConversionError(
                    f"{', '.join(rule.hf)} of {self.path} have different dtypes {sorted(map(str, kinds))} but become one tensor",
                    hint="Save the model in one dtype first",
                )
        return types

    def _check_tie(self) -> None:
        """A second copy of a tied head must be the embedding, bit for bit."""
        import torch

        embedding = next(rule.hf[0] for rule in self.rules.values() if rule.vocab)
        for name in self._tied_names() & set(self._files):
            if self.architecture.tied and not torch.equal(_bits(self.read_hf(name)), _bits(self.read_hf(embedding))):
                raise ConversionError(
                    f"tie_word_embeddings is true in {self.path / CONFIG_FILE}, but {name} differs from {embedding}",
                    hint="Set tie_word_embeddings to false if the model has a head of its own",
                )


def _object(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """A JSON file that holds an object, its keys unique when asked."""
    value = read_json(path, error=ConversionError)
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a {type(value).__name__}, not an object", corrupt=True)
    if unique:

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
            if twice:
                raise ConversionError(f"{path} lists {_some(twice)} twice", corrupt=True)
            return dict(pairs)

        json.loads(path.read_bytes(), object_pairs_hook=once)
    return value


def _some(names: Iterable[str]) -> str:
    """The first names of many, sorted, with their number."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:3])
    return shown if len(ordered) <= 3 else f"{shown} and {len(ordered) - 3} more"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().view(torch.uint8)
