"""`python -m conversion.diff A B`: are two checkpoints the same weights, bit for bit, whatever their formats?

In: two Hugging Face directories or Megatron checkpoints in any combination. Out: a table of what differs on canonical
names (keys, shapes, dtypes, values; vocabulary padding and ties undone) and exit code 0 equal, 1 different, 2 cannot be
compared, 3 damaged. One tensor of each side is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megawrap.errors import EXIT_DIFFERENT, EXIT_OK, ConversionError

if TYPE_CHECKING:
    import torch

    from conversion.source import Source

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """How one tensor differs."""

    name: str
    kind: str
    """only in A, only in B, shape, dtype or values."""
    a: str = ""
    """What A has: shape, dtype, or the first differing element's value."""
    b: str = ""
    """What B has."""
    differing: int = 0
    """Elements whose bits differ."""
    elements: int = 0
    """Elements of the tensor."""
    largest: float | None = None
    """Largest absolute difference; none when a difference is not a number."""
    first: tuple[int, ...] | None = None
    """Index of the first differing element."""

    def __str__(self) -> str:
        if self.kind != "values":
            return f"{self.name}: {self.kind} {self.a}{' against ' if self.a and self.b else ''}{self.b}".rstrip()
        largest = "not a number" if self.largest is None else f"{self.largest:.3e}"
        return (
            f"{self.name}: {self.differing:,} of {self.elements:,} elements differ, largest difference {largest}, "
            f"first at {list(self.first or ())}: {self.a} against {self.b}"
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The comparison of two checkpoints."""

    a: Path
    b: Path
    tensors: int
    """Canonical tensors on both sides together."""
    elements: int
    """Elements compared."""
    fields: tuple[str, ...] = ()
    """Fields of the architecture that differ, with both values."""
    differences: tuple[TensorDifference, ...] = field(default=())
    """Every tensor that differs."""

    @property
    def equal(self) -> bool:
        """Whether both are the same model, bit for bit."""
        return not self.fields and not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self) | {"a": str(self.a), "b": str(self.b), "equal": self.equal}

    def __str__(self) -> str:
        if self.equal:
            return f"equal: {self.tensors} tensors, {self.elements:,} elements, bit for bit\n  A {self.a}\n  B {self.b}"
        lines = [f"different: {len(self.differences)} of {self.tensors} tensors\n  A {self.a}\n  B {self.b}"]
        lines += [f"  architecture: {text}" for text in self.fields]
        lines += [f"  {difference}" for difference in self.differences[:_SHOWN]]
        if len(self.differences) > _SHOWN:
            lines.append(f"  and {len(self.differences) - _SHOWN} more (--json lists all)")
        return "\n".join(lines)


def compare(a: Source, b: Source) -> Difference:
    """Compare two opened checkpoints.

    Raises:
        ConversionError: they are of different families, so that their tensors do not correspond.
        MegawrapError: a tensor is damaged.
    """
    if a.family is not b.family:
        raise ConversionError(f"{a.path} is {a.family.name} and {b.path} is {b.family.name}; families cannot be compared")
    ours, theirs = a.architecture.to_dict(), b.architecture.to_dict()
    fields = tuple(f"{key} {ours[key]!r} against {theirs[key]!r}" for key in ours if ours[key] != theirs[key])
    types_a, types_b = a.dtypes, b.dtypes
    names = [*types_a, *(name for name in types_b if name not in types_a)]
    found, elements = [], 0
    for name in names:
        if name not in types_a or name not in types_b:
            found.append(TensorDifference(name=name, kind="only in A" if name in types_a else "only in B"))
            continue
        one, other = a.read(name), b.read(name)
        elements += one.numel()
        difference = compare_tensors(name, one, other)
        if difference is not None:
            found.append(difference)
    return Difference(a=a.path, b=b.path, tensors=len(names), elements=elements, fields=fields, differences=tuple(found))


def compare_tensors(name: str, a: torch.Tensor, b: torch.Tensor) -> TensorDifference | None:
    """How two tensors differ, bit for bit: -0.0 differs from 0.0, and a NaN equals only the same NaN. None when equal."""
    import torch

    if a.shape != b.shape:
        return TensorDifference(name=name, kind="shape", a=str(list(a.shape)), b=str(list(b.shape)))
    if a.dtype != b.dtype:
        return TensorDifference(name=name, kind="dtype", a=str(a.dtype), b=str(b.dtype))
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    a, b = a.contiguous(), b.contiguous()
    bits_a, bits_b = a.view(whole), b.view(whole)
    if torch.equal(bits_a, bits_b):
        return None
    mask = bits_a != bits_b
    position = int(mask.view(-1).int().argmax())
    largest = float((a[mask].double() - b[mask].double()).abs().max())
    return TensorDifference(
        name=name, kind="values", differing=int(mask.sum()), elements=a.numel(), largest=largest if largest == largest else None,
        first=tuple(int(index) for index in torch.unravel_index(torch.tensor(position), a.shape)),
        a=repr(a.view(-1)[position].item()), b=repr(b.view(-1)[position].item()),
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("a", type=Path, metavar="A", help="Hugging Face directory, checkpoint root, iter_* or release directory")
    parser.add_argument("b", type=Path, metavar="B", help="the same, of either format")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--trust", action="store_true", help="read a Megatron checkpoint that has no manifest.json to check it against")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare files with the sha256 of the manifest")


def run(args: Any) -> int:
    """Compare as the command line says."""
    from conversion.load import open_source

    options = {"trust": args.trust, "verify": args.verify, "allow_nonfinite": True}
    with open_source(args.a, **options) as a, open_source(args.b, **options) as b:
        result = compare(a, b)
    print(json.dumps(result.to_dict(), indent=1) if args.json else result)
    return EXIT_OK if result.equal else EXIT_DIFFERENT


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    from megawrap import cli

    def command(words: list[str]) -> int:
        parser = cli.Parser(prog="megawrap diff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        add_arguments(parser)
        return run(parser.parse_args(words))

    return cli.run_command(command, list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
