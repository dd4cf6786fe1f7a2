"""What two models disagree on, from megawrap's own description and from Megatron's arguments."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from megawrap import families
from megawrap.checkpoint.arguments import differences, megatron_arguments, table
from megawrap.models.architecture import Architecture

MODEL = families.get("llama").from_hf(families.get("llama").tiny())


def _common(architecture: Architecture, padded: int) -> dict[str, object]:
    args = megatron_arguments(architecture, padded, "bf16")
    return {"args": args, "megawrap": {"architecture": architecture.to_dict(), "padded_vocab_size": padded}}


def test_the_same_model_has_no_differences() -> None:
    common = _common(MODEL, 256)
    assert differences(common, MODEL, 256) == []
    assert differences({"args": common["args"]}, MODEL, 256) == []
    assert differences({}, MODEL, 256) == []


def test_every_field_is_compared() -> None:
    changes = {
        "num_layers": 9, "vocab_size": 9, "norm_epsilon": 0.5, "tied": True, "position": "learned", "rope_theta": 1.0, "qkv_bias": True,
    }  # fmt: skip
    for name, value in changes.items():
        other = replace(MODEL, **{name: value})
        assert differences(_common(MODEL, 256), other, 256) == [(name, getattr(MODEL, name), value)]
    assert differences(_common(MODEL, 128), MODEL, 256) == [("padded_vocab_size", 128, 256)]


def test_megatrons_arguments_are_compared_where_they_are_given() -> None:
    args = Namespace(
        num_layers=6, hidden_size=48, padded_vocab_size=512, group_query_attention=True, num_query_groups=2, normalization="RMSNorm"
    )
    found = differences({"args": args}, MODEL, 256)
    assert found == [("num_layers", 6, 4), ("padded_vocab_size", 512, 256), ("num_query_groups", 2, 4)]


def test_the_table_lines_up() -> None:
    lines = table([("num_layers", 6, 4), ("vocab_size", 49152, 131)]).splitlines()
    assert lines[0].split() == ["checkpoint", "this", "model"]
    assert len({line.index(value) for line, value in zip(lines, ("checkpoint", "6", "49152"), strict=True)}) == 1


def test_megatrons_names() -> None:
    args = megatron_arguments(MODEL, 256, "bf16", tp=2, pp=4)
    assert (args.num_query_groups, args.group_query_attention, args.swiglu, args.bf16, args.fp16) == (4, True, True, True, False)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 4)
