"""The layers a model is built from: norms that allow sequence parallelism, and the two layer providers.

In: which layers and which attention kernel were chosen. Out: the block specification megatron-core builds a decoder
from. The torch provider needs nothing but PyTorch; the TransformerEngine one is used where that is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megawrap.models.attention import PackedAttention, VarlenAttention
from megawrap.models.batch import Segments


def _place(norm: torch.nn.Module, config: TransformerConfig) -> None:
    """Give a norm's parameters the device, dtype and sequence-parallel mark megatron-core's own norms have."""
    norm.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel


class LayerNorm(torch.nn.LayerNorm):
    """PyTorch's LayerNorm for megatron-core; its WrappedTorchNorm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        _place(self, config)


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm for megatron-core; its WrappedTorchNorm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        _place(self, config)


class TorchProvider(LocalSpecProvider):
    """megatron-core's local layers with these norms and packed attention."""

    def __init__(self, attention: str) -> None:
        self.attention = VarlenAttention if attention == "varlen" else PackedAttention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """NVIDIA Apex's fused LayerNorm where it is installed and there is a GPU, else PyTorch's."""
        from megatron.core.fusions.fused_layer_norm import HAVE_FUSED_LAYER_NORM, FusedLayerNorm

        if rms_norm:
            return RMSNorm
        return FusedLayerNorm if HAVE_FUSED_LAYER_NORM and torch.cuda.is_available() else LayerNorm

    def core_attention(self) -> type:
        """Attention over packed rows."""
        return self.attention


class ParallelResidualLayer(TransformerLayer):
    """A layer whose attention and MLP both read its input, as in GPT-NeoX; megatron-core has none."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add attention and then the MLP to the input; arguments are those of `TransformerLayer`."""
        after_attention, context = self._forward_attention(hidden_states, *args, **kwargs)
        mlp_output = self.mlp(self._forward_pre_mlp_layernorm(hidden_states))
        return self._forward_post_mlp(mlp_output, after_attention), context


def block_spec(
    config: TransformerConfig, *, layers: str, attention: str, vp_stage: int | None, parallel_residual: bool = False
) -> TransformerBlockSubmodules:
    """Specification of the layers of this rank's pipeline stage and of the final norm.

    Args:
        config: megatron-core's configuration of the model.
        layers: "torch" or "te".
        attention: "sdpa" or "varlen"; TransformerEngine brings its own.
        vp_stage: virtual stage to build, or none.
        parallel_residual: layers are `ParallelResidualLayer`s.
    """
    layer, final_norm = _te_layer(config) if layers == "te" else _torch_layer(config, attention)
    if parallel_residual:
        layer.module = ParallelResidualLayer
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=final_norm)


def _torch_layer(config: TransformerConfig, attention: str) -> tuple[ModuleSpec, type]:
    provider = TorchProvider(attention)
    norm = provider.layer_norm(rms_norm=config.normalization == "RMSNorm")
    submodules = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=provider.column_parallel_linear(),
                core_attention=provider.core_attention(),
                linear_proj=provider.row_parallel_linear(),
                q_layernorm=norm if config.qk_layernorm else IdentityOp,
                k_layernorm=norm if config.qk_layernorm else IdentityOp,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=get_mlp_module_spec_for_backend(backend=provider),
        mlp_bda=get_bias_dropout_add,
        # On disk norms carry the names TransformerEngine's fused layers give them, whatever layers wrote them.
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules), norm


def _te_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from megawrap.models.attention import rotate

    class RotaryTEAttention(TEDotProductAttention):  # type: ignore[misc, valid-type]
        """TransformerEngine's packed attention behind megawrap's rotary positions."""

        def forward(self, query: Any, key: Any, value: Any, *args: Any, packed_seq_params: Segments, **kwargs: Any) -> Any:
            if packed_seq_params.rotary is not None:
                query, key = rotate(query, packed_seq_params.rotary), rotate(key, packed_seq_params.rotary)
            return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)

    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec.submodules.self_attention.submodules.core_attention = RotaryTEAttention
    return spec, TENorm
