"""Hugging Face directories that are wrong, damaged or hostile: each refused with its facts, and nothing written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conversion.convert import convert, main
from conversion.diff import compare
from conversion.export import open_tokenizer
from conversion.huggingface import HFDirectory
from conversion.load import open_source
from conversion.safetensors_file import SafetensorsFile
from megawrap.errors import ConversionError, MegawrapError
from tests.conversion.models import make_directory, raw_tensors, snapshot

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {
        "single": make_directory(folder / "single", "gqa"),
        "sharded": make_directory(folder / "sharded", "gqa", shard="60KB"),
        "tied": make_directory(folder / "tied", "mqa"),
    }


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None of a key that is there removes it."""
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})


def rename_shard(path: Path, name: str) -> None:
    index = json.loads((path / INDEX).read_text())
    first = index["weight_map"]["lm_head.weight"]
    index["weight_map"] = {key: name if shard == first else shard for key, shard in index["weight_map"].items()}
    (path / INDEX).write_text(json.dumps(index))


def drop_from_index(path: Path) -> None:
    index = json.loads((path / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (path / INDEX).write_text(json.dumps(index))


def add_to_index(path: Path) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = index["weight_map"]["lm_head.weight"]
    (path / INDEX).write_text(json.dumps(index))


def twice_in_index(path: Path) -> None:
    text = (path / INDEX).read_text()
    (path / INDEX).write_text(text.replace('"lm_head.weight"', '"lm_head.weight": "model-00001-of-00009.safetensors", "lm_head.weight"', 1))


def in_two_shards(path: Path) -> None:
    name = json.loads((path / INDEX).read_text())["weight_map"]
    first = name["lm_head.weight"]
    other = next(shard for shard in sorted(set(name.values())) if shard != first)
    tensors = load_file(path / other) | {"lm_head.weight": load_file(path / first)["lm_head.weight"]}
    save_file(tensors, path / other)


def symlinked_shard(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[0]
    outside = path.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)


def only_bin(path: Path) -> None:
    (path / "model.safetensors").unlink()

    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (path.parent / "canary",))

    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def huge_header(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def inf(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] = float("-inf")


def half(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].half()

    return change


Mutation = Callable[[Path], object]
CASES: list[tuple[str, str, Mutation, tuple[str, ...], int]] = [
    # name, original, mutation, facts in the message, exit code
    ("traversal", "sharded", lambda path: rename_shard(path, "../single/model.safetensors"), ("'../single/model.safetensors'",), 3),
    ("absolute", "sharded", lambda path: rename_shard(path, "/etc/passwd"), ("'/etc/passwd'",), 3),
    ("symlink", "sharded", symlinked_shard, ("outside.safetensors",), 3),
    ("missing-shard", "sharded", lambda path: sorted(path.glob("*.safetensors"))[1].unlink(), ("is missing", "names it"), 3),
    ("not-in-index", "sharded", drop_from_index, ("lm_head.weight", "is not in model.safetensors.index.json"), 3),
    ("only-in-index", "sharded", add_to_index, ("model.layers.9.mlp.up_proj.weight", "but it is not"), 3),
    ("twice-in-index", "sharded", twice_in_index, ("lm_head.weight twice",), 3),
    ("in-two-shards", "sharded", in_two_shards, ("lm_head.weight is in both",), 3),
    ("no-weight-map", "sharded", lambda path: edit(path / INDEX, weight_map=[]), ("has no weight_map",), 3),
    ("index-not-json", "sharded", lambda path: (path / INDEX).write_text("{"), (f"{INDEX}:1:2 is not JSON",), 3),
    ("two-formats", "sharded", lambda path: shutil.copy(sorted(path.glob("*.safetensors"))[0], path / "model.safetensors"), ("both",), 2),
    (
        "wrong-shape",
        "single",
        lambda path: edit(path / "config.json", intermediate_size=96),
        ("mlp.gate_proj.weight", "has shape [80, 48]", "asks for [96, 48]"),
        2,
    ),
    (
        "fewer-layers",
        "single",
        lambda path: edit(path / "config.json", num_hidden_layers=3),
        ("model.layers.3.input_layernorm.weight", "and 6 more", "does not have"),
        2,
    ),
    (
        "more-layers",
        "single",
        lambda path: edit(path / "config.json", num_hidden_layers=5),
        ("misses model.layers.4.input_layernorm.weight", "of the 48 tensors"),
        2,
    ),
    ("nan", "single", lambda path: edit_tensors(path, nan), ("model.layers.1.mlp.up_proj.weight", "NaN or Inf"), 2),
    ("inf", "single", lambda path: edit_tensors(path, inf), ("model.norm.weight", "NaN or Inf"), 2),
    (
        "extra-tensor",
        "single",
        lambda path: edit_tensors(path, lambda tensors: tensors.update(bonus=torch.zeros(3))),
        ("bonus", "llama", "does not have"),
        2,
    ),
    (
        "missing-tensor",
        "single",
        lambda path: edit_tensors(path, lambda tensors: tensors.pop("model.norm.weight")),
        ("misses model.norm.weight", "initialised at random"),
        2,
    ),
    ("only-bin", "single", only_bin, ("only pytorch_model.bin", "save_pretrained"), 2),
    ("no-weights", "single", lambda path: (path / "model.safetensors").unlink(), ("holds no weights",), 2),
    ("truncated", "single", truncate, ("model.safetensors is damaged",), 3),
    ("huge-header", "single", huge_header, ("model.safetensors is damaged",), 3),
    ("no-config", "single", lambda path: (path / "config.json").unlink(), ("config.json",), 2),
    ("config-is-a-list", "single", lambda path: (path / "config.json").write_text("[]"), ("holds a list, not an object",), 3),
    (
        "unknown-architecture",
        "single",
        lambda path: edit(path / "config.json", model_type="mamba", architectures=["MambaForCausalLM"]),
        ("'mamba'", "gpt_bigcode (GPTBigCodeForCausalLM), gpt_neox (GPTNeoXForCausalLM), llama (LlamaForCausalLM)"),
        2,
    ),
    ("adapter", "single", lambda path: (path / "adapter_config.json").write_text("{}"), ("adapter_config.json", "Merge it"), 2),
    (
        "quantised-config",
        "single",
        lambda path: edit(path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ("quantization_config is {'quant_method': 'gptq'",),
        2,
    ),
    (
        "quantised-tensor",
        "single",
        lambda path: edit_tensors(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})),
        ("model.norm.weight", "is I8", "without loss"),
        2,
    ),
    ("custom-code", "single", lambda path: edit(path / "config.json", auto_map={"AutoModel": "x.Y"}), ("auto_map", "never executed"), 2),
    (
        "rope-scaling",
        "single",
        lambda path: edit(path / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", "'yarn'", "4.0"),
        2,
    ),
    (
        "tied-flag-off",
        "tied",
        lambda path: edit(path / "config.json", tie_word_embeddings=False),
        ("misses lm_head.weight", "tie_word_embeddings is false"),
        2,
    ),
    (
        "tied-but-different",
        "single",
        lambda path: edit(path / "config.json", tie_word_embeddings=True),
        ("lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings is true"),
        2,
    ),
    (
        "mixed-dtypes-in-one-tensor",
        "single",
        lambda path: edit_tensors(path, half("model.layers.0.self_attn.k_proj.weight")),
        ("q_proj", "torch.float16", "torch.float32"),
        2,
    ),
    (
        "mixed-dtypes-between-layers",
        "single",
        lambda path: edit_tensors(path, half("model.layers.2.mlp.down_proj.weight")),
        ("linear_fc2.weight", "float16 and torch.float32"),
        2,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("original", "mutate", "facts", "code"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_directories_are_refused(
    tmp_path: Path,
    originals: dict[str, Path],
    original: str,
    mutate: Mutation,
    facts: tuple[str, ...],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(originals[original], source)
    mutate(source)
    before = snapshot(tmp_path)
    assert main([str(source), str(tmp_path / "out"), "--to", "torch_dist"]) == code
    told = capsys.readouterr().err
    assert told.startswith("megawrap: error: ") and "Traceback" not in told and len(told.strip().splitlines()) == 1
    assert all(fact in told for fact in facts), told
    assert snapshot(tmp_path) == before


def test_only_bin_is_never_unpickled(tmp_path: Path, originals: dict[str, Path]) -> None:
    source = tmp_path / "source"
    shutil.copytree(originals["single"], source)
    only_bin(source)
    with pytest.raises(ConversionError):
        HFDirectory(source)
    assert not (tmp_path / "canary").exists()


def test_harmless_directories_are_read(tmp_path: Path, originals: dict[str, Path]) -> None:
    """A tied head stored twice with the same bits, and constants that old versions saved, are no reason to refuse."""
    source = tmp_path / "source"
    shutil.copytree(originals["tied"], source)
    edit_tensors(source, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    edit_tensors(source, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}))
    convert(source, tmp_path / "out", to="hf")
    before, after = raw_tensors(originals["tied"]), raw_tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_nonfinite_weights_convert_when_allowed(tmp_path: Path, originals: dict[str, Path]) -> None:
    source = tmp_path / "source"
    shutil.copytree(originals["single"], source)
    edit_tensors(source, nan)
    convert(source, tmp_path / "mg", to="torch_dist", allow_nonfinite=True)
    with pytest.raises(MegawrapError, match="NaN or Inf"):
        convert(tmp_path / "mg", tmp_path / "no", to="hf")
    convert(tmp_path / "mg", tmp_path / "back", to="hf", allow_nonfinite=True)
    before, after = raw_tensors(source), raw_tensors(tmp_path / "back")
    assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)


@pytest.mark.parametrize(("content", "facts"), [("empty", "is empty"), ("missing", "is not a directory"), ("file", "is not a directory")])
def test_neither_format(tmp_path: Path, content: str, facts: str) -> None:
    path = tmp_path / content
    if content == "empty":
        path.mkdir()
    elif content == "file":
        path.write_text("x")
    with pytest.raises(MegawrapError, match=facts):
        open_source(path)


def make_tokenizer(path: Path, *, size: int = 100) -> Path:
    from tokenizers import Tokenizer, models

    path.mkdir()
    vocabulary = {"<|endoftext|>": 0, **{f"t{number}": number for number in range(1, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t1"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_tokenizer_travels_through_the_checkpoint(tmp_path: Path, originals: dict[str, Path]) -> None:
    import transformers

    tokenizer = make_tokenizer(tmp_path / "tok")
    convert(originals["tied"], tmp_path / "mg", to="torch_dist", tokenizer=tokenizer)
    assert convert(tmp_path / "mg", tmp_path / "hf", to="hf").tokenizer
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.eos_token == "<|endoftext|>" and loaded.eos_token_id == 0 and loaded.pad_token_id == 0
    assert loaded("t5", add_special_tokens=False)["input_ids"] == [5]
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_export_ends_where_the_model_was_trained_to(tmp_path: Path, originals: dict[str, Path]) -> None:
    """Fine-tuned with another tokenizer than config.json knew, generation stops at the new end token."""
    source = tmp_path / "source"
    shutil.copytree(originals["tied"], source)
    for name in ("config.json", "generation_config.json"):
        edit(source / name, eos_token_id=77, pad_token_id=None)
    convert(source, tmp_path / "hf", to="hf", tokenizer=make_tokenizer(tmp_path / "tok"))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text()).items() >= {"eos_token_id": 0, "pad_token_id": 0}.items()
    edit(source / "config.json", eos_token_id=[77, 0])
    edit(source / "generation_config.json", eos_token_id=[77, 0])
    convert(source, tmp_path / "kept", to="hf", tokenizer=tmp_path / "tok")
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["eos_token_id"] == [77, 0]


def test_tokenizer_that_is_not_the_models_is_refused(tmp_path: Path, originals: dict[str, Path]) -> None:
    large = make_tokenizer(tmp_path / "large", size=200)
    with HFDirectory(originals["tied"]) as source:
        with pytest.raises(ConversionError, match="has 200 tokens, but the model knows 131"):
            open_tokenizer(large, source)
        source.record = type(source.record)(tokenizer={"sha256": "0" * 64})
        with pytest.raises(ConversionError, match="trained with the tokenizer 000000000000"):
            open_tokenizer(make_tokenizer(tmp_path / "other"), source)


def test_safetensors_file_is_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5, dtype=torch.float32), "a": torch.randn(7).bfloat16(), "c": torch.randn(2, 2, 2, dtype=torch.float64),
        "empty": torch.zeros(0, 4), "d": torch.randn(1).half(),
    }  # fmt: skip
    with SafetensorsFile(tmp_path / "ours", {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
        with pytest.raises(ValueError, match="written before"):
            file.write("a", tensors["a"])
    loaded = load_file(tmp_path / "ours")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].dtype == tensors[name].dtype and torch.equal(loaded[name], tensors[name]) for name in tensors)
    unfinished = SafetensorsFile(tmp_path / "unfinished", {"a": (torch.float32, (2,))})
    with pytest.raises(ValueError, match="misses"):
        unfinished.close()


def test_gpt2_as_it_was_published_has_no_prefix(tmp_path: Path) -> None:
    """Names of the model without its head, and the causal masks that old files hold."""
    directory = make_directory(tmp_path / "hf", "gpt2")
    shutil.copytree(directory, tmp_path / "old")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(tensors, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    with HFDirectory(directory) as new, HFDirectory(tmp_path / "old") as old:
        assert compare(new, old).equal
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "old")(tokens).logits, load(directory)(tokens).logits)
