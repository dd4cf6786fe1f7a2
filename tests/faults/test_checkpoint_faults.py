"""Injected faults on checkpoints: kills while saving, flipped bits, missing, cut and swapped files, full disks, crafted files."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megawrap.checkpoint.store import TRACKER_FILE, Store
from megawrap.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, save_object
from megawrap.checkpoint.untrusted import load_plain
from megawrap.errors import EXIT_CORRUPT, CheckpointError
from megawrap.io import atomic_write
from tests.faults import saver

pytestmark = pytest.mark.fault
REPOSITORY = Path(__file__).parents[2]


# -- R5: kill -9 while saving --------------------------------------------------------------------------------------


def _save(root: Path, mode: str, unit: str, kill_at: int) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "tests.faults.saver", str(root), mode, unit, str(kill_at)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout.splitlines()


def _assert_intact(path: Path, iteration: int) -> None:
    """Every byte is what the writer meant, judged without the manifest."""
    for name in saver.FILES:
        assert (path / name).read_bytes() == saver.content(iteration, name), (path, name)


def _kill_once(root: Path, mode: str, unit: str, at: int) -> None:
    code, lines = _save(root, mode, unit, at)
    assert code == -9, (code, lines)
    committed = int(lines[-1].split()[1]) if lines else 0
    latest = Store(root, on_corrupt="fallback" if mode == "replacing" else "refuse").latest()
    reached = int(latest.iteration) if latest else 0
    lost = saver.INTERVAL if mode == "replacing" else 0  # there the newest one was damaged on purpose
    assert committed - lost <= reached <= committed + saver.INTERVAL, at
    if latest is not None:
        _assert_intact(latest.path, reached)
    code, _ = _save(root, mode, unit, 0)  # the same command again, no manual step
    assert code == 0, at
    names = {name for name in os.listdir(root) if not name.endswith(".damaged")}
    kept = {f"iter_{saver.LAST - back * saver.INTERVAL:07d}" for back in range(1 if mode == "pruning" else 2)}
    waiting = {f"iter_{saver.LAST - len(kept) * saver.INTERVAL:07d}"}  # killed before pruning with nothing left to save
    assert names - waiting == {*kept, TRACKER_FILE}, at
    _assert_intact(root / f"iter_{saver.LAST:07d}", saver.LAST)


def _kills(mode: str, unit: str, count: int, tmp_path: Path) -> None:
    code, lines = _save(tmp_path / "clean", mode, unit, 0)
    assert code == 0 and lines[-1].startswith("moments ")
    total, generator = int(lines[-1].split()[1]), random.Random(f"{mode} {unit} {count}")
    for number in range(count):
        _kill_once(tmp_path / f"run-{number}", mode, unit, generator.randint(1, total))


MODES = ["new", "again", "replacing", "pruning"]


@pytest.mark.parametrize(("unit", "count"), [("lines", 2), ("effects", 6)])
@pytest.mark.parametrize("mode", MODES)
def test_r5_a_kill_at_any_moment_of_saving_leaves_a_complete_checkpoint(
    mode: str, unit: str, count: int, tmp_path: Path, record_property: Any
) -> None:
    _kills(mode, unit, count, tmp_path)
    record_property("R5", (count, count))


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "count"), [("lines", 10), ("effects", 40)])
@pytest.mark.parametrize("mode", MODES)
def test_r5_many_kills_leave_a_complete_checkpoint(mode: str, unit: str, count: int, tmp_path: Path, record_property: Any) -> None:
    _kills(mode, unit, count, tmp_path)
    record_property("R5", (count, count))


# -- R7, R8: damaged files -----------------------------------------------------------------------------------------


def _write(number: int, directory: Path) -> list[str]:
    generator = torch.Generator().manual_seed(number)
    with TorchDistWriter(directory, file_bytes=2000) as writer:
        for key in ("decoder.a", "decoder.b", "optimizer.state.exp_avg.decoder.a"):
            for layer in range(2):
                writer.write(key, torch.randn(8, 16, generator=generator), layer, 2)
        writer.finish({"iteration": number})
    atomic_write(directory / "rng_00000.pt", lambda file: save_object(torch.get_rng_state(), file))
    return writer.files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = Store(tmp_path / "run")
    for number in (10, 20):
        store.save(number, lambda directory, number=number: _write(number, directory), {"number": number})
    return tmp_path / "run"


def _assert_refused(root: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Store(root).latest()
    assert name in str(caught.value), (name, str(caught.value))
    assert "iter_0000020" in str(caught.value)
    assert caught.value.exit_code == EXIT_CORRUPT
    fallback = Store(root, on_corrupt="fallback").latest()
    assert fallback is not None and fallback.iteration == 10


def test_r7_flipped_bits_are_all_refused_by_file_name(root: Path, record_property: Any) -> None:
    newest = root / "iter_0000020"
    files, generator = sorted(path for path in newest.iterdir()), random.Random(7)
    assert {".metadata", "common.pt", "manifest.json", "metadata.json", "rng_00000.pt", "__0_0.distcp", "__0_1.distcp"} <= {
        f.name for f in files
    }
    flips = 100
    for number in range(flips):
        path = files[number % len(files)]
        content = path.read_bytes()
        position, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
        path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
        _assert_refused(root, path.name)
        path.write_bytes(content)
    latest = Store(root).latest()
    assert latest is not None and latest.iteration == 20
    record_property("R7", (flips, flips))


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_refused(root: Path) -> None:
    path, generator = root / "iter_0000020" / "manifest.json", random.Random(8)
    content = path.read_bytes()
    for position in range(len(content)):
        bit = 1 << generator.randrange(8)
        path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            Store(root, verify=False).latest()


def test_flipped_bits_of_the_tracker_never_lead_to_an_older_checkpoint(root: Path) -> None:
    tracker = root / TRACKER_FILE
    content, refused = tracker.read_bytes(), 0
    for position in range(len(content)):
        for bit in range(8):
            tracker.write_bytes(content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :])
            try:
                latest = Store(root).latest()
            except CheckpointError as problem:
                assert TRACKER_FILE in str(problem)
                refused += 1
            else:
                assert latest is not None and latest.iteration == 20
    assert refused >= 8 * len(content) - 3  # 20 -> 10 names an older one: the newest is taken all the same


def test_r8_every_file_deleted_cut_or_swapped_is_refused(root: Path, record_property: Any) -> None:
    newest = root / "iter_0000020"
    names, cases = sorted(path.name for path in newest.iterdir()), 0
    for number, name in enumerate(names):
        other = names[number - 1]
        mine, theirs, older = (newest / name).read_bytes(), (newest / other).read_bytes(), (root / "iter_0000010" / name).read_bytes()
        for damage in ("delete", "cut", "empty", "grow", "swap", "older"):
            if damage == "older" and older == mine:
                continue  # the file is the same in both checkpoints
            if damage == "delete":
                (newest / name).unlink()
            else:
                changed = {"cut": mine[:-1], "empty": b"", "grow": mine + b"\0", "swap": theirs, "older": older}[damage]
                (newest / name).write_bytes(changed)
            if damage == "swap":
                (newest / other).write_bytes(mine)
            _assert_refused(root, name if damage != "swap" else "")
            (newest / name).write_bytes(mine)
            (newest / other).write_bytes(theirs)
            cases += 1
    (newest / "more.bin").write_bytes(b"")
    _assert_refused(root, "more.bin does not belong there")
    assert cases >= 5 * len(names)
    record_property("R8", (cases, cases))


def test_a_whole_directory_lost_is_not_taken_for_less_progress(root: Path) -> None:
    shutil.rmtree(root / "iter_0000020")
    with pytest.raises(CheckpointError, match=f"{TRACKER_FILE} names iteration 20, but only iterations 10 are there"):
        Store(root).latest()


# -- R9: full disk -------------------------------------------------------------------------------------------------

FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
from megawrap.checkpoint.store import Store
from megawrap.errors import MegawrapError
from tests.faults.test_checkpoint_faults import _write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root, found = Path(sys.argv[1]), []
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        Store(root).save(30, lambda directory: _write(30, directory))
        outcome = "saved"
    except MegawrapError as problem:
        outcome = f"{problem.exit_code} {problem}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found.append([limit, outcome, sorted(path.name for path in root.iterdir())])
print(json.dumps(found))
"""


def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_partial(root: Path) -> None:
    largest = max(path.stat().st_size for path in (root / "iter_0000020").iterdir())
    limits = [0, 1, *(largest * step // 17 for step in range(1, 17)), largest - 1, largest // 40]
    command = [sys.executable, "-W", "ignore", "-c", FULL_DISK, str(root), *map(str, limits)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 20
    for limit, outcome, names in found:
        assert outcome.startswith("2 cannot write "), (limit, outcome)
        assert "iter_0000030.tmp" in outcome or ".lock" in outcome or TRACKER_FILE in outcome
        assert "free there" in outcome
        assert names == ["iter_0000010", "iter_0000020", TRACKER_FILE], (limit, names)
    latest = Store(root).latest()
    assert latest is not None and latest.iteration == 20


# -- R12: crafted files --------------------------------------------------------------------------------------------


class _Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, canary: Path, function: Any) -> None:
        self.canary, self.function = canary, function

    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.canary}'",)) if self.function is os.system else (self.function, (str(self.canary), "w"))


def _expect_refusal(directory: Path, canary: Path) -> None:
    with pytest.raises(CheckpointError, match=r"asks to load|damaged") as caught:
        reader = TorchDistReader(directory, trust=True)
        reader.common()
        for key in reader.shapes:
            reader.read(key)
            reader.read(key, 0)
    assert caught.value.exit_code == EXIT_CORRUPT
    assert not canary.exists()


@pytest.mark.parametrize("function", [os.system, open], ids=["system", "open"])
def test_crafted_files_run_nothing(function: Any, root: Path, tmp_path: Path) -> None:
    canary, original = tmp_path / "canary", root / "iter_0000020"
    evil = _Touch(canary, function)
    assert pickle.loads(pickle.dumps(evil)) is not None and canary.exists(), "the canary works"
    canary.unlink()

    directory = shutil.copytree(original, tmp_path / "metadata")
    (directory / ".metadata").write_bytes(pickle.dumps(evil))
    _expect_refusal(directory, canary)

    directory = shutil.copytree(original, tmp_path / "storage")
    metadata = pickle.loads((directory / ".metadata").read_bytes())  # written by this test
    metadata.planner_data = evil
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    _expect_refusal(directory, canary)

    for name in ("common.pt", "rng_00000.pt"):
        directory = shutil.copytree(original, tmp_path / name)
        torch.save({"args": evil}, directory / name)
        with pytest.raises(CheckpointError, match="asks to load"):
            load_plain(directory / name)
    directory = shutil.copytree(original, tmp_path / "distcp")
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    place = next(iter(metadata.storage_data.values()))
    torch.save(evil, directory / place.relative_path)
    for entry in metadata.storage_data.values():
        entry.relative_path, entry.offset, entry.length = place.relative_path, 0, (directory / place.relative_path).stat().st_size
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    _expect_refusal(directory, canary)
    assert not canary.exists()


def test_crafted_object_entries_are_never_opened(root: Path, tmp_path: Path) -> None:
    canary, directory = tmp_path / "canary", tmp_path / "objects"
    directory.mkdir()
    with TorchDistWriter(directory) as writer:
        writer.write("weight", torch.ones(3))
        writer.write_object("decoder._extra_state/shard_0_1", _Touch(canary, os.system))
        writer.finish({})
    assert torch.equal(TorchDistReader(directory, trust=True).read("weight"), torch.ones(3))
    assert not canary.exists()
