"""The data benchmark runs every part on a small corpus, and its corpus is the same every time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import corpus, data, process_tree


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred functions, so that nothing depends on what is installed."""
    root = tmp_path_factory.mktemp("sources")
    for number in range(40):
        functions = [
            f'def function_{number}_{index}(value, other={index}):\n    """Add {index} to value.\n\n    And {number}.\n    """\n'
            f"    total = value + {index}\n    for item in range(other):\n        total += item * {number}\n    return total\n\n\n"
            for index in range(12)
        ]
        (root / f"module_{number}.py").write_text("import os\n\n" + "".join(functions))
    return root


def test_corpus_is_deterministic_and_whole(sources: Path, tmp_path: Path) -> None:
    facts = [corpus.write(tmp_path / name, 10**9, roots=[sources]) for name in ("a.jsonl", "b.jsonl")]
    content = (tmp_path / "a.jsonl").read_bytes()
    assert content == (tmp_path / "b.jsonl").read_bytes()
    assert facts[0] == facts[1]
    assert facts[0]["bytes"] == len(content)
    lines = [json.loads(line) for line in content.splitlines()]
    assert facts[0]["lines"] == len(lines) == 40 + 40 * 12
    assert facts[0]["file"] == 40
    assert facts[0]["instruction"] + facts[0]["body"] == 480 and facts[0]["instruction"] > 100 and facts[0]["body"] > 100
    assert all(line["inputs"].strip() and line["outputs"].strip() for line in lines)
    originals = [path.read_text() for path in sources.iterdir()]
    for line in lines[:50]:
        whole = line["outputs"] if line["kind"] == "instruction" else line["inputs"] + line["outputs"]
        assert any(whole.strip() in text for text in originals)
    assert corpus.write(tmp_path / "c.jsonl", 10**9, roots=[sources], seed=2) != facts[0] or (tmp_path / "c.jsonl").read_bytes() != content
    assert corpus.write(tmp_path / "d.jsonl", 5000, roots=[sources])["bytes"] < 60_000


def test_process_tree_counts_children(tmp_path: Path) -> None:
    """A child's memory and time belong to the command."""
    child = "import time; block = bytearray(80 << 20); block[::4096] = b'x' * len(block[::4096]); time.sleep(0.4)"
    parent = f"import json, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print(json.dumps(dict(tokens=7)))"
    cost = process_tree.run([sys.executable, "-c", parent], log_path=tmp_path / "log")
    assert cost.exit_code == 0
    assert cost.said == {"tokens": 7}
    assert cost.peak_mib > 80
    assert cost.seconds > cost.cpu_seconds > 0
    assert process_tree.run([sys.executable, "-c", "raise SystemExit(3)"], log_path=tmp_path / "log").exit_code == 3


@pytest.mark.timeout(280)
def test_quick_run_measures_every_part(sources: Path, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    pytest.importorskip("tiktoken")
    small = tmp_path / "corpus.jsonl"
    corpus.write(small, 300_000, roots=[sources])
    found = data.main(["--quick", "--rounds", "1", "--corpus", str(small), "--json", str(tmp_path / "out.json"), "--folder", str(tmp_path)])
    assert found["failed"] == {}
    expected = {bar.ours for bar in data.bars()} | {bar.theirs for bar in data.bars() if bar.theirs}
    absent = {label for label in expected if label.startswith(("Megatron-LM", "BigCode")) or "ten times" in label}
    assert set(found["contenders"]) == expected - absent
    assert all(run["tokens"] > 0 and run["seconds"] > 0 for runs in found["runs"].values() for run in runs)
    tokens = {label: row["tokens"] for label, row in found["contenders"].items()}
    samples = small.read_bytes().count(b"\n")
    assert tokens[f"megawrap, {data.GPT2}"] == tokens[f"gigatoken alone, {data.GPT2}"] + samples  # an end token each
    assert tokens[f"tiktoken alone, {data.STARCODER}"] == tokens[f"tokenizers alone, {data.STARCODER}"]
    assert json.loads((tmp_path / "out.json").read_text())["bars"] == found["bars"]
    assert found["contenders"]["packing the corpus at 2048"]["lost"] == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert "packing the corpus at 2048" in data.table(found)
