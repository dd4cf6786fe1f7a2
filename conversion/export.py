"""Writing a Hugging Face directory that transformers, vLLM and evaluation tools load as it is.

In: canonical tensors one at a time, the architecture, and what the source says about itself. Out: safetensors (in shards
with an index when large), config.json, generation_config.json, the tokenizer and a model card.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, TOKENIZER_FILES, WEIGHTS_FILE
from conversion.safetensors_file import SafetensorsFile
from conversion.source import Source
from megawrap.data.tokenizer import Tokenizer
from megawrap.data.tokenizer_files import VOCABULARY_FILES
from megawrap.errors import ConversionError
from megawrap.families.base import TRANSFORMERS_VERSION
from megawrap.io import explain_write_errors

SHARD_BYTES = 5 * 10**9
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HFWriter:
    """Writes one model into an existing, empty directory.

    Args:
        directory: where to write.
        source: gives rules, dtypes, architecture and record; its tensors are not read here.
        tokenizer: written beside the weights, and named in config.json when that is made anew; none writes no tokenizer.
        shard_bytes: size above which another file is started.
    """

    def __init__(self, directory: Path, source: Source, *, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = directory
        self.source = source
        self.tokenizer = tokenizer
        self._rules = source.rules
        self._dtypes = source.dtypes
        self.shapes = {name: shape for rule in self._rules.values() for name, shape in rule.hf_shapes.items()}
        types = {hf: self._dtypes[name] for name, rule in self._rules.items() for hf in rule.hf}
        self._files = self._plan(types, shard_bytes)

    def _plan(self, types: dict[str, torch.dtype], shard_bytes: int) -> dict[str, SafetensorsFile]:
        """An open file for every Hugging Face tensor, filled in the order of the model."""
        groups: list[list[str]] = [[]]
        size = 0
        for name, shape in self.shapes.items():
            num_bytes = math.prod(shape) * types[name].itemsize
            if groups[-1] and size + num_bytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += num_bytes
        files = {}
        for number, names in enumerate(groups, start=1):
            path = self.directory / (WEIGHTS_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors")
            file = SafetensorsFile(path, {name: (types[name], self.shapes[name]) for name in names})
            files.update(dict.fromkeys(names, file))
        return files

    def write(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Write a canonical tensor.

        Returns:
            The Hugging Face tensors it became.
        """
        rule = self._rules[name]
        parts = list(zip(rule.hf, rule.to_hf(tensor), strict=True))
        for hf, part in parts:
            self._files[hf].write(hf, part)
        return parts

    def finish(self) -> None:
        """Close the weight files and write everything beside them."""
        files = {id(file): file for file in self._files.values()}.values()
        for file in files:
            file.close()
        with explain_write_errors(self.directory, error=ConversionError):
            if len(files) > 1:
                weight_map = {name: file.path.name for name, file in sorted(self._files.items())}
                elements = sum(map(math.prod, self.shapes.values()))
                total = sum(math.prod(rule.megatron_shape) * self._dtypes[name].itemsize for name, rule in self._rules.items())
                _write_json(
                    self.directory / INDEX_FILE,
                    {"metadata": {"total_parameters": elements, "total_size": total}, "weight_map": weight_map},
                )
            config = self.config()
            _write_json(self.directory / CONFIG_FILE, config)
            generation = self.source.record.generation_config
            if generation is None or not self._ends_as(generation):
                generation = (generation or {}) | _generation_config(config)
            _write_json(self.directory / GENERATION_FILE, generation)
            if self.tokenizer is not None:
                write_tokenizer(self.tokenizer, self.directory, self.source.architecture.max_position_embeddings)
            (self.directory / "README.md").write_text(self._card(), encoding="utf-8")

    def config(self) -> dict[str, Any]:
        """The config.json: as it was imported while the architecture is still that one, else made from the architecture."""
        source, kept = self.source, self.source.record.hf_config
        dtype = str(Counter(self._dtypes.values()).most_common(1)[0][0]).removeprefix("torch.")
        if kept is None or source.family.from_hf(kept) != source.architecture:
            return source.family.to_hf(source.architecture) | {"dtype": dtype} | self._ends()
        key = "torch_dtype" if "torch_dtype" in kept and "dtype" not in kept else "dtype"
        same = kept.get(key) in (dtype, f"torch.{dtype}")
        return {**kept, **({} if same else {key: dtype}), **({} if self._ends_as(kept) else self._ends())}

    def _ends(self) -> dict[str, int | None]:
        """The token a generation ends with, and the one short sequences are filled with."""
        facts = self.tokenizer.facts() if self.tokenizer is not None else self.source.record.tokenizer
        end, pad = facts.get("eos_id"), facts.get("pad_id")
        return {"eos_token_id": end, "pad_token_id": end if pad is None else pad}

    def _ends_as(self, config: dict[str, Any]) -> bool:
        """Whether a kept configuration stops at the token that the model was trained to end with."""
        end, named = self._ends()["eos_token_id"], config.get("eos_token_id")
        return end is None or end == named or (isinstance(named, list) and end in named)

    def _card(self) -> str:
        source, architecture = self.source, self.source.architecture
        parameters = sum(math.prod(rule.megatron_shape) for rule in self._rules.values())
        facts = {
            "architecture": source.family.hf_class,
            "parameters": f"{parameters:,}",
            "layers, width, heads": f"{architecture.num_layers}, {architecture.hidden_size}, "
            f"{architecture.num_attention_heads} (key/value {architecture.num_query_groups})",
            "vocabulary, positions": f"{architecture.vocab_size}, {architecture.max_position_embeddings}",
            "training iteration": str(source.record.iteration),
        }
        rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
        head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- megawrap\n---\n"
        return (
            f"{head}\n# {source.family.hf_class}\n\nFine-tuned and converted with megawrap.\n\n| | |\n|---|---|\n{rows}\n\n"
            '```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("PATH")\n```\n'
        )


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Copy the tokenizer's files, making tokenizer_config.json when there is none beside it."""
    for name in TOKENIZER_FILES if tokenizer.path.is_file() else ():
        if (tokenizer.path.parent / name).is_file() and name != tokenizer.path.name:
            shutil.copyfile(tokenizer.path.parent / name, directory / name)
    if tokenizer.path.suffix == ".model":
        shutil.copyfile(tokenizer.path, directory / "tokenizer.model")
        return  # which class of transformers reads it is not known
    if tokenizer.path.is_dir():
        for name in VOCABULARY_FILES:
            if (tokenizer.path / name).is_file():
                shutil.copyfile(tokenizer.path / name, directory / name)
        return
    shutil.copyfile(tokenizer.path, directory / "tokenizer.json")
    if not (directory / "tokenizer_config.json").exists():
        end = tokenizer.eos_token
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "clean_up_tokenization_spaces": False}
        _write_json(directory / "tokenizer_config.json", {**settings, "eos_token": end, "pad_token": end})


def open_tokenizer(given: Path | None, source: Source) -> Tokenizer | None:
    """The tokenizer that goes with a model: the given one, else the one the source carries, else none.

    Raises:
        MegawrapError: there is none at the path, it is not the one the model was trained with, or it has more tokens than
            the model.
    """
    path = given or source.record.tokenizer_dir
    if path is None:
        return None
    tokenizer = Tokenizer(path)
    trained = source.record.tokenizer.get("sha256")
    if trained is not None and tokenizer.sha256 != trained:
        raise ConversionError(
            f"{tokenizer.path} has sha256 {tokenizer.sha256[:12]}, but the model was trained with the tokenizer {trained[:12]}",
            hint="Give the tokenizer that made the data",
        )
    if tokenizer.vocab_size > source.architecture.vocab_size:
        raise ConversionError(f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model knows {source.architecture.vocab_size}")
    return tokenizer


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    ids = {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}
    return {"_from_model_config": True, **ids, "transformers_version": TRANSFORMERS_VERSION}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
