"""`megawrap data inspect`: samples, rows and batches on the command line, as text, JSON, page and picture."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megawrap import data_inspect
from megawrap.config import DataConfig, ObjectiveConfig
from megawrap.data.format import IndexedWriter
from megawrap.data.plan import build
from megawrap.data.tokenizer import Tokenizer
from megawrap.errors import EXIT_USAGE
from tests.data import documents
from tests.data.test_interchange import theirs
from tests.data.test_twins import write_twins
from tests.tiny_tokenizer import write_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of text, the tokenizer beside it, and another tokenizer."""
    folder = tmp_path_factory.mktemp("inspect")
    tokenizer = Tokenizer(write_tokenizer(folder / "tokenizer"))
    write_tokenizer(folder / "elsewhere" / "other", vocab_size=280)
    with IndexedWriter(folder / "data" / "train", np.uint16) as writer:
        for number in range(40):
            ids, lengths = tokenizer.encode([f"def f{number}(x):\n", f"    return x + {number}\n"], escape_special=True)
            writer.add(np.append(ids, tokenizer.eos_id), lengths + np.array([0, 1]), np.array([2]), np.array([0, 1]))
        manifest = {"options": {"fields": ["inputs", "outputs"]}, "sources": [{"path": "/somewhere/a.jsonl", "bytes": 1234}]}
        writer.commit({"tokenizer": tokenizer.facts(), **manifest})
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What the command prints when it succeeds."""
    code = data_inspect.main([str(word) for word in words])
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line of a refusal."""
    assert data_inspect.main([str(word) for word in words]) == EXIT_USAGE
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("megawrap: error: ") and told.err.count("\n") == 1
    return told.err


def test_a_sample_without_any_flag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Statistics and the first sample; the tokenizer that lies beside the data is the very one, by its sha256."""
    told = run(capsys, folder / "data" / "train")
    assert "documents          40 (80 sequences)" in told and "a.jsonl" in told and "1,234" in told
    assert "inputs  context │ def f0(x):↵" in told and "outputs trained ┃     return x + 0↵" in told
    assert "\x1b" not in told  # not a terminal
    assert f"text by {folder / 'tokenizer' / 'tokenizer.json'}" in told


def test_samples_are_chosen_by_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, folder / "data" / "train", "--sample", "7", "39")
    assert "def f7(x)" in told and "return x + 39" in told and "def f8(x)" not in told and "statistics" not in told
    assert "--sample 40:" in refused(capsys, folder / "data" / "train", "--sample", "40")
    assert "samples 0 to 39" in refused(capsys, folder / "data" / "train", "--sample", "40")
    assert "-1 is not a number from 0" in refused(capsys, folder / "data" / "train", "--sample=-1")


def test_ids_are_a_line_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, folder / "data" / "train", "--sample", "3", "--ids")
    tokenizer = Tokenizer(folder / "tokenizer")
    ids, lengths = tokenizer.encode(["def f3(x):\n", "    return x + 3\n"], escape_special=True)
    expected = [*ids.tolist(), tokenizer.eos_id]
    lines = [line.split(maxsplit=3) for line in told.splitlines() if line[:8].strip().isdigit() or line.strip().startswith("label")]
    assert [int(line[1]) for line in lines] == expected
    assert [line[2] for line in lines] == ["context"] * lengths[0] + ["1"] * (lengths[1] + 1)
    assert [line[0] for line in lines] == [*map(str, range(len(expected) - 1)), "label"]


def test_rows_and_batches_are_those_of_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ids shown for a batch are the tokens and labels that the plan of a run would draw."""
    prefix = folder / "data" / "train"
    found = json.loads(run(capsys, prefix, "--batch", "2", "--global-batch-size", "3", "--seq-length", "64", "--seed", "5", "--json"))
    plan = build([f"train: 1 0:1 {prefix}"], DataConfig(seq_length=64, seed=5), ObjectiveConfig(), global_batch_size=3, iterations=1,
                 build_cache=False)  # fmt: skip
    rows = plan.train.rows(np.arange(6, 9))
    assert len(found["views"]) == 3
    for view, row in zip(found["views"], rows, strict=True):
        real = [segment for segment in view["segments"] if segment["padding"] != segment["positions"]]
        tokens = [token for segment in real for token in segment["ids"][:-1]]
        labels = [token for segment in real for token in segment["ids"][1:]]
        weights = [weight for segment in real for weight in segment["weights"][1:]]
        assert tokens == row["tokens"][: len(tokens)].tolist() and labels == row["labels"][: len(labels)].tolist()
        assert weights == row["weights"][: len(weights)].tolist() and not row["weights"][len(weights) :].any()
    one = json.loads(run(capsys, prefix, "--row", "7", "--seq-length", "64", "--seed", "5", "--json"))
    assert one["views"][0]["segments"] == found["views"][1]["segments"]


def recipe(folder: Path) -> Path:
    """A recipe with two groups of the dataset."""
    path = folder / "recipe.yaml"
    path.write_text(
        f"run: {folder}/run\nmodel: {{family: gpt_bigcode, num_layers: 1, hidden_size: 64, num_attention_heads: 2}}\n"
        f"data:\n  splits: ['train: 1.0 0:0.8 {folder}/data/train', 'valid_a: 1.0 0.8:1 {folder}/data/train']\n"
        f"  tokenizer: {folder}/tokenizer\n  seq_length: 64\ntrain: {{iterations: 10, global_batch_size: 2, micro_batch_size: 1}}\n"
    )
    return path


def test_a_recipe_shows_its_own_rows_and_sources(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "--config", recipe(folder), "--batch", "0", "--stats")
    assert told.count("row ") >= 2 and "2 shown" in told and "documents          32 (64 sequences)" in told
    told = run(capsys, "--config", recipe(folder), "--group", "valid_a", "--row", "0", "--stats")
    assert "row 0 of valid_a" in told and "documents          8 (16 sequences)" in told
    told = run(capsys, "--config", recipe(folder), "--row", "0", "--data.seq_length", "32")
    assert "32 positions" in told
    told = run(capsys, folder / "data" / "train", "--config", recipe(folder), "--stats")
    assert "documents          40 (80 sequences)" in told and "rows of 64" in told
    assert not list((folder / "data").glob("*.packing")) and not (folder / "run").exists()  # nothing is written


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--group", "valid_b", "--row", "0"], "--group valid_b: there is no such group. The groups are train, valid_a"),
        (["--group", "valid_a", "--row", "900"], "--row 900: the group valid_a has rows 0 to "),
        (["--group", "valid_a", "--batch", "900"], "--batch 900: the group valid_a has "),
        (["--sample", "0"], "--sample needs to know of which dataset. Give its PREFIX as well"),
        (["--no-such-flag"], "unknown argument --no-such-flag"),
        (["--data.seq_lenth", "3"], "data.seq_length"),
    ],
)
def test_refusals_of_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], fact: str) -> None:
    assert fact in refused(capsys, "--config", recipe(folder), *words)


def test_a_dataset_alone_has_one_group(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--group valid: a dataset alone has the one group train" in refused(capsys, folder / "data" / "train", "--group", "valid")


def test_rearranged_samples_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fill-in-the-middle as a recipe asks for it: the row shows sentinels, and says how many samples were rearranged."""
    from tokenizers import Tokenizer as Backend

    write_tokenizer(tmp_path / "tokenizer")
    backend = Backend.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    backend.add_special_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>"])
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    with IndexedWriter(tmp_path / "data" / "train", np.uint16) as writer:
        for number in range(40):
            ids, lengths = tokenizer.encode([f"def f{number}(x):\n", f"    return x + {number}\n"], escape_special=True)
            writer.add(np.append(ids, tokenizer.eos_id), lengths + np.array([0, 1]), np.array([2]), np.array([0, 1]))
        writer.commit({"tokenizer": tokenizer.facts()})
    told = run(capsys, "--config", recipe(tmp_path), "--row", "0", "--data.fim.rate", "1", "--data.seq_length", "128")
    assert "<fim_prefix>" in told and "<fim_middle>" in told
    rearranged = int(told.partition("fill-in-the-middle: ")[2].split()[0])
    assert rearranged == told.count("<fim_middle>") > 0


def test_nothing_to_look_at(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "Give a PREFIX, or --config RECIPE.yaml" in refused(capsys, "--stats")
    assert "no indexed dataset here" in refused(capsys, tmp_path / "nothing")
    assert "nearest known one is --sample" in refused(capsys, tmp_path / "x", "--samples", "1")


def test_another_tokenizer_is_refused_with_both_hashes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder / "elsewhere" / "other"
    told = refused(capsys, folder / "data" / "train", "--sample", "0", "--tokenizer", other)
    for path in (other, folder / "tokenizer"):
        assert Tokenizer(path).sha256[:16] in told
    assert "is not the tokenizer that made" in told


def test_a_tokenizer_that_only_lies_nearby_is_not_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = documents.write(tmp_path / "data", documents.samples(1, 5))
    write_tokenizer(tmp_path)
    told = run(capsys, data.prefix, "--sample", "0")
    assert "the tokenizer is not known, so ids are shown: name it with --tokenizer" in told
    numbers = " ".join(map(str, data.sequence(0).tolist()))
    assert numbers in told


def test_ids_the_tokenizer_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = theirs(tmp_path / "plain", [[5, 9000]])
    told = refused(capsys, prefix, "--sample", "0", "--tokenizer", write_tokenizer(tmp_path / "tokenizer"))
    assert f"{prefix}: token id 9000" in told and "knows 0 to 29" in told


def test_files_of_other_tools_and_twins(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = theirs(tmp_path / "plain", [[5, 6, 7], [8, 9]])
    told = run(capsys, prefix, "--sample", "0", "--row", "0", "--stats", "--seq-length", "16", "--tokenizer", folder / "tokenizer")
    assert "usable with loss_on all" in told and "could not be compared" in told and "1 by best_fit" in told
    write_twins(tmp_path / "pair", documents.samples(3, 9))
    told = run(capsys, tmp_path / "pair", "--sample", "2", "--stats")
    assert "documents          9 (18 sequences)" in told and "field 1 trained ┃" in told


def test_what_cannot_be_packed_is_counted_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents.write(tmp_path / "long", [[(0, [1] * 50), (1, [2] * 50)]])
    told = run(capsys, tmp_path / "long", "--stats", "--seq-length", "8", "--overlong", "error")
    assert "note: not packed: " in told and "do not fit a row of 8 positions" in told and "tokens             100" in told


def test_samples_of_one_token_and_of_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents.write(tmp_path / "data", [[(0, []), (1, [77])], [(0, []), (1, [])], [(0, [1]), (1, [2])]])
    told = run(capsys, tmp_path / "data", "--sample", "0", "1")
    assert "1 tokens in 2 fields, 0 trained" in told and "context │ 77" in told and "0 tokens in 2 fields, 0 trained" in told
    run(capsys, tmp_path / "data", "--html", tmp_path / "page.html")


def test_merged_sources_are_counted_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megawrap import data_merge

    parts = [documents.write(tmp_path / name, documents.samples(seed, 10 * seed)) for seed, name in enumerate(("one", "two"), 1)]
    assert data_merge.main([str(tmp_path / "both"), "--inputs", *(str(part.prefix) for part in parts)]) == 0
    capsys.readouterr()
    mix = json.loads(run(capsys, tmp_path / "both", "--stats", "--json"))["statistics"][0]["mix"]
    assert [(part["name"], part["documents"], part["tokens"]) for part in mix] == [
        (part.prefix.name, f"{part.num_documents:,}", f"{part.num_tokens:,}") for part in parts
    ]


def test_page_and_picture_are_written_whole(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    page, picture = tmp_path / "new" / "page.html", tmp_path / "new" / "stats.png"
    told = run(capsys, folder / "data" / "train", "--html", page, "--png", picture)
    assert told.splitlines()[-2:] == [f"picture: {picture}", f"page: {page}"]
    text = page.read_text()
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n") and text.count('<section id="view-') == 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in page.parent.iterdir()} == {"page.html", "stats.png"}


def test_a_page_that_would_be_too_large_says_what_is_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megawrap.data import page

    monkeypatch.setattr(page, "MAX_TOKENS", 100)
    run(capsys, folder / "data" / "train", "--html", tmp_path / "page.html", "--sample", *map(str, range(30)))
    text = (tmp_path / "page.html").read_text()
    shown = text.count('<section id="view-')
    assert 0 < shown < 30 and f"{30 - shown} more are not on this page" in text


def test_json_of_statistics_is_the_plans_account(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = json.loads(run(capsys, folder / "data" / "train", "--stats", "--json", "--seq-length", "64"))["statistics"]
    plan = build([f"train: 1 0:1 {folder}/data/train"], DataConfig(seq_length=64), ObjectiveConfig(), global_batch_size=1, iterations=1,
                 build_cache=False)  # fmt: skip
    source = plan.report[0].sources[0]
    assert found["packed"]["rows"] == source.rows and found["packed"]["fill"] == source.fill
    assert found["documents"] == 40 and sum(bar["documents"] for bar in found["histogram"]) == 40


def on_a_terminal(*words: str, **environment: str) -> str:
    """What the command writes when its output is a terminal."""
    leader, follower = pty.openpty()
    whole = {**{key: value for key, value in os.environ.items() if key != "NO_COLOR"}, "TERM": "xterm", **environment}
    command = [sys.executable, "-m", "megawrap.cli", "data", "inspect", *words]
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL, cwd=ROOT, env=whole)
    os.close(follower)
    parts: list[bytes] = []
    try:
        while block := os.read(leader, 1 << 16):
            parts.append(block)
    except OSError:  # how a terminal says that nobody writes any more
        pass
    finally:
        os.close(leader)
    assert process.wait(timeout=60) == 0
    return b"".join(parts).decode()


def test_colours_on_a_terminal(folder: Path) -> None:
    words = (str(folder / "data" / "train"), "--sample", "0")
    coloured = on_a_terminal(*words)
    assert "\x1b[1;32m    return x + 0↵\x1b[0m" in coloured and "\x1b[36mdef f0(x):↵\x1b[0m" in coloured
    assert "\x1b" not in on_a_terminal(*words, NO_COLOR="1") and "\x1b" not in on_a_terminal(*words, "--no-color")
    assert "\x1b[1;32m" in on_a_terminal(*words, "--color", NO_COLOR="1")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_output(folder: Path, encoding: str) -> None:
    environment: dict[str, Any] = {**os.environ, "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "megawrap.cli", "data", "inspect", str(folder / "data" / "train")]
    done = subprocess.run(words, capture_output=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "def f0(x)" in done.stdout.decode(encoding)
