"""Atomic files and directories, safe names and locks, under faults a user can meet."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from megawrap import io
from megawrap.errors import EXIT_CORRUPT, EXIT_USAGE, DataError, MegawrapError


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    io.atomic_write(tmp_path / "a", b"old")
    io.atomic_write(tmp_path / "a", lambda file: file.write(b"new") and None)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failing_writer_keeps_the_old_file_and_removes_the_new_one(tmp_path: Path) -> None:
    io.atomic_write(tmp_path / "a", b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        io.atomic_write(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """No file of this process may grow beyond 4096 bytes, as on a full disk: writing raises instead of killing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_names_path_and_sizes(tmp_path: Path, file_size_limit: None) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(MegawrapError, match=r"cannot write .*/a \(9\.8 KiB\).*free there") as caught:
        io.atomic_write(tmp_path / "a", bytes(10_000))
    assert caught.value.exit_code == EXIT_USAGE
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MegawrapError, match="cannot write"):
        io.atomic_write(tmp_path / "a", b"")
    tmp_path.chmod(0o700)


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MegawrapError, match="too long"):
        io.atomic_write(tmp_path / ("x" * 300), b"")
    io.atomic_write(tmp_path / ("x" * 240), b"y")
    assert (tmp_path / ("x" * 240)).read_bytes() == b"y"


def test_publish_moves_a_directory_and_refuses_an_existing_one(tmp_path: Path) -> None:
    (tmp_path / "new.tmp" / "sub").mkdir(parents=True)
    (tmp_path / "new.tmp" / "sub" / "file").write_bytes(b"1")
    io.publish(tmp_path / "new.tmp", tmp_path / "new")
    assert (tmp_path / "new" / "sub" / "file").read_bytes() == b"1"
    (tmp_path / "again.tmp").mkdir()
    (tmp_path / "empty").mkdir()
    for target in ("new", "empty"):
        with pytest.raises(MegawrapError, match=f"{target} exists already"):
            io.publish(tmp_path / "again.tmp", tmp_path / target)
    assert (tmp_path / "new" / "sub" / "file").exists() and (tmp_path / "again.tmp").exists()


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 5])
def test_sha256_is_hashlibs(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    assert io.sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/passwd", "a/../b", "a//b", "a/", "./a", "a\0b", "a\\b", "out", "out/x", "deep/out/x"]
)
def test_names_that_leave_the_directory_are_refused(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path)
    (root / "deep" / "out").symlink_to("../..")
    with pytest.raises(DataError) as caught:
        io.safe_join(root, name, error=DataError)
    assert caught.value.exit_code == EXIT_CORRUPT
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["a", "a/b", "..a", "a..b", "ü ñ", "in", ".hidden"])
def test_plain_names_are_joined(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").symlink_to(tmp_path / "a")
    assert io.safe_join(tmp_path, name) == tmp_path / name


def test_missing_space_is_found_before_work(tmp_path: Path) -> None:
    io.require_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(MegawrapError, match=r"needs 1048576\.0 TiB but only .* free"):
        io.require_free_space(tmp_path / "not" / "there", 1 << 60)


@pytest.mark.parametrize(
    ("content", "fact"),
    [(b'{"a": 1,}', ":1:9"), (b'{\n"a": nul}', ":2:6"), (b"\xff{}", "byte 0"), (b"", ":1:1"), (b"[" * 100_000, "nested too deeply")],
)
def test_bad_json_is_located(content: bytes, fact: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        io.read_json(tmp_path / "a.json", error=DataError)
    assert fact in str(caught.value) and "a.json" in str(caught.value)
    assert caught.value.exit_code == EXIT_CORRUPT


def test_missing_json_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(MegawrapError, match=r"cannot read .*a\.json") as caught:
        io.read_json(tmp_path / "a.json")
    assert caught.value.exit_code == EXIT_USAGE


# -- locks ---------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from megawrap.io import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_live_writer_is_refused_by_host_and_process(tmp_path: Path) -> None:
    holder = _holder(tmp_path / ".lock")
    try:
        with pytest.raises(MegawrapError, match=f"process {holder.pid} on host {os.uname().nodename}"):
            io.DirectoryLock(tmp_path / ".lock").acquire()
    finally:
        holder.kill()
        holder.wait()


def test_a_held_lock_is_refused_whatever_its_file_says(tmp_path: Path) -> None:
    holder = _holder(tmp_path / ".lock")
    try:
        _write_lock(tmp_path / ".lock", start="another boot:1")
        with pytest.raises(MegawrapError, match="only one writer is allowed"):
            io.DirectoryLock(tmp_path / ".lock").acquire()
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_of_a_killed_writer_is_taken_over_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = _holder(tmp_path / ".lock")
    holder.kill()
    holder.wait()
    with io.DirectoryLock(tmp_path / ".lock"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert f"taking over {tmp_path / '.lock'} from process {holder.pid}" in caplog.text
    assert not (tmp_path / ".lock").exists()


def test_a_second_lock_in_one_process_is_refused(tmp_path: Path) -> None:
    with io.DirectoryLock(tmp_path / ".lock"), pytest.raises(MegawrapError, match=str(os.getpid())):
        io.DirectoryLock(tmp_path / ".lock").acquire()
    with io.DirectoryLock(tmp_path / ".lock"):
        pass


def _write_lock(path: Path, **fields: object) -> None:
    me = {"host": os.uname().nodename, "pid": os.getppid(), "start": io._process_start(os.getppid()), "since": "then", "slurm_job": ""}
    path.write_text(json.dumps({**me, **fields}))


def test_a_live_process_named_in_the_file_is_refused_without_record_locks(tmp_path: Path) -> None:
    _write_lock(tmp_path / ".lock")
    with pytest.raises(MegawrapError, match=f"process {os.getppid()}"):
        io.DirectoryLock(tmp_path / ".lock").acquire()


def test_a_process_number_used_again_is_not_the_old_writer(tmp_path: Path) -> None:
    _write_lock(tmp_path / ".lock", start="another boot:1")
    with io.DirectoryLock(tmp_path / ".lock"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("pid", [2**22 + 1, 10**30])
def test_a_number_that_no_process_can_have_is_dead(pid: int, tmp_path: Path) -> None:
    _write_lock(tmp_path / ".lock", pid=pid, start="")
    with io.DirectoryLock(tmp_path / ".lock"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_another_host_is_refused_unless_it_ran_the_same_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    _write_lock(tmp_path / ".lock", host="elsewhere", slurm_job="41")
    with pytest.raises(MegawrapError, match=r"on host elsewhere since then.*remove"):
        io.DirectoryLock(tmp_path / ".lock").acquire()
    _write_lock(tmp_path / ".lock", host="elsewhere", slurm_job="42")
    with io.DirectoryLock(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', bytes(100)])
def test_a_lock_cut_short_by_a_kill_is_taken_over(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with io.DirectoryLock(tmp_path / ".lock"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(MegawrapError, match=f"process {os.getpid()} on host"):
            io.DirectoryLock(tmp_path / ".lock").acquire()
    assert not (tmp_path / ".lock").exists()


def test_no_heavy_import() -> None:
    code = "import sys, megawrap.io, megawrap.checkpoint.store; print([m for m in ('torch', 'numpy', 'megatron') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
