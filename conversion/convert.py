"""`python -m conversion.convert SRC DST --to hf|torch_dist`: one format into the other, streamed, complete or not at all.

In: a Hugging Face directory or a Megatron checkpoint. Out: a new directory of the other format (or of the same), and a
ledger that says every element was used and written exactly once. Tensors are read, laid out and written one by one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megawrap.errors import EXIT_OK, ConversionError
from megawrap.io import readable_size

if TYPE_CHECKING:
    import torch

    from conversion.ledger import Coverage
    from conversion.source import Source

_ROOM = 1 << 20  # headers, config and tokenizer beside the weights


class Writer(Protocol):
    """A target that canonical tensors are written to."""

    shapes: dict[str, tuple[int, ...]]

    def write(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Write a canonical tensor; returns the target's tensors it became."""

    def finish(self) -> None:
        """Write what belongs beside the tensors."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did."""

    source: Path
    source_format: str
    target: Path
    target_format: str
    family: str
    padded_vocab_size: int | None
    """Rows of the vocabulary tensors in the target; none when not padded."""
    padding: str
    """What the source's padding rows held: none, zeros, or other values (they are never converted)."""
    tokenizer: bool
    """Whether the target has a tokenizer."""
    coverage: Coverage
    seconds: float

    def __str__(self) -> str:
        coverage = self.coverage
        rate = coverage.num_bytes / max(self.seconds, 1e-9)
        lines = [
            f"{self.source_format} {self.source} -> {self.target_format} {self.target} ({self.family})",
            f"  tensors   {coverage.tensors}, {coverage.elements:,} elements, {readable_size(coverage.num_bytes)}",
            f"  time      {self.seconds:.2f} s, {readable_size(int(rate))}/s",
            "  coverage  complete: every source element used exactly once, every target element written exactly once",
            f"  padding   source {self.padding}, target {self.padded_vocab_size or 'none'}",
        ]
        if not self.tokenizer:
            lines.append("  tokenizer none found; add one with --tokenizer")
        return "\n".join(lines)


def convert(
    source_path: Path,
    target: Path,
    *,
    to: str,
    tp: int = 1,
    pp: int = 1,
    vocab_divisor: int = 128,
    tokenizer: Path | None = None,
    trust: bool = False,
    verify: bool = True,
    allow_nonfinite: bool = False,
    shard_bytes: int | None = None,
) -> Report:
    """Convert a checkpoint.

    Args:
        source_path: Hugging Face directory, checkpoint root, iter_* or release directory.
        target: directory that does not exist or is empty.
        to: "hf" or "torch_dist".
        tp: tensor-parallel size the checkpoint is meant for; the vocabulary is padded to `vocab_divisor` x tp.
        pp: pipeline size it is meant for; checked against the layers.
        vocab_divisor: see tp.
        tokenizer: tokenizer.json or directory to put beside the weights; default the source's.
        trust: read a Megatron checkpoint without a manifest.
        verify: check a Megatron checkpoint against its manifest first.
        allow_nonfinite: convert NaN and Inf.
        shard_bytes: hf: size above which another weight file is started.

    Raises:
        MegawrapError: refused, with nothing written.
    """
    from conversion.export import open_tokenizer
    from conversion.load import open_source
    from conversion.publish import new_directory, require_absent

    started = time.perf_counter()
    require_absent(target)
    with open_source(source_path, trust=trust, verify=verify, allow_nonfinite=allow_nonfinite) as source:
        require_layout(source, tp, pp)
        chosen = open_tokenizer(tokenizer, source)
        padded = _padded_rows(source, vocab_divisor, tp) if to == "torch_dist" else None
        num_bytes = sum(_num_elements(rule.megatron_shape) * source.dtypes[name].itemsize for name, rule in source.rules.items())
        with new_directory(target, num_bytes + _ROOM) as directory:
            if to == "hf":
                from conversion.export import SHARD_BYTES, HFWriter

                hf_writer = HFWriter(directory, source, tokenizer=chosen, shard_bytes=shard_bytes or SHARD_BYTES)
                coverage, padding = _transfer(source, hf_writer)
            else:
                assert padded is not None
                coverage, padding = _save_release(directory, source, padded, tokenizer or source.record.tokenizer_dir)
    return Report(
        source=source.path, source_format=source.format, target=target, target_format=to, family=source.family.name,
        padded_vocab_size=padded, padding=padding, tokenizer=chosen is not None, coverage=coverage,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _save_release(directory: Path, source: Source, padded: int, tokenizer: Path | None) -> tuple[Coverage, str]:
    from conversion.megatron import MegatronWriter
    from megawrap.checkpoint.store import RELEASE, Store

    results = []

    def write(folder: Path) -> None:
        results.append(_transfer(source, MegatronWriter(folder, source, padded_vocab_size=padded, tokenizer=tokenizer)))

    Store(directory).save(RELEASE, write, {"converted_from": source.format, "iteration": source.record.iteration})
    return results[0]


def _transfer(source: Source, writer: Writer) -> tuple[Coverage, str]:
    """Read, lay out and write every tensor, keeping the ledger.

    Raises:
        RuntimeError: the ledger does not add up, which is a defect of a rule.
    """
    from conversion.ledger import Ledger

    rules = source.rules
    ledger = Ledger({name: rule.megatron_shape for name, rule in rules.items()}, writer.shapes)
    ledger.prove(rules.values())
    padding = "none"
    for name, rule in rules.items():
        padded = source.read_padded(name)
        tensor, beyond = padded[: rule.megatron_shape[0]], padded[rule.megatron_shape[0] :]
        source.require_finite(name, tensor)
        if beyond.numel():
            padding = "other values" if padding == "other values" or beyond.any() else "zeros"
        ledger.used(name, tensor)
        for written, part in writer.write(name, tensor):
            ledger.written(written, part)
    coverage = ledger.close()
    if not coverage.complete:
        raise RuntimeError(f"the conversion is not complete: {'; '.join(coverage.problems)}")
    writer.finish()
    return coverage, padding


def _padded_rows(source: Source, divisor: int, tp: int) -> int:
    """Rows of the vocabulary on disk: what the source has when that can be cut by tp, else a new multiple."""
    kept = source.record.padded_vocab_size
    return kept if kept is not None and kept % tp == 0 else source.architecture.padded_vocab_size(divisor, tp)


def require_layout(source: Source, tp: int, pp: int) -> None:
    """Refuse a layout that the model cannot be cut into.

    Raises:
        ConversionError: all reasons at once.
    """
    from megawrap.parallel import Layout

    if tp < 1 or pp < 1:
        raise ConversionError(f"tp is {tp} and pp is {pp}; both must be 1 or more")
    problems = Layout(tp=tp, pp=pp).problems(source.architecture, seq_length=tp, micro_batch_size=1, global_batch_size=1)
    if problems:
        raise ConversionError("; ".join(problems), hint="Choose another --tp or --pp")


def _num_elements(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that reads checkpoints."""
    parser.add_argument("--trust", action="store_true", help="read a Megatron checkpoint that has no manifest.json to check it against")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare files with the sha256 of the manifest")
    parser.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf in weights")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("source", type=Path, metavar="SRC", help="Hugging Face directory, checkpoint root, iter_* or release directory")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to write; must not exist, or be empty")
    parser.add_argument("--to", required=True, choices=("hf", "torch_dist"), help="format to write")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size the checkpoint is meant for: pads the vocabulary")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size the checkpoint is meant for: checked")
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="torch_dist: pad the vocabulary to a multiple of N x tp"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or directory to put beside the weights (default: the source's)")
    parser.add_argument("--shard-bytes", type=int, help="hf: size above which another weight file is started (default 5e9)")
    add_source_arguments(parser)


def run(args: Any) -> int:
    """Convert as the command line says."""
    for name in ("make_vocab_size_divisible_by", "shard_bytes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConversionError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    report = convert(
        args.source, args.target, to=args.to, tp=args.tp, pp=args.pp, vocab_divisor=args.make_vocab_size_divisible_by,
        tokenizer=args.tokenizer, trust=args.trust, verify=args.verify, allow_nonfinite=args.allow_nonfinite, shard_bytes=args.shard_bytes,
    )  # fmt: skip
    print(report)
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    from megawrap import cli

    def command(words: list[str]) -> int:
        parser = cli.Parser(prog="megawrap convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        add_arguments(parser)
        return run(parser.parse_args(words))

    return cli.run_command(command, list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
