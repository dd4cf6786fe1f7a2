"""Families against transformers: configs both ways, parameter rules against its state dicts, refusals by key and value."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megawrap import config as recipe
from megawrap import families
from megawrap.checkpoint.arguments import differences
from megawrap.errors import ConfigError, ConversionError, MegawrapError
from megawrap.families.base import QKV, GatedMLP, Rule
from megawrap.models.architecture import DEFAULTS, Architecture

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt_bigcode", {}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_bigcode", {"tie_word_embeddings": False}),
    ("gpt_bigcode", {"activation_function": "gelu", "n_inner": None}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 8}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 14}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 0}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "head_dim": 6}),
    ("starcoder2", {}),
    ("starcoder2", {"tie_word_embeddings": False, "use_bias": False, "hidden_act": "gelu"}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
]
MULTI_HEAD = ("gpt2", "gpt_neox")
IDS = [f"{name}-{'-'.join(f'{key}={value}' for key, value in changes.items()) or 'tiny'}" for name, changes in VARIANTS]
each_variant = pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=IDS)


def hf_config(values: dict[str, Any]) -> transformers.PreTrainedConfig:
    return transformers.AutoConfig.for_model(**values)


def make(name: str, changes: dict[str, Any]) -> tuple[families.Family, dict[str, Any], Architecture]:
    family = families.get(name)
    config = family.tiny(**changes)
    return family, config, family.from_hf(config)


@each_variant
def test_config_survives_both_directions(name: str, changes: dict[str, Any]) -> None:
    family, config, architecture = make(name, changes)
    written = family.to_hf(architecture)
    assert families.from_hf_config(written) is family
    assert family.from_hf(written) == architecture
    assert Architecture.from_dict(architecture.to_dict()) == architecture
    theirs, ours = hf_config(config).to_dict(), hf_config(written).to_dict()
    not_architecture = {"bos_token_id", "eos_token_id", "pad_token_id"}
    if config.get("n_inner", 0) is None:
        not_architecture.add("n_inner")
        assert ours["n_inner"] == 4 * theirs["n_embd"]
    assert {key: value for key, value in ours.items() if key not in not_architecture} == {
        key: value for key, value in theirs.items() if key not in not_architecture
    }


@each_variant
def test_config_written_by_transformers_is_read_the_same(name: str, changes: dict[str, Any]) -> None:
    family, config, architecture = make(name, changes)
    assert family.from_hf(hf_config(config).to_dict()) == architecture
    assert family.from_hf(hf_config(config).to_diff_dict() | {"model_type": family.model_type}) == architecture


@pytest.mark.parametrize("name", families.known())
def test_missing_keys_have_the_defaults_of_transformers(name: str) -> None:
    family = families.get(name)
    assert family.from_hf({"model_type": family.model_type}) == family.from_hf(hf_config({"model_type": family.model_type}).to_dict())


@each_variant
def test_rules_name_every_parameter_of_transformers_once(name: str, changes: dict[str, Any]) -> None:
    family, config, architecture = make(name, changes)
    with torch.device("meta"):
        model = getattr(transformers, family.hf_class)(hf_config(config))
    renamed = {"lm_head.weight": family.head}  # some heads have another name on disk; a tied one is listed once
    expected = {renamed.get(key, key): tuple(value.shape) for key, value in model.named_parameters()}
    rules = family.expanded_rules(architecture)
    named = [hf for rule in rules for hf in rule.hf]
    assert len(named) == len(set(named))
    assert {hf: shape for rule in rules for hf, shape in rule.hf_shapes.items()} == expected
    megatron = [rule.megatron for rule in rules]
    assert len(megatron) == len(set(megatron))
    assert sum(math.prod(rule.megatron_shape) for rule in rules) == sum(parameter.numel() for parameter in model.parameters())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == architecture.tied


@each_variant
def test_every_rule_is_its_own_inverse(name: str, changes: dict[str, Any]) -> None:
    family, _, architecture = make(name, changes)
    for rule in family.rules(architecture):
        sources = [torch.randn(shape) for shape in rule.hf_shapes.values()]
        megatron = rule.from_hf(sources)
        assert tuple(megatron.shape) == rule.megatron_shape
        assert all(torch.equal(one, other) for one, other in zip(sources, rule.to_hf(megatron), strict=True))


def test_qkv_rows_against_a_loop_over_heads() -> None:
    family, _, architecture = make("llama", {})
    rule = next(rule for rule in family.rules(architecture) if isinstance(rule, QKV))
    query, key, value = (torch.randn(shape) for shape in rule.hf_shapes.values())
    width, per_group = architecture.head_dim, architecture.num_attention_heads // architecture.num_query_groups
    expected = []
    for group in range(architecture.num_query_groups):
        for head in range(group * per_group, (group + 1) * per_group):
            expected += [query[head * width + row] for row in range(width)]
        expected += [key[group * width + row] for row in range(width)]
        expected += [value[group * width + row] for row in range(width)]
    assert torch.equal(rule.from_hf([query, key, value]), torch.stack(expected))


def test_gpt2_rows_against_a_loop_over_heads() -> None:
    family, _, architecture = make("gpt2", {})
    rule = next(rule for rule in family.rules(architecture) if rule.hf[0].endswith("c_attn.weight"))
    heads, width, hidden = architecture.num_attention_heads, architecture.head_dim, architecture.hidden_size
    fused = torch.randn(hidden, 3 * hidden)  # as Conv1D multiplies: inputs x outputs
    columns = [part * hidden + head * width + row for head in range(heads) for part in range(3) for row in range(width)]
    assert torch.equal(rule.from_hf([fused]), torch.stack([fused[:, column] for column in columns]))


def test_gated_mlp_holds_gate_then_up() -> None:
    family, _, architecture = make("llama", {})
    rule = next(rule for rule in family.rules(architecture) if isinstance(rule, GatedMLP))
    gate, up = (torch.randn(shape) for shape in rule.hf_shapes.values())
    assert rule.hf[0].endswith("gate_proj.weight")
    assert torch.equal(rule.from_hf([gate, up]), torch.cat([gate, up]))


@pytest.mark.parametrize("name", families.known())
def test_tiny_has_no_sizes_equal_by_chance(name: str) -> None:
    _, _, architecture = make(name, {})
    sizes = [architecture.num_layers * 1000, architecture.hidden_size, architecture.ffn_hidden_size, architecture.vocab_size]
    assert len({*sizes, architecture.max_position_embeddings}) == 5
    assert architecture.num_attention_heads != architecture.num_query_groups or name in MULTI_HEAD
    assert architecture.vocab_size % 2 == 1


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is {'type': 'linear', 'factor': 2.0}"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope_parameters is {'rope_type': 'llama3'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "'partial_rotary_factor': 0.5"),
    ("llama", {"rope_parameters": "default"}, "rope_parameters is 'default'"),
    ("llama", {"rope_theta": 10000.0}, "[10000.0, 5000.0]"),
    ("llama", {"attention_bias": True}, "attention_bias is True and mlp_bias is False"),
    ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes'"),
    ("llama", {"sliding_window": 4096}, "sliding_window is 4096"),
    ("llama", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {'quant_method': 'gptq'}"),
    ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map is {'AutoModel': 'x.Y'}"),
    ("llama", {"residual_multiplier": 0.2}, "residual_multiplier is 0.2"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_query_groups 3"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ("llama", {"vocab_size": 0}, "vocab_size is 0"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters is {'rope_type': 'yarn'"),
    ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor must be above its low_freq_factor"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, "its factor must be a number above 0"),
    ("mistral", {"sliding_window": "wide"}, "sliding_window is 'wide'"),
    ("mistral", {"attention_bias": True}, "attention_bias is True"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 2}, "['full_attention', 'sliding_attention']"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types is ['sliding_attention'] with use_sliding_window False"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias is True"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("starcoder2", {"norm_type": "rms_norm"}, "norm_type is 'rms_norm'"),
    ("starcoder2", {"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias is False"),
    ("gpt_neox", {"rotary_pct": 0.25}, "[0.25, 0.34]"),
    ("gpt_neox", {"rotary_emb_base": 10000}, "[10000, 5000.0]"),
    ("gpt_neox", {"num_attention_heads": 16}, "of which 1 elements rotate"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2", {"n_ctx": 32}, "n_ctx is 32"),
    ("gpt2", {"multi_query": True}, "multi_query is True"),
    ("gpt_bigcode", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt_bigcode", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("gpt_bigcode", {"n_head": 5}, "n_embd 48 is not a multiple of n_head 5"),
    ("gpt_bigcode", {"num_key_value_heads": 4}, "num_key_value_heads is 4"),
    ("gpt_bigcode", {"activation_function": "gelu_10"}, "activation_function is 'gelu_10'"),
]


@pytest.mark.parametrize(("name", "changes", "facts"), REFUSALS, ids=[f"{name}-{next(iter(changes))}" for name, changes, _ in REFUSALS])
def test_what_is_not_mapped_is_refused_by_key_and_value(name: str, changes: dict[str, Any], facts: str) -> None:
    with pytest.raises(MegawrapError) as refusal:
        make(name, changes)
    assert facts in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_a_window_over_all_positions_is_none() -> None:
    for name in ("mistral", "starcoder2"):
        assert make(name, {"sliding_window": 64})[2] == make(name, {"sliding_window": None})[2]
    assert make("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2})[2] == make("qwen2", {})[2]
    assert make("qwen2", {"sliding_window": 19})[2] == make("qwen2", {})[2]  # switched off


def test_older_spellings_of_gpt_neox() -> None:
    older = {"rope_parameters": None, "rotary_pct": 0.34, "rotary_emb_base": 5000}
    assert make("gpt_neox", older)[2] == make("gpt_neox", {})[2]


def test_descriptions_of_earlier_versions_mean_the_defaults() -> None:
    _, _, architecture = make("llama", {})
    earlier = {key: value for key, value in architecture.to_dict().items() if key not in DEFAULTS or key == "rope_theta"}
    assert len(earlier) == 18 and Architecture.from_dict(earlier) == architecture
    assert differences({"megawrap": {"architecture": earlier, "padded_vocab_size": 256}}, architecture, 256) == []
    _, _, stretched = make("llama", {"rope_parameters": LLAMA3})
    (row,) = differences({"megawrap": {"architecture": earlier, "padded_vocab_size": 256}}, stretched, 256)
    assert row[:2] == ("rope_scaling", None)


def test_help_and_readme_name_every_family() -> None:
    names = families.known()
    assert f"{', '.join(names[:-1])} or {names[-1]}." in inspect.getsource(recipe.ModelConfig)
    readme = (Path(recipe.__file__).parents[1] / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in names)


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(ConversionError) as refusal:
        families.from_hf_config({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    assert "'mamba'" in str(refusal.value) and "gpt_bigcode (GPTBigCodeForCausalLM), " in str(refusal.value)
    with pytest.raises(ConversionError, match="LlamaForSequenceClassification"):
        families.from_hf_config({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    with pytest.raises(ConfigError, match=rf"'gpt5' is not known\. known are {', '.join(families.known())}"):
        families.get("gpt5")


def test_defaults_from_scratch() -> None:
    given = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 32}
    bigcode = families.get("gpt_bigcode").defaults(**given)
    assert (bigcode.num_query_groups, bigcode.ffn_hidden_size, bigcode.tied, bigcode.head_dim) == (1, 256, True, 16)
    llama = families.get("llama").defaults(**given, tie_word_embeddings=True, num_query_groups=2)
    assert (llama.num_query_groups, llama.ffn_hidden_size, llama.tied) == (2, 192, True)  # 8/3 x 64 = 170.7, up to 64
    with pytest.raises(ConfigError, match="not given: vocab_size"):
        families.get("llama").defaults(**{**given, "vocab_size": None})
    with pytest.raises(ConfigError, match="has no tied; known are"):
        families.get("llama").defaults(**given, tied=True)
    with pytest.raises(ConfigError, match="num_query_groups is 2; gpt_bigcode has 1"):
        families.get("gpt_bigcode").defaults(**given, num_query_groups=2)


def test_padded_vocabulary_is_a_multiple_of_divisor_times_tp() -> None:
    _, _, architecture = make("llama", {})
    assert [architecture.padded_vocab_size(divisor, tp) for divisor, tp in ((1, 1), (128, 1), (128, 2), (131, 1))] == [131, 256, 256, 131]


def test_layer_names_are_written_out() -> None:
    rule = Rule("decoder.layers.{layer}.x", ("h.{layer}.x",), 1, (3,), ())
    assert rule.at(12) == Rule("decoder.layers.12.x", ("h.12.x",), 1, (3,), ())
    assert type(GatedMLP("decoder.layers.{layer}.y", ("g", "u"), make("llama", {})[2]).at(0)) is GatedMLP
