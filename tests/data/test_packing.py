"""Over-long policies against a token-by-token oracle, packing against textbook best-fit-decreasing, caches against change."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.samples import MIXTURE, SHORTEST
from megawrap.config import OverlongPolicy
from megawrap.data import packing_cache
from megawrap.data.format import IndexedDataset
from megawrap.data.packing import Exchange, best_fit_decreasing, pack, places
from megawrap.data.packing_cache import PackingKey, load_or_pack
from megawrap.data.samples import OVERLONG, TOO_SHORT, UNSUPERVISED, Counts, Pieces, select
from megawrap.data.shuffle import _GOLDEN, _mix, make_key, permute, shuffled_order
from megawrap.errors import DataError
from megawrap.io import DirectoryLock
from tests.data.documents import END, flat, samples, windows, write

POLICIES = [policy for policy in get_args(OverlongPolicy) if policy != "error"]


def textbook_rooms(sizes: list[int], capacity: int) -> list[int]:
    """Room left in every bin of best-fit-decreasing, one item at a time."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        room = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(room)
        rooms.append(room - size)
    return sorted(rooms)


@settings(max_examples=500)
@given(st.data(), st.integers(1, 50), st.integers(0, 2**64 - 1))
def test_packs_as_the_textbook(data: st.DataObject, capacity: int, key: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    starts, items = best_fit_decreasing(np.array(sizes), capacity, key)
    assert sorted(items.tolist()) == list(range(len(sizes)))
    bins = [[sizes[i] for i in items[a:b]] for a, b in pairwise(starts)]
    assert all(members == sorted(members, reverse=True) for members in bins)
    assert sorted(capacity - sum(members) for members in bins) == textbook_rooms(sizes, capacity)


@settings(max_examples=200)
@given(st.data(), st.integers(1, 12), st.integers(0, 9), st.sampled_from([1, 2, 4, 8]))
def test_rows_are_the_textbooks_with_reserves_and_multiples_too(data: st.DataObject, units: int, reserve: int, multiple: int) -> None:
    capacity = units * multiple
    lengths = np.array(data.draw(st.lists(st.integers(2, capacity + 1), min_size=1, max_size=50)))
    wanted = [min(-(-(length - 1 + reserve) // multiple) * multiple, capacity) for length in lengths.tolist()]
    assert places(lengths, seq_length=capacity, reserve=reserve, multiple=multiple).tolist() == wanted
    number = np.arange(len(lengths))
    pieces = Pieces(document=number, start=0 * number, length=lengths, counts=Counts())
    packing = pack(pieces, capacity, 5, reserve=reserve, multiple=multiple)
    assert packing.num_rows == len(textbook_rooms(wanted, capacity))
    assert sorted(packing.document.tolist()) == number.tolist() and (packing.length == lengths[packing.document]).all()
    taken = packing.places(packing.length)
    assert (np.diff(taken) <= 0).all()
    assert (np.add.reduceat(taken[packing.windows], packing.row_starts[:-1]) <= capacity).all()


def test_equal_places_are_exchanged_from_epoch_to_epoch() -> None:
    lengths = np.random.default_rng(3).integers(2, 30, 4000)
    number = np.arange(len(lengths))
    packing = pack(Pieces(document=number, start=0 * number, length=lengths, counts=Counts()), 64, 5)
    taken = packing.places(packing.length)[packing.windows]
    rows = np.repeat(np.arange(packing.num_rows), np.diff(packing.row_starts))

    def fillers(seed: int, fingerprint: str, epoch: int) -> np.ndarray:
        return Exchange(packing, seed, fingerprint)(packing.windows, taken, epoch)

    assert fillers(1, "f", 0).tolist() == packing.windows.tolist()

    def company(filling: np.ndarray) -> set[tuple[int, int]]:
        members = [packing.document[filling[rows == row]].tolist() for row in range(packing.num_rows)]
        return {(min(a, b), max(a, b)) for row in members for a in row for b in row if a != b}

    def common(one: set[tuple[int, int]], other: set[tuple[int, int]]) -> float:
        return len(one & other) / len(one)

    at_random = packing.windows.copy()
    for place in np.unique(taken):
        at_random[taken == place] = np.random.default_rng(place).permutation(at_random[taken == place])
    by_chance = common(company(packing.windows), company(at_random))
    companions: list[set[tuple[int, int]]] = []
    for epoch in range(6):
        filling = fillers(1, "f", epoch)
        assert sorted(filling.tolist()) == number.tolist(), "every window once in an epoch"
        assert (packing.places(packing.length)[filling] == taken).all(), "in a place of its size"
        companions.append(company(filling))
    assert 0.05 < by_chance < 0.1
    assert all(common(one, other) < 1.5 * by_chance for n, one in enumerate(companions) for other in companions[:n])
    for seed, fingerprint, epoch in ((2, "f", 1), (1, "g", 1), (1, "f", 2)):
        assert (fillers(seed, fingerprint, epoch) != fillers(1, "f", 1)).mean() > 0.9
    exchange = Exchange(packing, 1, "f")  # any row of any epoch, in any order
    for epoch in (5, 2, 7, 1, 3, 6, 2):
        assert exchange(packing.windows[7:9], taken[7:9], epoch).tolist() == fillers(1, "f", epoch)[7:9].tolist()


def test_packing_refuses_what_cannot_fit() -> None:
    for sizes in ([0, 1], [1, 9]):
        with pytest.raises(ValueError, match="allowed are 1 to 8"):
            best_fit_decreasing(np.array(sizes), 8, 0)
    starts, items = best_fit_decreasing(np.array([], dtype=np.int64), 8, 0)
    assert starts.tolist() == [0] and len(items) == 0


def test_order_depends_on_the_key_and_not_on_lengths() -> None:
    sizes = np.random.default_rng(0).integers(1, 64, size=20_000)
    starts, items = best_fit_decreasing(sizes, 64, 1)
    again = best_fit_decreasing(sizes, 64, 1)
    other = best_fit_decreasing(sizes, 64, 2)
    assert (items == again[1]).all() and (starts == again[0]).all()
    assert (items != other[1]).mean() > 0.9
    mean_size = np.add.reduceat(sizes[items], starts[:-1]) / np.diff(starts)
    assert abs(np.corrcoef(np.arange(len(mean_size)), mean_size)[0, 1]) < 0.05
    same = items[sizes[items] == 10]  # equal sizes do not stand in the order of the file
    assert abs(np.corrcoef(np.arange(len(same)), same)[0, 1]) < 0.2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permutations_are_complete_and_keyed(size: int) -> None:
    one, other = (permute(np.arange(size), size, make_key("epoch", 1, e, "abc")) for e in (0, 1))
    assert sorted(one) == list(range(size)) and sorted(other) == list(range(size))
    assert permute(np.arange(size)[::-1], size, make_key("epoch", 1, 0, "abc")).tolist() == one[::-1].tolist()
    if size > 50:
        assert (one != other).mean() > 0.8 and (one != np.arange(size)).mean() > 0.8
        assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 5 / size**0.5


def test_shuffles_are_written_in_stone() -> None:
    """A resumed run must find the order it left, whatever release of numpy it resumes with."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # first outputs of splitmix64 with seed 0
    assert _mix(np.arange(1, 4, dtype=np.uint64) * np.uint64(_GOLDEN)).tolist() == published
    assert make_key("epoch", 1, 0, "abc") == 18296168723417386196
    assert permute(np.arange(10), 10, 7).tolist() == [5, 8, 1, 3, 2, 6, 0, 7, 9, 4]
    assert shuffled_order(np.array([1, 0, 1, 0, 1, 0]), 1, 7).tolist() == [1, 5, 3, 2, 0, 4]


@pytest.mark.parametrize("loss_on", ["outputs", "all"])
@pytest.mark.parametrize("overlong", POLICIES)
@pytest.mark.parametrize("chat", [False, True])
def test_windows_and_counts_equal_the_oracle(tmp_path: Path, overlong: OverlongPolicy, loss_on: str, chat: bool) -> None:
    documents = [
        *samples(1, 200, longest=20, chat=chat),
        [(1, [END])],
        [(0, [4, 5, 6])],
        [(0, []), (1, [7, END])],
        [(0, [1] * 40), (1, [])],
    ]
    dataset = write(tmp_path / "d", documents)
    for first, last in [(0, len(documents)), (17, 111), (50, 50)]:
        for seq_length in (1, 5, 16, 200):
            pieces = select(dataset, first, last, seq_length=seq_length, overlong=overlong, loss_on=loss_on)  # type: ignore[arg-type]
            wanted = [(d, *window) for d in range(first, last) for window in windows(documents[d], seq_length, overlong, loss_on)]
            found = list(zip(pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True))
            assert sorted(found) == wanted
            check_counts(pieces.counts, documents, wanted, (first, last), seq_length, overlong, loss_on)


def check_counts(
    counts: Counts, documents: list, wanted: list, span: tuple[int, int], seq_length: int, overlong: str, loss_on: str
) -> None:
    """The account against sets of single tokens."""
    flats = {d: flat(documents[d]) for d in range(*span)}
    kept = {(d, i) for d, start, length in wanted for i in range(start, start + length)}
    labels = Counter((d, i) for d, start, length in wanted for i in range(start + 1, start + length) if loss_on == "all" or flats[d][1][i])
    survivors = {d for d, _, _ in wanted}
    assert set(labels.values()) <= {1}
    assert (counts.documents, counts.samples, counts.pieces) == (len(flats), len(survivors), len(wanted))
    assert counts.tokens == sum(len(tokens) for tokens, _ in flats.values())
    assert counts.supervised == len(labels)
    assert counts.positions == sum(length - 1 for _, _, length in wanted)
    assert counts.overlong == sum(len(tokens) > seq_length + 1 for tokens, _ in flats.values())
    assert counts.documents == counts.samples + sum(counts.dropped_documents.values())
    assert counts.tokens == counts.kept_tokens + counts.cut_tokens + sum(counts.dropped_tokens.values())
    assert sum(counts.dropped_tokens.values()) == sum(len(flats[d][0]) for d in flats if d not in survivors)
    possible = sum(loss_on == "all" or modes[i] for tokens, modes in flats.values() for i in range(1, len(tokens)))
    assert counts.cut_supervised == possible - counts.supervised
    if overlong == "split":
        assert counts.cut_supervised == counts.cut_tokens == counts.shortened == 0
    else:
        assert counts.kept_tokens == len(kept)
    assert set(counts.dropped_documents) <= {TOO_SHORT, UNSUPERVISED, OVERLONG}
    assert (OVERLONG in counts.dropped_documents) <= (overlong == "drop")


def test_truncating_inputs_keeps_outputs_and_their_end(tmp_path: Path) -> None:
    document = [(0, list(range(1, 31))), (1, [101, 102, 103, END])]
    dataset = write(tmp_path / "d", [document])
    pieces = select(dataset, 0, 1, seq_length=6, overlong="truncate-inputs-left")
    assert (pieces.start.tolist(), pieces.length.tolist()) == ([27], [7])  # inputs 28, 29, 30 and all outputs
    pieces = select(dataset, 0, 1, seq_length=3, overlong="truncate-inputs-left")
    assert (pieces.start.tolist(), pieces.length.tolist()) == ([29], [4])  # input 30, outputs 101..103, no end token
    assert (pieces.counts.cut_tokens, pieces.counts.cut_supervised, pieces.counts.shortened) == (30, 1, 1)


def test_the_policy_error_names_the_first(tmp_path: Path) -> None:
    documents = [[(0, [1]), (1, [2, END])], [(0, [1] * 9), (1, [2, END])], [(0, [1] * 10), (1, [2, END])]]
    dataset = write(tmp_path / "d", documents)
    with pytest.raises(DataError, match=r"2 of 3 documents do not fit a row of 8 positions.*document 1, has 11 tokens, allowed are 9"):
        select(dataset, 0, 3, seq_length=8, overlong="error")
    assert select(dataset, 0, 1, seq_length=8, overlong="error").counts.samples == 1
    assert select(dataset, 0, 3, seq_length=11, overlong="error").counts.samples == 3


def test_data_without_modes_needs_loss_on_all(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", samples(2, 20, longest=30), modes=False)
    with pytest.raises(DataError, match=r"does not say which sequences are outputs.*loss_on to all"):
        select(dataset, 0, 20, seq_length=8, overlong="split")
    for overlong in POLICIES:
        pieces = select(dataset, 0, 20, seq_length=8, overlong=overlong, loss_on="all")  # type: ignore[arg-type]
        assert pieces.counts.supervised == pieces.counts.positions


def test_all_too_long_ends(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [[(0, [1] * 50), (1, [2] * 50)]] * 5)
    packing = pack(select(dataset, 0, 5, seq_length=4, overlong="drop"), 4, 0)
    assert packing.num_rows == 0 and packing.counts.dropped_documents == {OVERLONG: 5}
    packing = pack(select(dataset, 0, 5, seq_length=4, overlong="truncate-outputs"), 4, 0)
    assert packing.num_rows == 0 and packing.counts.dropped_documents == {UNSUPERVISED: 5}


def test_the_last_partial_row_is_kept(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [[(0, [1, 2]), (1, [3, END])]] * 7)  # 3 positions each, 2 to a row of 7
    packing = pack(select(dataset, 0, 7, seq_length=7, overlong="error"), 7, 0)
    assert sorted(np.diff(packing.row_starts).tolist()) == [1, 2, 2, 2]
    assert sorted(packing.document.tolist()) == list(range(7))


def key_of(dataset: IndexedDataset, **change: object) -> PackingKey:
    key = PackingKey(fingerprint=dataset.fingerprint, first=0, last=50, seq_length=16, overlong="split", loss_on="outputs", seed=1)
    return replace(key, **change)  # type: ignore[arg-type]


def same(one: packing_cache.Packing, other: packing_cache.Packing) -> bool:
    return one.counts == other.counts and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("row_starts", "windows", "document", "start", "length")
    )


def test_a_cache_is_read_only_for_exactly_its_key(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", samples(3, 60))
    built, said = load_or_pack(dataset, key_of(dataset), [tmp_path], write=True)
    assert "built" in said and "written" in said and "because" not in said
    read, said = load_or_pack(dataset, key_of(dataset), [tmp_path], write=False)
    assert "read from" in said and same(built, read)
    changes: list[dict[str, object]] = [
        {"first": 1}, {"last": 49}, {"seq_length": 17}, {"overlong": "drop"}, {"loss_on": "all"}, {"seed": 2}, {"version": 99},
        {"packing": "none"}, {"packing": "concat"}, {"pad_to_multiple": 4}, {"reserve": 3},
    ]  # fmt: skip
    assert {name for change in changes for name in change} == {item.name for item in fields(PackingKey)} - {"fingerprint"}
    before = sorted(tmp_path.rglob("*"))
    for change in changes:
        other, said = load_or_pack(dataset, key_of(dataset, **change), [tmp_path], write=False)
        assert "built" in said and "not written" in said and "because" not in said, change
        assert not same(built, other), change
        written, _ = load_or_pack(dataset, key_of(dataset, **change), [tmp_path / "other"], write=True)
        read, said = load_or_pack(dataset, key_of(dataset, **change), [tmp_path / "other"], write=False)
        assert "read from" in said and same(other, written) and same(other, read)
    shutil.rmtree(tmp_path / "other")
    assert sorted(tmp_path.rglob("*")) == before


def _packed_at_once(prefix: Path, folder: Path, ready: Any, said: Any) -> None:
    dataset = IndexedDataset(prefix)
    ready.wait()
    packing, sentence = load_or_pack(dataset, key_of(dataset), [folder], write=True)
    mapped = all(isinstance(getattr(packing, name).base, np.memmap) for name in packing_cache._ARRAYS)
    said.put((sentence, mapped, hash(packing.document.tobytes() + packing.windows.tobytes()) if mapped else None))


@pytest.mark.fault
def test_of_several_processes_one_packs_and_the_others_map(tmp_path: Path) -> None:
    write(tmp_path / "d", samples(16, 60))
    context = multiprocessing.get_context("fork")  # one process started them: hashes of bytes are alike
    ready, said = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_packed_at_once, args=(tmp_path / "d", tmp_path / "cache", ready, said)) for _ in range(8)]
    for process in processes:
        process.start()
    answers = [said.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum("built" in sentence for sentence, _, _ in answers) == 1
    assert sum("read from" in sentence for sentence, _, _ in answers) == 7
    assert all(mapped for _, mapped, _ in answers) and len({content for _, _, content in answers}) == 1


@pytest.mark.fault
def test_who_waits_for_a_killed_writer_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write(tmp_path / "d", samples(17, 60))
    begun, end = os.pipe()
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(packing_cache, "_pack", lambda *_: (os.write(end, b"x"), signal.pause()))
        load_or_pack(dataset, key_of(dataset), [tmp_path / "cache"], write=True)
        os._exit(0)
    assert os.read(begun, 1) == b"x"
    told: list[str] = []
    say = packing_cache._Report.say

    def listen(report: packing_cache._Report, sentence: str) -> None:
        if sentence.startswith("waiting"):
            told.append(sentence)
            os.kill(child, signal.SIGKILL)  # once it is known that this process waits
            os.waitpid(child, 0)
        say(report, sentence)

    monkeypatch.setattr(packing_cache._Report, "say", listen)
    packing, said = load_or_pack(dataset, key_of(dataset), [tmp_path / "cache"], write=True)
    assert len(told) == 1 and f"process {child}" in told[0] and str(dataset.prefix) in told[0]
    assert "built" in said and "written to" in said
    assert same(packing, load_or_pack(dataset, key_of(dataset), [], write=False)[0])


def test_a_writer_that_never_ends_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write(tmp_path / "d", samples(18, 60))
    monkeypatch.setattr(packing_cache, "WAIT_SECONDS", 0.0)
    lock = tmp_path / "cache" / "d.packing" / f".{key_of(dataset).name}.lock"
    lock.parent.mkdir(parents=True)
    with DirectoryLock(lock):
        packing, said = load_or_pack(dataset, key_of(dataset), [tmp_path / "cache"], write=True)
    assert "not written" in said and f"process {os.getpid()}" in said and "waited 0 s" in said
    assert same(packing, load_or_pack(dataset, key_of(dataset), [], write=False)[0])


def test_progress_is_shown_when_packing_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write(tmp_path / "d", samples(19, 60))
    load_or_pack(dataset, key_of(dataset), [], write=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(packing_cache, "LOG_SECONDS", 0.0)
    load_or_pack(dataset, key_of(dataset), [], write=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3 and all(line.startswith(f"packing {dataset.prefix} 0:50: ") for line in lines)
    shares = [int(line.partition("%")[0].rpartition(" ")[2]) for line in lines]
    assert shares == sorted(shares) and shares[-1] > 50


def test_changed_data_never_meets_a_stale_cache(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", samples(4, 60))
    load_or_pack(dataset, key_of(dataset), [tmp_path], write=True)
    for name in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"d{name}").unlink()
    dataset = write(tmp_path / "d", samples(5, 60))
    packing, said = load_or_pack(dataset, key_of(dataset), [tmp_path], write=True)
    assert "because the cache" in said and "of other data" in said
    fresh, _ = load_or_pack(dataset, key_of(dataset), [], write=False)
    assert same(packing, fresh)
    assert "read from" in load_or_pack(dataset, key_of(dataset), [tmp_path], write=True)[1]


@pytest.mark.fault
@pytest.mark.parametrize("name", ["row_starts.npy", "windows.npy", "document.npy", "start.npy", "length.npy", "index.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty", "swap"])
def test_a_damaged_cache_is_rebuilt_and_said_so(tmp_path: Path, name: str, damage: str) -> None:
    dataset = write(tmp_path / "d", samples(6, 60))
    fresh, _ = load_or_pack(dataset, key_of(dataset), [], write=False)
    load_or_pack(dataset, key_of(dataset), [tmp_path], write=True)
    path = next(tmp_path.rglob(name))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) - 9] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-5])
    elif damage == "delete":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        shutil.copy(next(other for other in path.parent.iterdir() if other.name not in (name, "index.json")), path)
    again, said = load_or_pack(dataset, key_of(dataset), [tmp_path], write=True)
    assert "is damaged" in said and "written to" in said
    assert same(fresh, again)
    assert "read from" in load_or_pack(dataset, key_of(dataset), [tmp_path], write=False)[1]


def test_an_index_that_was_swapped_since_is_noticed(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", samples(7, 60, longest=20))
    load_or_pack(dataset, key_of(dataset), [tmp_path], write=True)
    other = write(tmp_path / "e", samples(8, 60, longest=3))
    assert "does not fit e.idx" in _damage_of(other, key_of(dataset), tmp_path)


def _damage_of(dataset: IndexedDataset, key: PackingKey, tmp_path: Path) -> str:
    (tmp_path / "e.packing").mkdir()
    shutil.copytree(next((tmp_path / "d.packing").iterdir()), tmp_path / "e.packing" / key.name)
    return load_or_pack(dataset, key, [tmp_path], write=False)[1]


def test_a_cache_that_cannot_be_written_costs_a_sentence(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", samples(9, 60))
    (tmp_path / "file").write_text("")
    built, said = load_or_pack(dataset, key_of(dataset), [tmp_path / "file", tmp_path / "second"], write=True)
    assert f"written to {tmp_path / 'second'}" in said
    nowhere, said = load_or_pack(dataset, key_of(dataset), [tmp_path / "file"], write=True)
    assert "not written (" in said and same(built, nowhere)


def test_what_a_killed_writer_left_is_replaced(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", samples(10, 60))
    left = tmp_path / "d.packing" / f"{key_of(dataset).name}.tmp"
    left.mkdir(parents=True)
    (left / "start.npy").write_bytes(b"half")
    _, said = load_or_pack(dataset, key_of(dataset), [tmp_path], write=True)
    assert "written to" in said and "damaged" not in said
    assert [path.name for path in (tmp_path / "d.packing").iterdir()] == [key_of(dataset).name]


def _killed_at(call: int, dataset: IndexedDataset, folder: Path) -> bool:
    """Write the cache in a child that is killed at its `call`-th call to the file system; False when it finished before."""
    child = os.fork()
    if child == 0:
        calls = 0

        def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return wrapped

        for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink", "ftruncate"):
            setattr(os, name, deadly(getattr(os, name)))
        np.save = deadly(np.save)  # type: ignore[assignment]
        try:
            load_or_pack(dataset, key_of(dataset), [folder], write=True)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.fault
def test_a_kill_at_any_moment_leaves_the_whole_cache_or_none(tmp_path: Path, record_property: Any) -> None:
    dataset = write(tmp_path / "d", samples(15, 60))
    fresh, _ = load_or_pack(dataset, key_of(dataset), [], write=False)
    call = 1
    while _killed_at(call, dataset, tmp_path / f"cache{call}"):
        again, said = load_or_pack(dataset, key_of(dataset), [tmp_path / f"cache{call}"], write=True)
        assert same(fresh, again) and "damaged" not in said and "not written" not in said
        assert "read from" in load_or_pack(dataset, key_of(dataset), [tmp_path / f"cache{call}"], write=False)[1]
        left = [path.name for path in (tmp_path / f"cache{call}" / "d.packing").iterdir() if not path.name.endswith(".lock")]
        assert left == [key_of(dataset).name]
        call += 1
    record_property("R6", (call - 1, call - 1))
    assert call > 30


def mixture(number: int) -> np.ndarray:
    """Lengths of code samples as benchmarks/samples.py draws them, at most 2048."""
    rng = np.random.default_rng(0)
    shares, medians, sigmas = (np.array(column) for column in zip(*MIXTURE, strict=True))
    kinds = rng.choice(len(MIXTURE), number, p=shares / shares.sum())
    return np.exp(rng.normal(np.log(medians[kinds]), sigmas[kinds])).round().clip(SHORTEST, 2048).astype(np.int64)


def test_rows_are_full() -> None:
    sizes = mixture(200_000)
    starts, items = best_fit_decreasing(sizes, 2048, 0)
    assert len(items) == len(sizes) and sizes.sum() / ((len(starts) - 1) * 2048) >= 0.999


@pytest.mark.slow
def test_five_million_samples() -> None:
    """Prints the processor time; the bar of it is the benchmark's."""
    number = np.arange(5_000_000)
    pieces = Pieces(document=number, start=np.zeros_like(number, dtype=np.int32), length=mixture(len(number)) + 1, counts=Counts())
    began = time.process_time()
    packing = pack(pieces, 2048, 0)
    print(f"{time.process_time() - began:.2f} CPU s")
    assert (pieces.length - 1).sum() / (packing.num_rows * 2048) >= 0.999
