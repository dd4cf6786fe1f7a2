"""The verifier itself: planted errors are named by the weight check and, where they change the function, by the logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import diff, verify
from conversion.convert import convert
from conversion.diff import compare, compare_tensors
from conversion.huggingface import HFDirectory
from conversion.ledger import Ledger
from conversion.load import open_source
from conversion.verify import compare_weights, judge_logits, transformers_logits
from megawrap.families.base import Rule
from tests import ranks
from tests.conversion import rank_tasks
from tests.conversion.models import make_directory

Tensors = dict[str, torch.Tensor]
SEQUENCES = [np.random.default_rng(3).integers(131, size=length).tolist() for length in (64, 17)]
LLAMA, BIGCODE = "model.layers.{}.", "transformer.h.{}."


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def replace(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = by(tensors[name]).contiguous()

    return change


def exchange_layers(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(LLAMA.format(1))]:
        swap(name, name.replace(LLAMA.format(1), LLAMA.format(2)))(tensors)


def interleave_rotary(tensors: Tensors) -> None:
    """The row order of original Llama checkpoints, which transformers and megatron-core do not use."""
    for kind in ("q", "k"):
        name = LLAMA.format(0) + f"self_attn.{kind}_proj.weight"
        tensors[name] = tensors[name].view(-1, 2, 4, 48).transpose(1, 2).reshape(-1, 48).contiguous()


def last_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[17] = torch.nextafter(tensor.view(-1)[17], torch.tensor(9.0))
    return tensor


def swap_key_value_of_mqa(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[:48], tensor[60:], tensor[48:60]])


# variant, error, tensors that the weight check must name, whether logits change
PLANTED: dict[str, tuple[str, Callable[[Tensors], None], tuple[str, ...], bool]] = {
    "gate and up swapped": (
        "gqa",
        swap(LLAMA.format(1) + "mlp.gate_proj.weight", LLAMA.format(1) + "mlp.up_proj.weight"),
        (LLAMA.format(1) + "mlp.gate_proj.weight", LLAMA.format(1) + "mlp.up_proj.weight"),
        True,
    ),
    "key and value swapped": (
        "gqa",
        swap(LLAMA.format(2) + "self_attn.k_proj.weight", LLAMA.format(2) + "self_attn.v_proj.weight"),
        (LLAMA.format(2) + "self_attn.k_proj.weight", LLAMA.format(2) + "self_attn.v_proj.weight"),
        True,
    ),
    "key and value swapped, multi-query": (
        "mqa", replace(BIGCODE.format(0) + "attn.c_attn.weight", swap_key_value_of_mqa), (BIGCODE.format(0) + "attn.c_attn.weight",), True,
    ),
    "query heads reversed": (
        "gqa", replace(LLAMA.format(0) + "self_attn.q_proj.weight", lambda t: t.view(8, 8, 48).flip(0).reshape(64, 48)),
        (LLAMA.format(0) + "self_attn.q_proj.weight",), True,
    ),
    "rotary rows permuted": (
        "gqa", interleave_rotary, (LLAMA.format(0) + "self_attn.q_proj.weight", LLAMA.format(0) + "self_attn.k_proj.weight"), True,
    ),
    "norm left at 1": ("gqa", replace("model.norm.weight", torch.ones_like), ("model.norm.weight",), True),
    "norm of a layer left at 1": (
        "mqa", replace(BIGCODE.format(3) + "ln_2.weight", torch.ones_like), (BIGCODE.format(3) + "ln_2.weight",), True,
    ),
    "norm bias dropped": ("mqa", replace("transformer.ln_f.bias", torch.zeros_like), ("transformer.ln_f.bias",), True),
    "bias dropped": (
        "mqa", replace(BIGCODE.format(1) + "attn.c_attn.bias", torch.zeros_like), (BIGCODE.format(1) + "attn.c_attn.bias",), True,
    ),
    "embedding one row off": ("gqa", replace("model.embed_tokens.weight", lambda t: t.roll(1, 0)), ("model.embed_tokens.weight",), True),
    "positions one row off": ("mqa", replace("transformer.wpe.weight", lambda t: t.roll(1, 0)), ("transformer.wpe.weight",), True),
    "square matrix transposed": (
        "mqa", replace(BIGCODE.format(2) + "attn.c_proj.weight", lambda t: t.t()), (BIGCODE.format(2) + "attn.c_proj.weight",), True,
    ),
    "two layers exchanged": ("gqa", exchange_layers, (LLAMA.format(1) + "input_layernorm.weight",), True),
    "head replaced by the embedding": (
        "gqa", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}), ("lm_head.weight",), True,
    ),
    "one tensor-parallel shard stale": (
        "gqa", replace(LLAMA.format(3) + "mlp.down_proj.weight", lambda t: torch.cat([t[:, :40], t[:, 40:] * 0.99], 1)),
        (LLAMA.format(3) + "mlp.down_proj.weight",), True,
    ),
    "fp16 on the way": (
        "gqa", replace(LLAMA.format(0) + "mlp.up_proj.weight", lambda t: t.half().float()), (LLAMA.format(0) + "mlp.up_proj.weight",), True,
    ),
    "last bit of one element": (
        "gqa", replace(LLAMA.format(0) + "mlp.up_proj.weight", last_bit), (LLAMA.format(0) + "mlp.up_proj.weight",), False,
    ),
}  # fmt: skip
CONFIGURED: dict[str, tuple[str, dict[str, Any], str]] = {
    "erf gelu for tanh gelu": ("mqa", {"activation_function": "gelu"}, "activation 'gelu' against 'gelu_tanh'"),
    "another norm epsilon": ("mqa", {"layer_norm_epsilon": 1e-2}, "norm_epsilon 0.01 against 1e-05"),
    "another rotary base": (
        "gqa",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "rope_theta 10000.0 against 5000.0",
    ),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {variant: make_directory(folder / variant, variant) for variant in ("gqa", "mqa")}


@pytest.fixture(scope="module")
def planted(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for every planted error."""
    folder, found = tmp_path_factory.mktemp("planted"), {}
    for number, (name, (variant, change, _, _)) in enumerate(PLANTED.items()):
        found[name] = folder / str(number)
        shutil.copytree(originals[variant], found[name])
        tensors = load_file(found[name] / "model.safetensors")
        change(tensors)
        save_file(tensors, found[name] / "model.safetensors", metadata={"format": "pt"})
    for number, (name, (variant, changes, _)) in enumerate(CONFIGURED.items()):
        found[name] = folder / f"config-{number}"
        shutil.copytree(originals[variant], found[name])
        config = json.loads((found[name] / "config.json").read_text())
        (found[name] / "config.json").write_text(json.dumps(config | changes))
    return found


@pytest.mark.parametrize("name", PLANTED)
def test_weight_check_names_every_planted_error(name: str, originals: dict[str, Path], planted: dict[str, Path], tmp_path: Path) -> None:
    """Through a whole conversion, in whose round trip the error would be invisible."""
    variant, _, names, _ = PLANTED[name]
    convert(planted[name], tmp_path / "mg", to="torch_dist")
    with open_source(tmp_path / "mg") as source, HFDirectory(originals[variant]) as other:
        checks = {check.name: check for check in compare_weights(source, other)}
    assert not checks["weights"].passed and checks["coverage"].passed and checks["config"].passed
    named = {problem.split(":")[0] for problem in checks["weights"].problems}
    assert named == set(names) or (name == "two layers exchanged" and len(named) == 18 and set(names) < named)


@pytest.mark.parametrize("name", CONFIGURED)
def test_config_check_names_every_field(name: str, originals: dict[str, Path], planted: dict[str, Path]) -> None:
    variant, _, facts = CONFIGURED[name]
    with open_source(planted[name]) as source, HFDirectory(originals[variant]) as other:
        checks = {check.name: check for check in compare_weights(source, other)}
        assert checks["config"].problems == (facts,) and checks["weights"].passed
        assert compare(source, other).fields == (facts,)


@pytest.mark.dist
def test_logits_catch_every_planted_error_that_changes_the_function(originals: dict[str, Path], planted: dict[str, Path]) -> None:
    """Without looking at weights: what a rule that is wrong in both directions would do."""
    names = list(planted)
    theirs = {variant: transformers_logits(directory, SEQUENCES) for variant, directory in originals.items()}
    (found,) = ranks.run(1, rank_tasks.many_logits, [*originals.values(), *(planted[name] for name in names)], SEQUENCES)
    for variant, ours in zip(originals, found, strict=False):
        assert judge_logits(ours, theirs[variant], 1e-4).passed
    for name, ours in zip(names, found[len(originals) :], strict=True):
        variant, changes = (PLANTED[name][0], PLANTED[name][3]) if name in PLANTED else (CONFIGURED[name][0], True)
        assert judge_logits(ours, theirs[variant], 1e-4).passed != changes, name


def test_judging_logits() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, 131))
    assert judge_logits(logits + 9e-5, logits, 1e-4).passed
    worse = logits.copy()
    worse[7, 11] += 2e-4
    assert "at position 7, token 11" in judge_logits(worse, logits, 1e-4).problems[0]
    swapped = logits.copy()
    swapped[3, [logits[3].argmax(), logits[3].argmin()]] = swapped[3, [logits[3].argmin(), logits[3].argmax()]]
    problems = judge_logits(swapped, logits, 1e-4).problems
    assert len(problems) == 3 and "KL" in problems[1] and problems[2] == "the best token differs at 1 of 50 positions"
    assert not judge_logits(logits[:, :-1], logits, 1e-4).passed
    assert not judge_logits(np.full_like(logits, np.nan), logits, 1e-4).passed


def _fields(rule: Rule) -> tuple[Any, ...]:
    return rule.hf, rule.groups, rule.rows, rule.columns


def test_ledger_tells_what_is_not_covered() -> None:
    ledger = Ledger({"a": (2, 3), "b": (4,)}, {"x": (6,), "y": (4,)})
    ledger.used("a", torch.zeros(2, 3))
    ledger.used("a", torch.zeros(2, 3))
    ledger.written("x", torch.zeros(5))
    ledger.written("z", torch.zeros(1))
    sound = Rule("decoder.m", ("h1", "h2"), 2, (3, 1), (5,))

    class Forgetful(Rule):
        """Writes the first row of every group over the second."""

        def from_hf(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            laid_out = super().from_hf(tensors).clone()
            laid_out[1::4] = laid_out[0::4]
            return laid_out

    class NoInverse(Rule):
        """Comes back in another order than it went."""

        def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
            return [part.flip(0) for part in super().to_hf(tensor)]

    ledger.prove([sound, Forgetful("bad.1", *_fields(sound)), NoInverse("bad.2", *_fields(sound))])
    problems = ledger.close().problems
    assert problems == (
        "the rule of bad.1 does not move every row exactly once", "the rule of bad.2 does not move every row exactly once",
        "a: 12 elements used, 6 expected", "b: 0 elements used, 4 expected", "x: 5 elements written, 6 expected",
        "y: 0 elements written, 4 expected", "z: 1 elements written, 0 expected",
    )  # fmt: skip


def test_bits_decide(tmp_path: Path) -> None:
    zero, minus = torch.tensor([[0.0, 1.0]]), torch.tensor([[-0.0, 1.0]])
    found = compare_tensors("w", zero, minus)
    assert found is not None and (found.first, found.differing, found.largest, found.a, found.b) == ((0, 0), 1, 0.0, "0.0", "-0.0")
    nan = torch.tensor([[float("nan"), 1.0]])
    assert compare_tensors("w", nan, nan.clone()) is None
    found = compare_tensors("w", zero, nan)
    assert found is not None and found.largest is None
    found = compare_tensors("w", zero.bfloat16(), zero)
    assert found is not None and (found.kind, found.a, found.b) == ("dtype", "torch.bfloat16", "torch.float32")
    assert compare_tensors("w", zero, zero.t()).kind == "shape"  # type: ignore[union-attr]


def test_diff_command(tmp_path: Path, originals: dict[str, Path], planted: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    convert(originals["gqa"], tmp_path / "mg", to="torch_dist", vocab_divisor=1)
    convert(originals["gqa"], tmp_path / "padded", to="torch_dist")
    assert diff.main([str(tmp_path / "mg"), str(tmp_path / "padded")]) == 0
    assert "equal: 27 tensors, 95,952 elements, bit for bit" in capsys.readouterr().out
    assert diff.main([str(tmp_path / "mg"), str(planted["last bit of one element"]), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    (entry,) = told["differences"]
    assert entry["name"] == "decoder.layers.0.mlp.linear_fc1.weight" and entry["first"] == [80, 17] and entry["differing"] == 1
    assert 0 < entry["largest"] < 1e-6 and not told["equal"]
    assert diff.main([str(originals["gqa"]), str(originals["mqa"])]) == 2
    assert diff.main([str(originals["gqa"]), str(make_directory(tmp_path / "other", "gqa-tied"))]) == 1
    assert "output_layer.weight: only in A" in capsys.readouterr().out
    file = next((tmp_path / "mg" / "release").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert diff.main([str(tmp_path / "mg"), str(originals["gqa"])]) == 3
    assert file.name in capsys.readouterr().err


@pytest.mark.dist
def test_verify_command(tmp_path: Path, originals: dict[str, Path], planted: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    convert(originals["mqa"], tmp_path / "good", to="torch_dist")
    assert verify.main([str(tmp_path / "good"), "--against", str(originals["mqa"]), "--tp", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] and [check["name"] for check in told["checks"]] == ["coverage", "config", "weights", "replicas", "logits"]
    convert(planted["bias dropped"], tmp_path / "bad", to="torch_dist")
    assert verify.main([str(tmp_path / "bad"), "--against", str(originals["mqa"])]) == 1
    told_text = capsys.readouterr().out
    assert "NOT VERIFIED" in told_text and "FAIL weights" in told_text and "transformer.h.1.attn.c_attn.bias" in told_text
    assert "FAIL logits" in told_text and "ok   replicas" in told_text
    assert verify.main([str(tmp_path / "good"), "--against", str(originals["gqa"])]) == 2
    assert verify.main([str(tmp_path / "good"), "--tp", "3"]) == 2
    assert "tp 3" in capsys.readouterr().err
