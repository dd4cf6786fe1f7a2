"""What every rank of a verification does: build the model at tp x pp, load it, check its shards and compute logits.

In: a checkpoint, a layout and token sequences. Out, on rank 0: a `RankReport` with the problems of shards and replicas,
and fp32 logits. `python -m conversion.parity REQUEST.json` is one rank; `conversion.verify` starts them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from conversion.source import Source

REPORT_FILE = "report.json"
LOGITS_FILE = "logits.npy"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the ranks are asked to do; plain types, so that it travels as JSON."""

    checkpoint: str
    """Directory of either format."""
    tp: int
    pp: int
    sequences: list[list[int]]
    """Token ids; every sequence is a segment of one packed row. Empty: compute no logits."""
    output: str
    """Existing directory for the report and the logits."""
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What the ranks found."""

    problems: tuple[str, ...]
    """Replicas that differ, shards that are not the checkpoint's, elements held by no rank."""
    shards: int
    """Shards on all ranks together."""
    replicas: int
    """Shards that more than one rank holds."""
    elements: int
    """Elements of the full tensors they make up."""


def check_shards(chunks: Sequence[Any], source: Source) -> RankReport:
    """Compare every live parameter of this rank with the checkpoint, and equal ones of all ranks with each other.

    Collective. Replicated parameters (norms, biases after row-parallel layers, positions, tied embeddings of the last
    stage) are held by several ranks and must have the same bits on all of them.

    Returns:
        The same report on every rank.
    """
    import torch.distributed as dist

    from megawrap.models.weights import shards

    mine, problems = [], []
    for name, shape, where, live in shards(chunks):
        data = live.detach().cpu().contiguous()
        at = tuple((part.start, part.stop) for part in where)
        mine.append((name, shape, at, hashlib.sha256(_bits(data).numpy()).hexdigest()))
        if not _is_slice_of(source, name, shape, where, data):
            problems.append(f"rank {dist.get_rank()}: {name} {_ranges(at)} is not what the checkpoint holds")
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (mine, problems))
    return _judge(gathered, source)


def _judge(gathered: list[Any], source: Source) -> RankReport:
    problems = [problem for _, found in gathered for problem in found]
    holders: dict[tuple[str, Any], list[tuple[int, str]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, (mine, _) in enumerate(gathered):
        for name, shape, at, digest in mine:
            holders.setdefault((name, at), []).append((rank, digest))
            if shapes.setdefault(name, shape) != shape:
                problems.append(f"{name} has shape {shape} on rank {rank} and {shapes[name]} elsewhere")
    for (name, at), copies in holders.items():
        if len({digest for _, digest in copies}) > 1:
            problems.append(f"replicas of {name} {_ranges(at)} differ between ranks {', '.join(str(rank) for rank, _ in copies)}")
    for name, shape in shapes.items():
        held = sum(prod(stop - start for start, stop in at) for key, at in holders if key == name)
        if held != prod(shape):
            problems.append(f"{name}: ranks hold {held} of its {prod(shape)} elements")
    problems += [f"{name} is on no rank" for name in source.rules if name not in shapes]
    return RankReport(
        problems=tuple(problems),
        shards=sum(map(len, holders.values())),
        replicas=sum(len(copies) for copies in holders.values() if len(copies) > 1),
        elements=sum(map(prod, shapes.values())),
    )


def _is_slice_of(source: Source, name: str, shape: tuple[int, ...], where: tuple[slice, ...], live: torch.Tensor) -> bool:
    """Whether a live shard has the bits of its part of the checkpoint's tensor, padding rows zero."""
    import torch

    full = source.read(name).to(live.dtype)
    if full.shape[0] < shape[0]:
        full = torch.cat([full, full.new_zeros(shape[0] - full.size(0), *full.shape[1:])])
    return tuple(full.shape) == shape and torch.equal(_bits(full[where]), _bits(live))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8)


def _ranges(at: Sequence[tuple[int, int]]) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in at) + "]"


def logits(chunk: Any, sequences: Sequence[Sequence[int]]) -> torch.Tensor | None:
    """fp32 logits of the model at every position of packed sequences, through its pipeline stages.

    Args:
        chunk: the bare chunk of this rank (no virtual stages).
        sequences: token ids; each is a segment of one row of T positions.

    Returns:
        [T, vocab_size] on the ranks of the last stage, none elsewhere.
    """
    import numpy as np
    import torch
    import torch.distributed as dist

    from megawrap import parallel
    from megawrap.models.batch import Batch

    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    total = int(lengths.sum())
    arrays = {
        "tokens": np.concatenate([np.array(sequence, np.int64) for sequence in sequences]),
        "position_ids": np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        "labels": np.zeros(total, np.int64),
        "weights": np.ones(total, np.float32),
        "segment_lengths": lengths,
        "num_tokens": total,
        "squared_lengths": int((lengths.astype(np.int64) ** 2).sum()),
    }
    device = next(chunk.parameters()).device
    batch = Batch.of(arrays, device)
    group = parallel.pp_group()
    stage, stages = dist.get_rank(group), dist.get_world_size(group)
    with torch.no_grad():
        if stage > 0:
            received = torch.empty(total, 1, chunk.config.hidden_size, device=device)
            dist.recv(received, group=group, group_src=stage - 1)
            chunk.set_input_tensor(received)
        result = chunk(batch, mode="logits")
        if stage < stages - 1:
            dist.send(result.contiguous(), group=group, group_dst=stage + 1)
            return None
    return result.float().cpu()


def measure(request: Request) -> RankReport:
    """Do what is asked on this rank. Collective over tp x pp ranks; the first rank of the last stage writes the logits."""
    import numpy as np

    from conversion.load import initialise, open_source
    from megawrap import device, parallel

    device.adapt()
    from megawrap.models.gpt import Build, build_chunks

    layout = parallel.Layout(tp=request.tp, pp=request.pp)
    parallel.start(layout)
    with open_source(request.checkpoint, trust=request.trust, verify=False, allow_nonfinite=True) as source:
        chunks = build_chunks(source.architecture, layout, Build(padded_vocab_size=_padded_rows(source, request.tp)))
        for chunk in chunks:
            chunk.eval()
        initialise(chunks, source)
        report = check_shards(chunks, source)
        if request.sequences:
            result = logits(chunks[0], request.sequences)
            if result is not None and parallel.tp_rank() == 0:
                np.save(Path(request.output, LOGITS_FILE), result.numpy(), allow_pickle=False)
    return report


def _padded_rows(source: Source, tp: int) -> int:
    kept = source.record.padded_vocab_size
    return kept if kept is not None and kept % tp == 0 else source.architecture.padded_vocab_size(1, tp)


def main(argv: Sequence[str] | None = None) -> int:
    """One rank of a verification."""
    from megawrap import cli

    def command(words: list[str]) -> int:
        import torch.distributed as dist

        from megawrap import parallel

        request = Request(**json.loads(Path(words[0]).read_text()))
        report = measure(request)
        if dist.get_rank() == 0:
            Path(request.output, REPORT_FILE).write_text(json.dumps(asdict(report)))
        parallel.stop()
        return 0

    return cli.run_command(command, list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
