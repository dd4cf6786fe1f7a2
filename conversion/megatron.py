"""Megatron torch_dist checkpoints as sources and targets of canonical tensors.

In: a checkpoint root, an iter_* or a release directory; or canonical tensors to be written. Out: a `MegatronCheckpoint`
whose tensors are read one layer at a time, or a directory that megatron-core loads at any tp x pp. Layers are stacked on
disk ([layers, ...] under a name without the index), vocabularies are padded; both are undone here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface import TOKENIZER_FILES
from conversion.source import Record, Source
from megawrap import families
from megawrap.checkpoint.arguments import CHECKPOINT_VERSION, megatron_arguments
from megawrap.checkpoint.store import Checkpoint, Store
from megawrap.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megawrap.data.tokenizer_files import VOCABULARY_FILES, holds_tokenizer
from megawrap.errors import CheckpointError, ConversionError
from megawrap.families.base import Rule
from megawrap.io import explain_write_errors
from megawrap.models.architecture import LAYERS, Architecture

TOKENIZER_DIR = "tokenizer"
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_OPTIMIZER = ("optimizer.", "chained_")
# Linear layers whose (empty) extra state megatron-core asks for in every layer; the last one is TransformerEngine's.
_EXTRA_STATE = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2", "self_attention.core_attention",
)  # fmt: skip


class MegatronCheckpoint(Source):
    """A torch_dist checkpoint on disk.

    Args:
        path: root (its tracker is followed), iter_* or release directory.
        trust: read it although no manifest.json says what its files should be.
        verify: compare the sha256 of its files with the manifest first; collective when ranks were started.
        allow_nonfinite: read NaN and Inf instead of refusing them.

    Raises:
        CheckpointError: no checkpoint, damaged, not megawrap's, or tensors missing, left over or of the wrong shape.
    """

    format = "torch_dist"

    def __init__(self, path: Path, *, trust: bool = False, verify: bool = True, allow_nonfinite: bool = False) -> None:
        checkpoint = Store.open(Path(path), trust=trust, verify=verify)
        self.path = checkpoint.path
        self.allow_nonfinite = allow_nonfinite
        self.reader = TorchDistReader(self.path, trust=trust)
        said = self.reader.common().get("megawrap")
        if not isinstance(said, dict) or not isinstance(said.get("architecture"), dict):
            raise CheckpointError(
                f"common.pt of {self.path} does not hold megawrap's description of the architecture", hint="Was it written by megawrap?"
            )
        self.said = said
        self.architecture = Architecture.from_dict(said["architecture"])
        self.family = families.get(self.architecture.family)
        self._rules = super().rules
        self._keys = self.reader.keys()
        self.record = _record(checkpoint, said, self._padded_rows())
        self._places = self._locate()

    @property
    def rules(self) -> dict[str, Rule]:
        """See `Source.rules`."""
        return self._rules

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """See `Source.dtypes`."""
        return {name: self._keys[key][1] for name, (key, _) in self._places.items()}

    def read_padded(self, name: str) -> torch.Tensor:
        """See `Source.read_padded`."""
        key, index = self._places[name]
        return self.reader.read(key, index)

    def close(self) -> None:
        """See `Source.close`; no file is held open between reads."""

    def _padded_rows(self) -> int | None:
        name = next(rule.megatron for rule in self._rules.values() if rule.vocab)
        return self._keys[name][0][0] if name in self._keys else None

    def _locate(self) -> dict[str, tuple[str, int | None]]:
        """Key and layer index on disk of every canonical tensor."""
        places: dict[str, tuple[str, int | None]] = {}
        wrong: list[str] = []
        for name, rule in self._rules.items():
            stacked, index = stacked_name(name)
            at: tuple[str, int | None] = (stacked, index) if stacked in self._keys else (name, None)
            expected = rule.megatron_shape if at[1] is None else (self.architecture.num_layers, *rule.megatron_shape)
            if at[0] not in self._keys:
                wrong.append(f"{name} is missing")
                continue
            found = self._keys[at[0]][0]
            enough = rule.vocab and len(found) == len(expected) and found[0] >= expected[0] and found[1:] == expected[1:]
            if found != expected and not enough:
                wrong.append(f"{at[0]} has shape {list(found)}, the architecture asks for {list(expected)}")
            places[name] = at
        extra = {key for key in self._keys if not key.startswith(_OPTIMIZER)} - {key for key, _ in places.values()}
        wrong += [f"{key} does not belong to the architecture" for key in sorted(extra)]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise CheckpointError(
                f"{self.path} and its {self.architecture.family} architecture do not fit: {'; '.join(wrong[:4])}{more}",
                hint="Nothing is dropped, and nothing is initialised at random",
            )
        return places


def _record(checkpoint: Checkpoint, said: dict[str, Any], padded: int | None) -> Record:
    folder = checkpoint.path / TOKENIZER_DIR
    kept, tokenizer = said.get("hf"), said.get("tokenizer")
    kept = kept if isinstance(kept, dict) else {}
    return Record(
        hf_config=kept.get("config"),
        generation_config=kept.get("generation_config"),
        tokenizer=tokenizer if isinstance(tokenizer, dict) else {},
        tokenizer_dir=folder if holds_tokenizer(folder) else None,
        iteration=checkpoint.iteration if isinstance(checkpoint.iteration, int) else 0,
        padded_vocab_size=padded,
    )


def stacked_name(name: str) -> tuple[str, int | None]:
    """("decoder.layers.x", 3) for "decoder.layers.3.x"; a name outside the layers comes back with None."""
    if not name.startswith(LAYERS):
        return name, None
    index, _, rest = name.removeprefix(LAYERS).partition(".")
    return LAYERS + rest, int(index)


class MegatronWriter:
    """Writes the files of one checkpoint; `Store.save` makes them one.

    Args:
        directory: existing directory of the checkpoint.
        source: gives rules, architecture and record; its tensors are not read here.
        padded_vocab_size: rows that vocabulary tensors get on disk; those beyond the vocabulary are zero.
        tokenizer: directory or tokenizer.json whose files are kept in the checkpoint; none keeps none.
    """

    def __init__(self, directory: Path, source: Source, *, padded_vocab_size: int, tokenizer: Path | None = None) -> None:
        self.source = source
        self.padded_vocab_size = padded_vocab_size
        self.tokenizer = tokenizer
        self._rules = source.rules
        self.shapes = {name: self._padded(rule) for name, rule in self._rules.items()}
        self._require_one_dtype_per_stack()
        self.writer = TorchDistWriter(directory)

    def _padded(self, rule: Rule) -> tuple[int, ...]:
        return (self.padded_vocab_size, *rule.columns) if rule.vocab else rule.megatron_shape

    def _require_one_dtype_per_stack(self) -> None:
        found: dict[str, set[str]] = {}
        for name, dtype in self.source.dtypes.items():
            found.setdefault(stacked_name(name)[0], set()).add(str(dtype))
        for key, dtypes in found.items():
            if len(dtypes) > 1:
                raise ConversionError(
                    f"{key} of {self.source.path} has layers of {' and '.join(sorted(dtypes))}, but layers are stacked in one tensor",
                    hint="Save the model in one dtype first",
                )

    def write(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Write a canonical tensor.

        Returns:
            Its name and the tensor as written, with padding.
        """
        if self._rules[name].vocab:
            tensor = torch.cat([tensor, tensor.new_zeros(self.padded_vocab_size - tensor.size(0), *tensor.shape[1:])])
        key, index = stacked_name(name)
        self.writer.write(key, tensor, index, None if index is None else self.source.architecture.num_layers)
        return [(name, tensor)]

    def finish(self) -> None:
        """Write the empty entries megatron-core asks for, common.pt, the index and the tokenizer."""
        layers = self.source.architecture.num_layers
        for module in _EXTRA_STATE:
            for layer in range(layers):
                self.writer.write_empty(f"{LAYERS}{module}._extra_state/shard_{layer}_{layers}")
        self.writer.finish(self.common())
        if self.tokenizer is not None:
            keep_tokenizer(self.tokenizer, self.writer.path)

    def common(self) -> dict[str, Any]:
        """The content of common.pt: Megatron's arguments, and what megawrap knows of the model. Plain types."""
        record, architecture = self.source.record, self.source.architecture
        said = {
            "architecture": architecture.to_dict(),
            "padded_vocab_size": self.padded_vocab_size,
            "consumed_rows": 0,
            "tokenizer": record.tokenizer,
        }
        said |= origin(record)
        dtypes = set(self.source.dtypes.values())
        precision = _PRECISIONS.get(dtypes.pop(), "fp32") if len(dtypes) == 1 else "fp32"
        args = megatron_arguments(architecture, self.padded_vocab_size, precision)
        return {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": record.iteration, "megawrap": said}


def origin(record: Record) -> dict[str, Any]:
    """What a later checkpoint of the same model keeps, so that an export gets its first config.json back."""
    if record.hf_config is None:
        return {}
    return {"hf": {"config": record.hf_config, "generation_config": record.generation_config}}


def keep_tokenizer(tokenizer: Path, directory: Path) -> None:
    """Copy the tokenizer's files into a checkpoint, so that an export needs nothing else."""
    with explain_write_errors(directory, error=ConversionError):
        (directory / TOKENIZER_DIR).mkdir()
        models = [path.name for path in tokenizer.glob("*.model")]
        for name in {*TOKENIZER_FILES, *VOCABULARY_FILES, *models} if tokenizer.is_dir() else ():
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, directory / TOKENIZER_DIR / name)
        if not tokenizer.is_dir():
            name = "tokenizer.model" if tokenizer.suffix == ".model" else "tokenizer.json"
            shutil.copyfile(tokenizer, directory / TOKENIZER_DIR / name)
