"""What `megawrap data inspect` shows: samples, rows and batches as `View`s, and the `Account` of every source.

In: a prefix or the data settings of a recipe, and numbers of samples, rows or a batch. Out: views and accounts, made by
the same plan, packing and rows as training. Nothing is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megawrap.config import DataConfig, ObjectiveConfig
from megawrap.data.blend import Once
from megawrap.data.format import IndexedDataset
from megawrap.data.plan import GroupPlan, Plan, SourcePlan, build
from megawrap.data.splits import Group, Source, Splits
from megawrap.data.statistics import collect
from megawrap.data.statistics_table import Account, Packed, Part
from megawrap.data.tokenizer import Tokenizer
from megawrap.data.tokenizer_files import find
from megawrap.data.view import Decode, View, of_row, of_sample
from megawrap.errors import EXIT_CORRUPT, DataError, MegawrapError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what rows there are.

    Attributes:
        splits: as in the recipe, or made by `whole`.
        data, objective: sections of the configuration.
        global_batch_size: rows of an optimizer step.
        iterations: of the run, for the epochs of the mix.
        vocab_size: of the model, when known.
        fallback_cache_dir: where packings may lie besides the data's directory.
    """

    splits: Splits | str | Path | Sequence[str]
    data: DataConfig
    objective: ObjectiveConfig
    global_batch_size: int = 1
    iterations: int = 1
    vocab_size: int | None = None
    fallback_cache_dir: Path | None = None


def whole(prefix: Path) -> Splits:
    """Splits that train on all of one dataset."""
    source = Source(weight=1.0, start=0.0, end=1.0, prefix=prefix, where="PREFIX")
    return Splits(train=Group(name="train", sources=(source,), where="PREFIX"), evaluation=())


@dataclass(kw_only=True)
class Inspection:
    """Samples of one dataset, rows of one group, and what is known of both.

    Attributes:
        settings: what rows there are.
        prefix: of the dataset that was named; None shows the sources of a recipe.
        group: name of the group whose rows are shown.
        tokenizer: tokenizer.json or a directory; None looks at what the manifest names.
        notes: what could not be done or checked.
    """

    settings: Settings
    prefix: Path | None
    group: str = "train"
    tokenizer: str | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def dataset(self) -> IndexedDataset:
        """The dataset that was named."""
        if self.prefix is None:
            raise DataError("--sample needs to know of which dataset", hint="Give its PREFIX as well")
        return IndexedDataset(self.prefix)

    @cached_property
    def plan(self) -> Plan:
        """The plan that training would follow; packings are read or made, and not written."""
        settings = self.settings
        return build(
            settings.splits,
            settings.data,
            settings.objective,
            global_batch_size=settings.global_batch_size,
            iterations=settings.iterations,
            vocab_size=settings.vocab_size,
            evaluate=False,
            build_cache=False,
            fallback_cache_dir=settings.fallback_cache_dir,
        )

    def _group_plan(self) -> GroupPlan:
        for found in self.plan.report:
            if found.name == self.group:
                return found
        known = ", ".join(found.name for found in self.plan.report)
        raise DataError(f"--group {self.group}: there is no such group", hint=f"The groups are {known}")

    @cached_property
    def decode(self) -> Decode | None:
        """Ids to text; None, with a note, when no tokenizer is known.

        Raises:
            DataError: it is not the tokenizer that made the data.
        """
        made_with = (self.dataset.manifest or {}).get("tokenizer") if self.prefix is not None else self.plan.tokenizer
        facts: dict[str, Any] = made_with or {}
        path = self.tokenizer or self._tokenizer_nearby(facts)
        if path is None:
            self.notes.append("the tokenizer is not known, so ids are shown: name it with --tokenizer")
            return None
        tokenizer = Tokenizer(path)
        where = self.prefix or "the data"
        if "sha256" not in facts:
            self.notes.append(f"{where} does not say which tokenizer made it; {tokenizer.path} could not be compared")
        elif facts["sha256"] != tokenizer.sha256:
            raise DataError(
                f"{tokenizer.path} is not the tokenizer that made {where}: its sha256 is {tokenizer.sha256[:16]}...,"
                f" the manifest names {facts['sha256'][:16]}...",
                hint="Give the model's tokenizer that the data was preprocessed with",
            )

        def decode(ids: Sequence[int]) -> str:
            if ids and max(ids) >= tokenizer.vocab_size:
                raise DataError(
                    f"{where}: token id {max(ids)}, {tokenizer.path} knows 0 to {tokenizer.vocab_size - 1}",
                    hint="Give the tokenizer that made the data",
                )
            return tokenizer.decode(ids)

        return decode

    def _tokenizer_nearby(self, facts: dict[str, Any]) -> Path | None:
        """The tokenizer where the manifest says it was, or in a usual place beside the data, if it is the very same by its sha256."""
        folders = [Path(facts["path"])] if isinstance(facts.get("path"), str) else []
        if self.prefix is not None:
            folders += [folder / name for folder in (self.prefix.parent, self.prefix.parent.parent) for name in ("", "tokenizer")]
        for folder in folders:
            with contextlib.suppress(DataError):  # nothing there is the usual case
                files = find(folder)
                if files.sha256() == facts.get("sha256"):
                    self.notes.append(f"text by {files.path}, which made the data by its sha256")
                    return files.path
        return None

    def sample(self, number: int) -> View:
        """A document of the named dataset."""
        if not 0 <= number < self.dataset.num_documents:
            raise DataError(f"--sample {number}: {self.dataset.prefix} has samples 0 to {self.dataset.num_documents - 1}")
        return of_sample(self.dataset, number, self.decode, loss_on=self.settings.objective.loss_on)

    def rows(self, numbers: Sequence[int], *, flag: str = "--row") -> list[View]:
        """Rows of the group, numbered as they are drawn; training goes on for ever, an evaluation group ends."""
        self._group_plan()
        rows = self.plan.train if self.group == "train" else self.plan.groups.get(self.group)
        if rows is None:
            raise DataError(f"{flag}: the group {self.group} is empty")
        if isinstance(rows, Once) and max(numbers) >= len(rows):
            raise DataError(f"{flag} {max(numbers)}: the group {self.group} has rows 0 to {len(rows) - 1}")
        wanted = np.array(numbers, dtype=np.int64)
        titles = [f"row {number} of {self.group}" for number in numbers]
        told = [text.partition(": documents ")[0] for text in rows.describe(wanted)]
        return [of_row(row, f"{title}, {of}", self.decode) for row, title, of in zip(rows.rows(wanted), titles, told, strict=True)]

    def batch(self, number: int) -> list[View]:
        """The rows of a global batch of the group, counted from 0."""
        size = self.settings.global_batch_size
        if self.settings.data.packing == "none":
            self.notes.append("packing none: in training, the rows of a micro-batch are padded to its longest")
        first = number * size
        if self.group == "train":
            return self.rows(range(first, first + size), flag=f"--batch {number}")
        last = len(self.plan.groups[self.group]) if self.group in self.plan.groups else 0
        if first >= last:
            self._group_plan()
            raise DataError(f"--batch {number}: the group {self.group} has {last} rows, {-(-last // size)} batches of {size}")
        return self.rows(range(first, min(last, first + size)), flag=f"--batch {number}")

    def accounts(self) -> list[Account]:
        """Statistics of the named dataset, or of every source of the group."""
        if self.prefix is not None:
            try:
                packed = _packed(self.plan.report[0].sources[0], self.plan)
            except MegawrapError as problem:
                if problem.exit_code == EXIT_CORRUPT:
                    raise
                packed = None  # what cannot be packed can still be counted
                self.notes.append(f"not packed: {problem}")
            return [Account(statistics=collect(self.dataset), packed=packed, mix=_recorded_mix(self.dataset))]
        sources = self._group_plan().sources
        mix = [_part(source) for source in sources]
        return [
            Account(
                statistics=collect(IndexedDataset(source.prefix), *source.range),
                packed=_packed(source, self.plan),
                mix=mix if number == 0 and len(mix) > 1 else [],
            )
            for number, source in enumerate(sources)
        ]


def _packed(source: SourcePlan, plan: Plan) -> Packed:
    counts = source.counts
    losses = [
        f"{number:,} documents, {counts.dropped_tokens[reason]:,} tokens left out: {reason}"
        for reason, number in counts.dropped_documents.items()
    ]
    if counts.cut_tokens:
        losses.append(f"{counts.cut_tokens:,} tokens cut from {counts.shortened:,} over-long documents")
    return Packed(
        seq_length=plan.seq_length,
        packing=plan.packing,
        rows=source.rows,
        fill=source.fill,
        trained=source.trained,
        overlong=counts.overlong,
        lost_tokens=counts.tokens - counts.kept_tokens,
        losses=losses,
    )


def _part(source: SourcePlan) -> Part:
    counts = source.counts
    return Part(
        name=str(source.prefix),
        numbers={
            "weight %": f"{100 * source.share:.2f}",
            "documents": f"{counts.documents:,}",
            "rows": f"{source.rows:,}",
            "tokens": f"{counts.tokens:,}",
            "trained": f"{counts.supervised:,}",
            "trained %": f"{100 * source.trained_share:.2f}",
            "epochs": f"{source.epochs:.2f}",
        },
    )


def _recorded_mix(dataset: IndexedDataset) -> list[Part]:
    """The sources a manifest names: datasets that were merged, counted one by one, or files that were preprocessed."""
    sources = [source for source in (dataset.manifest or {}).get("sources") or [] if isinstance(source, dict)]
    ranges = [source.get("documents") for source in sources]
    sizes = [last - first for first, last in (found for found in ranges if isinstance(found, list) and len(found) == 2)]
    if sources and len(sizes) == len(sources) and sum(sizes) == dataset.num_documents:
        ends = np.cumsum(sizes).tolist()
        return [
            _counted(dataset, str(source.get("dataset")), end - size, end) for source, size, end in zip(sources, sizes, ends, strict=True)
        ]
    parts = []
    for source in sources:
        numbers = {
            name.replace("_", " "): f"{value:,}" for name, value in source.items() if isinstance(value, int) and not isinstance(value, bool)
        }
        name = next((str(source[key]) for key in ("path", "name", "file", "dataset") if key in source), "?")
        parts.append(Part(name=Path(name).name or name, numbers=numbers))
    return parts


def _counted(dataset: IndexedDataset, name: str, first: int, last: int) -> Part:
    found = collect(dataset, first, last)
    numbers = {
        "documents": f"{found.documents:,}",
        "tokens": f"{found.tokens:,}",
        "tokens %": f"{100 * found.tokens / dataset.num_tokens:.1f}",
    }
    if found.trained_share is not None:
        numbers |= {"trained": f"{found.trained_tokens:,}", "trained %": f"{100 * found.trained_share:.1f}"}
    return Part(name=name, numbers=numbers)
