"""The data plan: everything a run is trained and evaluated on, checked and counted before the first iteration.

In: split strings and the data and objective sections of a configuration. Out: `Plan`, which holds the training rows,
the evaluation groups, a fingerprint for checkpoints, and an account of every document of every source.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from megawrap.config import DataConfig, ObjectiveConfig, PackingMode
from megawrap.data.blend import Blend, Once
from megawrap.data.fim import RESERVE, Fim
from megawrap.data.format import IndexedDataset
from megawrap.data.packing_cache import PackingKey, load_or_pack
from megawrap.data.plan_table import render
from megawrap.data.rows import RowDataset
from megawrap.data.samples import UNSUPERVISED, Counts
from megawrap.data.splits import Group, Source, Splits, parse
from megawrap.errors import DataError

TRIED_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """What one source gives to its group.

    Attributes:
        prefix: of the dataset.
        range: first document and the one after the last.
        share: of the group's rows; for training as drawn, for evaluation as there are.
        counts: the account of the range.
        rows: packed rows.
        row_positions: positions of all of them, padding included; with packing none that of a row alone, not of its batch.
        epochs: times its rows are drawn in the requested iterations; 1 for evaluation.
        trained_share: of the group's trained tokens.
        fingerprint: of the dataset.
    """

    prefix: Path
    range: tuple[int, int]
    share: float
    counts: Counts
    rows: int
    row_positions: int
    epochs: float
    trained_share: float
    fingerprint: str

    @property
    def fill(self) -> float:
        """Share of row positions that hold a sample."""
        return self.counts.positions / self.row_positions if self.rows else 0.0

    @property
    def trained(self) -> float:
        """Share of row positions that are trained on."""
        return self.counts.supervised / self.row_positions if self.rows else 0.0


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """A named group and its sources."""

    name: str
    sources: tuple[SourcePlan, ...]

    @property
    def rows(self) -> int:
        """Packed rows of all sources."""
        return sum(source.rows for source in self.sources)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The data of a run.

    Attributes:
        train: endless training rows.
        groups: evaluation groups (valid and test) by name, in the order they were written.
        valid: those of them that are evaluated while training.
        report: an account of train and of every group.
        seq_length: positions of a row; with packing none, of the longest.
        packing: how samples become rows.
        global_batch_size: rows of an optimizer step.
        iterations: optimizer steps.
        fingerprint: of everything the order and content of training rows follow from; goes into checkpoints.
        tokenizer: facts of the tokenizer that made the data (sha256, vocab_size, ...); None when unknown.
        notes: where packings came from, what was left out, what could not be checked.
    """

    train: Blend
    groups: dict[str, Once]
    valid: dict[str, Once]
    report: tuple[GroupPlan, ...]
    seq_length: int
    packing: PackingMode
    global_batch_size: int
    iterations: int
    fingerprint: str
    tokenizer: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)

    @property
    def trained_tokens_per_iteration(self) -> float:
        """Supervised tokens of an average global batch."""
        return self.global_batch_size * sum(source.share * source.counts.supervised / source.rows for source in self.report[0].sources)

    @property
    def positions_per_iteration(self) -> float:
        """Positions of an average global batch, without what packing none adds to make the rows of a micro-batch equal."""
        return self.global_batch_size * sum(source.share * source.row_positions / source.rows for source in self.report[0].sources)

    def table(self) -> str:
        """The plan for a terminal."""
        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain types, for JSON."""
        groups = [
            {
                "name": group.name,
                "rows": group.rows,
                "sources": [
                    {**asdict(source), "prefix": str(source.prefix), "fill": source.fill, "trained": source.trained}
                    for source in group.sources
                ],
            }
            for group in self.report
        ]
        names = (
            "seq_length", "packing", "global_batch_size", "iterations", "fingerprint", "tokenizer", "trained_tokens_per_iteration",
            "positions_per_iteration", "notes",
        )  # fmt: skip
        return {**{name: getattr(self, name) for name in names}, "groups": groups}


def build(
    splits: str | Path | Sequence[str] | Splits,
    data: DataConfig,
    objective: ObjectiveConfig,
    *,
    global_batch_size: int,
    iterations: int,
    vocab_size: int | None = None,
    evaluate: bool = True,
    build_cache: bool = True,
    barrier: Callable[[], None] | None = None,
    fallback_cache_dir: Path | None = None,
) -> Plan:
    """Open, check, pack and count all data of a run.

    With several ranks all call this: one with build_cache=True, the others with False, all with the same barrier. The
    others wait at the barrier until the caches are written, and then map them; where they do not see them (a cache directory
    of their own host), one of them builds while the rest wait. The barrier is passed on errors too, which every rank then finds.

    Args:
        splits: file, strings, or what `megawrap.data.splits.parse` made of them.
        data: everything but splits is used.
        objective: loss_on and normalize are used.
        global_batch_size: rows of an optimizer step.
        iterations: optimizer steps, for the epochs of the table.
        vocab_size: of the model; token ids must be below. None: of the data's tokenizer.
        evaluate: False allows empty evaluation groups; they are left out with a note.
        build_cache: write packings to disk; False without a barrier only reads them.
        barrier: waits for all ranks.
        fallback_cache_dir: where packings go when the directory of the data cannot be written.

    Raises:
        DataError: damaged or missing data, empty groups, fewer rows than a global batch, nothing to train on, another
            tokenizer than the model's or than that of another source, fill-in-the-middle without tokens for it.
    """
    builder = _Builder(data, objective, vocab_size, build_cache or barrier is not None, fallback_cache_dir)
    if barrier is not None and not build_cache:
        barrier()
    try:
        parsed = splits if isinstance(splits, Splits) else parse(splits)
        builder.open(parsed)
        rows = {group.name: [builder.rows(source, train=group is parsed.train) for source in group.sources] for group in parsed.groups}
    finally:
        if barrier is not None and build_cache:
            barrier()
    _refuse_little(parsed.train, rows["train"], global_batch_size)
    groups = _evaluation_groups(parsed, rows, evaluate, builder.notes)
    train = Blend(rows["train"], [source.weight for source in parsed.train.sources], data.seed)
    return Plan(
        train=train,
        groups=groups,
        valid={group.name: groups[group.name] for group in parsed.evaluation if group.is_valid and group.name in groups},
        report=_reports(parsed, rows, builder, train.shares, iterations * global_batch_size),
        seq_length=data.seq_length,
        packing=data.packing,
        global_batch_size=global_batch_size,
        iterations=iterations,
        fingerprint=builder.order_fingerprint(parsed.train, train.weights),
        tokenizer=builder.tokenizer,
        notes=builder.notes,
    )


def _reports(
    splits: Splits, rows: dict[str, list[RowDataset]], builder: _Builder, shares: list[float], drawn: int
) -> tuple[GroupPlan, ...]:  # fmt: skip
    """The account of train, of which `drawn` rows are used in these shares, and of every other group, used once."""
    report = [_report(splits.train, rows["train"], builder, shares, drawn)]
    for group in splits.evaluation:
        counts = [len(source) for source in rows[group.name]]
        report.append(_report(group, rows[group.name], builder, [count / max(1, sum(counts)) for count in counts], None))
    return tuple(report)


class _Builder:
    """Opens every dataset once, checks that they belong together, and packs ranges of them."""

    def __init__(
        self, data: DataConfig, objective: ObjectiveConfig, vocab_size: int | None, build_cache: bool, fallback_cache_dir: Path | None
    ) -> None:
        self.data = data
        self.objective = objective
        self.vocab_size = vocab_size
        self.build_cache = build_cache
        self.fallback_cache_dir = fallback_cache_dir
        self.datasets: dict[str, IndexedDataset] = {}
        self.tokenizer: dict[str, Any] | None = None
        self.fim: Fim | None = None
        self.notes: list[str] = []

    def dataset(self, source: Source) -> IndexedDataset:
        return self.datasets[os.path.realpath(source.prefix)]

    def open(self, splits: Splits) -> None:
        """Open all datasets and report everything wrong with them together."""
        found: list[DataError] = []
        for group in splits.groups:
            for source in group.sources:
                name = os.path.realpath(source.prefix)
                if name not in self.datasets:
                    try:
                        self.datasets[name] = IndexedDataset(source.prefix)
                    except DataError as problem:
                        found.append(DataError(f"{source.where}: {problem.message}", hint=problem.hint, corrupt=problem.exit_code == 3))
        if len(found) > 1:
            corrupt = any(problem.exit_code == 3 for problem in found)
            raise DataError(f"{len(found)} datasets cannot be used:\n  " + "\n  ".join(map(str, found)), corrupt=corrupt)
        if found:
            raise found[0]
        self._check_tokenizers()
        self._check_copies(splits)
        self._check_borders()
        if self.data.fim.rate > 0:
            self._start_fim()

    def _check_borders(self) -> None:
        for dataset in self.datasets.values() if self.data.packing == "concat" else ():
            if (dataset.manifest or {}).get("options", {}).get("append_eod") is not True:
                self.notes.append(
                    f"{dataset.prefix} is not known to end its documents with an end token; packing concat joins them without"
                )

    def _start_fim(self) -> None:
        from megawrap.data.tokenizer import Tokenizer

        if self.data.tokenizer is None:
            raise DataError("data.fim.rate is above 0 without data.tokenizer", hint="Name the tokenizer the data was made with")
        tokenizer = Tokenizer(self.data.tokenizer)
        used = (self.tokenizer or {}).get("sha256")
        if used is not None and used != tokenizer.sha256:
            raise DataError(
                f"data.tokenizer {self.data.tokenizer} has sha256 {tokenizer.sha256[:12]}, the data was made with {used[:12]}",
                hint="Fill-in-the-middle cuts texts of the data: name the tokenizer it was made with",
            )
        fim = self.data.fim
        self.notes.append(
            f"fill-in-the-middle: {fim.rate:.0%} of the training samples, drawn in every epoch, {fim.spm_rate:.0%} of them suffix first;"
            f" {fim.loss} is supervised; {RESERVE} positions are kept free behind each sample"
        )
        self.fim = Fim(fim, tokenizer, seed=self.data.seed, name=str(self.data.tokenizer), vocab_size=self.vocab_size)

    def _check_tokenizers(self) -> None:
        named: dict[str, IndexedDataset] = {}
        for dataset in self.datasets.values():
            facts = (dataset.manifest or {}).get("tokenizer") or {}
            if "sha256" not in facts:
                self.notes.append(f"{dataset.prefix} does not say which tokenizer made it; it could not be compared")
                continue
            named.setdefault(facts["sha256"], dataset)
            self.tokenizer = self.tokenizer or facts
        if len(named) > 1:
            first, second = list(named.items())[:2]
            raise DataError(
                f"{first[1].prefix} and {second[1].prefix} were made with different tokenizers"
                f" (sha256 {first[0][:12]}... and {second[0][:12]}...)",
                hint="Preprocess all data of a run with the model's tokenizer",
            )
        own = (self.tokenizer or {}).get("vocab_size")
        if self.vocab_size is None:
            self.vocab_size = own
        elif own is not None and own > self.vocab_size:
            raise DataError(
                f"{next(iter(named.values())).prefix} was made with a vocabulary of {own} tokens, the model knows {self.vocab_size}",
                hint="Preprocess the data with the model's tokenizer, or give model.vocab_size",
            )

    def _check_copies(self, splits: Splits) -> None:
        """A copy under another name must not carry a document into two groups either."""
        for one, other in combinations(splits.groups, 2):
            for a in one.sources:
                for b in other.sources:
                    if a.start < b.end and b.start < a.end and self.dataset(a).fingerprint == self.dataset(b).fingerprint:
                        raise DataError(
                            f"{b.where}: {other.name} {b.start:g}:{b.end:g} of {b.prefix} overlaps {one.name} {a.start:g}:{a.end:g}"
                            f" of {a.prefix}, which is a copy of the same data",
                            hint="Give the two groups ranges that do not overlap",
                        )

    def key(self, source: Source, *, train: bool) -> PackingKey:
        """What the packing of a source follows from."""
        dataset = self.dataset(source)
        first, last = source.documents(dataset.num_documents)
        return PackingKey(
            fingerprint=dataset.fingerprint,
            first=first,
            last=last,
            seq_length=self.data.seq_length,
            overlong=self.data.overlong,
            loss_on=self.objective.loss_on,
            seed=self.data.seed,
            packing=self.data.packing,
            pad_to_multiple=self.data.pad_to_multiple,
            reserve=RESERVE if train and self.data.fim.rate > 0 else 0,
        )

    def order_fingerprint(self, train: Group, weights: list[int]) -> str:
        """Of everything the order and content of training rows follow from."""
        order: list[Any] = [[asdict(self.key(source, train=True)) for source in train.sources], weights, self.data.seed]
        if self.fim is not None:
            order += [asdict(self.data.fim), self.tokenizer]
        return hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()

    def rows(self, source: Source, *, train: bool) -> RowDataset:
        """Packed rows of a source; only those that are trained on change from epoch to epoch."""
        dataset = self.dataset(source)
        folders = [Path(self.data.cache_dir)] if self.data.cache_dir else [source.prefix.parent]
        if self.fallback_cache_dir is not None:
            folders.append(self.fallback_cache_dir)
        packing, note = load_or_pack(dataset, self.key(source, train=train), folders, write=self.build_cache)
        self.notes.append(note)
        rows = RowDataset(
            dataset,
            packing,
            seq_length=self.data.seq_length,
            loss_on=self.objective.loss_on,
            normalize=self.objective.normalize,
            vocab_size=self.vocab_size,
            seed=self.data.seed if train else None,
            fim=self.fim if train else None,
        )
        if rows.fim is not None and len(rows):
            self._try_fim(rows)
        return rows

    def _try_fim(self, rows: RowDataset) -> None:
        """Transform all samples of a few rows, so that data of which none can be is not trained on without a word."""
        always = copy(rows)
        assert self.fim is not None
        always.fim = self.fim.with_rate(1.0)
        tried = np.sum([always.row(index)["fim"] for index in range(min(len(rows), TRIED_ROWS))], axis=0)
        transformed, kept, outgrown = tried.tolist()
        number = transformed + kept + outgrown
        if transformed == 0:
            raise DataError(
                f"data.fim.rate is {self.data.fim.rate}, but of {number} samples of {rows.dataset.prefix} that were tried none can be"
                f" transformed: {outgrown} would outgrow a row of {rows.seq_length} positions, {kept} have special tokens inside their"
                " text, no text, or are cut",
                hint="Raise data.seq_length, look at the data with megawrap data inspect, or set data.fim.rate to 0",
            )
        self.notes.append(
            f"{rows.dataset.prefix}: of {number:,} samples that were tried {transformed:,} can be transformed for fill-in-the-middle"
            f" ({outgrown:,} would outgrow their place)"
        )


def _refuse_empty(group: Group, source: Source, rows: RowDataset) -> None:
    counts = rows.packing.counts
    first, last = source.documents(rows.dataset.num_documents)
    what = f"{source.where}: group {group.name}, {source.prefix} {source.start:g}:{source.end:g}"
    if first == last:
        raise DataError(
            f"{what}: the range holds none of {rows.dataset.num_documents} documents (round({source.start:g} x"
            f" {rows.dataset.num_documents}) = round({source.end:g} x {rows.dataset.num_documents}) = {first})",
            hint="Widen the range, or leave the entry out",
        )
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.dropped_documents.items())
    hint = "Raise data.seq_length or choose another data.overlong policy" if counts.overlong else "Check the range and the data"
    if counts.dropped_documents.get(UNSUPERVISED) == counts.documents and not counts.overlong:
        hint = "Its loss mask is all zero: preprocess with outputs, or set objective.loss_on to all"
    raise DataError(f"{what}: nothing is left of {counts.documents} documents: {reasons}", hint=hint)


def _refuse_little(train: Group, rows: list[RowDataset], global_batch_size: int) -> None:
    for source, source_rows in zip(train.sources, rows, strict=True):
        if len(source_rows) == 0:
            _refuse_empty(train, source, source_rows)
    total, at_most = sum(len(source_rows) for source_rows in rows), "at most " if rows[0].packing.mode == "none" else ""
    if total < global_batch_size:
        raise DataError(
            f"the train group packs into {total} row{'s' * (total != 1)} of {at_most}{rows[0].seq_length} positions, fewer than one"
            f" global batch of {global_batch_size}",
            hint="Lower train.global_batch_size or data.seq_length, or add data",
        )


def _evaluation_groups(splits: Splits, rows: dict[str, list[RowDataset]], evaluate: bool, notes: list[str]) -> dict[str, Once]:
    groups = {}
    for group in splits.evaluation:
        if not any(map(len, rows[group.name])):
            if evaluate:
                _refuse_empty(group, group.sources[0], rows[group.name][0])
            notes.append(f"group {group.name} is empty and left out")
            continue
        groups[group.name] = Once(rows[group.name])
        if len({source.weight for source in group.sources}) > 1:
            notes.append(f"group {group.name}: its weights play no part, evaluation takes every row once")
    return groups


def _report(group: Group, rows: list[RowDataset], builder: _Builder, shares: list[float], drawn: int | None) -> GroupPlan:
    counts = [source_rows.packing.counts for source_rows in rows]
    density = [share * c.supervised / max(1, len(r)) for share, c, r in zip(shares, counts, rows, strict=True)]
    sources = []
    for number, (source, source_rows) in enumerate(zip(group.sources, rows, strict=True)):
        sources.append(
            SourcePlan(
                prefix=source.prefix,
                range=source.documents(source_rows.dataset.num_documents),
                share=shares[number],
                counts=counts[number],
                rows=len(source_rows),
                row_positions=source_rows.total_positions,
                epochs=1.0 if drawn is None else drawn * shares[number] / len(source_rows),
                trained_share=density[number] / (sum(density) or 1.0),
                fingerprint=builder.dataset(source).fingerprint,
            )
        )
    return GroupPlan(name=group.name, sources=tuple(sources))
