"""Parquet files and saved `datasets` directories against the same samples as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megawrap.data.counts import BadLines
from megawrap.data.format import IndexedDataset
from megawrap.data.inputs import expand
from megawrap.errors import EXIT_CORRUPT, EXIT_OK, DataError
from tests.data.reading import added_up, read
from tests.preprocessing import run
from tests.tiny_tokenizer import write_tokenizer

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
ROWS = [{"inputs": f"{i}é" * (i % 3), "outputs": f"out {i}" * (i % 7), "score": i} for i in range(700)]
GOOD = [(row["inputs"], row["outputs"]) for row in ROWS if row["outputs"]]


def write(path: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"row_group_size": 100, "compression": "zstd"}, {"use_dictionary": True}], ids=str)
def test_parquet_gives_the_samples_of_its_rows(tmp_path: Path, options: dict[str, Any]) -> None:
    samples, reader = read(write(tmp_path / "data.parquet", **options), block_bytes=2000)
    assert [sample.texts for sample in samples] == GOOD
    assert [sample.line for sample in samples] == [number for number, row in enumerate(ROWS, start=1) if row["outputs"]]
    assert (reader.counts.lines, added_up(reader), reader.counts.empty) == (700, 700, 100)
    facts = reader.sources[0].facts()
    assert (facts["lines_read"], facts["bytes"]) == (700, (tmp_path / "data.parquet").stat().st_size)
    assert len(facts["sha256"]) == 64
    samples, reader = read(tmp_path / "data.parquet", limit=300)
    assert reader.counts.lines == 300


def test_text_columns_of_every_arrow_type(tmp_path: Path) -> None:
    texts = pyarrow.array(["a", "b", "a"])
    kinds = {"large": texts.cast(pyarrow.large_string()), "dictionary": texts.dictionary_encode(), "plain": texts}
    for name, column in kinds.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table({"inputs": column, "outputs": texts}), path)
        assert [sample.texts for sample in read(path)[0]] == [("a", "a"), ("b", "b"), ("a", "a")]


def test_the_dataset_is_that_of_the_json_lines(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for source, out in ((tmp_path / "data.jsonl", "one"), (write(tmp_path / "data.parquet"), "two")):
        assert run(source, tokenizer, tmp_path / out) == EXIT_OK
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    assert (tmp_path / "one.idx").read_bytes() == (tmp_path / "two.idx").read_bytes()


def test_conversations_in_a_table(tmp_path: Path) -> None:
    """Arrow gives every struct all keys; the absent ones must not reach the template as None."""
    template = (
        "{% for m in messages %}{% if 'name' in m %}{{ m.name }}{% endif %}{{ '<|pad|>' + m.role + '\n' + m.content + '<|endoftext|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|pad|>assistant\n' }}{% endif %}"
    )
    tokenizer = write_tokenizer(tmp_path / "tokenizer", config={"eos_token": "<|endoftext|>", "chat_template": template})
    rows = [
        {"messages": [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "yes"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source, out in ((tmp_path / "data.jsonl", "one"), (write(tmp_path / "data.parquet", rows), "two")):
        assert run(source, tokenizer, tmp_path / out, "--fields", "messages") == EXIT_OK
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    data = IndexedDataset(tmp_path / "two")
    assert data.modes is not None
    assert data.modes.tolist() == [0, 1, 0, 0, 1, 0]


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved, num_shards=3)
    assert [Path(name).name for name in expand([saved])] == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    samples, reader = read(saved)
    assert [sample.texts for sample in samples] == GOOD
    assert reader.counts.lines == 700
    both = tmp_path / "both"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:9])}).save_to_disk(both)
    with pytest.raises(DataError, match=r"several splits.*both/train, .*both/test"):
        expand([both])
    assert read(both / "test")[1].counts.lines == 9
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../saved2/x.arrow"}]}')
    with pytest.raises(DataError, match="not a plain relative path"):
        expand([saved])
    (saved / "state.json").write_text('{"_data_files": 3}')
    with pytest.raises(DataError, match=r"state\.json: not written by datasets"):
        expand([saved])


def test_rows_that_are_not_samples(tmp_path: Path) -> None:
    rows = [{"inputs": "a", "outputs": "b"}, {"inputs": None, "outputs": "b"}, {"inputs": "a" * 50, "outputs": "b"}]
    path = write(tmp_path / "data.parquet", rows)
    with pytest.raises(DataError, match=r"data\.parquet:2: 'inputs' is null, it must be a string"):
        read(path)
    _, reader = read(path, bad_lines=BadLines("skip"), max_line_bytes=40)
    assert dict(reader.counts.bad) == {"line-too-long": 1, "wrong-type": 1}
    assert added_up(reader) == 3


def test_columns_are_checked_before_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.parquet: no column 'outputs', the columns are 'inputs', 'output'; did you mean 'output'"):
        read(write(tmp_path / "data.parquet", [{"inputs": "a", "output": "b"}]))
    with pytest.raises(DataError, match="column 'outputs' holds int64, it must hold strings"):
        read(write(tmp_path / "data.parquet", [{"inputs": "a", "outputs": 3}]))


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet")
    content = path.read_bytes()
    for damaged in (content[:-20], content[:200] + bytes(100) + content[300:], b"PAR1" + content[4:-9] + content[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"data\.parquet: damaged after row") as refused:
            read(path)
        assert refused.value.exit_code == EXIT_CORRUPT
    path.write_bytes(b"not a table")
    with pytest.raises(DataError, match="not parquet"):
        expand([path])
    path.write_bytes(content)
    path.rename(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match="this is a parquet file, not text"):
        expand([tmp_path / "data.jsonl"])


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pyarrow package.*megawrap\[parquet\]"):
        read(path)
