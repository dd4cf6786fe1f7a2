"""Weighted split strings: both spellings, ranges, and every way to write them wrong."""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megawrap.data.splits import parse
from megawrap.errors import EXIT_USAGE, DataError

GOOD = "train: 1.0 0:0.95 code, 0.3 0:1 other"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "splits.txt"
    path.write_bytes(text.encode())
    return path


def refusal(splits: str | list[str] | Path) -> str:
    with pytest.raises(DataError) as caught:
        parse(splits)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '"train: 1.0 0:0.95 code, 0.3 0:1 other" "VALID_code: 1 0.95:1 code"\n',
        '"train: 1.0 0:0.95 code, 0.3 0:1 other" "VALID_code: 1 0.95:1 code"',
        '"TRAIN: 1.0 0:0.95 code, 0.3 0:1 other"\n"VALID_code: 1 0.95:1 code"\n',
        "train: 1.0 0:0.95 code, 0.3 0:1 other\nVALID_code: 1 0.95:1 code",
        "# data\n\n  train:1.0 0:0.95 code,0.3 0:1 other   # two\r\n# c: 1 0:1 x\nVALID_code: 1 .95:1. code\n",
        "\ufefftrain: 1e0 0:0.95 'code', 0.3 0:1 \"other\"\nVALID_code: +1 0.95:1 code\n",
    ],
)
def test_both_spellings_mean_the_same(tmp_path: Path, text: str) -> None:
    splits = parse(written(tmp_path, text))
    assert [group.name for group in splits.groups] == ["train", "VALID_code"]
    assert [(s.weight, s.start, s.end, s.prefix) for s in splits.train.sources] == [
        (1.0, 0.0, 0.95, tmp_path / "code"),
        (0.3, 0.0, 1.0, tmp_path / "other"),
    ]
    assert [group.is_valid for group in splits.groups] == [False, True]


def test_strings_and_lists_start_from_the_working_directory(tmp_path: Path) -> None:
    for splits in (GOOD, [GOOD], f"{GOOD}\nvalid: 1 0:1 third", [GOOD, '"valid: 1 0:1 third" "test_a: 1 0:1 fourth"']):
        assert parse(splits).train.sources[0].prefix == Path("code")
    assert parse([GOOD], base_dir=tmp_path).train.sources[1].prefix == tmp_path / "other"
    assert parse("splits.txt", base_dir=written(tmp_path, GOOD).parent).train.sources[0].prefix == tmp_path / "code"


@pytest.mark.parametrize("name", ["a b", "a, b:c", "it's", 'say "x"', "back\\slash", "new\nline", "ünï", "#x", "a #b", " lead", "-0:1"])
@pytest.mark.parametrize("outer", [False, True])
def test_a_quoted_prefix_holds_anything(tmp_path: Path, name: str, outer: bool) -> None:
    quoted = "'" + name.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    group = f"train: 1 0:0.5 {quoted}, 2 0:1 plain"
    text = '"' + group.replace('"', '\\"') + '"' if outer else group
    sources = parse(written(tmp_path, text)).train.sources
    assert [source.prefix for source in sources] == [tmp_path / name, tmp_path / "plain"]


def test_an_unquoted_prefix_may_hold_colons_and_quotes() -> None:
    assert parse(["train: 1 0:1 /d/o'b:c#1"]).train.sources[0].prefix == Path("/d/o'b:c#1")


def as_the_fork_reads(line: str) -> list[tuple[str, list[tuple[float, float, float, str]]]]:
    """The rule of the BigCode fork's arguments.py, said again: a line in quotes, `" "` between groups, commas, three words."""
    assert line[0] == '"' and line[-2:] == '"\n'
    groups = []
    for value in line[1:-2].split('" "'):
        name, _, datasets = value.partition(":")
        entries = []
        for dataset in datasets.split(","):
            weight, span, path = dataset.split()
            start, end = span.split(":")
            entries.append((float(weight), float(start), float(end), path))
        groups.append((name, entries))
    return groups


PATHS = st.from_regex(r"/[A-Za-z0-9_.:/@+=~-]{1,20}[a-z]", fullmatch=True)
ENTRY = st.tuples(st.sampled_from(["1.0", "0.3", "1e-2", "7", ".5"]), st.sampled_from(["0:0.9", "0.0:0.95", "0:.5"]), PATHS)


@given(st.lists(ENTRY, min_size=1, max_size=4, unique_by=lambda entry: os.path.realpath(entry[2])), st.data())
def test_the_forks_file_is_read_as_the_fork_reads_it(entries: list[tuple[str, str, str]], data: st.DataObject) -> None:
    spaces = data.draw(st.sampled_from([", ", ",", " , ", ",  "]))
    train = data.draw(st.sampled_from(["train", "TRAIN", "Train"])) + data.draw(st.sampled_from([":", ": "]))
    valid = [f"valid_{n}: {weight} 0.95:1.0 {path}" for n, (weight, _, path) in enumerate(entries[:2])]
    line = '"' + '" "'.join([train + spaces.join(" ".join(entry) for entry in entries), *valid]) + '"\n'
    with tempfile.TemporaryDirectory() as folder:
        splits = parse(written(Path(folder), line))
    found = [(group.name, [(s.weight, s.start, s.end, str(s.prefix)) for s in group.sources]) for group in splits.groups]
    wanted = [(name, [(*numbers, str(Path(path))) for *numbers, path in group]) for name, group in as_the_fork_reads(line)]
    assert found == [("train", wanted[0][1]), *wanted[1:]]


def test_a_list_may_name_files(tmp_path: Path) -> None:
    """The fork keeps its groups for training and for validation in files of their own."""
    (tmp_path / "sub").mkdir()
    train, valid = tmp_path / "train.txt", tmp_path / "sub" / "valid.txt"
    train.write_text('"train: 1.0 0:0.95 a, 0.3 0:1 /b"\n')
    valid.write_text('"valid_a: 1 0:1 c" "valid_b: 1 0:1 d"\n')
    splits = parse([str(train), str(valid), "test: 1 0.95:1 e"], base_dir=tmp_path)
    assert [[str(s.prefix) for s in group.sources] for group in splits.groups] == [
        [str(tmp_path / "a"), "/b"], [str(tmp_path / "sub" / "c")], [str(tmp_path / "sub" / "d")], [str(tmp_path / "e")],
    ]  # fmt: skip
    valid.write_text('"valid_a: 1 0.5:0.1 c"\n')
    assert f"{valid}:1: group valid_a, entry 1" in refusal([str(train), str(valid)])
    assert "splits[1]" in refusal([str(train), str(tmp_path / "absent.txt")])


def test_the_forks_files_may_name_their_groups_as_they_like(tmp_path: Path) -> None:
    train, valid = tmp_path / "train.txt", tmp_path / "valid.txt"
    train.write_text('"NAME_ABC: 0.6 0:0.6 /A, 0.3 0:1 /B"\n')
    valid.write_text('"NAME_ABC: 0.6 0.6:0.8 /A, 0.3 0:1 /C" "valid_2: 1 0:1 /D"\n')
    splits = parse([f"train={train}", f"valid={valid.name}"], base_dir=tmp_path)
    assert [group.name for group in splits.groups] == ["train", "valid_NAME_ABC", "valid_2"]
    assert [(s.weight, s.start, s.end, str(s.prefix)) for s in splits.train.sources] == [(0.6, 0.0, 0.6, "/A"), (0.3, 0.0, 1.0, "/B")]
    valid.write_text('"A: 1 0:1 /C"\n')
    assert parse(["train=train.txt", "test=valid.txt"], base_dir=tmp_path).evaluation[0].name == "test_A"
    train.write_text('"A: 1 0:1 /A" "B: 1 0:1 /B"\n')
    assert "group train is already given" in refusal([f"train={train}"])
    assert "cannot read the splits file" in refusal(["train=absent.txt"])


@given(st.integers(0, 10**7), st.lists(st.integers(0, 1000), min_size=1, max_size=6, unique=True))
def test_adjoining_ranges_share_out_every_document_once(documents: int, cuts: list[int]) -> None:
    bounds = [0, *sorted(cut / 1000 for cut in cuts if 0 < cut < 1000), 1]
    groups = [f"{'train' if i == 0 else f'valid{i}'}: 1 {a}:{b} x" for i, (a, b) in enumerate(pairwise(bounds))]
    ranges = [group.sources[0].documents(documents) for group in parse(groups).groups]
    assert ranges[0][0] == 0 and ranges[-1][1] == documents
    assert all(one[1] == other[0] for one, other in pairwise(ranges))


def test_bounds_are_rounded() -> None:
    source = parse(["train: 1 0.123:0.95 x"]).train.sources[0]
    assert source.documents(1000) == (123, 950)
    assert source.documents(10) == (1, 10)


BAD = {  # text: facts the message must hold
    "train: -1 0:1 x": ["WEIGHT is -1", "above 0"],
    "train: 0 0:1 x": ["WEIGHT is 0"],
    "train: nan 0:1 x": ["WEIGHT is 'nan'"],
    "train: inf 0:1 x": ["WEIGHT is 'inf'"],
    "train: 1e999 0:1 x": ["1e999"],
    "train: 1_0 0:1 x": ["1_0"],
    "train: 1 0.5:0.5 x": ["START 0.5 is not below END 0.5"],
    "train: 1 0.9:0.1 x": ["START 0.9 is not below END 0.1"],
    "train: 1 0:1.2 x": ["END is 1.2", "0 to 1"],
    "train: 1 -0.1:1 x": ["START is -0.1"],
    "train: 1 0:nan x": ["END is 'nan'"],
    "train: 1 0:95% x": ["95%", "0.95"],
    "train: 100% 0:1 x": ["100%", "write the fraction 1"],
    "train: 1 start:end x": ["START is 'start'", "END is 'end'"],
    "train: 1 0-1 x": ["'0-1' is not START:END"],
    "train: 1 0:0.5:1 x": ["not START:END"],
    "train: 1 0:1": ["2 words"],
    "train: 1 0:1 a b": ["4 words", "quote"],
    "train: 1 0:1 a 1 0:1 b": ["6 words", "comma is missing"],
    "train: 1 0:1 a,, 1 0:1 b": ["an entry is empty"],
    "train: 1 0:1 a,": ["an entry is empty"],
    "train:": ["no dataset"],
    "train: 1 0:1 ''": ["not a path"],
    "train: 1 0:1 'a": ["missing quote"],
    "train: 1 0:1 'a'b": ["follows a closing quote"],
    '"train: 1 0:1 a': ["missing quote"],
    '"train: 1 0:1 a" valid: 1 0:1 b': ["outside the quotes"],
    '"train: 1 0:1 a""valid: 1 0.5:1 a" x': ["outside the quotes"],
    "train 1 0:1 a": ["group name"],
    ": 1 0:1 a": ["group name"],
    "train: 1 0:0.5 x, 1 0.5:1 x": ["twice", "x"],
    "train: 1 0:0.5 x, 1 0.5:1 ./x": ["twice"],
    "train: 1 0:0.9 x\nvalid: 1 0.8:1 x": ["valid 0.8:1 overlaps train 0:0.9", "0.8:0.9"],
    "train: 1 0:0.5 x\nvalid_a: 1 0.5:0.8 x\ntest: 1 0.7:1 x": ["test 0.7:1 overlaps valid_a 0.5:0.8"],
    "train: 1 0:1 x\nvalid: 1 0:1 y/../x": ["overlaps"],
    "valid: 1 0:1 x": ["no train group", "valid"],
    "train: 1 0:1 x\ntrain: 1 0:1 y": ["already given"],
    "train: 1 0:1 x\nvalid: 1 0:1 y\nVALID: 1 0:1 z": ["VALID is already given"],
    "train: 1 0:1 x\ntrain_b: 1 0:1 y": ["train_b", "one train group"],
    "train: 1 0:1 x\nvlaid: 1 0:1 y": ["vlaid", "did you mean valid?"],
    "train: 1 0:1 x\ndev_stdlib: 1 0:1 y": ["did you mean valid_stdlib?"],
    "train: 1 0:1 x\npython: 1 0:1 y": ["valid_python"],
    "train: 1 0:1 x\nvalid a/b: 1 0:1 y": ["'valid a/b'", "letters"],
    "\n": ["no train group", "none at all"],
    "": ["no train group"],
}


@pytest.mark.parametrize("text", BAD)
def test_every_mistake_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    message = refusal(path)
    for fact in BAD[text]:
        assert fact in message
    if "no train" not in message:
        assert f"{path}:{1 + text.rstrip().count(chr(10))}:" in message
    assert os.listdir(tmp_path) == ["splits.txt"]


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, "trian: 0 0:2 a\n# fine\nvalid: 1 0.5:0.1 b, 1 x y z\nvalid: 1 0:1 'q"))
    for fact in ("trian", "WEIGHT is 0", "END is 2", ":3: group valid, entry 1", "START 0.5", "entry 2", ":4: group valid: missing quote"):
        assert fact in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refusal(str(tmp_path / "absent.txt"))
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "latin").write_bytes(b"train: 1 0:1 \xe9")
    assert "UTF-8 at byte 13" in refusal(tmp_path / "latin")
    assert "splits[1]: group valid" in refusal([GOOD, "valid: 1 2:3 x"])


def test_symbolic_links_do_not_hide_an_overlap(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert "overlaps" in refusal(written(tmp_path, "train: 1 0:1 real/x\nvalid: 1 0.5:1 link/x"))
