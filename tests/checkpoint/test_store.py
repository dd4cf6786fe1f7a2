"""The commit rule on plain files: what counts as a checkpoint, what is kept, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megawrap.checkpoint.manifest import FORMAT_VERSION, _own_sha256, _spelling, share
from megawrap.checkpoint.store import TRACKER_FILE, Checkpoint, Store
from megawrap.errors import EXIT_CORRUPT, CheckpointError
from tests import ranks


def writer(number: int) -> Callable[[Path], None]:
    """Files whose content is known from the number."""

    def write(directory: Path) -> None:
        (directory / "weights.bin").write_bytes(hashlib.sha256(str(number).encode()).digest() * 100)
        (directory / "sub").mkdir()
        (directory / "sub" / "more.bin").write_bytes(f"{number}\n".encode())

    return write


def save(root: Path, *numbers: int, **options: object) -> list[Checkpoint]:
    store = Store(root, **options)  # type: ignore[arg-type]
    return [store.save(number, writer(number), {"number": number}) for number in numbers]


def content(checkpoint: Checkpoint) -> str:
    return (checkpoint.path / "sub" / "more.bin").read_text().strip()


def test_a_saved_checkpoint_is_found_with_its_info(tmp_path: Path) -> None:
    assert Store(tmp_path / "run").latest() is None
    save(tmp_path / "run", 10, 20)
    latest = Store(tmp_path / "run").latest()
    assert latest is not None and latest.iteration == 20 and content(latest) == "20"
    assert latest.info == {"number": 20}
    assert latest.path.name == "iter_0000020"
    assert (tmp_path / "run" / TRACKER_FILE).read_text() == "20"
    assert sorted(os.listdir(tmp_path / "run")) == ["iter_0000010", "iter_0000020", TRACKER_FILE]


def test_the_manifest_says_what_sha256sum_says(tmp_path: Path) -> None:
    (checkpoint,) = save(tmp_path, 1)
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    assert manifest["format_version"] == FORMAT_VERSION and manifest["iteration"] == 1
    assert set(manifest["files"]) == {"weights.bin", "sub/more.bin"}
    for name, entry in manifest["files"].items():
        data = (checkpoint.path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=keep)
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("iter_*")) == left


def test_nothing_is_pruned_when_the_newer_one_does_not_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)
    from megawrap.checkpoint import store

    def damaging(*args: object) -> None:
        original(*args)  # type: ignore[arg-type]
        path = tmp_path / "iter_0000002" / "weights.bin"
        path.write_bytes(bytes(path.stat().st_size))

    original = store.publish
    monkeypatch.setattr(store, "publish", damaging)
    with pytest.raises(CheckpointError, match=r"weights\.bin"):
        save(tmp_path, 2, keep=1)
    assert content(Store.open(tmp_path / "iter_0000001")) == "1"


def test_a_failing_writer_leaves_nothing_and_keeps_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def fail(directory: Path) -> None:
        (directory / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot write .*iter_0000002\.tmp: the disk is full"):
        Store(tmp_path).save(2, fail)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", TRACKER_FILE]
    latest = Store(tmp_path).latest()
    assert latest is not None and latest.iteration == 1


def test_the_same_iteration_is_kept_when_it_verifies(tmp_path: Path) -> None:
    save(tmp_path, 5)
    Store(tmp_path).save(5, writer(6))
    latest = Store(tmp_path).latest()
    assert latest is not None and content(latest) == "5"


def test_the_same_iteration_is_replaced_when_it_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 4, 5)
    (tmp_path / "iter_0000005" / "weights.bin").write_bytes(b"short")
    save(tmp_path, 5)
    latest = Store(tmp_path).latest()
    assert latest is not None and latest.iteration == 5
    assert (tmp_path / "iter_0000005.damaged" / "weights.bin").read_bytes() == b"short"


def test_a_tracker_that_lags_or_is_missing_is_corrected_by_the_next_writer(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for lagging in ("1", None):
        if lagging is None:
            (tmp_path / TRACKER_FILE).unlink()
        else:
            (tmp_path / TRACKER_FILE).write_text(lagging)
        latest = Store(tmp_path).latest()
        assert latest is not None and latest.iteration == 2
        with Store(tmp_path).writing():
            assert (tmp_path / TRACKER_FILE).read_text() == "2"


@pytest.mark.parametrize("text", ["", "abc", "3", "-1", "1e3", "2 ", "release"])
def test_a_tracker_no_kill_can_leave(text: str, tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / TRACKER_FILE).write_text(text)
    if text.strip() == "2" or text == "release":
        latest = Store(tmp_path).latest()
        assert latest is not None and latest.iteration == 2
        return
    with pytest.raises(CheckpointError, match=TRACKER_FILE) as caught:
        Store(tmp_path).latest()
    assert caught.value.exit_code == EXIT_CORRUPT
    fallback = Store(tmp_path, on_corrupt="fallback").latest()
    assert fallback is not None and fallback.iteration == 2


def test_what_killed_writers_left_is_ignored_then_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "iter_0000001", tmp_path / "iter_0000002.tmp")
    (tmp_path / "iter_0000009.old.tmp").mkdir()
    (tmp_path / f".{TRACKER_FILE}.77.tmp").write_text("2")
    latest = Store(tmp_path).latest()
    assert latest is not None and latest.iteration == 1
    with Store(tmp_path).writing():
        assert sorted(os.listdir(tmp_path)) == [".lock", "iter_0000001", TRACKER_FILE]


def test_fallback_takes_the_newest_intact_one_and_goes_on_from_there(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    with open(tmp_path / "iter_0000030" / "weights.bin", "r+b") as file:
        file.write(b"\0")
    (tmp_path / "iter_0000020" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.bin"):
        Store(tmp_path).latest()
    latest = Store(tmp_path, on_corrupt="fallback").latest()
    assert latest is not None and latest.iteration == 10
    save(tmp_path, 15)
    assert (tmp_path / TRACKER_FILE).read_text() == "15"
    latest = Store(tmp_path).latest()  # what was passed over is set aside, so no flag is needed any more
    assert latest is not None and latest.iteration == 15


def test_everything_damaged_is_not_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "iter_0000001" / "weights.bin").unlink()
    with pytest.raises(CheckpointError, match="no intact checkpoint") as caught:
        Store(tmp_path, on_corrupt="fallback").latest()
    assert caught.value.exit_code == EXIT_CORRUPT


def test_no_verify_trusts_names_and_sizes_only(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with open(tmp_path / "iter_0000001" / "weights.bin", "r+b") as file:
        file.write(b"\0")
    assert Store(tmp_path, verify=False).latest() is not None
    with pytest.raises(CheckpointError):
        Store(tmp_path).latest()
    os.truncate(tmp_path / "iter_0000001" / "weights.bin", 5)
    with pytest.raises(CheckpointError, match=r"weights\.bin has 5 bytes instead of 3200"):
        Store(tmp_path, verify=False).latest()


def test_discarding_needs_the_lock_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.discard()
    with store.writing():
        store.discard()
    assert Store(tmp_path).latest() is None
    assert os.listdir(tmp_path) == []


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with Store(tmp_path).writing(), pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        save(tmp_path, 1)


# -- opening what is to be started from ----------------------------------------------------------------------------


def test_roots_iterations_and_releases_are_opened(tmp_path: Path) -> None:
    save(tmp_path / "run", 1, 2)
    (tmp_path / "run" / TRACKER_FILE).write_text("1")
    assert Store.open(tmp_path / "run").iteration == 1  # the tracker is followed
    assert Store.open(tmp_path / "run" / "iter_0000002").iteration == 2
    Store(tmp_path / "converted").save("release", writer(7))
    for path in (tmp_path / "converted", tmp_path / "converted" / "release"):
        opened = Store.open(path)
        assert opened.iteration == "release" and content(opened) == "7"
    assert (tmp_path / "converted" / TRACKER_FILE).read_text() == "release"


def test_another_projects_directory_needs_trust(tmp_path: Path) -> None:
    foreign = tmp_path / "iter_0000003"
    foreign.mkdir()
    (foreign / "metadata.json").write_text("{}")
    (tmp_path / TRACKER_FILE).write_text("3\n")
    for path in (tmp_path, foreign):
        with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
            Store.open(path)
        opened = Store.open(path, trust=True)
        assert opened.iteration == 3 and opened.manifest is None and opened.verify() == 0


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        Store.open(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Store.open(tmp_path)
    (tmp_path / TRACKER_FILE).write_text("12")
    with pytest.raises(CheckpointError, match="names 12, but"):
        Store.open(tmp_path)
    (tmp_path / "iter_0000012").mkdir()
    with pytest.raises(CheckpointError, match=r"metadata\.json"):
        Store.open(tmp_path, trust=True)


def _edit_manifest(directory: Path, **fields: object) -> None:
    path = directory / "manifest.json"
    body = {**json.loads(path.read_text()), **fields}
    body["manifest_sha256"] = _own_sha256(body)
    path.write_bytes(_spelling(body))


def test_a_newer_format_is_refused_by_version(tmp_path: Path) -> None:
    save(tmp_path, 1)
    _edit_manifest(tmp_path / "iter_0000001", format_version=99)
    with pytest.raises(CheckpointError, match=f"format version 99.*up to {FORMAT_VERSION}"):
        Store(tmp_path).latest()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_manifest_cannot_name_files_outside(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "secret").write_bytes(b"x")
    _edit_manifest(tmp_path / "iter_0000001", files={name: {"size": 1, "sha256": "00"}})
    with pytest.raises(CheckpointError, match="plain relative path"):
        Store(tmp_path).latest()


def test_a_directory_under_another_number_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "iter_0000001").rename(tmp_path / "iter_0000002")
    (tmp_path / TRACKER_FILE).write_text("2")
    with pytest.raises(CheckpointError, match="of iteration 1, not 2"):
        Store(tmp_path).latest()


def test_hashing_is_shared_evenly_and_completely() -> None:
    manifest = {"files": {f"f{i}": {"size": size} for i, size in enumerate([100, 90, 50, 40, 10, 10])}}
    parts = [share(manifest, rank, 3) for rank in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(manifest["files"])
    loads = [sum(manifest["files"][name]["size"] for name in part) for part in parts]
    assert max(loads) == 100


# -- several ranks -------------------------------------------------------------------------------------------------


def _save_on_ranks(root: str, fail_on: int | None) -> tuple[str, list[str]]:
    import torch.distributed as dist

    rank = dist.get_rank()

    def write(directory: Path) -> list[str]:
        if rank == fail_on:
            raise CheckpointError("planted", hint="fix it", corrupt=True)
        (directory / f"part_{rank}").write_bytes(bytes([rank]) * 1000)
        return [f"part_{rank}"]

    try:
        return str(Store(Path(root), keep=1).save(7 if fail_on is None else 8, write).path), sorted(os.listdir(root))
    except CheckpointError as problem:
        dist.barrier()
        return f"{problem} {problem.exit_code}", sorted(os.listdir(root))


@pytest.mark.dist
def test_ranks_commit_together_or_not_at_all(tmp_path: Path) -> None:
    results = ranks.run(3, _save_on_ranks, str(tmp_path), None)
    assert {path for path, _ in results} == {str(tmp_path / "iter_0000007")}
    opened = Store.open(tmp_path)
    assert set(opened.manifest["files"]) == {"part_0", "part_1", "part_2"}  # type: ignore[index]
    failed = ranks.run(3, _save_on_ranks, str(tmp_path), 1)
    assert [text for text, _ in failed] == ["rank 1: planted. fix it 3", "planted. fix it 3", "rank 1: planted. fix it 3"]
    assert all(names == ["iter_0000007", TRACKER_FILE] for _, names in failed)


def _latest_on_ranks(root: str) -> str:
    try:
        latest = Store(Path(root)).latest()
    except CheckpointError as problem:
        return str(problem)
    return str(latest.iteration) if latest else "none"


@pytest.mark.dist
def test_damage_one_rank_finds_is_refused_on_all(tmp_path: Path) -> None:
    ranks.run(3, _save_on_ranks, str(tmp_path), None)
    assert ranks.run(3, _latest_on_ranks, str(tmp_path)) == ["7"] * 3
    with open(tmp_path / "iter_0000007" / "part_2", "r+b") as file:
        file.write(b"\1")
    assert all("part_2" in message for message in ranks.run(3, _latest_on_ranks, str(tmp_path)))
