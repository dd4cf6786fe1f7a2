"""FLOP counted by torch on transformers' models, parameters against published counts, memory against real tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megawrap.config import TrainConfig
from megawrap.models.architecture import Architecture
from megawrap.parallel import Layout
from megawrap.training import flops
from megawrap.training.flops import matrix_products, memory_estimate, parameters_per_rank, peak_flops, training_flops

BIGCODE = Architecture(
    family="gpt_bigcode", num_layers=3, hidden_size=48, num_attention_heads=4, num_query_groups=1, head_dim=12, ffn_hidden_size=192,
    vocab_size=130, max_position_embeddings=64, position="learned", norm="layernorm", norm_epsilon=1e-5, activation="gelu_tanh",
    gated=False, linear_bias=True, qkv_bias=True, tied=True,
)  # fmt: skip
LLAMA = Architecture(
    family="llama", num_layers=2, hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=16, ffn_hidden_size=80,
    vocab_size=130, max_position_embeddings=64, position="rope", norm="rmsnorm", norm_epsilon=1e-5, activation="silu",
    gated=True, linear_bias=False, qkv_bias=False, tied=False,
)  # fmt: skip
STARCODER = Architecture(
    family="gpt_bigcode", num_layers=40, hidden_size=6144, num_attention_heads=48, num_query_groups=1, head_dim=128, ffn_hidden_size=24576,
    vocab_size=49152, max_position_embeddings=8192, position="learned", norm="layernorm", norm_epsilon=1e-5, activation="gelu_tanh",
    gated=False, linear_bias=True, qkv_bias=True, tied=True,
)  # fmt: skip


def hugging_face(architecture: Architecture) -> PreTrainedModel:
    a = architecture
    if a.family == "llama":
        config = LlamaConfig(
            num_hidden_layers=a.num_layers, hidden_size=a.hidden_size, num_attention_heads=a.num_attention_heads,
            num_key_value_heads=a.num_query_groups, head_dim=a.head_dim, intermediate_size=a.ffn_hidden_size, vocab_size=a.vocab_size,
            max_position_embeddings=a.max_position_embeddings, tie_word_embeddings=a.tied, attn_implementation="eager",
        )  # fmt: skip
        return LlamaForCausalLM(config)
    config = GPTBigCodeConfig(
        n_layer=a.num_layers, n_embd=a.hidden_size, n_head=a.num_attention_heads, n_inner=a.ffn_hidden_size, vocab_size=a.vocab_size,
        n_positions=a.max_position_embeddings, attn_implementation="eager", attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    return GPTBigCodeForCausalLM(config)


@pytest.mark.parametrize("architecture", [BIGCODE, LLAMA], ids=lambda a: a.family)
def test_flops_equal_torch_counter_on_transformers(architecture: Architecture) -> None:
    """Eager attention computes the whole square and logits everywhere: n^2 counts twice, every token is a target."""
    model = hugging_face(architecture)
    batch, length = 2, 24
    ids = torch.randint(architecture.vocab_size, (batch, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    expected = training_flops(architecture, num_tokens=batch * length, squared_lengths=2 * batch * length**2, num_targets=batch * length)
    assert counter.get_total_flops() == expected


def test_padding_other_samples_and_untrained_positions_are_not_required() -> None:
    lengths = [7, 12, 5]
    together = training_flops(BIGCODE, num_tokens=24, squared_lengths=sum(n * n for n in lengths), num_targets=9)
    apart = sum(
        training_flops(BIGCODE, num_tokens=n, squared_lengths=n * n, num_targets=t) for n, t in zip(lengths, [2, 3, 4], strict=True)
    )
    assert together == apart
    assert training_flops(BIGCODE, num_tokens=24, squared_lengths=24**2, num_targets=9) > together
    more = training_flops(BIGCODE, num_tokens=24, squared_lengths=218, num_targets=10) - training_flops(
        BIGCODE, num_tokens=24, squared_lengths=218, num_targets=9
    )
    assert more == 3 * 2 * 48 * 130


def test_published_figure_per_token() -> None:
    """6 x parameters per token is the usual estimate: it lies within 3 % at StarCoder's size without attention."""
    per_token = training_flops(STARCODER, num_tokens=1, squared_lengths=0, num_targets=1)
    assert per_token == pytest.approx(6 * 15.5e9, rel=0.03)


@pytest.mark.parametrize("architecture", [BIGCODE, LLAMA], ids=lambda a: a.family)
def test_parameters_equal_transformers(architecture: Architecture) -> None:
    expected = sum(p.numel() for p in hugging_face(architecture).parameters())
    assert parameters_per_rank(architecture, Layout(), vocab_divisor=1) == expected


def test_parameters_of_starcoder_at_tp4_pp4() -> None:
    """Counts of megatron-core's own model, built rank by rank."""
    layout = Layout(tp=4, pp=4, dp=4)
    counts = [parameters_per_rank(STARCODER, layout, pp_rank=stage) for stage in range(4)]
    assert counts == [1_073_925_760, 948_096_640, 948_096_640, 1_023_606_400]


def test_memory_of_starcoder_rank_0() -> None:
    train = TrainConfig(micro_batch_size=1, global_batch_size=128)
    layout = Layout(tp=4, pp=4, dp=4, sequence_parallel=True)
    sizes = memory_estimate(STARCODER, layout, train, seq_length=8192, precision="bf16", distributed_optimizer=True)
    gib = {name: round(value / 2**30, 2) for name, value in sizes.items()}
    assert (gib["weights"], gib["gradients"], gib["optimizer"], gib["logits"]) == (2.0, 4.0, 3.0, 0.0)
    assert sizes["total"] == sum(value for name, value in sizes.items() if name not in ("parameters", "total"))


def test_activations_follow_recompute_stage_and_sequence_parallelism() -> None:
    def activations(recompute: str = "none", stage: int = 0, sp: bool = False) -> int:
        layout = Layout(tp=4, pp=4, dp=1, sequence_parallel=sp)
        train = TrainConfig(micro_batch_size=1, global_batch_size=8, recompute=recompute)
        sizes = memory_estimate(STARCODER, layout, train, seq_length=8192, precision="bf16", distributed_optimizer=False, pp_rank=stage)
        return sizes["activations"]

    assert activations() == 4 * activations(stage=3)
    assert activations("full") < activations("selective") < activations()
    assert activations(sp=True) < activations()


def test_activations_are_near_what_autograd_keeps() -> None:
    """Bytes of the tensors saved for backward by a layer of transformers, scaled to what fused attention keeps."""
    model = hugging_face(BIGCODE)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() and not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: list[torch.Tensor] = []
    model.config._attn_implementation = "sdpa"
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.transformer(torch.randint(130, (1, 64)), use_cache=False)
    train = TrainConfig(micro_batch_size=1, global_batch_size=1)
    sizes = memory_estimate(BIGCODE, Layout(), train, seq_length=64, precision="fp32", distributed_optimizer=False)
    assert 0.5 < sizes["activations"] / sum(kept.values()) < 1.5


def test_products_carry_the_flops_of_the_weights() -> None:
    total = sum(2 * m * k * n * count for m, k, n, count in matrix_products(LLAMA, num_tokens=100, num_targets=30))
    assert total == training_flops(LLAMA, num_tokens=100, squared_lengths=0, num_targets=30)
    half = sum(2 * m * k * n * count for m, k, n, count in matrix_products(LLAMA, num_tokens=100, num_targets=30, tp=2))
    assert 2 * half == total


def test_peak_is_measured_once_and_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    shapes = [(64, 64, 64, 2), (32, 64, 96, 1)]
    first = peak_flops("cpu", torch.float32, shapes)
    monkeypatch.setattr(flops, "_best_time", lambda *_: 1.0)
    assert peak_flops("cpu", torch.float32, shapes) == first
    assert 1e8 < first < 1e13
    assert peak_flops("cpu", torch.float64, shapes) == (2 * 64**3 * 2 + 2 * 32 * 64 * 96) / 3
