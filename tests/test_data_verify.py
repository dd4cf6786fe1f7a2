"""`megawrap data verify`: what passes is proven, what does not is named with file and place, in memory that does not grow."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megawrap import data_verify
from megawrap.data import format
from megawrap.data.format import IndexedDataset, IndexedWriter
from megawrap.errors import EXIT_CORRUPT, EXIT_USAGE, DataError
from tests.data import documents
from tests.data.test_interchange import theirs
from tests.data.test_twins import write_twins


def test_what_was_proven_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = documents.samples(1, 20)
    data = documents.write(tmp_path / "data", given)
    assert data_verify.main([str(tmp_path / "data")]) == 0
    told = capsys.readouterr().out
    trained = sum(len(tokens) for document in given for mode, tokens in document if mode)
    highest = max(token for document in given for _, tokens in document for token in tokens)
    for fact in ("20 (40 sequences", f"{data.num_tokens:,} tokens of uint16", "as the manifest says (bin ", f"0 to {highest:,}",
                 f"the vocabulary has {documents.VOCAB:,}", f"{trained:,} tokens, {100 * trained / data.num_tokens:.1f} %"):  # fmt: skip
        assert fact in told


def test_without_a_manifest_the_structure_is_checked_and_this_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = theirs(tmp_path / "plain", [[1, 2, 3], [4, 900]])
    assert data_verify.main([str(prefix)]) == 0
    told = capsys.readouterr().out
    assert "there is no manifest, only the structure was checked" in told
    assert "usable with loss_on all" in told and "no vocabulary size is known" in told
    assert data_verify.main([str(prefix), "--vocab-size", "901"]) == 0
    assert data_verify.main([str(prefix), "--vocab-size", "900"]) == EXIT_CORRUPT
    assert f"{prefix}.bin: token ids: 900 in sequence 1: the vocabulary ends at 900" in capsys.readouterr().err


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = documents.write(tmp_path / "data", documents.samples(2, 20))
    assert data_verify.main([str(data.prefix), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["tokens"], report["manifest"], report["vocab_size"]) == (data.num_tokens, True, documents.VOCAB)
    assert report["files"] == {str(path): path.stat().st_size for path in (data.bin_path, data.idx_path)}


def test_every_damaged_prefix_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good", "flipped", "cut"):
        documents.write(tmp_path / name, documents.samples(3, 20))
    path = tmp_path / "flipped.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    os.truncate(tmp_path / "cut.bin", 10)
    names = [str(tmp_path / name) for name in ("good", "flipped", "cut", "nothing")]
    assert data_verify.main(names) == EXIT_CORRUPT
    told = capsys.readouterr()
    assert f"verified    {names[0]}" in told.out
    assert "3 of 4 datasets did not pass" in told.err
    assert all(fact in told.err for fact in ("flipped.bin: sha256", "cut.bin: size: 10 bytes", "nothing: no indexed dataset here"))
    assert data_verify.main([names[-1]]) == EXIT_USAGE


def test_twins_are_verified_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_twins(tmp_path / "pair", documents.samples(4, 20))
    assert data_verify.main([str(tmp_path / "pair")]) == 0
    assert "inputs bin" in capsys.readouterr().out


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_of_any_size_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """What is found does not depend on where blocks end, and damage is found in every one of them, at its place."""
    given = documents.samples(5, 20)
    data = documents.write(tmp_path / "data", given)
    whole = data.verify()
    monkeypatch.setattr(format, "_CHUNK", block)
    assert IndexedDataset(data.prefix).verify() == whole
    assert whole["max_token_id"] == max(token for document in given for _, tokens in document for token in tokens)
    (tmp_path / "data.manifest.json").unlink()
    sequences = [number for number, length in enumerate(data.lengths.tolist()) for _ in range(length)]
    for at, sequence in enumerate(sequences):
        tokens = np.fromfile(data.bin_path, "<u2")
        tokens[at] = 65_000
        tokens.tofile(data.bin_path)
        with pytest.raises(DataError, match=f"65000 in sequence {sequence}: the vocabulary ends at {documents.VOCAB}"):
            IndexedDataset(data.prefix).verify(documents.VOCAB)
        tokens[at] = 1
        tokens.tofile(data.bin_path)


@pytest.mark.parametrize("name", ["max_token_id", "target_tokens", "context_tokens"])
def test_counts_only_a_whole_reading_can_tell(tmp_path: Path, name: str) -> None:
    """The manifest agrees with the size of the files and their sha256, and still tells something else."""
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add(np.array([7, 8, 9]), np.array([1, 2]), np.array([2]), np.array([0, 1]))
        writer.commit({"counts": {"target_tokens": 2, "context_tokens": 1}})
    path = tmp_path / "data.manifest.json"
    manifest = json.loads(path.read_text())
    right = manifest["counts"][name]
    manifest["counts"][name] = 5
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"counts\.{name}: 5 in the manifest, {right} in the files"):
        IndexedDataset(tmp_path / "data").verify()


def values(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of every value inside a JSON document."""
    found = [path] if path else []
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            found += values(value, (*path, key))
    return found


@pytest.mark.fault
def test_a_manifest_with_anything_in_it_is_never_a_traceback(tmp_path: Path) -> None:
    """Every value of a manifest is replaced by one of another kind, and left out: refused in a sentence, or harmless."""
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add(np.array([7, 8, 9]), np.array([1, 2]), np.array([2]), np.array([0, 1]))
        writer.commit({"tokenizer": {"sha256": "ab", "vocab_size": 10}, "counts": {"target_tokens": 2}, "sources": [{"path": "x"}]})
    path = tmp_path / "data.manifest.json"
    whole = json.loads(path.read_text())
    refused = 0
    for place in values(whole):
        for change in (None, "x", -1, 2**70, [], {}, [1], {"a": 1}, True, "left out"):
            manifest = json.loads(json.dumps(whole))
            holder = manifest
            for key in place[:-1]:
                holder = holder[key]
            if change == "left out":
                del holder[place[-1]]
            else:
                holder[place[-1]] = change
            path.write_text(json.dumps(manifest))
            try:
                IndexedDataset(tmp_path / "data").verify()
            except DataError as problem:
                refused += 1
                assert str(path) in str(problem) or "data.bin" in str(problem) or "data.idx" in str(problem)
    assert refused > 100
    for text in (b"", b"[]", b"null", b"\xff", b"{" * 100_000, b"[" * 100_000, json.dumps(whole).encode()[:-9]):
        path.write_bytes(text)
        with pytest.raises(DataError, match="manifest"):
            IndexedDataset(tmp_path / "data")


@pytest.mark.fault
def test_any_bytes_in_an_index_are_never_a_traceback(tmp_path: Path) -> None:
    """1,000 random changes of an index without manifest: opened, or refused naming the file; never another error."""
    prefix = theirs(tmp_path / "plain", [[1, 2, 3], [4], [5, 6]], per_document=2)
    path, good = tmp_path / "plain.idx", (tmp_path / "plain.idx").read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(1000):
        bad = bytearray(good)
        at = rng.randrange(len(bad))
        kind: Callable[[], int] = rng.choice([lambda: 0, lambda: 255, lambda: rng.randrange(256)])
        for offset in range(at, min(len(bad), at + rng.choice([1, 4, 8]))):
            bad[offset] = kind()
        path.write_bytes(bad[: rng.choice([len(bad), len(bad), at])])
        try:
            dataset = IndexedDataset(prefix)
            dataset.verify()
            assert dataset.num_tokens == 6
        except DataError as problem:
            refused += 1
            assert "plain" in str(problem) and problem.exit_code == EXIT_CORRUPT
    assert refused > 700


MEASURED = """
import resource, sys
from megawrap import data_verify
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert data_verify.main(sys.argv[1:]) == 0
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """512 MiB of token ids (a hole on disk) in one sequence are verified in far less memory than that."""
    assert resource.getpagesize() > 0
    tokens = 1 << 28
    with (tmp_path / "hole.bin").open("wb") as stream:
        stream.truncate(2 * tokens)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2) + struct.pack("<i", tokens) + struct.pack("<q", 0) + struct.pack("<2q", 0, 1)
    (tmp_path / "hole.idx").write_bytes(index)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path / "hole")], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.splitlines()[-1].split())
    assert "0 to 0" in done.stdout and after - before < 100 << 10, (before, after)
