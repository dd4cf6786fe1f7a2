"""`python -m conversion.verify CKPT [--against HF_DIR] [--tp T --pp P]`: is this checkpoint what it claims to be?

In: a checkpoint, and the Hugging Face directory it should equal; without one, an export made for the purpose. Out: a
summary and an exit code (0 proven, 1 different, 2 cannot be compared, 3 damaged). Checked: coverage of every element,
weights bit for bit, shards and replicas of a real tp x pp model, and its fp32 logits against transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megawrap.errors import EXIT_DIFFERENT, EXIT_OK, CheckpointError, ConversionError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from conversion.huggingface import HFDirectory
    from conversion.source import Source

TOLERANCE = 1e-4
_KL_LIMIT = 1e-6
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    summary: str
    """What was measured, in one line."""
    problems: tuple[str, ...] = ()
    """Everything that is wrong, by tensor name where there is one."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of verifying a checkpoint."""

    checkpoint: Path
    against: Path | None
    tp: int
    pp: int
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        against = None if self.against is None else str(self.against)
        return asdict(self) | {"checkpoint": str(self.checkpoint), "against": against, "passed": self.passed}

    def __str__(self) -> str:
        lines = [f"{'verified' if self.passed else 'NOT VERIFIED'}: {self.checkpoint} at tp {self.tp} x pp {self.pp}"]
        lines.append(f"  against {self.against or 'an export made for this check'}")
        for check in self.checks:
            lines.append(f"  {'ok  ' if check.passed else 'FAIL'} {check.name:<9} {check.summary}")
            lines += [f"         {problem}" for problem in check.problems[:_SHOWN]]
            if len(check.problems) > _SHOWN:
                lines.append(f"         and {len(check.problems) - _SHOWN} more (--json lists all)")
        return "\n".join(lines)


def verify(
    checkpoint: Path,
    *,
    against: Path | None = None,
    tp: int = 1,
    pp: int = 1,
    logits: bool = True,
    tolerance: float = TOLERANCE,
    trust: bool = False,
    seed: int = 0,
) -> Verification:
    """Verify a checkpoint.

    Args:
        checkpoint: directory of either format.
        against: Hugging Face directory it should equal; none exports the checkpoint and compares logits with that.
        tp: tensor-parallel size of the model that is built.
        pp: its pipeline size.
        logits: compute logits too (holds the model once in fp32 per side).
        tolerance: largest difference of fp32 logits of standard deviation 1.
        trust: read a Megatron checkpoint without a manifest.
        seed: of random token sequences, used when there is no tokenizer.

    Raises:
        MegawrapError: one of the two cannot be read, or they cannot be compared.
    """
    from conversion.convert import convert, require_layout
    from conversion.huggingface import HFDirectory
    from conversion.load import open_source

    with tempfile.TemporaryDirectory(prefix="megawrap-verify-") as scratch:
        with open_source(checkpoint, trust=trust, allow_nonfinite=True) as source:
            require_layout(source, tp, pp)
            other = HFDirectory(against, allow_nonfinite=True) if against is not None else None
            if other is not None and other.family is not source.family:
                raise ConversionError(f"{source.path} is {source.family.name} and {other.path} is {other.family.name}")
            checks = compare_weights(source, other)
            sequences = _sequences(source, seed) if logits else []
            same_shape = other is None or _function(other) == _function(source)
        report = _on_ranks(checkpoint, tp=tp, pp=pp, sequences=sequences, scratch=Path(scratch), trust=trust)
        checks.append(_replicas(report))
        if sequences and not same_shape:
            checks.append(Check(name="logits", passed=False, summary="not computed: the architectures differ"))
        elif sequences:
            directory = against or Path(scratch, "hf")
            if against is None:
                convert(checkpoint, directory, to="hf", trust=trust, verify=False, allow_nonfinite=True)
            checks.append(_compare_logits(directory, sequences, Path(scratch), tolerance))
    return Verification(checkpoint=checkpoint, against=against, tp=tp, pp=pp, checks=tuple(checks))


def _function(source: Source) -> dict[str, Any]:
    """The fields of the architecture without which logits cannot be compared at all."""
    return {key: value for key, value in source.architecture.to_dict().items() if key.startswith(("num_", "hidden", "vocab"))}


def compare_weights(source: Source, other: HFDirectory | None) -> list[Check]:
    """Coverage of the checkpoint's elements by the rules, and its tensors against the Hugging Face ones, in one pass."""
    from conversion.diff import compare_tensors
    from conversion.ledger import Ledger

    rules = source.rules
    hf_shapes = {hf: shape for rule in rules.values() for hf, shape in rule.hf_shapes.items()}
    ledger = Ledger({name: rule.megatron_shape for name, rule in rules.items()}, hf_shapes)
    ledger.prove(rules.values())
    theirs = {hf for rule in other.rules.values() for hf in rule.hf} if other is not None else set()
    differences, not_finite, elements = [], [], 0
    for name, rule in rules.items():
        tensor = source.read(name)
        ledger.used(name, tensor)
        if not _finite(tensor):
            not_finite.append(f"{name} holds NaN or Inf")
        for hf, part in zip(rule.hf, rule.to_hf(tensor), strict=True):
            ledger.written(hf, part)
            if other is None:
                continue
            if hf not in theirs:
                differences.append(f"{hf} is only in the checkpoint")
                continue
            elements += part.numel()
            difference = compare_tensors(hf, part, other.read_hf(hf))
            if difference is not None:
                differences.append(f"{difference} ({name})")
    coverage = ledger.close()
    text = f"{coverage.tensors} tensors, {coverage.elements:,} elements, each used and written exactly once"
    checks = [Check(name="coverage", passed=coverage.complete, summary=text, problems=coverage.problems)]
    if not_finite:
        checks.append(Check(name="finite", passed=False, summary=f"{len(not_finite)} tensors", problems=tuple(not_finite)))
    if other is not None:
        ours_arch, theirs_arch = source.architecture.to_dict(), other.architecture.to_dict()
        fields = [f"{key} {value!r} against {theirs_arch[key]!r}" for key, value in ours_arch.items() if value != theirs_arch[key]]
        checks.append(Check(name="config", passed=not fields, summary=f"{len(fields)} fields differ", problems=tuple(fields)))
        differences += [f"{hf} is only in {other.path}" for hf in sorted(theirs - set(hf_shapes))]
        text = f"{elements:,} elements compared bit for bit, {len(differences)} tensors differ"
        checks.append(Check(name="weights", passed=not differences, summary=text, problems=tuple(differences)))
    return checks


def _finite(tensor: torch.Tensor) -> bool:
    import torch

    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _sequences(source: Source, seed: int) -> list[list[int]]:
    """Token sequences of three lengths: real text where the checkpoint has a tokenizer, and random tokens."""
    import numpy as np

    longest = min(source.architecture.max_position_embeddings, 128)
    lengths = sorted({longest, max(1, longest // 3), max(1, longest // 11)}, reverse=True)
    random = np.random.default_rng(seed)
    sequences = [random.integers(source.architecture.vocab_size, size=length).tolist() for length in lengths]
    if source.record.tokenizer_dir is not None:
        from megawrap.data.tokenizer import Tokenizer

        ids, _ = Tokenizer(source.record.tokenizer_dir).encode([Path(__file__).read_text()], escape_special=True)
        sequences[0] = [int(token) for token in ids[:longest]]
    return sequences


def _on_ranks(checkpoint: Path, *, tp: int, pp: int, sequences: list[list[int]], scratch: Path, trust: bool) -> dict[str, Any]:
    """Start tp x pp ranks of `conversion.parity` and collect what they wrote."""
    from conversion.parity import REPORT_FILE, Request
    from megawrap import ranks

    request = Request(checkpoint=str(checkpoint.absolute()), tp=tp, pp=pp, sequences=sequences, output=str(scratch), trust=trust)
    file = scratch / "request.json"
    file.write_text(json.dumps(asdict(request)))
    code = ranks.start("conversion.parity", [str(file)], tp * pp)
    if code != 0:
        raise CheckpointError(f"the model could not be loaded on {tp * pp} rank(s): they ended with exit code {code}", corrupt=code == 3)
    return json.loads((scratch / REPORT_FILE).read_text())


def _replicas(report: dict[str, Any]) -> Check:
    problems = tuple(report["problems"])
    text = f"{report['shards']} shards of {report['elements']:,} elements bit for bit, {report['replicas']} of them replicas, all equal"
    return Check(name="replicas", passed=not problems, summary=text if not problems else f"{len(problems)} problems", problems=problems)


def _compare_logits(directory: Path, sequences: list[list[int]], scratch: Path, tolerance: float) -> Check:
    import numpy as np

    from conversion.parity import LOGITS_FILE

    ours = np.load(scratch / LOGITS_FILE, allow_pickle=False)
    return judge_logits(ours, transformers_logits(directory, sequences), tolerance)


def transformers_logits(directory: Path, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """fp32 logits of transformers' own model on the CPU, each sequence alone, laid end to end: [T, vocab_size]."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False, local_files_only=True, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([list(sequence)])).logits[0].float().numpy() for sequence in sequences])


def judge_logits(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> Check:
    """Compare logits [T, V] by largest difference, mean KL divergence and agreement of the best token.

    Args:
        ours: logits of the megatron-core model.
        theirs: logits of transformers.
        tolerance: largest difference of logits of standard deviation 1; grows with theirs, as rounding does. The smallest
            real mistakes (erf against tanh gelu, another norm epsilon) are more than ten times larger.

    Best tokens may differ only where the two best logits are closer than twice the limit.
    """
    import numpy as np

    problems: list[str] = []
    if ours.shape != theirs.shape:
        return Check(name="logits", passed=False, summary=f"shape {ours.shape} against {theirs.shape}")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Check(name="logits", passed=False, summary="NaN or Inf in logits")
    limit = tolerance * max(1.0, float(b.std()))
    largest = float(np.abs(a - b).max())
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    kl = float((np.exp(log_b) * (log_b - log_a)).sum(axis=1).mean())
    best = np.sort(b, axis=1)
    decided = best[:, -1] - best[:, -2] > 2 * limit
    agree = (a.argmax(axis=1) == b.argmax(axis=1)) | ~decided
    if largest > limit:
        row, token = np.unravel_index(np.abs(a - b).argmax(), a.shape)
        problems.append(f"largest difference {largest:.3e} is above {limit:.1e}, at position {row}, token {token}")
    if kl > _KL_LIMIT:
        problems.append(f"mean KL divergence {kl:.3e} is above {_KL_LIMIT:g}")
    if not agree.all():
        problems.append(f"the best token differs at {int((~agree).sum())} of {len(agree)} positions")
    text = (
        f"{len(a)} positions, logits of std {b.std():.2f}: largest difference {largest:.1e}, mean KL {kl:.1e}, "
        f"best token equal at {100 * float(agree.mean()):.1f} %"
    )
    return Check(name="logits", passed=not problems, summary=text, problems=tuple(problems))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    import numpy as np

    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint root, iter_* or release directory, or a Hugging Face one")
    parser.add_argument("--against", type=Path, metavar="HF_DIR", help="Hugging Face directory it should equal (default: an export of it)")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size of the model that is built")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size of the model that is built")
    parser.add_argument(
        "--no-logits", dest="logits", action="store_false", help="leave logits out (large models: no model of transformers)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest difference of fp32 logits of standard deviation 1 (default 1e-4)"
    )
    parser.add_argument("--trust", action="store_true", help="read a Megatron checkpoint that has no manifest.json to check it against")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: Any) -> int:
    """Verify as the command line says."""
    result = verify(
        args.checkpoint, against=args.against, tp=args.tp, pp=args.pp, logits=args.logits, tolerance=args.tolerance, trust=args.trust
    )
    print(json.dumps(result.to_dict(), indent=1) if args.json else result)
    return EXIT_OK if result.passed else EXIT_DIFFERENT


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    from megawrap import cli

    def command(words: list[str]) -> int:
        parser = cli.Parser(prog="megawrap verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        add_arguments(parser)
        return run(parser.parse_args(words))

    return cli.run_command(command, list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
