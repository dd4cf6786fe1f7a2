"""The configuration of a fine-tuning run: frozen, keyword-only dataclasses, one per section of a recipe.

The docstring under each field is its --help. `Config.problems()` returns everything that can be found wrong
without touching data, a checkpoint or the device; the entry point reports all of it together before any work.
Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]
OverlongPolicy = Literal["truncate-inputs-left", "truncate-outputs", "split", "drop", "error"]
PackingMode = Literal["best_fit", "none", "concat"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from. With init_from the architecture is read from there; without, it is built from scratch."""

    init_from: str | None = None
    """Hugging Face directory, or Megatron checkpoint (root or iter_* directory) to start from; none trains from scratch."""
    family: str | None = None
    """Model family when training from scratch: gpt2, gpt_bigcode, gpt_neox, llama, mistral, qwen2, qwen3 or starcoder2."""
    num_layers: int | None = None
    """Transformer layers (from scratch)."""
    hidden_size: int | None = None
    """Width of the residual stream (from scratch)."""
    ffn_hidden_size: int | None = None
    """Width inside the MLP; default 4 x hidden_size, gated families 8/3 x rounded up to 64."""
    num_attention_heads: int | None = None
    """Query heads (from scratch)."""
    num_query_groups: int | None = None
    """Key/value heads: 1 is multi-query, num_attention_heads is multi-head; default is the family's."""
    max_position_embeddings: int | None = None
    """Longest position the model knows; default data.seq_length."""
    vocab_size: int | None = None
    """Tokens of the vocabulary without padding; default the tokenizer's that made the data."""
    tie_word_embeddings: bool | None = None
    """Share input and output embeddings; default is the family's."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times tp; padding rows never enter the loss."""
    init_method_std: float = 0.02
    """Standard deviation of freshly drawn weights."""
    attention_dropout: float = 0.0
    """Dropout of attention probabilities."""
    hidden_dropout: float = 0.0
    """Dropout after attention, MLP and embedding."""


@dataclass(frozen=True, kw_only=True)
class FimConfig:
    """Fill-in-the-middle: training samples cut at characters into prefix, middle and suffix, and put together in another order."""

    rate: float = 0.0
    """Share of training samples that are transformed, drawn anew in every epoch; evaluation never is."""
    spm_rate: float = 0.5
    """Share of those in the order suffix, prefix, middle; the others are prefix, suffix, middle."""
    loss: Literal["all", "middle"] = "all"
    """What is supervised of a transformed text: all of it, or the middle and the end token only."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and how samples become rows."""

    splits: str | list[str] = field(default_factory=list)
    """A file of weighted split strings, or the strings: `train: 1.0 0:0.95 PREFIX, 0.3 0:1 OTHER`."""
    tokenizer: str | None = None
    """tokenizer.json or Hugging Face directory; checked against the data's and exported with the model."""
    seq_length: int = 2048
    """Tokens per packed row; with packing none the longest row."""
    packing: PackingMode = "best_fit"
    """best_fit: whole samples share rows and never see each other; none: one sample a row, padded to the longest of its
    batch; concat: language modelling over all documents as one stream cut into rows, borders marked by the end token."""
    pad_to_multiple: int = 1
    """Lengths of segments in a row (packing none: of rows) are padded to a multiple of this, for kernels that want it."""
    overlong: OverlongPolicy = "truncate-inputs-left"
    """What happens to a sample longer than a row; packing concat cuts every document where a row ends."""
    seed: int = 1234
    """Seed of packing, of the order of rows, of the draw between sources and of fill-in-the-middle."""
    cache_dir: str | None = None
    """Where packing indices are kept; default beside the data, or under the run when that is read-only."""
    pin_and_prefetch: bool | None = None
    """Read batches ahead in a thread and pin them; default: on CUDA."""
    fim: FimConfig = field(default_factory=FimConfig)
    """Fill-in-the-middle."""

    def problems(self) -> list[str]:
        """What is wrong with how samples become rows, a sentence each."""
        found, rate = [], self.fim.rate
        for name in ("rate", "spm_rate"):
            value = getattr(self.fim, name)
            if not 0 <= value <= 1:
                found.append(f"data.fim.{name} is {value}; it must be in [0, 1]")
        if min(self.pad_to_multiple, self.seq_length) > 0 and self.seq_length % self.pad_to_multiple:
            found.append(f"data.seq_length {self.seq_length} is not a multiple of data.pad_to_multiple {self.pad_to_multiple}")
        if rate > 0 and self.packing == "concat":
            found.append(
                f"data.fim.rate is {rate} with data.packing concat, where a document has no place of its own to change its length in; "
                "use best_fit or none"
            )
        if rate > 0 and self.tokenizer is None:
            found.append(f"data.fim.rate is {rate} without data.tokenizer; texts are cut at characters, which needs the tokenizer")
        return found


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned."""

    name: str = "sft"
    """Objective: sft."""
    loss_on: Literal["outputs", "all"] = "outputs"
    """Tokens that are supervised: the outputs of a sample, or all of it."""
    normalize: Literal["token", "target"] = "token"
    """token: every supervised token weighs 1; target: every supervised span weighs 1."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut over ranks. Data parallelism is what is left: world size / (tp x pp)."""

    tp: int = 1
    """Tensor-parallel size (--tensor-model-parallel-size)."""
    pp: int = 1
    """Pipeline-parallel size (--pipeline-model-parallel-size)."""
    vpp: int | None = None
    """Virtual pipeline stages per rank; none for the plain 1F1B schedule."""
    sequence_parallel: bool | None = None
    """Split norms and dropout over the sequence inside a TP group; default: on CUDA with tp > 1."""
    distributed_optimizer: bool | None = None
    """Shard optimizer state over data-parallel ranks; default: on when dp > 1."""
    overlap: bool | None = None
    """Reduce gradients over data-parallel ranks while the backward pass goes on; default: on CUDA with dp > 1."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. The moments and main parameters are fp32."""

    lr: float = 5e-5
    """Peak learning rate."""
    min_lr: float = 5e-6
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.05
    """Decoupled weight decay; not applied to biases and norms."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Term added to the denominator."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    loss_scale: float | None = None
    """fp16: fixed loss scale; default dynamic."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over iterations."""

    name: Literal["cosine", "linear", "constant", "inverse-sqrt", "wsd"] = "cosine"
    """Shape after warmup."""
    warmup: float = 0.01
    """Iterations of linear warmup; below 1 a fraction of train.iterations."""
    decay: float = 0.1
    """wsd: iterations of the final decay; below 1 a fraction of train.iterations."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how large, how precise."""

    iterations: int = 1000
    """Optimizer steps of the whole run."""
    micro_batch_size: int = 1
    """Packed rows per forward pass and rank."""
    global_batch_size: int = 8
    """Packed rows per optimizer step, over all ranks."""
    precision: Precision = "auto"
    """Compute precision; auto: bf16 where the hardware multiplies bf16 matrices, else fp32."""
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """Attention kernel: sdpa works per segment anywhere, varlen is PyTorch's packed flash kernel (CUDA)."""
    layers: Literal["auto", "torch", "te"] = "auto"
    """Layer implementation: torch, or TransformerEngine (CUDA, when installed)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations thrown away and computed again: none, attention only (selective), whole layers (full)."""
    seed: int = 1234
    """Seed of initialisation and dropout."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient norm that is not finite: stop before the step, or skip the step."""
    max_skipped: int = 5
    """skip: steps in a row that may be skipped before the run stops."""
    deterministic: bool = True
    """Refuse kernels whose result depends on timing; a resumed run is then bit for bit the same."""
    timeout_minutes: float = 10.0
    """A rank that waits longer than this for another gives up and names it."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training, on every named valid group."""

    interval: int = 100
    """Iterations between evaluations; 0 turns them off."""
    batches: int | None = None
    """Global batches per group; default the whole group once."""
    at_start: bool = True
    """Evaluate before the first iteration too."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, kept and loaded."""

    interval: int = 100
    """Iterations between checkpoints; the last iteration is always saved. 0: only the last."""
    keep: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    load_optim: bool = True
    """Load optimizer state from a Megatron checkpoint named by init_from (--no-load-optim turns it off)."""
    load_rng: bool = True
    """Load random states from a Megatron checkpoint named by init_from (--no-load-rng turns it off)."""
    finetune: bool = False
    """Take only the weights of init_from: no optimizer, random state or iteration (--finetune)."""
    reset_progress: bool = False
    """Take weights and optimizer of init_from but count iterations and data from 0 (--reset-progress)."""
    allow_restart: bool = False
    """Throw away the progress in the save directory and start again; the only way to do so."""
    verify: bool = True
    """Check the sha256 of every file before loading."""
    on_corrupt: Literal["refuse", "fallback"] = "refuse"
    """A damaged latest checkpoint: refuse it, or load the newest intact one."""
    trust: bool = False
    """Load an init_from checkpoint that has no megawrap manifest."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    interval: int = 10
    """Iterations between lines of metrics.jsonl and of the console."""
    plots: bool = True
    """Draw plots/curves.png at the end, when matplotlib is installed."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A fine-tuning run. Written whole to RUN/config.yaml before the first iteration."""

    run: str
    """Run directory: config.yaml, environment.json, logs/, checkpoints/, plots/."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Where the model comes from."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is trained on."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is learned."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is cut over ranks."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over iterations."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, how large, how precise."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved and loaded."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is written while training."""

    def problems(self) -> list[str]:
        """Everything wrong with the values themselves, a sentence each; empty when nothing is."""
        found: list[str] = []

        def check(ok: bool, sentence: str) -> None:
            if not ok:
                found.append(sentence)

        for section, name in _POSITIVE:
            value = getattr(getattr(self, section), name)
            check(value is None or value > 0, f"{section}.{name} is {value}; it must be above 0")
        for section, name in _NOT_NEGATIVE:
            value = getattr(getattr(self, section), name)
            check(value is None or (value >= 0 and math.isfinite(value)), f"{section}.{name} is {value}; it must be a number of 0 or more")
        for name in ("attention_dropout", "hidden_dropout"):
            value = getattr(self.model, name)
            check(0 <= value < 1, f"model.{name} is {value}; it must be in [0, 1)")
        for name in ("beta1", "beta2"):
            value = getattr(self.optim, name)
            check(0 <= value < 1, f"optim.{name} is {value}; it must be in [0, 1)")
        check(bool(self.run.strip()), "run is empty; give the run directory")
        check(bool(self.data.splits), "data.splits is empty; give a file or a list of weighted split strings")
        found += self.data.problems()
        check(self.optim.min_lr <= self.optim.lr, f"optim.min_lr {self.optim.min_lr} is above optim.lr {self.optim.lr}")
        check(
            self.model.init_from is not None or self.model.family is not None,
            "neither model.init_from nor model.family is given; "
            "name a checkpoint or Hugging Face directory to start from, or a family to train from scratch",
        )
        if self.model.init_from is None and self.model.family is not None:
            for name in ("num_layers", "hidden_size", "num_attention_heads"):
                check(getattr(self.model, name) is not None, f"model.{name} is not given; a model from scratch needs it")
        heads, hidden = self.model.num_attention_heads, self.model.hidden_size
        if heads and hidden:
            check(hidden % heads == 0, f"model.hidden_size {hidden} is not a multiple of model.num_attention_heads {heads}")
        check(
            not (self.checkpoint.finetune and self.checkpoint.reset_progress),
            "checkpoint.finetune and checkpoint.reset_progress are both given; finetune already resets progress, leave one out",
        )
        return found


_POSITIVE = [
    *(("model", name) for name in (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "max_position_embeddings",
        "vocab_size", "make_vocab_size_divisible_by", "init_method_std",
    )),
    *(("parallel", name) for name in ("tp", "pp", "vpp")),
    *(("train", name) for name in ("iterations", "micro_batch_size", "global_batch_size", "timeout_minutes")),
    ("data", "seq_length"), ("data", "pad_to_multiple"), ("optim", "lr"), ("optim", "eps"), ("log", "interval"), ("eval", "batches"),
    ("optim", "loss_scale"),
]  # fmt: skip
_NOT_NEGATIVE = [
    ("optim", "min_lr"), ("optim", "weight_decay"), ("optim", "clip_grad"), ("schedule", "warmup"), ("schedule", "decay"),
    ("checkpoint", "interval"), ("checkpoint", "keep"), ("eval", "interval"), ("train", "max_skipped"),
]  # fmt: skip

SECTIONS = tuple(item.name for item in fields(Config) if item.name != "run")
