"""Writing that survives a kill and reading that does not trust: atomic files and directories, sha256, safe joins, locks.

Comes in: bytes or a function that writes them, finished directories, names from untrusted files. Goes out: files and
directories that are there whole or not at all, and a `MegawrapError` with path and sizes where that is impossible.
Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar

from megawrap.errors import MegawrapError

logger = logging.getLogger(__name__)

_HASH_BUFFER_BYTES = 4 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def readable_size(num_bytes: int) -> str:
    """`num_bytes` for a reader: 734003200 -> "700.0 MiB"."""
    size = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{int(size)} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def sync(path: Path) -> None:
    """Force a file's bytes, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_write_errors(path: Path, num_bytes: int | None = None, *, error: type[MegawrapError] = MegawrapError) -> Iterator[None]:
    """Turn a full disk, an exceeded quota or a missing permission while writing `path` into one sentence.

    Args:
        path: file or directory that is being written.
        num_bytes: how much was to be written, when known.
        error: class to raise.

    Raises:
        MegawrapError: naming the path, what it needs and what is free.
    """
    try:
        yield
    except OSError as problem:
        needs = "" if num_bytes is None else f" ({readable_size(num_bytes)})"
        if problem.errno in _NO_SPACE:
            free = readable_size(_free_bytes(path))
            reason = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file-size limit (ulimit -f) is reached"}
            why = reason.get(problem.errno or 0, "the disk is full")
            hint = "Free space or choose another directory; nothing partial was left behind"
            raise error(f"cannot write {path}{needs}: {why}; {free} free there", hint=hint) from problem
        if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise error(f"cannot write {path}{needs}: {problem.strerror}", hint="Choose a directory you may write to") from problem
        if problem.errno == errno.ENAMETOOLONG:
            raise error(f"cannot write {path}: the name is too long for this filesystem", hint="Choose a shorter name") from problem
        raise


def atomic_write(path: Path, data: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file so that readers see the old content or the new, never a part, also after a power cut.

    Args:
        path: destination; its directory must exist.
        data: the content, or a function that writes it to an open binary file.

    Raises:
        MegawrapError: the disk is full or the directory cannot be written; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with explain_write_errors(path, None if callable(data) else len(data)):
            with open(temporary, "wb") as file:
                if callable(data):
                    data(file)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish(tmp_dir: Path, final_dir: Path) -> None:
    """Make a finished directory visible under its final name: fsync everything inside, rename, fsync the parent.

    Args:
        tmp_dir: complete directory on the same filesystem as `final_dir`.
        final_dir: name that must not exist yet.

    Raises:
        MegawrapError: `final_dir` exists, or cannot be written.
    """
    with explain_write_errors(final_dir):
        for folder, _, names in os.walk(tmp_dir, topdown=False):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        if os.path.lexists(final_dir):  # rename would replace an empty directory without a word
            raise MegawrapError(f"{final_dir} exists already", hint="Remove it or choose another name; nothing was overwritten")
        os.rename(tmp_dir, final_dir)
        sync(Path(final_dir).parent)


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file; releases the interpreter lock, so threads hash in parallel."""
    digest = hashlib.sha256()
    buffer = bytearray(_HASH_BUFFER_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def safe_join(root: Path, name: str, *, error: type[MegawrapError] = MegawrapError) -> Path:
    """`root / name` for a name that comes from an untrusted file.

    Args:
        root: directory the result must stay in.
        name: relative path; "a/b" is allowed, "", ".", "/x", "../x", "a/../b" and links that lead outside are not.
        error: class to raise.

    Raises:
        MegawrapError: the name is absolute, has an empty, "." or ".." part or a NUL, or leads outside through a link.
    """
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise error(
            f"file name {name!r} is not a plain relative path inside {root}",
            hint="The file that names it is not to be trusted",
            corrupt=True,
        )
    path = Path(root, *parts)
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise error(
            f"file name {name!r} leads outside {root} (to {path.resolve()})", hint="Replace the link by the file it points to", corrupt=True
        )
    return path


def _free_bytes(path: Path) -> int:
    """Bytes an ordinary user may still write at `path`, which need not exist yet."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def require_free_space(path: Path, num_bytes: int, *, error: type[MegawrapError] = MegawrapError) -> None:
    """Refuse work that cannot fit before it starts.

    Args:
        path: where the bytes will go; need not exist yet.
        num_bytes: how many.
        error: class to raise.

    Raises:
        MegawrapError: less than `num_bytes` are free, with both numbers.
    """
    free = _free_bytes(path)
    if free < num_bytes:
        message = f"{path} needs {readable_size(num_bytes)} but only {readable_size(free)} are free there"
        raise error(message, hint="Free space or choose another directory; nothing was written")


def read_json(path: Path, *, error: type[MegawrapError] = MegawrapError) -> Any:
    """The value in a JSON file.

    Raises:
        MegawrapError: missing, unreadable, not UTF-8 or not JSON (file:line:column, corrupt).
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
        return json.loads(text)
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 at byte {problem.start}", corrupt=True) from problem
    except json.JSONDecodeError as problem:
        raise error(f"{path}:{problem.lineno}:{problem.colno} is not JSON: {problem.msg}", corrupt=True) from problem
    except RecursionError as problem:
        raise error(f"{path} is nested too deeply to be read", corrupt=True) from problem


def _process_start(pid: int) -> str:
    """What tells a process from a later one with the same number: boot and start tick; empty when unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _is_alive(pid: int, start: str) -> bool:
    """Whether the process that had this number, and began at `start` where that is known, is still there; whoever owns it."""
    import psutil

    return psutil.pid_exists(pid) and not (start and start != _process_start(pid))


class DirectoryLock:
    """One writer per directory: `with DirectoryLock(root / ".lock"): ...`.

    The file names host, process and start of its holder. A live holder is refused by name. The kernel's record lock
    (not inherited by forks, gone when the process dies) and the process number both have to say that a holder on this
    host is dead; its lock is then taken over with a notice. A holder on another host cannot be asked: it is refused,
    except when both are runs of one SLURM job, which never runs twice at once.
    """

    _held: ClassVar[set[str]] = set()  # record locks do not exclude within one process

    def __init__(self, path: Path, *, error: type[MegawrapError] = MegawrapError) -> None:
        self.path = Path(path)
        self.error = error
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            MegawrapError: someone else holds it, naming host and process; or the directory cannot be written.
        """
        key = os.path.realpath(self.path)
        if key in DirectoryLock._held:
            raise self._refusal({"host": socket.gethostname(), "pid": os.getpid()})
        with explain_write_errors(self.path, error=self.error):
            descriptor = self._open()
        ours = False
        try:
            self._displace(_lock_content(descriptor))
            ours = True
            with explain_write_errors(self.path, error=self.error):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_own_identity()).encode(), 0)
                os.fsync(descriptor)
        except BaseException:
            if ours:
                self.path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        DirectoryLock._held.add(key)

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
            DirectoryLock._held.discard(os.path.realpath(self.path))

    def _open(self) -> int:
        """A descriptor of the file that stands under the name now, record-locked where the filesystem can."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as problem:
                holder = _lock_content(descriptor)
                if problem.errno in (errno.EACCES, errno.EAGAIN):
                    os.close(descriptor)
                    raise self._refusal(holder or {}) from problem
                logger.debug("%s: no record locks on this filesystem (%s)", self.path, problem.strerror)
            try:
                if os.stat(self.path).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            except FileNotFoundError:
                logger.debug("%s was released while it was being opened", self.path)
            os.close(descriptor)

    def _displace(self, holder: dict[str, Any] | None) -> None:
        """Nothing when the holder is gone, else a refusal."""
        if holder is None:
            return
        me = _own_identity()
        if holder.get("host") == me["host"]:
            if _is_alive(int(holder.get("pid", 0)), str(holder.get("start", ""))):
                raise self._refusal(holder)
        elif not (me["slurm_job"] and holder.get("slurm_job") == me["slurm_job"]):
            raise self._refusal(holder)
        logger.warning(
            "taking over %s from process %s on %s (since %s), which is gone",
            self.path,
            holder.get("pid"),
            holder.get("host"),
            holder.get("since"),
        )

    def _refusal(self, holder: dict[str, Any]) -> MegawrapError:
        who = f"process {holder.get('pid', 'unknown')} on host {holder.get('host', 'unknown')}"
        since = f" since {holder['since']}" if "since" in holder else ""
        hint = f"Wait for it or stop it; if it is gone for certain, remove {self.path}"
        return self.error(f"{self.path.parent} is being written by {who}{since}; only one writer is allowed", hint=hint)

    def __enter__(self) -> DirectoryLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def _own_identity() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "start": _process_start(pid),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
    }


def _lock_content(descriptor: int) -> dict[str, Any] | None:
    """The holder written in a lock file; None when a holder was killed before it had written itself down."""
    try:
        content = json.loads(os.pread(descriptor, 1 << 16, 0))
        pid = str(content.get("pid", "")) if isinstance(content, dict) else ""
        return content if pid.isdigit() and int(pid) < 1 << 31 else None  # no system numbers processes beyond
    except ValueError:
        return None
