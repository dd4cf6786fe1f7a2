"""Indexed datasets against megatron-core's own reader and writer, and against a process killed between two renames."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megawrap.data.format import IndexedDataset, IndexedWriter, token_dtype
from megawrap.errors import EXIT_CORRUPT, EXIT_USAGE, DataError

NAMES = (".bin", ".idx", ".manifest.json")


def random_documents(seed: int, num_documents: int = 40) -> list[list[tuple[int, list[int]]]]:
    """Documents of 1-3 (mode, tokens) sequences, some of them empty."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(num_documents):
        modes = [0] * int(rng.integers(0, 3)) + [1]
        documents.append([(mode, rng.integers(0, 1000, size=int(rng.integers(0, 9))).tolist()) for mode in modes])
    return documents


def write(
    prefix: Path, documents: list[list[tuple[int, list[int]]]], *, dtype: Any = np.uint16, step: int = 7, modes: bool = True
) -> dict[str, Any]:
    with IndexedWriter(prefix, dtype) as writer:
        for first in range(0, len(documents), step):
            block = documents[first : first + step]
            sequences = [sequence for document in block for sequence in document]
            writer.add(
                np.array([token for _, tokens in sequences for token in tokens], dtype=np.int64),
                np.array([len(tokens) for _, tokens in sequences]),
                np.array([len(document) for document in block]),
                np.array([mode for mode, _ in sequences]) if modes else None,
            )
        return writer.commit({"tokenizer": {"vocab_size": 1000}})


def files_of(prefix: Path) -> set[str]:
    return {path.name for path in prefix.parent.iterdir()}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("modes", [True, False])
def test_bytes_equal_megatron_cores_builder(tmp_path: Path, dtype: Any, modes: bool) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = random_documents(0)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype, multimodal=modes)
    for document in documents:
        flat = torch.tensor([token for _, tokens in document for token in tokens], dtype=torch.int64)
        builder.add_document(flat, [len(tokens) for _, tokens in document], [mode for mode, _ in document] if modes else None)
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", documents, dtype=dtype, modes=modes)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    # A file of theirs has no manifest; its content gives the same fingerprint.
    theirs = IndexedDataset(tmp_path / "theirs")
    assert theirs.manifest is None
    assert theirs.fingerprint == IndexedDataset(tmp_path / "ours").fingerprint
    assert theirs.max_token_id == IndexedDataset(tmp_path / "ours").max_token_id


@pytest.mark.parametrize("multimodal", [True, False])
def test_megatron_core_reads_our_files(tmp_path: Path, multimodal: bool) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Theirs

    documents = random_documents(1)
    write(tmp_path / "data", documents)
    theirs = Theirs(str(tmp_path / "data"), multimodal=multimodal)
    sequences = [sequence for document in documents for sequence in document]
    assert len(theirs) == len(sequences)
    for index, (mode, tokens) in enumerate(sequences):
        found = theirs[index]
        if multimodal:
            assert found[1] == mode
            found = found[0]
        assert found.tolist() == tokens
    assert theirs.document_indices.tolist() == np.cumsum([0] + [len(document) for document in documents]).tolist()
    if multimodal:
        assert theirs.index.sequence_modes.tolist() == [mode for mode, _ in sequences]


@pytest.mark.parametrize("mmap", [True, False])
def test_reader_returns_what_was_written(tmp_path: Path, mmap: bool) -> None:
    documents = random_documents(2)
    write(tmp_path / "a.b" / "data.v1", documents)
    data = IndexedDataset(tmp_path / "a.b" / "data.v1", mmap=mmap)
    sequences = [sequence for document in documents for sequence in document]
    assert [data.sequence(index).tolist() for index in range(data.num_sequences)] == [tokens for _, tokens in sequences]
    assert data.tokens.tolist() == [token for _, tokens in sequences for token in tokens]
    assert data.modes is not None
    assert data.modes.tolist() == [mode for mode, _ in sequences]
    assert data.num_documents == len(documents)
    assert data.max_token_id == max(token for _, tokens in sequences for token in tokens)
    data.verify()
    assert files_of(tmp_path / "a.b" / "data.v1") == {"data.v1" + name for name in NAMES}


def test_index_has_the_published_layout(tmp_path: Path) -> None:
    write(tmp_path / "data", [[(0, [5, 6]), (1, [7])], [(1, [8, 9, 10])]])
    index = (tmp_path / "data.idx").read_bytes()
    assert index == (
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, 3, 3)
        + struct.pack("<3i", 2, 1, 3)
        + struct.pack("<3q", 0, 4, 6)
        + struct.pack("<3q", 0, 2, 3)
        + struct.pack("<3b", 0, 1, 1)
    )
    assert (tmp_path / "data.bin").read_bytes() == struct.pack("<6H", 5, 6, 7, 8, 9, 10)


def test_block_size_does_not_change_the_bytes(tmp_path: Path) -> None:
    documents = random_documents(3)
    manifests = [write(tmp_path / f"by{step}", documents, step=step) for step in (1, 5, 100)]
    assert manifests[0] == manifests[1] == manifests[2]


def test_token_dtype_is_megatron_cores() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (1, 65499, 65500, 200_000):
        assert token_dtype(size) == np.dtype(DType.optimal_dtype(size))


def test_an_id_that_does_not_fit_is_never_wrapped(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "data", np.uint16) as writer, pytest.raises(ValueError, match="65536 does not fit uint16"):
        writer.add(np.array([65536]), np.array([1]), np.array([1]), np.array([1]))
    assert files_of(tmp_path / "data") == set()


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token"), IndexedWriter(tmp_path / "new" / "data", np.uint16) as writer:
        writer.add(np.zeros(0, np.int64), np.array([0]), np.array([1]), np.array([1]))
        writer.commit({})
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    write(tmp_path / "data", random_documents(4))
    before = {name: (tmp_path / f"data{name}").read_bytes() for name in NAMES}
    with pytest.raises(DataError, match=r"data\.bin, data\.idx, data\.manifest\.json already there"):
        IndexedWriter(tmp_path / "data", np.uint16)
    os.unlink(tmp_path / "data.manifest.json")  # now it looks like a pair of another tool
    with pytest.raises(DataError, match=r"data\.bin, data\.idx already there"):
        IndexedWriter(tmp_path / "data", np.uint16)
    assert files_of(tmp_path / "data") == {"data.bin", "data.idx"}
    assert (tmp_path / "data.bin").read_bytes() == before[".bin"]


def test_two_writers_of_one_prefix(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "data", np.uint16) as first:
        with pytest.raises(DataError, match=f"process {os.getpid()}"):
            IndexedWriter(tmp_path / "data", np.uint16)
        with IndexedWriter(tmp_path / "neighbour", np.uint16):
            pass
        first.add(np.array([1]), np.array([1]), np.array([1]), np.array([1]))
        first.commit({})
    assert IndexedDataset(tmp_path / "data").num_tokens == 1


KILLED = """
import os, sys
import numpy as np
from megawrap.data.format import IndexedWriter
rename, left = os.replace, int(sys.argv[2])
def counted(source, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    rename(source, target)
os.replace = counted
writer = IndexedWriter(sys.argv[1], np.uint16)
writer.add(np.arange(6), np.array([2, 4]), np.array([2]), np.array([0, 1]))
writer.commit({})
os._exit(9)
"""


@pytest.mark.fault
@pytest.mark.parametrize("renames", range(4))
def test_killed_between_renames(tmp_path: Path, renames: int) -> None:
    prefix = tmp_path / "data"
    assert subprocess.run([sys.executable, "-c", KILLED, str(prefix), str(renames)], check=False).returncode == 9
    if renames < 3:
        with pytest.raises(DataError, match="interrupted") as refused:
            IndexedDataset(prefix)
        assert refused.value.exit_code == EXIT_CORRUPT
        with IndexedWriter(prefix, np.uint16) as writer:  # the same command again, no manual step
            writer.add(np.arange(6), np.array([2, 4]), np.array([2]), np.array([0, 1]))
            writer.commit({})
    data = IndexedDataset(prefix)
    data.verify()
    assert data.tokens.tolist() == list(range(6))
    assert files_of(prefix) - {".data.lock"} == {"data" + name for name in NAMES}


def test_wrong_prefix_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no indexed dataset here") as refused:
        IndexedDataset(tmp_path / "nothing")
    assert refused.value.exit_code == EXIT_USAGE
    write(tmp_path / "data", random_documents(5))
    with pytest.raises(DataError, match=r"prefix without \.bin"):
        IndexedDataset(tmp_path / "data.idx")


def test_verify_finds_every_changed_bit(tmp_path: Path) -> None:
    write(tmp_path / "data", [[(0, [5, 6]), (1, [7])], [(0, []), (1, [8, 9, 10])]])
    for suffix in (".bin", ".idx"):
        path = tmp_path / f"data{suffix}"
        good = path.read_bytes()
        for bit in range(8 * len(good)):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            with pytest.raises(DataError) as refused:
                IndexedDataset(tmp_path / "data").verify()
            assert refused.value.exit_code == EXIT_CORRUPT
            assert str(tmp_path / "data") in str(refused.value)
        path.write_bytes(good)
    IndexedDataset(tmp_path / "data").verify()


@pytest.mark.parametrize("mmap", [True, False])
def test_token_ids_outside_the_vocabulary(tmp_path: Path, mmap: bool) -> None:
    write(tmp_path / "data", [[(0, [1, 2]), (1, [3, 77, 4])]], dtype=np.int32)
    data = IndexedDataset(tmp_path / "data", mmap=mmap)
    data.verify(vocab_size=78)
    with pytest.raises(DataError, match=r"77 in sequence 1: the vocabulary ends at 77"):
        data.verify(vocab_size=77)
    (tmp_path / "data.manifest.json").unlink()
    tokens = np.fromfile(tmp_path / "data.bin", "<i4")
    tokens[0] = -5
    tokens.tofile(tmp_path / "data.bin")
    with pytest.raises(DataError, match=r"-5 in sequence 0: negative"):
        IndexedDataset(tmp_path / "data", mmap=mmap).verify()


def test_bin_cut_after_open_is_noticed_in_file_mode(tmp_path: Path) -> None:
    write(tmp_path / "data", [[(1, list(range(100)))]])
    data = IndexedDataset(tmp_path / "data", mmap=False)
    os.truncate(tmp_path / "data.bin", 50)
    with pytest.raises(DataError, match="100 tokens at 0 were there at open, 25 are now"):
        data.sequence(0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda manifest: manifest["counts"].update(tokens=7), "counts.tokens"),
        (lambda manifest: manifest["counts"].update(documents=7), "counts.documents"),
        (lambda manifest: manifest["counts"].update(sequences=7), "counts.sequences"),
        (lambda manifest: manifest["files"]["bin"].update(bytes=7), "files.bin.bytes"),
        (lambda manifest: manifest["files"]["idx"].update(bytes=7), "files.idx.bytes"),
        (lambda manifest: manifest.update(dtype="int32"), "dtype"),
        (lambda manifest: manifest.update(modes=False), "modes"),
        (lambda manifest: manifest.update(format="other"), "format"),
        (lambda manifest: manifest.pop("files"), "content"),
        (lambda manifest: manifest.update(version=99), "version 99"),
    ],
)
def test_manifest_must_agree(tmp_path: Path, change: Any, field: str) -> None:
    write(tmp_path / "data", random_documents(6))
    path = tmp_path / "data.manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError) as refused:
        IndexedDataset(tmp_path / "data")
    assert str(path) in str(refused.value)
    assert field in str(refused.value)


def test_empty_documents_of_other_tools_are_read(tmp_path: Path) -> None:
    write(tmp_path / "data", [[(1, [1])], [(1, [2])]], modes=False)
    index = bytearray((tmp_path / "data.idx").read_bytes())
    index[26:34] = struct.pack("<Q", 4)
    index[-24:] = struct.pack("<4q", 0, 1, 1, 2)
    (tmp_path / "data.idx").write_bytes(index)
    (tmp_path / "data.manifest.json").unlink()
    assert IndexedDataset(tmp_path / "data").document_indices.tolist() == [0, 1, 1, 2]
