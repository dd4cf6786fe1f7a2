"""The independent oracle: fp32 logits of our megatron-core model at tp x pp against transformers, 1e-4 at most.

Weights come through megawrap's loading, through megatron-core's own reader, and back from its own writer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conversion.convert import convert
from conversion.diff import compare
from conversion.load import open_source
from conversion.verify import judge_logits, transformers_logits
from tests import ranks
from tests.conversion import rank_tasks
from tests.conversion.models import VARIANTS, make_directory, raw_tensors, same_bits

SEQUENCES = [np.random.default_rng(7).integers(131, size=length).tolist() for length in (64, 21, 5, 1)]
LAYOUTS = [
    *[("mqa", tp, pp) for tp, pp in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))],
    *[("gqa", tp, pp) for tp, pp in ((1, 1), (2, 1), (4, 1), (2, 2))],
    *[(variant, 1, 1) for variant in VARIANTS if variant not in ("mqa", "gqa")],
    ("gpt2", 2, 2), ("mistral", 2, 2), ("qwen2", 2, 2), ("qwen3", 2, 2), ("starcoder2", 2, 2), ("gpt-neox", 2, 2), ("starcoder2", 4, 1),
    ("mha", 2, 2), ("gqa-tied", 2, 2), ("mqa-untied", 1, 2), ("llama-biases", 2, 1), ("llama-mqa-tied", 4, 1),
]  # fmt: skip

pytestmark = pytest.mark.dist


def of_last_stage(results: list[np.ndarray | None]) -> np.ndarray:
    """The logits, which every rank of the last stage has in full and alike."""
    found = [result for result in results if result is not None]
    assert found and all(np.array_equal(found[0], other) for other in found)
    return found[0]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {variant: make_directory(folder / variant, variant) for variant in VARIANTS}


@pytest.mark.parametrize(("variant", "tp", "pp"), LAYOUTS, ids=[f"{variant}-tp{tp}-pp{pp}" for variant, tp, pp in LAYOUTS])
def test_logits_equal_transformers(directories: dict[str, Path], variant: str, tp: int, pp: int) -> None:
    theirs = transformers_logits(directories[variant], SEQUENCES)
    assert 0.5 < theirs.std() < 6  # at an ordinary scale, 1e-4 tells mistakes from rounding
    ours = of_last_stage(ranks.run(tp * pp, rank_tasks.logits_from, directories[variant], tp, pp, SEQUENCES))
    assert np.abs(ours - theirs).max() <= 1e-4
    check = judge_logits(ours, theirs, 1e-4)
    assert check.passed, check


@pytest.mark.parametrize(("variant", "tp", "pp"), [("mqa", 2, 2), ("gqa", 2, 2), ("gqa-tied", 1, 2), ("mha-untied-even", 2, 1)])
def test_megatron_core_loads_what_we_write(tmp_path: Path, directories: dict[str, Path], variant: str, tp: int, pp: int) -> None:
    """With its own reader, at its default strictness, at a layout the writer never saw."""
    convert(directories[variant], tmp_path / "mg", to="torch_dist")
    ours = of_last_stage(ranks.run(tp * pp, rank_tasks.logits_by_megatron, tmp_path / "mg" / "release", tp, pp, SEQUENCES))
    assert np.abs(ours - transformers_logits(directories[variant], SEQUENCES)).max() <= 1e-4


@pytest.mark.parametrize(("variant", "tp", "pp"), [("mqa", 2, 1), ("gqa-tied", 2, 2)])
def test_megawrap_initialises_from_what_it_writes(tmp_path: Path, directories: dict[str, Path], variant: str, tp: int, pp: int) -> None:
    """Bit for bit the model that the Hugging Face directory gives."""
    convert(directories[variant], tmp_path / "mg", to="torch_dist", vocab_divisor=1, tp=4)
    ours = of_last_stage(ranks.run(tp * pp, rank_tasks.logits_from, tmp_path / "mg", tp, pp, SEQUENCES))
    assert np.array_equal(ours, of_last_stage(ranks.run(tp * pp, rank_tasks.logits_from, directories[variant], tp, pp, SEQUENCES)))


@pytest.mark.parametrize(("variant", "tp", "pp"), [("mqa", 2, 1), ("gqa", 2, 2), ("gqa-tied", 1, 2)])
def test_what_megatron_core_writes_is_exported(tmp_path: Path, directories: dict[str, Path], variant: str, tp: int, pp: int) -> None:
    (tmp_path / "mg").mkdir()
    with open_source(directories[variant]) as source:
        common = {"megawrap": {"architecture": source.architecture.to_dict()}, "iteration": 3}
    ranks.run(tp * pp, rank_tasks.save_by_megatron, directories[variant], tmp_path / "mg", tp, pp, common)
    convert(tmp_path / "mg", tmp_path / "hf", to="hf", trust=True)
    before, after = raw_tensors(directories[variant]), raw_tensors(tmp_path / "hf")
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    with open_source(directories[variant]) as a, open_source(tmp_path / "hf") as b:
        assert compare(a, b).equal


def test_bf16_weights_are_compared_in_fp32(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "hf", "gqa", dtype=torch.bfloat16)
    ours = of_last_stage(ranks.run(1, rank_tasks.logits_from, directory, 1, 1, SEQUENCES))
    assert np.abs(ours - transformers_logits(directory, SEQUENCES)).max() <= 1e-4


@pytest.mark.parametrize(
    ("variant", "tp", "pp", "rank", "parameter", "facts"),
    [
        ("gqa", 2, 2, 1, "decoder.layers.0.input_layernorm.weight", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"),
        ("mqa", 2, 1, 1, "decoder.layers.3.mlp.linear_fc2.bias", "decoder.layers.3.mlp.linear_fc2.bias"),
        ("mqa", 1, 2, 1, "output_layer.weight", "embedding.word_embeddings.weight"),
        ("mqa", 2, 1, 0, "embedding.position_embeddings.weight", "embedding.position_embeddings.weight"),
    ],
)
def test_a_drifted_replica_is_named(
    directories: dict[str, Path], variant: str, tp: int, pp: int, rank: int, parameter: str, facts: str
) -> None:
    """The last bit of one element on one rank."""
    for report in ranks.run(tp * pp, rank_tasks.report, directories[variant], tp, pp, rank, parameter):
        assert any(text.startswith(f"replicas of {facts} ") and "differ between ranks" in text for text in report.problems)
        assert any(text.startswith(f"rank {rank}: {facts} ") for text in report.problems) and len(report.problems) == 2


def test_another_architecture_is_refused(directories: dict[str, Path]) -> None:
    (told,) = ranks.run(1, rank_tasks.refusal, directories["mqa"], directories["mqa-untied"])
    assert told.startswith("the model and ") and told.endswith("differ in tied True against False")


def test_a_stale_shard_is_named(directories: dict[str, Path]) -> None:
    """A cut parameter has no replica to differ from; the checkpoint tells."""
    (report, _) = ranks.run(2, rank_tasks.report, directories["gqa"], 2, 1, 1, "decoder.layers.2.mlp.linear_fc1.weight")
    assert report.problems == ("rank 1: decoder.layers.2.mlp.linear_fc1.weight [120:160, 0:48] is not what the checkpoint holds",)


def test_sound_shards_have_no_problems(directories: dict[str, Path]) -> None:
    for report in ranks.run(4, rank_tasks.report, directories["mqa"], 2, 2, -1, ""):
        assert report.problems == () and report.replicas > 0 and report.elements == 72_736 + (256 - 131) * 48
