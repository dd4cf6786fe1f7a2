"""Twin files read as one dataset: the same bytes as one file, streamed or in memory, and pairs that are none refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megawrap.data import twins
from megawrap.data.format import IndexedDataset, IndexedWriter
from megawrap.data.twins import TwinDataset, open_writers, twin_prefixes
from megawrap.errors import EXIT_CORRUPT, DataError
from tests.data import documents


def write_twins(prefix: Path, given: list[documents.Document], *, name: str = "targets", manifest: dict[str, Any] | None = None) -> None:
    writers = open_writers(prefix, name, np.uint16)
    for place, writer in enumerate(writers):
        parts = [sample[place][1] for sample in given]
        lengths = np.array([len(part) for part in parts])
        writer.add(np.array([t for part in parts for t in part], dtype=np.int64), lengths, np.ones(len(parts), dtype=np.int64), None)
    for writer in writers:
        writer.prepare(manifest or {"tokenizer": {"sha256": "ab" * 32, "vocab_size": documents.VOCAB}})
    for writer in writers:
        writer.publish()


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", ["targets", "outputs"])
def test_any_prefix_of_twins_is_one_dataset(tmp_path: Path, name: str, mmap: bool) -> None:
    given = documents.samples(1, 50)
    write_twins(tmp_path / "pair", given, name=name)
    found, one = IndexedDataset(tmp_path / "pair", mmap=mmap), documents.write(tmp_path / "one", given)
    assert isinstance(found, TwinDataset)
    for field in ("lengths", "pointers", "document_indices", "modes", "tokens"):
        assert np.array_equal(getattr(found, field), getattr(one, field)), field
    assert (found.num_documents, found.num_sequences, found.num_tokens) == (50, 100, one.num_tokens)
    assert (found.dtype, found.max_token_id) == (one.dtype, one.max_token_id)
    assert found.verify()["trained_tokens"] == one.verify()["trained_tokens"]
    assert found.manifest is not None
    assert found.manifest["tokenizer"]["vocab_size"] == documents.VOCAB


def test_every_stretch_of_tokens_can_be_read_alone(tmp_path: Path) -> None:
    given = documents.samples(2, 12, longest=4)
    write_twins(tmp_path / "pair", given)
    found = IndexedDataset(tmp_path / "pair")
    flat = [token for sample in given for _, tokens in sample for token in tokens]
    for first in range(len(flat) + 1):
        for count in range(len(flat) - first + 1):
            assert found.read(first, count).tolist() == flat[first : first + count]


def test_a_dataset_of_the_same_name_is_opened_rather_than_twins(tmp_path: Path) -> None:
    given = documents.samples(3, 5)
    write_twins(tmp_path / "pair", given)
    documents.write(tmp_path / "pair", given)
    assert not isinstance(IndexedDataset(tmp_path / "pair"), TwinDataset)


@pytest.mark.parametrize("lost", ["pair_inputs_document", "pair_targets_document"])
@pytest.mark.parametrize("suffixes", [(".bin",), (".idx",), (".bin", ".idx", ".manifest.json")])
def test_a_twin_that_is_missing_is_named(tmp_path: Path, lost: str, suffixes: tuple[str, ...]) -> None:
    write_twins(tmp_path / "pair", documents.samples(4, 5))
    for suffix in suffixes:
        (tmp_path / f"{lost}{suffix}").unlink()
    with pytest.raises(DataError) as refused:
        IndexedDataset(tmp_path / "pair")
    assert str(tmp_path / lost) in str(refused.value)


def test_both_kinds_of_outputs_are_one_too_many(tmp_path: Path) -> None:
    given = documents.samples(5, 5)
    write_twins(tmp_path / "pair", given)
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"pair_outputs_document{suffix}").write_bytes((tmp_path / f"pair_targets_document{suffix}").read_bytes())
    with pytest.raises(DataError, match=r"exactly one of .*pair_targets_document or .*pair_outputs_document; there are 2"):
        IndexedDataset(tmp_path / "pair")


def test_twins_of_unequal_number_say_both_numbers(tmp_path: Path) -> None:
    write_twins(tmp_path / "pair", documents.samples(6, 5))
    write_twins(tmp_path / "other", documents.samples(6, 4))
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"other_targets_document{suffix}").replace(tmp_path / f"pair_targets_document{suffix}")
    with pytest.raises(DataError, match="do not pair up: 5 inputs of uint16, 4 targets of uint16"):
        IndexedDataset(tmp_path / "pair")


def test_twins_of_different_runs_are_told_apart_by_their_manifests(tmp_path: Path) -> None:
    given = documents.samples(7, 5)
    write_twins(tmp_path / "pair", given)
    write_twins(tmp_path / "other", given, manifest={"tokenizer": {"sha256": "cd" * 32, "vocab_size": documents.VOCAB}})
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"other_targets_document{suffix}").replace(tmp_path / f"pair_targets_document{suffix}")
    with pytest.raises(DataError, match="manifests of the twins differ in tokenizer"):
        IndexedDataset(tmp_path / "pair")


def test_sequences_that_are_no_samples_are_refused(tmp_path: Path) -> None:
    write_twins(tmp_path / "pair", documents.samples(8, 4))
    inputs = twin_prefixes(tmp_path / "pair", "targets")[0]
    for suffix in (".bin", ".idx", ".manifest.json"):
        inputs.with_name(inputs.name + suffix).unlink()
    with IndexedWriter(inputs, np.uint16) as writer:
        writer.add(np.arange(1, 5), np.ones(4, dtype=np.int64), np.array([1, 3]), None)
        writer.commit({})
    with pytest.raises(DataError, match="4 sequences in 2 documents, twin files have one each"):
        IndexedDataset(tmp_path / "pair")


def test_what_does_not_fit_in_memory_is_refused_with_the_command_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_twins(tmp_path / "pair", documents.samples(9, 30))
    found = IndexedDataset(tmp_path / "pair")
    monkeypatch.setattr(twins, "MAX_BYTES_IN_MEMORY", 100)
    with pytest.raises(DataError, match=r"and the limit is 100 bytes") as refused:
        _ = found.tokens
    assert f"megawrap data merge {tmp_path / 'pair'}_merged --inputs {tmp_path / 'pair'}" in str(refused.value)


def test_damage_of_either_twin_is_found(tmp_path: Path) -> None:
    write_twins(tmp_path / "pair", documents.samples(10, 20))
    for name in twin_prefixes(tmp_path / "pair", "targets"):
        path = name.with_name(name.name + ".bin")
        good = path.read_bytes()
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        with pytest.raises(DataError) as refused:
            IndexedDataset(tmp_path / "pair").verify()
        assert refused.value.exit_code == EXIT_CORRUPT
        assert f"{path}: sha256" in str(refused.value)
        path.write_bytes(good)
