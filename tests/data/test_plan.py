"""The data plan: counts that add up to a brute-force count, refusals that name their cause, and the same plan on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megawrap.config import DataConfig, FimConfig, ObjectiveConfig
from megawrap.data.plan import Plan, build
from megawrap.data.splits import parse
from megawrap.data.tokenizer import Tokenizer
from megawrap.data_plan import main
from megawrap.errors import EXIT_CORRUPT, EXIT_USAGE, ConfigError, DataError
from tests.data.documents import END, VOCAB, Document, flat, samples, windows, write
from tests.data.fim_tokenizer import SANTACODER, write_fim_tokenizer, write_texts

SEQ = 32


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, list[Document]]:
    documents = {"a": samples(21, 200, longest=30), "b": samples(22, 80, longest=10), "c": samples(23, 40)}
    documents["a"][3] = [(0, [5, 6, 7])]  # no outputs
    documents["a"][4] = [(1, [END])]  # too short
    for name, content in documents.items():
        write(tmp_path / name, content)
    return documents


def plan_of(tmp_path: Path, *groups: str, objective: ObjectiveConfig | None = None, **options: Any) -> Plan:
    data = {
        name: options.pop(name)
        for name in ("seq_length", "overlong", "seed", "cache_dir", "packing", "pad_to_multiple", "tokenizer", "fim")
        if name in options
    }
    given = {"global_batch_size": 4, "iterations": 10, **options}
    config = DataConfig(splits=list(groups), **{"seq_length": SEQ, **data})
    return build(parse(groups, base_dir=tmp_path), config, objective or ObjectiveConfig(), **given)


GROUPS = ("train: 1.0 0:0.9 a, 0.3 0:1 b", "valid_a: 1 0.9:0.95 a", "valid_c: 1 0:1 c", "test: 1 0.95:1 a")


def test_counts_equal_a_brute_force_count(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    for overlong in ("truncate-inputs-left", "split", "drop"):
        plan = plan_of(tmp_path, *GROUPS, overlong=overlong)
        assert [group.name for group in plan.report] == ["train", "valid_a", "valid_c", "test"]
        for group in plan.report:
            for source in group.sources:
                first, last = source.range
                kept = [(d, *w) for d in range(first, last) for w in windows(corpus[source.prefix.name][d], SEQ, overlong, "outputs")]
                counts = source.counts
                assert counts.documents == last - first
                assert counts.documents == counts.samples + sum(counts.dropped_documents.values())
                assert counts.tokens == counts.kept_tokens + counts.cut_tokens + sum(counts.dropped_tokens.values())
                assert counts.positions == sum(length - 1 for _, _, length in kept)
                trained = sum(sum(flat(corpus[source.prefix.name][d])[1][s + 1 : s + n]) for d, s, n in kept)
                assert counts.supervised == trained
                assert source.fill == pytest.approx(counts.positions / (source.rows * SEQ))
                assert source.rows * SEQ >= counts.positions
        train = plan.report[0].sources
        assert [source.share for source in train] == pytest.approx([10 / 13, 3 / 13])
        assert [source.epochs for source in train] == pytest.approx([40 * 10 / 13 / train[0].rows, 40 * 3 / 13 / train[1].rows])
        assert sum(source.trained_share for source in train) == pytest.approx(1)


def test_the_expected_trained_tokens_are_those_of_the_loader(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    plan = plan_of(tmp_path, *GROUPS)
    rows = plan.train.rows(np.arange(4000))
    assert sum(row["weights"].sum() for row in rows) / 1000 == pytest.approx(plan.trained_tokens_per_iteration, rel=0.01)


def test_groups_are_disjoint_and_ranges_honoured(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    plan = plan_of(tmp_path, *GROUPS)
    seen = {source.prefix.name: set() for source in plan.report[0].sources}
    for name, rows in zip(seen, plan.train.sources, strict=True):
        for index in range(len(rows)):
            seen[name] |= set(rows.row(index)["sample_ids"].tolist())
    groups = {
        name: {d for row in order.rows(np.arange(len(order))) for d in row["sample_ids"].tolist()} for name, order in plan.groups.items()
    }
    assert list(plan.groups) == ["valid_a", "valid_c", "test"] and list(plan.valid) == ["valid_a", "valid_c"]
    found = [
        (seen["a"], "a", 0, 180),
        (groups["valid_a"], "a", 180, 190),
        (groups["test"], "a", 190, 200),
        (seen["b"], "b", 0, 80),
        (groups["valid_c"], "c", 0, 40),
    ]
    for documents, name, first, last in found:
        assert documents == {d for d in range(first, last) if windows(corpus[name][d], SEQ, "truncate-inputs-left", "outputs")}
        assert len(documents) > 0.8 * (last - first)


def test_the_fingerprint_follows_what_is_trained_on(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    base = plan_of(tmp_path, *GROUPS).fingerprint
    assert plan_of(tmp_path, *GROUPS).fingerprint == base
    assert plan_of(tmp_path, GROUPS[0]).fingerprint == base  # another validation group is no reason to refuse a checkpoint
    assert plan_of(tmp_path, *GROUPS, global_batch_size=8, iterations=99).fingerprint == base
    assert plan_of(tmp_path, "train: 2 0:0.9 a, 0.6 0:1 b").fingerprint == base
    others = [
        plan_of(tmp_path, *GROUPS, seq_length=31), plan_of(tmp_path, *GROUPS, seed=3), plan_of(tmp_path, *GROUPS, overlong="split"),
        plan_of(tmp_path, "train: 1.0 0:0.89 a, 0.3 0:1 b"), plan_of(tmp_path, "train: 1.0 0:0.9 a, 0.31 0:1 b"),
        plan_of(tmp_path, "train: 0.3 0:1 b, 1.0 0:0.9 a"), plan_of(tmp_path, *GROUPS, objective=ObjectiveConfig(loss_on="all")),
    ]  # fmt: skip
    for name in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"b{name}").unlink()
    write(tmp_path / "b", samples(99, 80, longest=10))
    others.append(plan_of(tmp_path, *GROUPS))
    assert len({base, *(other.fingerprint for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("packing", ["best_fit", "none", "concat"])
def test_a_longer_run_keeps_every_earlier_row_in_place(tmp_path: Path, corpus: dict[str, list[Document]], packing: str) -> None:
    short = plan_of(tmp_path, *GROUPS, iterations=10, packing=packing)
    long = plan_of(tmp_path, *GROUPS, iterations=5000, packing=packing, cache_dir=str(tmp_path / "elsewhere"))
    rows = 3 * short.report[0].rows  # over the borders of epochs
    for one, other in zip(short.train.rows(np.arange(rows)), long.train.rows(np.arange(rows)), strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert short.fingerprint == long.fingerprint


@pytest.mark.parametrize("packing", ["none", "concat"])
def test_other_ways_to_make_rows_train_on_the_same_tokens(tmp_path: Path, corpus: dict[str, list[Document]], packing: str) -> None:
    usual, other = plan_of(tmp_path, *GROUPS, overlong="split"), plan_of(tmp_path, *GROUPS, overlong="split", packing=packing)
    table, facts = other.table(), other.to_dict()
    assert usual.fingerprint != other.fingerprint and facts["packing"] == packing
    for one, two in zip(usual.report, other.report, strict=True):
        for a, b in zip(one.sources, two.sources, strict=True):
            if packing == "none":
                assert b.counts == a.counts and b.rows == b.counts.pieces and b.row_positions == b.counts.positions
            else:
                assert b.counts.kept_tokens == b.counts.tokens and b.rows == -(-b.counts.positions // SEQ)
                joints = sum(document[0][1] == [] for document in _with_tokens(corpus[b.prefix.name], b.range))
                assert a.counts.supervised <= b.counts.supervised <= a.counts.supervised + joints + 1
            assert f"{b.rows:,}" in table
    drawn = other.train.rows(np.arange(4000))
    assert sum(row["weights"].sum() for row in drawn) / 1000 == pytest.approx(other.trained_tokens_per_iteration, rel=0.02)
    assert sum(len(row["tokens"]) for row in drawn) / 1000 == pytest.approx(other.positions_per_iteration, rel=0.02)
    assert ("at most 32 and on average" in table) == (packing == "none")
    assert any("end token" in note for note in other.notes) == (packing == "concat")  # the test's data does not say that it has one


def _with_tokens(documents: list[Document], span: tuple[int, int]) -> list[Document]:
    return [document for document in documents[slice(*span)] if flat(document)[0]]


def test_padding_to_a_multiple_fills_less(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    plain, padded = (plan_of(tmp_path, *GROUPS, pad_to_multiple=multiple).report[0].sources[0] for multiple in (1, 8))
    assert padded.rows > plain.rows and padded.fill < plain.fill and padded.counts == plain.counts


def test_fill_in_the_middle_is_planned_and_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_fim_tokenizer(tmp_path / "tok"))
    write_texts(tmp_path / "t", tokenizer, [(f"context {n}", f"text number {n}") for n in range(120)])
    groups, options = ("train: 1 0:0.9 t", "valid: 1 0.9:1 t"), {"tokenizer": str(tmp_path / "tok"), "seq_length": 96}
    plain = plan_of(tmp_path, *groups, **options)
    plan = plan_of(tmp_path, *groups, **options, fim=FimConfig(rate=0.5))
    assert any("fill-in-the-middle: 50% of the training samples" in note for note in plan.notes)
    assert plan.report[0].rows > plain.report[0].rows and plan.report[1] == plain.report[1], "evaluation is as it was"
    assert sum(row["fim"] for row in plan.train.rows(np.arange(40)))[0] > 10
    assert all("fim" not in row for row in plan.groups["valid"].rows(np.arange(3)))
    prints = [plan_of(tmp_path, *groups, **options, fim=fim).fingerprint for fim in (
        FimConfig(), FimConfig(spm_rate=0.1), FimConfig(rate=0.5), FimConfig(rate=0.6), FimConfig(rate=0.5, spm_rate=0.1),
        FimConfig(rate=0.5, loss="middle"),
    )]  # fmt: skip
    assert prints[0] == prints[1] == plain.fingerprint and len(set(prints)) == 5
    write_fim_tokenizer(tmp_path / "other", SANTACODER)
    message = refusal(tmp_path, *groups, tokenizer=str(tmp_path / "other"), fim=FimConfig(rate=0.5))
    assert Tokenizer(tmp_path / "other").sha256[:12] in message and tokenizer.sha256[:12] in message
    assert "without data.tokenizer" in refusal(tmp_path, *groups, fim=FimConfig(rate=0.5))
    assert any("can be transformed for fill-in-the-middle" in note for note in plan.notes)
    message = refusal(tmp_path, *groups, **{**options, "seq_length": 16}, fim=FimConfig(rate=0.01))
    assert "data.fim.rate is 0.01, but of 16 samples" in message and "none can be transformed" in message


def test_weights_reach_the_loss_only_by_normalize(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    token, target = (plan_of(tmp_path, *GROUPS, objective=ObjectiveConfig(normalize=how)) for how in ("token", "target"))  # type: ignore[arg-type]
    one, other = token.train.rows(np.arange(3)), target.train.rows(np.arange(3))
    assert all(((a["weights"] > 0) == (b["weights"] > 0)).all() for a, b in zip(one, other, strict=True))
    assert any((a["weights"] != b["weights"]).any() for a, b in zip(one, other, strict=True))


def refusal(tmp_path: Path, *groups: str, code: int = EXIT_USAGE, **options: Any) -> str:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError) as caught:
        plan_of(tmp_path, *groups, build_cache=False, **options)
    assert caught.value.exit_code == code
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def test_refusals_name_their_cause(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    rows = plan_of(tmp_path, "train: 1 0:1 c").report[0].rows
    message = refusal(tmp_path, "train: 1 0:1 c", global_batch_size=rows + 1)
    assert f"packs into {rows} rows of {SEQ} positions, fewer than one global batch of {rows + 1}" in message
    message = refusal(tmp_path, "train: 1 0:1 a", "valid: 1 0.5:0.501 c")
    assert "group valid" in message and "holds none of 40 documents" in message and "splits[1]" in message
    message = refusal(tmp_path, "train: 1 0:1 a, 1 0:0.001 c")
    assert "group train" in message and "none of 40" in message
    message = refusal(tmp_path, "train: 1 0.015:0.02 a")
    assert "nothing is left of 1 documents: 1 no supervised token" in message and "all zero" in message
    message = refusal(tmp_path, "train: 1 0:1 a", seq_length=1, overlong="drop", global_batch_size=1)
    assert "nothing is left of 200 documents" in message and "over-long" in message and "seq_length" in message
    message = refusal(tmp_path, "train: 1 0:1 a", overlong="error")
    assert "do not fit a row of 32" in message
    message = refusal(tmp_path, "train: 1 0:1 a", vocab_size=VOCAB - 1)
    assert f"a vocabulary of {VOCAB} tokens, the model knows {VOCAB - 1}" in message


def test_missing_and_damaged_data_are_reported_together(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    (tmp_path / "c.bin").write_bytes(b"short")
    message = refusal(tmp_path, "train: 1 0:1 absent, 1 0:1 a", "valid: 1 0:1 c", code=EXIT_CORRUPT)
    assert "2 datasets cannot be used" in message and "splits[0]" in message and "absent" in message and "c.bin" in message
    assert "Give the prefix without .bin" in refusal(tmp_path, "train: 1 0:1 a.bin")


def test_an_empty_group_is_left_out_when_evaluation_is_off(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    plan = plan_of(tmp_path, "train: 1 0:1 a", "valid: 1 0.5:0.501 c", evaluate=False)
    assert plan.groups == {} and any("group valid is empty" in note for note in plan.notes)


def test_sources_must_share_a_tokenizer(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    write(tmp_path / "other", samples(31, 20), tokenizer={"sha256": "cd" * 32, "vocab_size": VOCAB})
    message = refusal(tmp_path, "train: 1 0:1 a", "valid: 1 0:1 other")
    assert "different tokenizers" in message and "abababab" in message and "cdcdcdcd" in message
    write(tmp_path / "foreign", samples(32, 20), manifest=False)
    plan = plan_of(tmp_path, "train: 1 0:1 a, 1 0:1 foreign", "valid: 1 0:1 c")
    assert any("foreign does not say which tokenizer" in note for note in plan.notes)
    assert plan.tokenizer == {"sha256": "ab" * 32, "vocab_size": VOCAB}


def test_a_copy_does_not_hide_an_overlap(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    for name in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"copy{name}").write_bytes((tmp_path / f"a{name}").read_bytes())
    message = refusal(tmp_path, "train: 1 0:0.9 a", "valid: 1 0.5:1 copy")
    assert "valid 0.5:1" in message and "copy of the same data" in message
    plan_of(tmp_path, "train: 1 0:0.5 a", "valid: 1 0.5:1 copy")


def test_every_rank_gets_one_plan_and_one_builds(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    calls: list[bool] = []
    built = plan_of(tmp_path, *GROUPS, barrier=lambda: calls.append((tmp_path / "a.packing").exists()))
    assert calls == [True]  # the builder passes the barrier when the caches are there
    read = plan_of(tmp_path, *GROUPS, build_cache=False, barrier=lambda: calls.append(True))
    assert len(calls) == 2 and all("read from" in note for note in read.notes if "packing" in note)
    assert all("built" in note for note in built.notes if "packing" in note)
    one, other = built.train.rows(np.arange(20)), read.train.rows(np.arange(20))
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)
    assert built.fingerprint == read.fingerprint
    with pytest.raises(DataError):
        plan_of(tmp_path, "train: 1 0:1 absent", barrier=lambda: calls.append(True))
    assert len(calls) == 3  # the others are not left waiting


def test_ranks_that_do_not_see_the_cache_build_one_and_share_it(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    """A cache directory on a disk of each host: the first of its ranks packs, the next one maps."""
    options = {"build_cache": False, "barrier": lambda: None, "cache_dir": str(tmp_path / "local")}
    first, second = plan_of(tmp_path, *GROUPS, **options), plan_of(tmp_path, *GROUPS, **options)
    assert all("written to" in note for note in first.notes if "packing" in note)
    assert all("read from" in note for note in second.notes if "packing" in note)
    assert first.fingerprint == second.fingerprint


def test_caches_go_where_they_can(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    plan_of(tmp_path, *GROUPS, cache_dir=str(tmp_path / "given"), fallback_cache_dir=tmp_path / "unused")
    assert (tmp_path / "given" / "a.packing").is_dir() and not (tmp_path / "a.packing").exists() and not (tmp_path / "unused").exists()
    (tmp_path / "a.packing").write_text("in the way")
    plan_of(tmp_path, *GROUPS, fallback_cache_dir=tmp_path / "run")
    assert (tmp_path / "run" / "a.packing").is_dir() and (tmp_path / "b.packing").is_dir()


def test_table_and_dictionary_say_the_same(tmp_path: Path, corpus: dict[str, list[Document]]) -> None:
    plan = plan_of(tmp_path, *GROUPS)
    table, facts = plan.table(), json.loads(json.dumps(plan.to_dict()))
    for group in facts["groups"]:
        line = next(line for line in table.splitlines() if line.startswith(group["name"] + " "))
        source = group["sources"][0]
        for number in (source["counts"]["samples"], source["rows"], source["counts"]["kept_tokens"], source["counts"]["supervised"]):
            assert f"{number:,}" in line.split()
        assert f"{100 * source['fill']:.2f}" in line.split()
    assert "1 documents, 3 tokens: no supervised token" in table
    assert "1 documents, 1 tokens: fewer than 2 tokens" in table
    assert f"global batch: 4 rows x {SEQ} positions = 128" in table and "10 iterations = 40 rows" in table
    assert max(map(len, table.splitlines())) <= 140
    assert facts["fingerprint"] == plan.fingerprint


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder / "d", samples(len(folder) + ord(folder[0]), 50))
    table = plan_of(tmp_path, "train: 1 0:1 one/d, 1 0:1 two/d").table()
    assert " one/d " in table and " two/d " in table


def test_the_command(tmp_path: Path, corpus: dict[str, list[Document]], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "splits.txt").write_text("\n".join(GROUPS))
    before = sorted(tmp_path.rglob("*"))
    assert main(["--splits", str(tmp_path / "splits.txt"), "--seq-length", "32", "--global-batch-size", "4", "--iterations", "10"]) == 0
    printed = capsys.readouterr().out
    assert plan_of(tmp_path, *GROUPS, build_cache=False).table() in printed and "not written" in printed
    assert main(["--splits", f"train: 1 0:1 '{tmp_path}/c'", "--json", "--overlong", "split"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["sources"][0]["counts"]["documents"] == 40
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(DataError, match="there is no train group"):
        main(["--splits", "valid: 1 0:1 x"])


def test_the_command_plans_other_modes(tmp_path: Path, corpus: dict[str, list[Document]], capsys: pytest.CaptureFixture[str]) -> None:
    group = f"train: 1 0:1 '{tmp_path}/c'"
    for packing, rows in (("none", 40), ("concat", None)):
        assert main(["--splits", group, "--json", "--packing", packing, "--seq-length", "32", "--pad-to-multiple", "4"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["packing"] == packing and facts["groups"][0]["rows"] == (
            rows or -(-(facts["groups"][0]["sources"][0]["counts"]["tokens"] - 1) // 32)
        )
    with pytest.raises(ConfigError, match=r"data.fim.rate is 0.5 without data.tokenizer"):
        main(["--splits", group, "--fim-rate", "0.5"])
    with pytest.raises(ConfigError, match=r"data.seq_length 30 is not a multiple of data.pad_to_multiple 4"):
        main(["--splits", group, "--seq-length", "30", "--pad-to-multiple", "4"])


def test_the_command_reads_recipes(tmp_path: Path, corpus: dict[str, list[Document]], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "splits.txt").write_text("\n".join(GROUPS))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"run: {tmp_path}/run\nmodel: {{init_from: somewhere}}\ndata: {{splits: {tmp_path}/splits.txt, seq_length: 32}}\n"
        "train: {global_batch_size: 4, iterations: 10}\n"
    )
    assert main(["--config", str(recipe), "--data.overlong", "split"]) == 0
    assert plan_of(tmp_path, *GROUPS, build_cache=False, overlong="split").table() in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_planning_imports_no_torch() -> None:
    code = "import sys, megawrap.data_plan, megawrap.data.loader\nprint([m for m in ('torch', 'megatron') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    assert found.stdout.strip() == "[]"
