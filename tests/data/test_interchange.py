"""Files of others and for others: megatron-core's own IndexedDataset and GPTDataset, and twins as the BigCode fork writes them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megawrap.config import DataConfig, ObjectiveConfig
from megawrap.data.format import IndexedDataset
from megawrap.data.plan import build
from megawrap.errors import DataError
from tests.data import documents


def theirs(prefix: Path, sequences: list[list[int]], *, dtype: Any = np.uint16, per_document: int = 1) -> Path:
    """A dataset written by megatron-core's builder, as Megatron-LM's and the fork's preprocess_data.py drive it."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(prefix.with_name(prefix.name + ".bin")), dtype=dtype)
    for first in range(0, len(sequences), per_document):
        for sequence in sequences[first : first + per_document]:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(prefix.with_name(prefix.name + ".idx")))
    return prefix


def test_megatron_cores_gpt_dataset_reads_our_files(tmp_path: Path) -> None:
    """Every row of their dataset is a window of the stream of our sequences, in an order of theirs."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Theirs
    from megatron.core.datasets.utils import Split

    class Tokenizer:  # the facts GPTDataset asks of one
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012
        vocab_size, eod, pad = documents.VOCAB, 0, 1

    given = documents.samples(3, 40)
    ours = documents.write(tmp_path / "data", given)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend=([str(ours.prefix)], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=Tokenizer(),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    low = Theirs(str(ours.prefix), multimodal=False)
    rows = GPTDataset(low, str(ours.prefix), np.arange(len(low), dtype=np.int32), 8, Split.train, config)
    order = rows.document_index.tolist()
    sequences = [tokens for document in given for _, tokens in document]
    stream = [token for index in order for token in sequences[index]]
    starts = {tuple(stream[at : at + 17]) for at in range(0, len(stream) - 16, 16)}
    for index in range(8):
        row = rows[index]
        assert (*row["tokens"].tolist(), row["labels"].tolist()[-1]) in starts


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("per_document", [1, 3])
def test_plain_files_of_theirs_are_trained_on_whole(tmp_path: Path, dtype: Any, per_document: int) -> None:
    """No modes, no manifest: refused with the fix under loss_on outputs, every next token a label under loss_on all."""
    rng = np.random.default_rng(5)
    sequences = [rng.integers(1, 500, size=int(rng.integers(2, 9))).tolist() for _ in range(30)]
    prefix = theirs(tmp_path / "plain", sequences, dtype=dtype, per_document=per_document)
    data = DataConfig(splits="", seq_length=32)
    with pytest.raises(DataError, match=r"set objective\.loss_on to all"):
        build([f"train: 1 0:1 {prefix}"], data, ObjectiveConfig(), global_batch_size=1, iterations=1, build_cache=False)
    plan = build([f"train: 1 0:1 {prefix}"], data, ObjectiveConfig(loss_on="all"), global_batch_size=1, iterations=1, build_cache=False)
    counts = plan.report[0].sources[0].counts
    assert counts.kept_tokens == sum(map(len, sequences)) == IndexedDataset(prefix).num_tokens
    assert counts.supervised == sum(map(len, sequences)) - 30 // per_document


@pytest.mark.parametrize("name", ["targets", "outputs"])
def test_twins_of_the_fork_train_as_one_dataset(tmp_path: Path, name: str) -> None:
    """The rows of twin files are the rows of the same samples in one file: tokens, labels, weights."""
    given = documents.samples(7, 60)
    theirs(tmp_path / "corpus_inputs_document", [sample[0][1] for sample in given])
    theirs(tmp_path / f"corpus_{name}_document", [sample[1][1] for sample in given])
    twins = IndexedDataset(tmp_path / "corpus")
    assert [twins.sequence(index).tolist() for index in range(twins.num_sequences)] == [t for sample in given for _, t in sample]
    assert twins.modes is not None
    assert twins.modes.tolist() == [mode for sample in given for mode, _ in sample]
    data = DataConfig(splits="", seq_length=40)
    text = f"train: 1 0:1 {tmp_path / 'corpus'}"
    plan = build([text], data, ObjectiveConfig(), global_batch_size=2, iterations=1, build_cache=False)
    seen = set()
    for row in plan.train.rows(np.arange(2 * sum(map(len, plan.train.sources)))):
        bounds = np.concatenate([[0], np.cumsum(row["segment_lengths"])])
        for document, first in zip(row["sample_ids"].tolist(), bounds.tolist(), strict=False):
            expected = documents.segment(given[document], 0, len(documents.flat(given[document])[0]), "outputs", "token")
            span = slice(first, first + len(expected))
            found = zip(*(row[key][span].tolist() for key in ("tokens", "labels", "position_ids", "weights")), strict=True)
            assert list(found) == expected
            seen.add(document)
    assert len(seen) == sum(source.packing.counts.samples for source in plan.train.sources)


def test_the_forks_file_of_weighted_splits_with_twins(tmp_path: Path) -> None:
    """The line as the fork's scripts write it: groups in double quotes, prefixes of twins."""
    given = documents.samples(8, 50)
    theirs(tmp_path / "a_inputs_document", [sample[0][1] for sample in given])
    theirs(tmp_path / "a_targets_document", [sample[1][1] for sample in given])
    (tmp_path / "train.txt").write_text(f'"train: 1.0 0:0.9 {tmp_path}/a" "valid_a: 1.0 0.9:1.0 {tmp_path}/a"')
    data, objective = DataConfig(splits="", seq_length=40), ObjectiveConfig()
    plan = build(tmp_path / "train.txt", data, objective, global_batch_size=2, iterations=1, build_cache=False)
    assert [(group.name, group.sources[0].range) for group in plan.report] == [("train", (0, 45)), ("valid_a", (45, 50))]


def test_floats_under_the_codes_that_older_forks_swap_are_refused(tmp_path: Path) -> None:
    prefix = theirs(tmp_path / "old", [[1, 2, 3]])
    index = bytearray((tmp_path / "old.idx").read_bytes())
    for code in (6, 7):
        struct.pack_into("<B", index, 17, code)
        (tmp_path / "old.idx").write_bytes(index)
        with pytest.raises(DataError, match=f"dtype code: {code}, token ids are one of"):
            IndexedDataset(prefix)
