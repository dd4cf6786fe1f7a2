"""Decoder-only models: from an Architecture and a layout to megatron-core model chunks.

In: an `Architecture`, a `Layout`, and what the hardware chose. Out: the model chunks of this rank (one per virtual
stage), unwrapped for inference or wrapped for training. `GPT.forward` gives hidden states, logits at chosen
positions, or the loss at target positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megawrap import parallel
from megawrap.models.architecture import Architecture
from megawrap.models.attention import rotary_tables
from megawrap.models.batch import Batch
from megawrap.models.head import linear_cross_entropy
from megawrap.models.layers import block_spec
from megawrap.parallel import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": F.gelu, "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True, kw_only=True)
class Build:
    """How a model is built, apart from its shape."""

    precision: str = "fp32"
    """fp32, bf16 or fp16."""
    layers: str = "torch"
    """torch or te."""
    attention: str = "sdpa"
    """sdpa or varlen."""
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    recompute: str = "none"
    """none, selective or full."""
    vocab_divisor: int = 128
    """The embedding is padded to a multiple of this times tp."""
    padded_vocab_size: int | None = None
    """Rows of the embedding, when a checkpoint already fixes them."""

    def padded(self, architecture: Architecture, tp: int) -> int:
        """Rows of the embedding."""
        return self.padded_vocab_size or architecture.padded_vocab_size(self.vocab_divisor, tp)


class GPT(GPTModel):
    """megatron-core's GPT over packed rows, with rotary angles made once per row and logits only where asked."""

    def __init__(self, architecture: Architecture, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.architecture = architecture

    def forward(self, batch: Batch, mode: str = "loss") -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run this pipeline stage.

        Args:
            batch: the micro-batch; every stage gets it.
            mode: "loss": the weighted loss sum and each target's loss [K]; "logits": [K, vocab_size] at batch.targets.

        Returns:
            Hidden states [T, 1, H] ([T/tp, 1, H] under sequence parallelism) on every stage but the last.
        """
        hidden = self.embedding(input_ids=batch.tokens, position_ids=batch.position_ids) if self.pre_process else None
        segments = batch.segments
        model = self.architecture
        if model.position == "rope" and segments.rotary is None:
            dtype = self.config.params_dtype
            segments.rotary = rotary_tables(batch.position_ids, model.rotary_width, model.rope_theta, dtype, model.rope_scaling)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=segments)
        if not self.post_process:
            return hidden
        group = self.pg_collection.tp
        sequence_parallel = self.config.sequence_parallel
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        at_targets = hidden.squeeze(1).index_select(0, batch.targets)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        if mode == "logits":
            logits = gather_from_tensor_model_parallel_region(at_targets @ weight.t(), group=group)
            return logits[:, : model.vocab_size].float()
        return linear_cross_entropy(
            at_targets, weight, batch.labels, batch.weights,
            vocab_size=model.vocab_size, group=group, reduce_hidden=not sequence_parallel,
        )  # fmt: skip


def transformer_config(architecture: Architecture, layout: Layout, build: Build) -> TransformerConfig:
    """megatron-core's configuration of this model in this layout."""
    cuda = torch.cuda.is_available()
    dtype = DTYPES[build.precision]
    fusable = architecture.gated or architecture.activation == "gelu_tanh"  # the fused gelu is the tanh one
    recompute: dict[str, Any] = {}
    if build.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif build.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm" if architecture.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        add_bias_linear=architecture.linear_bias,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        window_size=None if architecture.sliding_window is None else (architecture.sliding_window - 1, 0),
        activation_func=_tanh_gelu if architecture.activation == "gelu_tanh" and not cuda else _ACTIVATIONS[architecture.activation],
        gated_linear_unit=architecture.gated,
        attention_dropout=build.attention_dropout,
        hidden_dropout=build.hidden_dropout,
        rotary_interleaved=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=build.precision == "bf16",
        fp16=build.precision == "fp16",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        sequence_parallel=layout.sequence_parallel,
        # The loss is a sum over the whole global batch, divided once by the global count when gradients are finalised.
        calculate_per_token_loss=True,
        # batch_p2p_comm with virtual stages gives wrong gradients at pp 2; the overlapped messages are right everywhere.
        batch_p2p_comm=layout.vpp is None,
        overlap_p2p_comm=layout.vpp is not None,
        batch_p2p_sync=cuda,
        # gloo reads a message after the schedule has gone on; freeing it then, as CUDA's streams allow, sends garbage.
        deallocate_pipeline_outputs=cuda,
        # Compiled on first use, which does not pay on CPU; and only where the fused formula is the architecture's.
        bias_activation_fusion=cuda and fusable and architecture.linear_bias != architecture.gated,
        bias_dropout_fusion=cuda,
        # Their extensions would ignore borders of samples, or are not there without Apex.
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        # Weights are written by `models.weights.fill`, the same for every layout; megatron-core marks its tensor-parallel
        # parameters only on the way through its own initialisation, so that draws nothing.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        **recompute,
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def build_chunks(architecture: Architecture, layout: Layout, build: Build) -> list[GPT]:
    """The bare model chunks of this rank, on its device, with weights still to be filled."""
    config = transformer_config(architecture, layout, build)
    stages: list[int | None] = [None] if layout.vpp is None else list(range(layout.vpp))
    chunks = []
    for stage in stages:
        parallel_residual = architecture.parallel_residual
        spec = block_spec(config, layers=build.layers, attention=build.attention, vp_stage=stage, parallel_residual=parallel_residual)
        chunk = GPT(
            architecture,
            config=config,
            transformer_layer_spec=spec,
            vocab_size=build.padded(architecture, layout.tp),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel.is_first_stage(stage),
            post_process=parallel.is_last_stage(stage),
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="learned_absolute" if architecture.position == "learned" else "none",
            pg_collection=parallel.groups(),
            vp_stage=stage,
        )
        chunk.to(torch.cuda.current_device())
        chunks.append(chunk)
    return chunks
