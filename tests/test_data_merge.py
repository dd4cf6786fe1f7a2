"""Merging and cutting: cuts merged again are the original byte for byte, and nothing that does not belong together is joined."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megawrap import data_cut, data_merge
from megawrap.data import concat
from megawrap.data.format import IndexedDataset, IndexedWriter, manifest_path
from megawrap.errors import EXIT_CORRUPT, EXIT_USAGE
from tests.data import documents
from tests.data.test_interchange import theirs
from tests.data.test_twins import write_twins

NAMES = (".bin", ".idx", ".manifest.json")


def content(prefix: Path) -> tuple[bytes, bytes]:
    return prefix.with_name(prefix.name + ".bin").read_bytes(), prefix.with_name(prefix.name + ".idx").read_bytes()


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """What a refused command said, in one line."""
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("megawrap: error: ") and told.err.count("\n") == 1
    assert code in (EXIT_USAGE, EXIT_CORRUPT)
    return told.err


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_merge_of_cuts_is_the_original(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any cuts, any block size, with and without modes, with empty sequences."""
    folder = tmp_path_factory.mktemp("cuts")
    modes = data.draw(st.booleans())
    given_documents = documents.samples(data.draw(st.integers(0, 99)), data.draw(st.integers(2, 30)), chat=True)
    original = documents.write(folder / "all", given_documents, modes=modes)
    number = original.num_documents
    bounds = sorted({0, number, *data.draw(st.lists(st.integers(0, number), max_size=4))})
    block = data.draw(st.sampled_from([1, 7, 1000]))
    patch = pytest.MonkeyPatch()
    patch.setattr(concat.document_blocks, "__kwdefaults__", {**concat.document_blocks.__kwdefaults__, "block_tokens": block})
    try:
        parts = []
        for first, last in pairwise(bounds):
            parts.append(str(folder / f"cut{first}"))
            assert data_cut.main([str(folder / "all"), parts[-1], "--documents", f"{first}:{last}"]) == 0
        assert data_merge.main([str(folder / "again"), "--inputs", *parts]) == 0
    finally:
        patch.undo()
    assert content(folder / "again") == content(folder / "all")
    IndexedDataset(folder / "again").verify()
    counts = json.loads((folder / "again.manifest.json").read_text())["counts"]
    if modes:
        trained = sum(len(tokens) for document in given_documents for mode, tokens in document if mode)
        assert counts["target_tokens"] == trained and counts["context_tokens"] == original.num_tokens - trained


def test_ranges_are_those_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--range` takes the documents that `data.splits` would take, and ranges that adjoin lose nothing."""
    from megawrap.data.splits import parse

    original = documents.write(tmp_path / "all", documents.samples(1, 37))
    for text in ("0:0.31", "0.31:0.62", "0.62:1"):
        assert data_cut.main([str(original.prefix), str(tmp_path / text), "--range", text]) == 0
        source = parse(f"train: 1 {text} {original.prefix}").train.sources[0]
        assert json.loads(manifest_path(tmp_path / text).read_text())["sources"][0]["documents"] == list(source.documents(37))
    parts = [str(tmp_path / text) for text in ("0:0.31", "0.31:0.62", "0.62:1")]
    assert data_merge.main([str(tmp_path / "again"), "--inputs", *parts]) == 0
    assert content(tmp_path / "again") == content(tmp_path / "all")


def test_megatron_core_reads_the_result(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Theirs

    one, two = documents.samples(2, 9), documents.samples(3, 8)
    documents.write(tmp_path / "one", one)
    documents.write(tmp_path / "two", two)
    assert data_merge.main([str(tmp_path / "both"), "--inputs", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    found = Theirs(str(tmp_path / "both"), multimodal=True)
    expected = [sequence for document in one + two for sequence in document]
    assert [(int(found[i][1]), found[i][0].tolist()) for i in range(len(found))] == expected
    assert found.document_indices.tolist() == list(range(0, 2 * 17 + 1, 2))


def test_twins_become_one_file(tmp_path: Path) -> None:
    given_documents = documents.samples(4, 30)
    write_twins(tmp_path / "pair", given_documents)
    documents.write(tmp_path / "expected", given_documents)
    assert data_merge.main([str(tmp_path / "single"), "--inputs", str(tmp_path / "pair")]) == 0
    assert content(tmp_path / "single") == content(tmp_path / "expected")
    assert data_merge.main([str(tmp_path / "twice"), "--inputs", str(tmp_path / "pair"), str(tmp_path / "expected")]) == 0
    assert IndexedDataset(tmp_path / "twice").num_documents == 60


@pytest.mark.parametrize("block", [1, 1000])
def test_files_of_other_tools_keep_their_empty_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """megatron-core's builder ends documents that hold nothing; the last ones too must come through."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for tokens in ([1, 2, 3], None, [4], [5, 6], None, None):
        if tokens:
            builder.add_item(torch.tensor(tokens))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    monkeypatch.setattr(concat.document_blocks, "__kwdefaults__", {**concat.document_blocks.__kwdefaults__, "block_tokens": block})
    for cut, span in (("a", "0:2"), ("b", "2:4"), ("c", "3:6")):
        assert data_cut.main([str(tmp_path / "theirs"), str(tmp_path / cut), "--documents", span]) == 0
    assert data_merge.main([str(tmp_path / "same"), "--inputs", str(tmp_path / "theirs")]) == 0
    assert content(tmp_path / "same") == content(tmp_path / "theirs")
    assert IndexedDataset(tmp_path / "c").document_indices.tolist() == [0, 1, 1, 1]


def test_sources_are_recorded(tmp_path: Path) -> None:
    tokenizer = {"sha256": "12" * 32, "vocab_size": documents.VOCAB}
    one = documents.write(tmp_path / "one", documents.samples(5, 10), tokenizer=tokenizer)
    two = documents.write(tmp_path / "two", documents.samples(6, 10), tokenizer=tokenizer)
    assert data_cut.main([str(one.prefix), str(tmp_path / "cut"), "--documents", "2:7"]) == 0
    assert data_merge.main([str(tmp_path / "out"), "--inputs", str(tmp_path / "cut"), str(two.prefix)]) == 0
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["tokenizer"] == tokenizer
    assert [(source["dataset"], source["documents"], source["of_documents"]) for source in manifest["sources"]] == [
        ("cut", [0, 5], 5),
        ("two", [0, 10], 10),
    ]
    assert manifest["sources"][1]["fingerprint"] == two.fingerprint
    assert manifest["sources"][0]["sources"][0]["dataset"] == "one"


def test_a_tokenizer_that_only_some_name_is_not_claimed_for_all(tmp_path: Path) -> None:
    documents.write(tmp_path / "one", documents.samples(5, 10))
    documents.write(tmp_path / "two", documents.samples(6, 10), manifest=False)
    assert data_merge.main([str(tmp_path / "out"), "--inputs", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "tokenizer" not in json.loads((tmp_path / "out.manifest.json").read_text())


def test_damage_is_not_cut_out_under_a_new_sha256(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_flipped_bit(tmp_path)
    assert data_cut.main([str(tmp_path / "other"), str(tmp_path / "out"), "--documents", "0:2"]) == EXIT_CORRUPT
    assert "other.bin: sha256" in refusal(capsys, EXIT_CORRUPT)
    assert not list(tmp_path.glob("*out*"))


def options(prefix: Path, **changed: Any) -> Path:
    """A dataset whose manifest records options of preprocessing."""
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add(np.array([1, 2, 3]), np.array([1, 2]), np.array([2]), np.array([0, 1]))
        writer.commit({"options": {"fields": ["inputs", "outputs"], "append_eod": True, "limit": None, **changed}})
    return prefix


def test_other_options_are_refused_with_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options(tmp_path / "one", limit=5)
    options(tmp_path / "two", append_eod=False, fields=["a", "b"])
    words = [str(tmp_path / "out"), "--inputs", str(tmp_path / "one"), str(tmp_path / "two")]
    told = refusal(capsys, data_merge.main(words))
    assert "append_eod (True and False), fields (['inputs', 'outputs'] and ['a', 'b'])" in told
    assert "limit" not in told  # which lines were read does not change what a line becomes
    assert not list(tmp_path.glob("out*"))
    assert data_merge.main([*words, "--allow-different-options"]) == 0
    assert json.loads((tmp_path / "out.manifest.json").read_text())["options"] == {}


def other_tokenizer(folder: Path) -> None:
    documents.write(folder / "other", documents.samples(1, 4), tokenizer={"sha256": "cd" * 32, "vocab_size": documents.VOCAB})


def other_dtype(folder: Path) -> None:
    theirs(folder / "other", [[1, 2], [3, 4]], dtype=np.int32)


def without_modes(folder: Path) -> None:
    theirs(folder / "other", [[1, 2], [3, 4]])


def a_flipped_bit(folder: Path) -> None:
    documents.write(folder / "other", documents.samples(1, 4))
    path = folder / "other.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "facts", "code"),
    [
        (other_tokenizer, ["sha256 abababababab and cdcdcdcdcdcd"], EXIT_USAGE),
        (other_dtype, ["uint16", "int32"], EXIT_USAGE),
        (without_modes, ["says which sequences are trained"], EXIT_USAGE),
        (a_flipped_bit, ["other.bin: sha256"], EXIT_CORRUPT),
        (nothing, ["no indexed dataset here"], EXIT_USAGE),
    ],
)
def test_what_does_not_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, facts: list[str], code: int) -> None:
    documents.write(tmp_path / "one", documents.samples(0, 4))
    make(tmp_path)
    assert data_merge.main([str(tmp_path / "out"), "--inputs", str(tmp_path / "one"), str(tmp_path / "other")]) == code
    told = refusal(capsys, code)
    assert all(fact in told for fact in [*facts, "other"])
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("flag", "value", "fact"),
    [
        ("--documents", "3:2", "documents 0:6"),
        ("--documents", "0:7", "documents 0:6"),
        ("--documents", "-1:3", "expected A:B"),
        ("--documents", "3", "expected A:B"),
        ("--range", "0:1.5", "0 <= START < END <= 1"),
        ("--range", "0.5:0.5", "0 <= START < END <= 1"),
        ("--range", "nan:1", "two fractions from 0 to 1"),
        ("--range", "0:50%", "two fractions from 0 to 1"),
        ("--range", "0.51:0.52", "holds none of 6 documents (round(0.51 x 6) = round(0.52 x 6) = 3)"),
        ("--documents", "4:6", "documents 4:6 hold no sequence of mode 1"),
        ("--documents", "5:6", "documents 5:6 hold no token"),
    ],
)
def test_cuts_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, fact: str) -> None:
    documents.write(tmp_path / "all", [*documents.samples(7, 4), [(0, [1, 2])], [(0, [])]])
    assert data_cut.main([str(tmp_path / "all"), str(tmp_path / "out"), f"{flag}={value}"]) == EXIT_USAGE
    told = refusal(capsys, EXIT_USAGE)
    assert fact in told and not list(tmp_path.glob("*out*"))


def test_a_dataset_twice_is_refused_under_any_spelling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents.write(tmp_path / "one", documents.samples(1, 5))
    again = tmp_path / "." / "link"
    again.symlink_to(tmp_path, target_is_directory=True)
    assert data_merge.main([str(tmp_path / "out"), "--inputs", str(tmp_path / "one"), str(again / "one")]) == EXIT_USAGE
    assert f"the same dataset twice (first as {tmp_path / 'one'})" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_an_output_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents.write(tmp_path / "one", documents.samples(8, 4))
    before = content(tmp_path / "one")
    assert data_merge.main([str(tmp_path / "one"), "--inputs", str(tmp_path / "one")]) == EXIT_USAGE
    assert "already there" in refusal(capsys, EXIT_USAGE)
    assert content(tmp_path / "one") == before


@pytest.mark.parametrize(
    "name", ["with space", "it's", 'a"b', "new\nline", "日本語 🙂", "a,b:c", "%", "$HOME", "*", "x" * 240, "a.b.c", "\x1b[31mred"]
)
def test_any_name_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Works, or refuses in a sentence, for every command that takes a prefix; nothing of a name reaches the terminal raw."""
    from megawrap import data_inspect, data_verify

    documents.write(tmp_path / "plain", documents.samples(1, 9))
    odd, again = str(tmp_path / name), str(tmp_path / f"{name}2")
    codes = [data_cut.main([str(tmp_path / "plain"), odd, "--documents", ":"])]
    if len(name) < 200:
        assert content(Path(odd)) == content(tmp_path / "plain")
        codes += [
            data_merge.main([again, "--inputs", odd]),
            data_verify.main([again]),
            data_inspect.main([again, "--row", "0", "--stats", "--seq-length", "32"]),
            data_inspect.main([again, "--html", again + ".html", "--sample", "0"]),
        ]
        assert codes == [0] * 5
    told = capsys.readouterr()
    assert "Traceback" not in told.err and "\x1b" not in told.out
    assert codes == [0] * 5 or (codes == [EXIT_USAGE] and "too long" in told.err)


KILLED = """
import os, sys
from megawrap import data_merge
left = int(sys.argv[1])
for name in ("replace", "fsync"):
    def counted(*args, call=getattr(os, name)):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return call(*args)
    setattr(os, name, counted)
data_merge.main(sys.argv[2:])
"""


@pytest.mark.fault
def test_a_merge_killed_anywhere_is_repeated_with_the_same_bytes(tmp_path: Path) -> None:
    documents.write(tmp_path / "one", documents.samples(9, 20))
    documents.write(tmp_path / "two", documents.samples(10, 20))
    words = ["--inputs", str(tmp_path / "one"), str(tmp_path / "two")]
    assert data_merge.main([str(tmp_path / "clean"), *words]) == 0
    for calls in range(50):
        out = tmp_path / f"killed{calls}"
        done = subprocess.run([sys.executable, "-c", KILLED, str(calls), str(out), *words], check=False, cwd=os.getcwd())
        if done.returncode == 0:
            break
        assert done.returncode == 9
        if not manifest_path(out).exists():  # the last rename is what makes it complete
            assert data_merge.main([str(out), *words]) == 0
        assert content(out) == content(tmp_path / "clean")
    assert calls > 5


LIMITED = """
import resource, signal, sys
from megawrap import data_merge
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(data_merge.main(sys.argv[2:]))
"""


@pytest.mark.fault
@pytest.mark.parametrize("limit", [0, 100, 1000, 4000])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, limit: int) -> None:
    documents.write(tmp_path / "one", documents.samples(11, 400))
    before = {path.name for path in tmp_path.iterdir()}
    words = [str(limit), str(tmp_path / "out"), "--inputs", str(tmp_path / "one")]
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True, check=False, cwd=os.getcwd())
    assert done.returncode == EXIT_USAGE and "Traceback" not in done.stderr
    assert "the file-size limit (ulimit -f) is reached" in done.stderr and str(tmp_path) in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == before
