"""Round trips through torch_dist: bit-identical tensors, equal configs, and transformers computing the same logits."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conversion import convert as command
from conversion.convert import convert
from conversion.diff import compare
from conversion.huggingface import HFDirectory
from conversion.load import open_source
from conversion.megatron import MegatronCheckpoint
from megawrap.checkpoint.store import Store
from megawrap.checkpoint.torch_dist import TorchDistReader
from megawrap.errors import MegawrapError
from tests.conversion.models import VARIANTS, make_directory, make_model, raw_tensors, same_bits, snapshot


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip_is_bit_identical(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    source = make_directory(tmp_path / "hf", variant, dtype=dtype, shard="60KB")
    report = convert(source, tmp_path / "mg", to="torch_dist", tp=2, pp=2)
    assert report.padded_vocab_size == 256 and report.coverage.complete
    back = convert(tmp_path / "mg", tmp_path / "back", to="hf", shard_bytes=50_000)
    assert back.coverage.complete and back.padding == ("none" if "even" in variant else "zeros")
    before, after = raw_tensors(source), raw_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back" / "config.json").read_text())
    assert json.loads((source / "generation_config.json").read_text()) == json.loads(
        (tmp_path / "back" / "generation_config.json").read_text()
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_the_export_without_its_origin(tmp_path: Path, variant: str) -> None:
    """A config.json made from the architecture alone, and one weight file."""
    source = make_directory(tmp_path / "hf", variant)
    with open_source(source) as opened:
        opened.record = type(opened.record)()  # forget the imported config.json
        from conversion.export import HFWriter

        (tmp_path / "out").mkdir()
        writer = HFWriter(tmp_path / "out", opened)
        for name in opened.rules:
            writer.write(name, opened.read(name))
        writer.finish()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.arange(40)[None] * 3 % 131
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load(source)(tokens).logits)
    ours, theirs = model.config.to_dict(), load(source).config.to_dict()
    skipped = {"bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path"}
    assert {key: ours[key] for key in ours if key not in skipped} == {key: theirs[key] for key in theirs if key not in skipped}


def test_layout_on_disk_against_plain_torch(tmp_path: Path) -> None:
    """Stacked layers, padded vocabulary, interleaved query/key/value and gate before up, all by hand."""
    source = make_directory(tmp_path / "hf", "gqa")
    convert(source, tmp_path / "mg", to="torch_dist")
    hf, reader = raw_tensors(source), TorchDistReader(tmp_path / "mg" / "release")
    layers = [f"model.layers.{number}." for number in range(4)]
    gates = torch.stack([torch.cat([hf[f"{at}mlp.gate_proj.weight"], hf[f"{at}mlp.up_proj.weight"]]) for at in layers])
    assert torch.equal(reader.read("decoder.layers.mlp.linear_fc1.weight"), gates)
    rows = []
    for group in range(4):  # 8 query heads of 8 rows: two per group
        at = "model.layers.2.self_attn."
        rows += [hf[f"{at}q_proj.weight"][group * 16 : group * 16 + 16]]
        rows += [hf[f"{at}k_proj.weight"][group * 8 : group * 8 + 8], hf[f"{at}v_proj.weight"][group * 8 : group * 8 + 8]]
    assert torch.equal(reader.read("decoder.layers.self_attention.linear_qkv.weight", index=2), torch.cat(rows))
    embedding = reader.read("embedding.word_embeddings.weight")
    assert torch.equal(embedding[:131], hf["model.embed_tokens.weight"]) and not embedding[131:].any() and len(embedding) == 256
    common = reader.common()
    assert (common["args"].num_query_groups, common["args"].swiglu, common["args"].padded_vocab_size) == (4, True, 256)
    assert common["megawrap"]["architecture"]["vocab_size"] == 131
    assert Store.open(tmp_path / "mg").iteration == "release"


def test_same_bytes_twice(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "hf", "mqa")
    sums = []
    for name in ("one", "two"):
        convert(source, tmp_path / name / "mg", to="torch_dist")
        convert(tmp_path / name / "mg", tmp_path / name / "hf", to="hf")
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        sums.append([(path.name, path.read_bytes()) for path in files])
    assert sums[0] == sums[1]


def test_torch_dist_to_torch_dist_keeps_or_changes_padding(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "hf", "gqa-tied")
    convert(source, tmp_path / "one", to="torch_dist", vocab_divisor=12)
    assert MegatronCheckpoint(tmp_path / "one").record.padded_vocab_size == 132
    assert convert(tmp_path / "one", tmp_path / "two", to="torch_dist", tp=4).padded_vocab_size == 132
    with open_source(source) as a, open_source(tmp_path / "two") as b:
        assert compare(a, b).equal


def test_trained_padding_rows_are_named_and_left_behind(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "hf", "mqa")
    with open_source(source) as opened:
        from conversion.megatron import MegatronWriter

        def write(folder: Path) -> None:
            writer = MegatronWriter(folder, opened, padded_vocab_size=192)
            for name, rule in opened.rules.items():
                tensor = opened.read(name)
                if rule.vocab:  # as Megatron-LM pads: the last row again
                    tensor = torch.cat([tensor, tensor[-1:].expand(192 - len(tensor), -1)])
                writer.write(name, tensor)
            writer.finish()

        Store(tmp_path / "mg").save(7, write)
    report = convert(tmp_path / "mg", tmp_path / "back", to="hf")
    assert report.padding == "other values"
    assert all(same_bits(tensor, raw_tensors(tmp_path / "back")[name]) for name, tensor in raw_tensors(source).items())


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"tp": 3}, "3"),
        ({"pp": 3}, "4 layers cannot be split evenly over 3"),
        ({"tp": 0}, "tp is 0"),
        ({"tokenizer": Path("/nowhere/tokenizer.json")}, "/nowhere/tokenizer.json"),
    ],
)
def test_impossible_requests_write_nothing(tmp_path: Path, options: dict[str, Any], facts: str) -> None:
    source = make_directory(tmp_path / "hf", "mqa")
    before = snapshot(tmp_path)
    with pytest.raises(MegawrapError) as refusal:
        convert(source, tmp_path / "mg", to="torch_dist", **options)
    assert facts in str(refusal.value) and snapshot(tmp_path) == before


def test_output_must_be_new(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "hf", "mqa")
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", to="torch_dist")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    for name in ("full", "file", "hf"):
        with pytest.raises(MegawrapError, match=r"is not empty|is no directory"):
            convert(source, tmp_path / name, to="torch_dist")
    assert snapshot(tmp_path) == before


def test_flipped_bit_in_a_checkpoint_is_corrupt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(make_directory(tmp_path / "hf", "mqa"), tmp_path / "mg", to="torch_dist")
    file = next((tmp_path / "mg" / "release").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = snapshot(tmp_path)
    assert command.main([str(tmp_path / "mg"), str(tmp_path / "out"), "--to", "hf"]) == 3
    assert file.name in capsys.readouterr().err and snapshot(tmp_path) == before


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_directory(tmp_path / "hf", "mqa")
    assert command.main([str(source), str(tmp_path / "mg"), "--to", "torch_dist", "--tp", "2"]) == 0
    printed = capsys.readouterr().out
    assert "52 tensors" in printed.replace("tensors   52", "52 tensors") and "used exactly once" in printed
    assert command.main([str(source), str(tmp_path / "mg2"), "--to", "nemo"]) == 2
    assert command.main([str(tmp_path / "none"), str(tmp_path / "mg2"), "--to", "hf"]) == 2
    assert "none is not a directory" in capsys.readouterr().err
    assert not (tmp_path / "mg2").exists()


@pytest.mark.fault
@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_r9_full_disk_leaves_nothing_behind(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str], record_property: Any) -> None:
    source = make_directory(tmp_path / "hf", "mqa")
    before = snapshot(tmp_path)
    capsys.readouterr()
    limits = (10, 100, 2_000, 5_000, *range(20_000, 290_000, 45_000))
    for limit in limits:  # Python ignores SIGXFSZ, so that a write fails with EFBIG
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            code = command.main([str(source), str(tmp_path / "out"), "--to", to])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        told = capsys.readouterr().err
        assert code == 2 and "megawrap: error: cannot write" in told and str(tmp_path) in told, (limit, told)
        assert snapshot(tmp_path) == before
    record_property("R9", (len(limits), len(limits)))


@pytest.mark.fault
@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_r6_killed_conversion_is_repeated_without_a_manual_step(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """A process that dies at tensor n leaves nothing under the final name, and the next one ends as if it had not been."""
    source = make_directory(tmp_path / "hf", "mqa")
    convert(source, tmp_path / "clean", to=to)
    original = HFDirectory.read_padded
    with HFDirectory(source) as opened:
        victims = [*list(opened.rules)[::4], "decoder.final_layernorm.bias", "the last file"]
    for victim in victims:

        def die(self: HFDirectory, name: str, victim: str = victim) -> torch.Tensor:
            if name == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, name)

        if (child := os.fork()) == 0:
            monkeypatch.setattr(HFDirectory, "read_padded", die)
            if victim == "the last file":
                monkeypatch.setattr("conversion.publish.publish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            convert(source, tmp_path / "out", to=to)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not (tmp_path / "out").exists() and (tmp_path / ".out.tmp").exists()
        convert(source, tmp_path / "out", to=to)
        assert not (tmp_path / ".out.tmp").exists()
        for path in (tmp_path / "clean").rglob("*"):
            assert path.is_dir() or path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "clean")).read_bytes()
        shutil.rmtree(tmp_path / "out")
    record_property("R6", (len(victims), len(victims)))


def test_hf_directory_is_read_through_the_hub_cache(tmp_path: Path) -> None:
    """A snapshot of the hub cache is made of links into its own blobs; those are followed, others are not."""
    blobs, snap = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snap.mkdir(parents=True)
    for number, file in enumerate(sorted(make_directory(tmp_path / "hf", "mqa", shard="60KB").iterdir())):
        file.rename(blobs / str(number))
        (snap / file.name).symlink_to(Path("../../blobs") / str(number))
    assert HFDirectory(snap).num_elements == 72_736


MEASURED = """
import sys
from pathlib import Path
import conversion.export, conversion.megatron
from conversion.convert import convert

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), to=sys.argv[3], verify=False)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """250 MB in tensors of at most 8 MB: a mapping of 64 MiB and a few tensors are all that is ever held."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8, "head_dim": 64}
    make_model("llama", **sizes).save_pretrained(tmp_path / "hf")
    for source, target, to in (("hf", "mg", "torch_dist"), ("mg", "back", "hf")):
        command_line = [sys.executable, "-c", MEASURED, str(tmp_path / source), str(tmp_path / target), to]
        grown = int(subprocess.run(command_line, capture_output=True, text=True, check=True).stdout.split()[-1])
        assert grown < (64 + 8 * 5 + 16) << 20, (to, grown)


@pytest.mark.parametrize("module", ["convert", "diff", "verify"])
def test_help_needs_no_torch(module: str) -> None:
    code = f"""
import sys
import conversion.{module} as module
try:
    module.main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules and "megawrap.cli" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: megawrap {module}" in done.stdout, done.stderr
