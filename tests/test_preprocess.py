"""The preprocess command: what it writes against megatron-core's reader and the tokenizers library, what it refuses, what a kill leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megawrap import preprocess
from megawrap.data.format import IndexedDataset
from megawrap.data.twins import open_twins, twin_prefixes
from megawrap.errors import EXIT_CORRUPT, EXIT_OK, EXIT_USAGE, DataError
from tests.preprocessing import OUTPUTS, hashes, left, random_text, run, write_samples
from tests.tiny_tokenizer import END, PAD, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A prefix in a directory of its own, so that everything that is left behind shows."""
    return tmp_path / "out" / "out"


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_thousand_samples_against_independent_readers(
    tmp_path: Path, out: Path, pad_is_eos: bool, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """R15, its part here: outputs and end token have mode 1, the end token also when it is the padding token, inputs mode 0."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Theirs
    from tokenizers import Tokenizer as Oracle

    monkeypatch.setattr("megawrap.data.reader.BLOCK_BYTES", 3000)
    directory = write_tokenizer(tmp_path / "tokenizer", config={"eos_token": END, "pad_token": END if pad_is_eos else PAD})
    rng = random.Random(7)
    samples = [(random_text(rng), random_text(rng)) for _ in range(1000)]
    assert run(write_samples(tmp_path / "data.jsonl", samples), directory, out) == EXIT_OK

    oracle = Oracle.from_file(str(directory / "tokenizer.json"))
    oracle.encode_special_tokens = True
    end = oracle.token_to_id(END)
    kept = [(inputs, outputs) for inputs, outputs in samples if outputs]
    assert 0 < len(kept) < 1000
    theirs = Theirs(str(out), multimodal=True)
    assert len(theirs) == 2 * len(kept)
    assert theirs.document_indices.tolist() == list(range(0, 2 * len(kept) + 1, 2))
    for index, (inputs, outputs) in enumerate(kept):
        context, context_mode = theirs[2 * index]
        target, target_mode = theirs[2 * index + 1]
        assert (context_mode, target_mode) == (0, 1)
        assert context.tolist() == oracle.encode(inputs, add_special_tokens=False).ids
        assert target.tolist() == [*oracle.encode(outputs, add_special_tokens=False).ids, end]
        assert end not in context
        assert end not in target[:-1]
    data = IndexedDataset(out)
    data.verify()
    assert data.manifest is not None
    assert data.modes is not None
    assert data.manifest["counts"]["target_tokens"] == int(data.lengths[data.modes == 1].sum())
    assert data.manifest["counts"]["context_tokens"] == int(data.lengths[data.modes == 0].sum())
    assert data.manifest["lines"]["empty_outputs"] == 1000 - len(kept)
    assert data.manifest["tokenizer"]["pad_id"] == (end if pad_is_eos else 1)
    record_property("R15", (500, 500))


def test_output_does_not_depend_on_workers_or_blocks(tmp_path: Path, tokenizer: Path) -> None:
    rng = random.Random(8)
    source = write_samples(tmp_path / "data.jsonl", [(random_text(rng), random_text(rng)) for _ in range(300)])
    found = []
    for workers, block in ((1, 1 << 22), (2, 1 << 22), (3, 700)):
        out = tmp_path / f"{workers}-{block}" / "out"
        script = f"import sys; from megawrap.data import reader; from megawrap import preprocess\nreader.BLOCK_BYTES = {block}"
        script += "\nsys.exit(preprocess.main())"
        command = [
            sys.executable,
            "-c",
            script,
            "--input",
            source,
            "--tokenizer",
            tokenizer,
            "--output-prefix",
            out,
            "--workers",
            str(workers),
        ]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        found.append(hashes(out))
    assert found[0].keys() == OUTPUTS
    assert found[0] == found[1] == found[2]


def test_without_end_token(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    assert run(write_samples(tmp_path / "data.jsonl", [("a", "b")]), tokenizer, out, "--no-append-eod") == EXIT_OK
    assert IndexedDataset(out).lengths.tolist() == [1, 1]


def test_empty_inputs_keep_their_place(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    assert run(write_samples(tmp_path / "data.jsonl", [("", "b"), ("a", "b"), ("", "b")]), tokenizer, out) == EXIT_OK
    data = IndexedDataset(out)
    assert data.lengths.tolist() == [0, 2, 1, 2, 0, 2]
    assert data.modes is not None
    assert data.modes.tolist() == [0, 1] * 3


def test_other_fields(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"system": "ab", "prompt": "c", "answer": "d"}\n')
    assert run(tmp_path / "data.jsonl", tokenizer, out, "--fields", "system", "prompt", "answer") == EXIT_OK
    data = IndexedDataset(out)
    assert (data.num_documents, data.num_sequences) == (1, 3)
    assert data.modes is not None
    assert data.modes.tolist() == [0, 0, 1]


def test_manifest_records_where_it_came_from(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    sources = [write_samples(tmp_path / name, [("a", name)]) for name in ("x.jsonl", "y.jsonl")]
    flags = ["--output-prefix", str(out), "--tokenizer", str(tokenizer), "--append-eod"]
    assert preprocess.main(["--input", str(sources[0]), str(sources[1]), *flags]) == EXIT_OK
    manifest = json.loads(out.with_name("out.manifest.json").read_text())
    for source, noted in zip(sources, manifest["sources"], strict=True):
        content = source.read_bytes()
        assert noted == {"path": str(source), "bytes": len(content), "lines_read": 1, "sha256": hashlib.sha256(content).hexdigest()}
    for name in ("bin", "idx"):
        content = out.with_name(f"out.{name}").read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["options"]["append_eod"] is True


def test_counts_add_up_and_bad_lines_are_listed(tmp_path: Path, tokenizer: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = '{"inputs": "a", "outputs": "b"}'
    lines = [good, "", "[]", '{"inputs": "a", "outputs": ""}', "{", good, '{"inputs": "a"}', "{", good]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    assert run(tmp_path / "data.jsonl", tokenizer, out, "--on-bad-line", "skip") == EXIT_OK
    counts = json.loads(out.with_name("out.manifest.json").read_text())["lines"]
    assert counts["bad"] == {"invalid-json": 2, "missing-key": 1, "not-an-object": 1}
    assert (counts["samples"], counts["blank"], counts["empty_outputs"], counts["lines"]) == (3, 1, 1, 9)
    assert "9 lines = 3 samples + 1 blank + 1 with empty outputs + 4 bad" in capsys.readouterr().out
    notes = [json.loads(line) for line in out.with_name("out.bad.jsonl").read_text().splitlines()]
    assert [(note["line"], note["reason"]) for note in notes] == [
        (3, "not-an-object"),
        (5, "invalid-json"),
        (7, "missing-key"),
        (8, "invalid-json"),
    ]
    assert left(out) == OUTPUTS | {"out.bad.jsonl"}
    assert IndexedDataset(out).num_documents == 3


def test_outputs_that_give_no_token(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))  # knows two letters, drops the rest
    backend.add_special_tokens([AddedToken(END, special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    source = write_samples(tmp_path / "data.jsonl", [("a", "b"), ("ab", "xyz"), ("xy", "ba")])
    assert run(source, tmp_path / "tokenizer.json", out) == EXIT_OK
    assert IndexedDataset(out).tokens.tolist() == [0, 1, 2, 1, 0, 2]
    assert "3 lines = 2 samples + 0 blank + 1 with empty outputs" in capsys.readouterr().out
    strict = out.with_name("strict")
    assert run(source, tmp_path / "tokenizer.json", strict, "--strict") == EXIT_USAGE
    assert f"{source}:2: the last field gives no token" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["escape", "allow", "error"])
def test_special_tokens_in_text(tmp_path: Path, tokenizer: Path, out: Path, policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_samples(tmp_path / "data.jsonl", [("a", "b"), (f"x {END} y", "b"), ("a", f"{PAD}")])
    code = run(source, tokenizer, out, "--special-tokens-in-text", policy)
    if policy == "error":
        assert code == EXIT_USAGE
        assert f"{source}:2: the special token '{END}' is spelled out" in capsys.readouterr().err
        assert left(out) == set()
        assert run(source, tokenizer, out, "--special-tokens-in-text", policy, "--on-bad-line", "skip") == EXIT_OK
        assert json.loads(out.with_name("out.manifest.json").read_text())["lines"]["bad"] == {"special-token": 2}
        return
    assert code == EXIT_OK
    data = IndexedDataset(out)
    assert (data.tokens == 0).sum() == (4 if policy == "allow" else 3)
    assert (data.tokens == 1).sum() == (1 if policy == "allow" else 0)
    assert data.manifest is not None
    assert data.manifest["counts"]["samples_with_special_text"] == 2


def test_limit_and_standard_input(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    source = write_samples(tmp_path / "data.jsonl", [("a", "b")] * 9)
    assert run(source, tokenizer, out, "--limit", "4") == EXIT_OK
    assert IndexedDataset(out).num_documents == 4
    command = [sys.executable, "-m", "megawrap.preprocess", "--input", "-", "--tokenizer", str(tokenizer), "--output-prefix", f"{out}2"]
    subprocess.run(command, check=True, input=source.read_bytes(), capture_output=True)
    assert IndexedDataset(f"{out}2").num_documents == 9


@pytest.mark.parametrize("name", ["with space", "quo'te\"s", "new\nline", "ünïcode-日本", "a,b:c[0]*?", "-dash", "x" * 200, "dots.v1.0"])
def test_hostile_names(tmp_path: Path, tokenizer: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    source = write_samples(folder / f"{name}.jsonl", [("a", "b")])
    assert run(source, tokenizer, folder / name) == EXIT_OK
    assert IndexedDataset(folder / name).num_documents == 1


# ---- twin files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["targets", "outputs"])
def test_twin_files(tmp_path: Path, tokenizer: Path, out: Path, name: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Theirs

    rng = random.Random(9)
    source = write_samples(tmp_path / "data.jsonl", [("" if i % 5 == 0 else random_text(rng), random_text(rng) + "z") for i in range(50)])
    assert run(source, tokenizer, out) == EXIT_OK
    assert run(source, tokenizer, out, "--twin-files", name) == EXIT_OK
    single, twins = IndexedDataset(out), open_twins(out)
    for attribute in ("lengths", "pointers", "document_indices", "modes", "tokens"):
        assert getattr(twins, attribute).tolist() == getattr(single, attribute).tolist()
        assert getattr(twins, attribute).dtype == getattr(single, attribute).dtype
    assert [twins.sequence(i).tolist() for i in range(100)] == [single.sequence(i).tolist() for i in range(100)]
    assert (twins.num_documents, twins.num_sequences, twins.num_tokens) == (50, 100, single.num_tokens)
    assert twins.max_token_id == single.max_token_id
    for offset, prefix in enumerate(twin_prefixes(out, name)):
        theirs = Theirs(str(prefix))
        assert [theirs[i].tolist() for i in range(len(theirs))] == [single.sequence(2 * i + offset).tolist() for i in range(50)]


def test_twins_that_do_not_pair_up(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    for number, prefix in ((3, out), (2, out.with_name("other"))):
        assert run(write_samples(tmp_path / "data.jsonl", [("a", "b")] * number), tokenizer, prefix, "--twin-files", "targets") == EXIT_OK
    mine, theirs = twin_prefixes(out, "targets")[1], twin_prefixes(out.with_name("other"), "targets")[1]
    for suffix in (".bin", ".idx", ".manifest.json"):
        os.replace(f"{theirs}{suffix}", f"{mine}{suffix}")
    with pytest.raises(DataError, match=r"do not pair up: 3 inputs of uint16, 2 targets"):
        open_twins(out)
    with pytest.raises(DataError, match="there are 0"):
        open_twins(out.with_name("nothing"))


# ---- refused --------------------------------------------------------------------------------------------------------


def test_flags_are_reported_together(tmp_path: Path, tokenizer: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--workers",
        "0",
        "--limit",
        "-1",
        "--max-bad",
        "-2",
        "--max-line-mib",
        "0",
        "--fields",
        "a",
        "a",
        "a",
        "--twin-files",
        "targets",
    ]
    assert run(tmp_path / "data.jsonl", tokenizer, out, *flags) == EXIT_USAGE
    message = capsys.readouterr().err
    for fact in (
        "--workers 0",
        "--limit -1",
        "--max-bad -2",
        "--max-line-mib 0",
        "--fields a a a",
        "--twin-files needs two --fields, 3 given",
    ):
        assert fact in message
    assert left(out) == set()


BAD_RUNS: dict[str, tuple[bytes, int, list[str]]] = {
    "bad last line": (b'{"inputs": "a", "outputs": "b"}\n{"inputs"', EXIT_USAGE, ["data.jsonl:2:", "cut"]),
    "only blank lines": (b"\n\n", EXIT_USAGE, ["no sample in 2 lines", "2 blank"]),
    "only empty outputs": (b'{"inputs": "a", "outputs": ""}\n', EXIT_USAGE, ["no sample in 1 lines", "1 with empty outputs"]),
    "empty file": (b"", EXIT_USAGE, ["data.jsonl", "0 bytes"]),
    "gzip named .jsonl": (b"\x1f\x8b\x08\x00", EXIT_USAGE, ["data.jsonl", "gzip"]),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_refused_without_traceback_or_trace(tmp_path: Path, tokenizer: Path, out: Path, name: str) -> None:
    content, code, facts = BAD_RUNS[name]
    (tmp_path / "data.jsonl").write_bytes(content)
    command = [
        sys.executable,
        "-m",
        "megawrap.preprocess",
        "--input",
        "data.jsonl",
        "--tokenizer",
        str(tokenizer),
        "--output-prefix",
        str(out),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith("megawrap: error: ")
    assert done.stderr.count("\n") == 1
    for fact in facts:
        assert fact in done.stderr
    assert left(out) == set()
    assert not out.parent.exists()


def test_refused_inputs_and_tokenizers(tmp_path: Path, tokenizer: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_samples(tmp_path / "data.jsonl", [("a", "b")])
    (tmp_path / "broken.json").write_text("{")
    cases = [
        (tmp_path / "no*.jsonl", tokenizer, EXIT_USAGE, "matches no file"),
        (source, tmp_path / "nothing", EXIT_USAGE, "no such tokenizer"),
        (source, tmp_path / "broken.json", EXIT_CORRUPT, "broken.json:1:2"),
    ]
    for path, directory, code, fact in cases:
        assert run(path, directory, out) == code
        assert fact in capsys.readouterr().err
    assert run(source, tokenizer, out, "--on-bad-line", "skip", "--fields", "inputs", "targets") == EXIT_USAGE
    assert "1 bad (missing-key 1)" in capsys.readouterr().err
    assert not out.parent.exists()


def test_existing_output_is_kept(tmp_path: Path, tokenizer: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_samples(tmp_path / "data.jsonl", [("a", "b")])
    assert run(source, tokenizer, out) == EXIT_OK
    before = hashes(out)
    assert run(source, tokenizer, out) == EXIT_USAGE
    assert "out.bin, out.idx, out.manifest.json already there" in capsys.readouterr().err
    assert hashes(out) == before
    assert left(out) == OUTPUTS


def test_output_directory_that_cannot_be(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_samples(tmp_path / "data.jsonl", [("a", "b")])
    assert run(source, tokenizer, source / "sub" / "out") == EXIT_USAGE
    assert "cannot write" in capsys.readouterr().err
    assert run(source, tokenizer, tmp_path / ("x" * 250)) == EXIT_USAGE
    assert "too long" in capsys.readouterr().err
    assert left(source) == {"data.jsonl"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from megawrap import preprocess\n"
        "try: preprocess.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'tokenizers', 'transformers', 'tqdm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for flag in (
        "--input",
        "--tokenizer",
        "--output-prefix",
        "--fields",
        "--workers",
        "--no-append-eod",
        "--on-bad-line",
        "--max-bad",
        "--strict",
    ):
        assert flag in done.stdout


def test_counts_that_do_not_add_up_are_a_defect(tmp_path: Path, tokenizer: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity lines = samples + blank + empty + bad is checked in every run, not only here."""
    from megawrap.data.reader import SampleReader

    original = SampleReader._block

    def forgetful(self: SampleReader, *args: Any) -> Any:
        batch = original(self, *args)
        batch.select(np.arange(len(batch.lines)) != 1)
        return batch

    monkeypatch.setattr(SampleReader, "_block", forgetful)
    source = write_samples(tmp_path / "data.jsonl", [("a", "b")] * 3)
    with pytest.raises(AssertionError):
        run(source, tokenizer, out)
    assert not out.parent.exists()


def test_ids_are_below_the_vocabulary(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    assert run(write_samples(tmp_path / "data.jsonl", [("a", "b")]), tokenizer, out) == EXIT_OK
    data = IndexedDataset(out)
    assert data.dtype == np.uint16
    assert data.max_token_id == int(data.tokens.max()) < 300


MALFORMED = {
    "braces": b"{" * 3_000_000,
    "brackets": b'{"inputs": ' + b"[" * 3_000_000,
    "quotes": b'{"inputs": "a", "outputs": ' + b'"' * 3_000_001,
    "backslashes": b'{"inputs": "' + b"\\" * 3_000_001,
    "escapes": b'{"inputs": "' + b"\\u0022" * 500_000 + b'", "outputs": "b", "inputs": "c"}',
    "not text": b'{"inputs": "' + b"\xff" * 3_000_000,
    "spaces": b"{" + b" " * 3_000_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_one_malformed_line_never_hangs(tmp_path: Path, tokenizer: Path, out: Path, name: str) -> None:
    """A worker that dies of a line must not leave the others waiting, and no check may take the square of its length."""
    good = b'{"inputs": "a", "outputs": "b"}\n'
    (tmp_path / "data.jsonl").write_bytes(good * 500 + MALFORMED[name] + b"\n" + good * 500)
    command = [sys.executable, "-m", "megawrap.preprocess", "--input", tmp_path / "data.jsonl", "--tokenizer", tokenizer]
    done = subprocess.run([*command, "--output-prefix", out, "--workers", "2"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == EXIT_USAGE
    assert f"{tmp_path / 'data.jsonl'}:501" in done.stderr
    assert len(done.stderr) < 2000
    assert not out.parent.exists()
