"""The only file that knows a CPU from a GPU, and the only place that adapts megatron-core to CPU.

In: nothing but the machine. Out: what it is (`detect`), what is chosen for it and why (`choose`), memory and clock
readings, and `adapt()`, which makes megatron-core run without a GPU. On CUDA `adapt()` changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import platform
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megawrap.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megawrap.config import Config


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What this process computes on."""

    kind: str
    """cpu or cuda."""
    name: str
    """The processor's or the GPU's own name."""
    count: int
    """GPUs, or cores this process may use."""
    native_bf16: bool
    """Multiplies bf16 matrices in hardware."""
    memory: int
    """Bytes of GPU memory, or of main memory."""

    @property
    def backend(self) -> str:
        """Communication library of torch.distributed."""
        return "nccl" if self.kind == "cuda" else "gloo"

    def torch_device(self) -> torch.device:
        """Device of this rank."""
        import torch

        return torch.device("cuda", torch.cuda.current_device()) if self.kind == "cuda" else torch.device("cpu")


@functools.cache
def detect() -> Hardware:
    """The hardware of this process; a GPU wins over the CPU unless CUDA_VISIBLE_DEVICES hides it."""
    import torch

    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} visible",
                hint="Start at most one rank per GPU.",
            )
        torch.cuda.set_device(local_rank)
        properties = torch.cuda.get_device_properties(local_rank)
        return Hardware(
            kind="cuda", name=properties.name, count=torch.cuda.device_count(),
            native_bf16=torch.cuda.is_bf16_supported(including_emulation=False), memory=properties.total_memory,
        )  # fmt: skip
    # oneDNN keeps a compiled kernel for each of the last 1,024 shapes, some 5 MB each; rows have ever new segment lengths.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "96")
    name, flags = _cpu()
    return Hardware(
        kind="cpu", name=name, count=len(os.sched_getaffinity(0)),
        native_bf16=bool({"amx_bf16", "avx512_bf16", "bf16"} & flags),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )  # fmt: skip


def _cpu() -> tuple[str, set[str]]:
    """Processor name and feature flags, from /proc where there is one."""
    name, flags = platform.processor() or platform.machine(), set()
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
            break
    return name, flags


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What was left to the hardware, resolved; `reasons` has one sentence for each."""

    precision: str
    attention: str
    layers: str
    distributed_optimizer: bool
    sequence_parallel: bool
    overlap: bool
    prefetch: bool
    reasons: tuple[tuple[str, str, str], ...]
    """(setting, value, reason)."""


def choose(config: Config, *, dp: int) -> Choices:
    """Resolve every `auto` of a configuration for this machine.

    Args:
        config: the run.
        dp: data-parallel size of its layout.

    Raises:
        ConfigError: a choice the machine cannot serve; all of them in one sentence each.
    """
    hardware, problems = detect(), []
    cuda, gpu_only = hardware.kind == "cuda", "there is no GPU here"
    te = _installed("transformer_engine")
    reasons: list[tuple[str, str, str]] = []

    def pick(setting: str, given: Any, automatic: Any, why: str) -> Any:
        chosen, reason = (automatic, why) if given in (None, "auto") else (given, "as given")
        reasons.append((setting, str(chosen), reason))
        return chosen

    bf16_why = f"{hardware.name} {'multiplies' if hardware.native_bf16 else 'does not multiply'} bf16 matrices in hardware"
    precision = pick("train.precision", config.train.precision, "bf16" if hardware.native_bf16 else "fp32", bf16_why)
    layers = pick(
        "train.layers", config.train.layers, "te" if cuda and te else "torch",
        "TransformerEngine is installed" if cuda and te else (gpu_only if not cuda else "TransformerEngine is not installed"),
    )  # fmt: skip
    dropout = config.model.attention_dropout > 0
    varlen = cuda and precision != "fp32" and not dropout
    attention = pick(
        "train.attention", config.train.attention, "varlen" if varlen else "sdpa",
        "packed flash kernel" if varlen else (
            gpu_only if not cuda else ("the packed kernel has no dropout" if dropout else "the packed kernel has no fp32")
        ),
    )  # fmt: skip
    distributed = pick("parallel.distributed_optimizer", config.parallel.distributed_optimizer, dp > 1, f"dp is {dp}")
    sequence = pick(
        "parallel.sequence_parallel", config.parallel.sequence_parallel, cuda and config.parallel.tp > 1,
        f"tp is {config.parallel.tp} on {hardware.kind}",
    )  # fmt: skip
    overlap = pick("parallel.overlap", config.parallel.overlap, cuda and dp > 1, f"dp is {dp} on {hardware.kind}")
    prefetch = pick("data.pin_and_prefetch", config.data.pin_and_prefetch, cuda, f"batches are read on {hardware.kind}")
    if layers == "te" and not te:
        problems.append("train.layers is te, but TransformerEngine is not installed; install the extra megawrap[te] or use torch")
    if layers == "te" and not cuda:
        problems.append(f"train.layers is te, but {gpu_only}; use torch")
    if attention == "varlen" and not cuda:
        problems.append(f"train.attention is varlen, but {gpu_only}; use sdpa")
    if attention == "varlen" and dropout:
        problems.append(
            f"train.attention is varlen, which has no dropout, but model.attention_dropout is {config.model.attention_dropout}; use sdpa"
        )
    if attention == "varlen" and precision == "fp32":
        problems.append("train.attention is varlen, which needs bf16 or fp16, but train.precision is fp32; use sdpa")
    if sequence and config.parallel.tp == 1:
        problems.append("parallel.sequence_parallel is on, but tp is 1; it splits the sequence over a tensor-parallel group")
    if problems:
        raise ConfigError("; ".join(problems))
    return Choices(
        precision=precision, attention=attention, layers=layers, distributed_optimizer=distributed, sequence_parallel=sequence,
        overlap=overlap, prefetch=prefetch, reasons=tuple(reasons),
    )  # fmt: skip


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def synchronize() -> None:
    """Wait for the device, so that a clock read next is honest."""
    if detect().kind == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: the most this process has held, on the GPU where there is one, else resident in main memory."""
    if detect().kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --------------------------------------------------------------------------------------------------------------
# megatron-core on CPU. Each adapted call stands in ADAPTATIONS with the reason; tests/test_device.py fails when one is
# no longer reached, so that an upgrade of megatron-core which makes it needless is noticed.
# --------------------------------------------------------------------------------------------------------------

HITS: Counter[str] = Counter()
"""How often each adaptation was reached in this process."""


class _CpuTorch:
    """`torch` as a megatron-core module sees it: tensors it wants on "cuda" are made on the CPU."""

    def __init__(self, torch: Any, module: str) -> None:
        self._torch, self._key = torch, f"{module}: device='cuda'"

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._torch, name)
        if name not in ("tensor", "zeros", "empty", "full", "ones"):
            return found

        def make(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") == "cuda":
                HITS[self._key] += 1
                kwargs["device"] = "cpu"
            return found(*args, **kwargs)

        return make


def _current_device(_: Any) -> Callable[[], str]:
    def current_device() -> str:
        HITS["torch.cuda.current_device"] += 1
        return "cpu"

    return current_device


def _tensor_cuda(original: Any) -> Callable[..., Any]:
    def cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return original(self, *args, **kwargs)
        HITS["torch.Tensor.cuda"] += 1
        return self

    return cuda


def _tensor_type(original: Any) -> Callable[..., Any]:
    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        if args or kwargs or not sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return name
        HITS["torch.Tensor.type"] += 1
        return name.replace("torch.", "torch.cuda.", 1)

    return type_


def _get_rng_state(_: Any) -> Callable[..., Any]:
    def get_rng_state(*_: Any, **__: Any) -> Any:
        import torch

        HITS["random._get_cuda_rng_state"] += 1
        return torch.get_rng_state()

    return get_rng_state


def _set_rng_state(_: Any) -> Callable[..., Any]:
    def set_rng_state(state: Any, *_: Any, **__: Any) -> None:
        import torch

        HITS["random._set_cuda_rng_state"] += 1
        torch.set_rng_state(state)

    return set_rng_state


def _rng_tracker(original: Any) -> Any:
    import torch

    class CpuRNGStatesTracker(original):  # type: ignore[misc, valid-type]
        """Named random states over torch's CPU generator, as the original has over the GPU's."""

        def add(self, name: str, seed: int) -> None:
            HITS["random.CudaRNGStatesTracker"] += 1
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    return CpuRNGStatesTracker


@dataclass(frozen=True)
class Adaptation:
    """One name of torch or megatron-core that is replaced when there is no GPU."""

    module: str
    attribute: str
    replace: Callable[[Any], Any]
    key: str
    """Its name in HITS."""
    reason: str


def _factories(module: str) -> Adaptation:
    return Adaptation(
        module, "torch", lambda torch: _CpuTorch(torch, module), f"{module}: device='cuda'",
        "makes small tensors with the literal device='cuda'",
    )  # fmt: skip


ADAPTATIONS = (
    Adaptation("torch.cuda", "current_device", _current_device, "torch.cuda.current_device",
               "megatron-core passes it as the device of every parameter, buffer and message"),
    Adaptation("torch", "Tensor.cuda", _tensor_cuda, "torch.Tensor.cuda",
               "tied embeddings over pipeline stages are moved with .cuda() before they are compared"),
    Adaptation("torch", "Tensor.type", _tensor_type, "torch.Tensor.type",
               "the optimizer sorts parameters by comparing type() with 'torch.cuda.FloatTensor'"),
    Adaptation("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _get_rng_state, "random._get_cuda_rng_state",
               "recomputed activations replay the GPU's random state; here it is torch's CPU state"),
    Adaptation("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state, "random._set_cuda_rng_state",
               "the other half of the line above"),
    Adaptation("megatron.core.tensor_parallel.random", "CudaRNGStatesTracker", _rng_tracker, "random.CudaRNGStatesTracker",
               "the tracker keeps GPU generator states and warns when the CPU state moves, which here it must"),
    _factories("megatron.core.pipeline_parallel.schedules"),
    _factories("megatron.core.optimizer.optimizer"),
    _factories("megatron.core.optimizer.clip_grads"),
    _factories("megatron.core.optimizer.grad_scaler"),
    _factories("megatron.core.utils"),
)  # fmt: skip

_SILENCED = (
    # megatron-core says on import, and on first use, what is not installed; the pre-flight print says what is used instead.
    (UserWarning, "(Apex|Transformer Engine and Apex) (is|are) not installed"),
    (UserWarning, "full scope is deprecated. Use empty cuda_graph_scope"),
    (UserWarning, "When using async grad allreduce it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS"),
    (FutureWarning, "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"),
)
"""Warnings of megatron-core that a user can do nothing about."""


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Functions that megatron-core decorates on import stay as they are: torch.compile does not pay on CPU, and the compiler
    it would load costs every process 70 MiB and two seconds."""
    import torch

    def untouched(function: Any = None, **_: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    original, torch.compile = torch.compile, untouched
    try:
        yield
    finally:
        torch.compile = original


def adapt() -> None:
    """Import megatron-core quietly and, when there is no GPU, replace the calls in ADAPTATIONS. Idempotent."""
    if _STATE["adapted"]:
        return
    _STATE["adapted"] = True
    for category, message in _SILENCED:
        warnings.filterwarnings("ignore", message=message, category=category)
    cpu = detect().kind == "cpu"
    logging.disable(logging.WARNING)  # a page of lines about optional packages
    try:
        with _nothing_compiled() if cpu else contextlib.nullcontext():
            for name in ("optimizer", "pipeline_parallel", "models.gpt", "distributed", "dist_checkpointing", "tensor_parallel"):
                importlib.import_module(f"megatron.core.{name}")
    finally:
        logging.disable(logging.NOTSET)
    if not cpu:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # asynchronous tensor-parallel collectives need the order
        return
    for adaptation in ADAPTATIONS:
        owner: Any = importlib.import_module(adaptation.module)
        *path, name = adaptation.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, adaptation.replace(getattr(owner, name)))


_STATE = {"adapted": False}
