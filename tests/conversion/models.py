"""Tiny Hugging Face models in which no mistake can hide: random norms and biases, logits of ordinary size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from megawrap import families

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mqa": ("gpt_bigcode", {}),
    "mha": ("gpt_bigcode", {"multi_query": False}),
    "mqa-untied": ("gpt_bigcode", {"tie_word_embeddings": False}),
    "mha-untied-even": ("gpt_bigcode", {"multi_query": False, "tie_word_embeddings": False, "vocab_size": 256}),
    "gqa": ("llama", {}),
    "gqa-tied": ("llama", {"tie_word_embeddings": True}),
    "gqa-even": ("llama", {"vocab_size": 256}),
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "head_dim": 14, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-plain": ("starcoder2", {"tie_word_embeddings": False, "use_bias": False, "sliding_window": None}),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
}


def make_model(family: str, *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A model of random weights: matrices keep the scale of their input, norms and biases are anything but 1 and 0."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**families.get(family).tiny(**changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 / math.sqrt(parameter.size(1)))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0.3, 0.8)
    return model


def make_directory(path: Path, variant: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", seed: int = 0) -> Path:
    """The Hugging Face directory of a variant, written by transformers."""
    family, changes = VARIANTS[variant]
    make_model(family, seed=seed, **changes).to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


def raw_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face directory through the safetensors library."""
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def snapshot(directory: Path) -> set[str]:
    """Everything below a directory, to see that nothing was written."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}
