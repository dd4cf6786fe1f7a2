"""The checkpoints of a run on disk: committed whole, verified, kept and found again.

Comes in: a root directory and a function that writes the files of one checkpoint. Goes out: `iter_%07d/` directories that
are there whole or not at all, `latest_checkpointed_iteration.txt`, and the newest checkpoint that can be trusted.

A directory is a checkpoint when its manifest exists and every name and size matches; it gets its final name only then.
The directories are the truth and the tracker follows them: the newest directory counts even when the run was killed
before the tracker was written (the next writer corrects it). A tracker that names a directory which is not there was not
left by a kill: it is refused, or passed over with `on_corrupt="fallback"`. No torch is imported here.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megawrap.checkpoint.collective import Collective
from megawrap.checkpoint.manifest import (
    MANIFEST_FILE,
    check_contents,
    check_sizes,
    describe,
    files_in,
    read_manifest,
    share,
    write_manifest,
)
from megawrap.errors import CheckpointError
from megawrap.io import DirectoryLock, atomic_write, explain_write_errors, publish, sync

logger = logging.getLogger(__name__)

TRACKER_FILE = "latest_checkpointed_iteration.txt"
LOCK_FILE = ".lock"
RELEASE = "release"
_DIRECTORY = re.compile(r"^iter_(\d{7,})$")

Write = Callable[[Path], Iterable[str] | None]
"""Writes this rank's files into a directory; may return their names, so that each rank hashes its own."""


def directory_name(iteration: int | str) -> str:
    """iter_0000100 for 100; release for "release"."""
    return RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint directory.

    Attributes:
        path: the directory.
        iteration: its number, or "release".
        manifest: what manifest.json says; None for another project's checkpoint that was trusted.
    """

    path: Path
    iteration: int | str
    manifest: dict[str, Any] | None = field(repr=False)

    @property
    def info(self) -> dict[str, Any]:
        """What `Store.save` was given beside the files; empty without a manifest."""
        return dict(self.manifest["info"]) if self.manifest else {}

    def verify(self, collective: Collective | None = None) -> int:
        """Compare every file with its sha256, the ranks sharing the work.

        Returns:
            Bytes that were read, on all ranks together; 0 without a manifest.

        Raises:
            CheckpointError: naming the files that are missing, extra, truncated or altered.
        """
        if self.manifest is None:
            return 0
        collective = collective or Collective()
        manifest = self.manifest
        collective.gather(lambda: check_sizes(self.path, manifest))
        return sum(collective.gather(lambda: check_contents(self.path, manifest, share(manifest, collective.rank, collective.size))))


class Store:
    """Checkpoints under one root.

    Every method is collective when torch.distributed is started: all ranks call it, and all raise when one fails.

    Args:
        root: directory of the checkpoints; made by the first writer.
        keep: newest checkpoints kept after a save; 0 keeps all.
        verify: compare sha256 before a checkpoint is handed out.
        on_corrupt: "refuse" a damaged newest checkpoint, or "fallback" to the newest intact one with a warning.
    """

    def __init__(self, root: Path, *, keep: int = 0, verify: bool = True, on_corrupt: Literal["refuse", "fallback"] = "refuse") -> None:
        self.root = Path(root)
        self.keep = keep
        self.verify = verify
        self.on_corrupt = on_corrupt
        self._lock = DirectoryLock(self.root / LOCK_FILE, error=CheckpointError)
        self._locked = False

    @property
    def collective(self) -> Collective:
        """The ranks that share this store."""
        return Collective()

    # -- reading ---------------------------------------------------------------------------------------------------

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint; None when there is none yet.

        Raises:
            CheckpointError: the newest one is damaged (named), or the tracker is, and `on_corrupt` is "refuse"; or every
                checkpoint is damaged.
        """
        numbers = self.collective.first(lambda: _numbers(self.root))
        problem = self._tracker_problem(numbers)
        if self.collective.rank == 0 and (left := _leftovers(self.root)):
            logger.info("ignoring %s, which an interrupted run left", ", ".join(path.name for path in left))
        if problem is not None and self.on_corrupt == "refuse":
            raise problem
        if problem is not None:
            logger.warning("%s", problem.message)
        for number in reversed(numbers):
            try:
                return self._load(number)
            except CheckpointError as damage:
                if self.on_corrupt == "refuse":
                    hint = "Restore the file, or load the newest intact checkpoint with --checkpoint.on_corrupt fallback"
                    raise CheckpointError(damage.message, hint=damage.hint or hint, corrupt=damage.exit_code == 3) from damage
                logger.warning("falling back from iteration %d: %s", number, damage.message)
                problem = damage
        if problem is not None:
            raise CheckpointError(f"no intact checkpoint is left in {self.root}; the last problem: {problem.message}", corrupt=True)
        return None

    def _load(self, number: int) -> Checkpoint:
        path = self.root / directory_name(number)
        checkpoint = self.collective.first(lambda: _checkpoint(path, trust=False))
        if self.verify:
            checkpoint.verify(self.collective)
        return checkpoint

    def _tracker_problem(self, numbers: list[int]) -> CheckpointError | None:
        """What is wrong with the tracker that a kill cannot explain."""
        said = self.collective.first(lambda: _read_tracker(self.root))
        path = self.root / TRACKER_FILE
        hint = "Restore it, or take the newest intact checkpoint with --checkpoint.on_corrupt fallback"
        if said is None or said in numbers:
            return None
        if said == RELEASE:
            return (
                None
                if numbers
                else CheckpointError(f"{path} names a release, which holds no progress of a run", hint="Give it as init_from")
            )
        if isinstance(said, str):
            return CheckpointError(f"{path} says {said!r}; it must be an iteration or the word release", hint=hint, corrupt=True)
        there = f"only iterations {', '.join(map(str, numbers))} are there" if numbers else "no checkpoint is there"
        return CheckpointError(f"{path} names iteration {said}, but {there}", hint=hint, corrupt=True)

    @classmethod
    def open(cls, path: Path, *, trust: bool = False, verify: bool = True) -> Checkpoint:
        """A checkpoint to start from: a root (its tracker is followed), an `iter_*` directory, or `release`.

        Args:
            path: any of these.
            trust: accept a directory without a manifest (another project's), which cannot be verified.
            verify: compare sha256 where there is a manifest.

        Raises:
            CheckpointError: none of these, no manifest and no trust, or damaged.
        """
        collective = Collective()
        checkpoint = collective.first(lambda: _checkpoint(_resolve(Path(path)), trust=trust))
        if verify:
            checkpoint.verify(collective)
        return checkpoint

    # -- writing ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[Store]:
        """Be the one writer of the root: take the lock, remove what killed writers left, correct the tracker.

        Raises:
            CheckpointError: another process writes there (host and pid are named), or it cannot be written.
        """
        self.collective.first(self._begin)
        self._locked = True
        try:
            yield self
        finally:
            self._locked = False
            if self.collective.rank == 0:
                self._lock.release()

    def _begin(self) -> None:
        with explain_write_errors(self.root, error=CheckpointError):
            self.root.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            for left in _leftovers(self.root):
                logger.warning("removing %s, which an interrupted run left", left)
                _remove(left)
            numbers = [number for number in _numbers(self.root) if _is_whole(self.root / directory_name(number))]
            said = _read_tracker(self.root)
            if numbers and (said is None or (isinstance(said, int) and said < numbers[-1])):
                logger.warning("%s was at %s; iteration %d is complete and newer", TRACKER_FILE, said, numbers[-1])
                _write_tracker(self.root, numbers[-1])
        except BaseException:
            self._lock.release()
            raise

    def save(self, iteration: int | str, write: Write, info: dict[str, Any] | None = None) -> Checkpoint:
        """Commit a checkpoint: all of it, or nothing and an error on every rank.

        Args:
            iteration: its number, or "release".
            write: called on every rank with the same directory to write this rank's files into.
            info: put into the manifest: world layout, config hash, data fingerprint; JSON types.

        Returns:
            The checkpoint. When this iteration is there already and verifies it is kept and nothing is written; a damaged
            one is replaced only once the new one is complete. Newer ones, which the run has passed over, are set aside.

        Raises:
            CheckpointError: a rank could not write its files (path and sizes named), or another writer is active.
        """
        if not self._locked:
            with self.writing():
                return self.save(iteration, write, info)
        final = self.root / directory_name(iteration)
        if self.collective.first(final.exists) and self._verifies(final):
            logger.warning("%s is there already and verifies; it is kept", final)
            self.collective.first(lambda: self._finish(iteration))
            return self.collective.first(lambda: _checkpoint(final, trust=False))
        temporary = self.root / f"{final.name}.tmp"
        self.collective.first(lambda: _make_empty(temporary))
        try:
            files = self._write_files(temporary, write)
            self.collective.first(lambda: self._commit(temporary, final, iteration, files, info or {}))
        except BaseException:
            if self.collective.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        checkpoint = self.collective.first(lambda: _checkpoint(final, trust=False))
        if self.keep and iteration != RELEASE and self.collective.first(self._surplus):
            checkpoint.verify(self.collective)
            self.collective.first(self._prune)
        return checkpoint

    def _verifies(self, path: Path) -> bool:
        try:
            self.collective.first(lambda: _checkpoint(path, trust=False)).verify(self.collective)
        except CheckpointError as damage:
            logger.warning("%s is replaced: %s", path, damage.message)
            return False
        return True

    def _write_files(self, directory: Path, write: Write) -> dict[str, dict[str, Any]]:
        """Run `write` everywhere; sync and hash each file on the rank that wrote it (rank 0 for files nobody names)."""

        def here() -> list[str]:
            with explain_write_errors(directory, error=CheckpointError):
                directory.mkdir(exist_ok=True)
                return sorted(write(directory) or ())

        named = self.collective.gather(here)
        others = sorted(set(files_in(directory)) - {name for names in named for name in names}) if self.collective.rank == 0 else []

        def hash_own() -> dict[str, dict[str, Any]]:
            names = [*named[self.collective.rank], *others]
            for name in names:
                sync(directory / name)
            return describe(directory, names)

        return {name: entry for part in self.collective.gather(hash_own) for name, entry in part.items()}

    def _commit(self, temporary: Path, final: Path, iteration: int | str, files: dict[str, dict[str, Any]], info: dict[str, Any]) -> None:
        if not files:
            raise CheckpointError(f"nothing was written into {temporary}")
        with explain_write_errors(temporary, error=CheckpointError):
            write_manifest(temporary, iteration, files, info)
            check_sizes(temporary, read_manifest(temporary))
            for folder in {(temporary / name).parent for name in files}:
                sync(folder)
            if final.exists():  # damaged, or save() would have kept it
                self._step_back(final)
            publish(temporary, final)
        self._finish(iteration)

    def _step_back(self, final: Path) -> None:
        """Move a damaged directory out of the way; first the tracker, which may not name what is not there."""
        others = [number for number in _numbers(self.root) if directory_name(number) != final.name]
        whole = [number for number in others if _is_whole(self.root / directory_name(number))]
        if whole:
            _write_tracker(self.root, whole[-1])
        else:
            (self.root / TRACKER_FILE).unlink(missing_ok=True)
            sync(self.root)
        _set_aside(final)

    def _finish(self, iteration: int | str) -> None:
        """Let the tracker name what was saved. Newer directories are damaged ones that were passed over: set them aside."""
        _write_tracker(self.root, iteration)
        for number in _numbers(self.root):
            if isinstance(iteration, int) and number > iteration:
                _set_aside(self.root / directory_name(number))

    def _surplus(self) -> list[int]:
        """Iterations older than the `keep` newest whole ones, among directories that have a manifest."""
        numbers = _numbers(self.root)
        whole = [number for number in numbers if _is_whole(self.root / directory_name(number))]
        if len(whole) <= self.keep:
            return []
        return [n for n in numbers if n < whole[-self.keep] and (self.root / directory_name(n) / MANIFEST_FILE).is_file()]

    def _prune(self) -> None:
        for number in self._surplus():
            path = self.root / directory_name(number)
            leaving = path.with_name(f"{path.name}.old.tmp")  # a half-removed directory must not look like a checkpoint
            _remove(leaving)
            path.rename(leaving)
            _remove(leaving)

    def discard(self) -> None:
        """Remove every checkpoint and the tracker: the run starts again (`--allow-restart`). Needs `writing()`."""

        def remove() -> None:
            (self.root / TRACKER_FILE).unlink(missing_ok=True)
            for number in reversed(_numbers(self.root)):
                path = self.root / directory_name(number)
                leaving = path.with_name(f"{path.name}.old.tmp")
                path.rename(leaving)
                _remove(leaving)

        if not self._locked:
            raise RuntimeError("discard() needs writing()")
        self.collective.first(remove)


def _numbers(root: Path) -> list[int]:
    """Iterations that have a directory with a final name, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for path in root.iterdir() if (match := _DIRECTORY.match(path.name)) and path.is_dir())


def _checkpoint(path: Path, *, trust: bool) -> Checkpoint:
    """The checkpoint in a directory whose manifest, names and sizes are right; or, trusted, one without a manifest."""
    name = path.name
    match = _DIRECTORY.match(name)
    iteration: int | str = int(match[1]) if match else RELEASE
    if trust and not (path / MANIFEST_FILE).exists():
        if not (path / "metadata.json").is_file():
            raise CheckpointError(f"{path} is no Megatron torch_dist checkpoint: it has no metadata.json")
        return Checkpoint(path, iteration, None)
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    if match and manifest["iteration"] != iteration:
        raise CheckpointError(f"{path / MANIFEST_FILE} is of iteration {manifest['iteration']}, not {iteration}", corrupt=True)
    return Checkpoint(path, manifest["iteration"], manifest)


def _is_whole(path: Path) -> bool:
    try:
        _checkpoint(path, trust=False)
    except CheckpointError as problem:
        logger.debug("%s", problem)
        return False
    return True


def _read_tracker(root: Path) -> int | str | None:
    """The iteration the tracker names; "release"; None when there is no tracker; else its text, which is wrong."""
    try:
        text = (root / TRACKER_FILE).read_bytes().decode("ascii", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise CheckpointError(f"cannot read {root / TRACKER_FILE}: {problem.strerror}") from problem
    return int(text) if re.fullmatch(r"\d{1,18}", text) else text


def _write_tracker(root: Path, iteration: int | str) -> None:
    atomic_write(root / TRACKER_FILE, str(iteration).encode())


def _resolve(path: Path) -> Path:
    """The directory that a root, an iter_* directory or `release` stands for."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory", hint="Give a checkpoint root, an iter_* directory or a release directory")
    if (path / "metadata.json").is_file() or (path / MANIFEST_FILE).is_file() or _DIRECTORY.match(path.name):
        return path
    said, numbers = _read_tracker(path), _numbers(path)
    if said is None and numbers:
        return path / directory_name(numbers[-1])
    if said is None and (path / RELEASE).is_dir():
        return path / RELEASE
    if said is None:
        raise CheckpointError(f"{path} holds no checkpoint: no {TRACKER_FILE}, iter_* or release directory")
    if isinstance(said, str) and said != RELEASE:
        raise CheckpointError(f"{path / TRACKER_FILE} says {said!r}; it must be an iteration or the word release", corrupt=True)
    found = path / directory_name(said)
    if not found.is_dir():
        raise CheckpointError(f"{path / TRACKER_FILE} names {said}, but {found} is not there", corrupt=True)
    if numbers and isinstance(said, int) and numbers[-1] > said:
        logger.warning("%s names iteration %d; the newer %s is not used", path / TRACKER_FILE, said, directory_name(numbers[-1]))
    return found


def _leftovers(root: Path) -> list[Path]:
    """What killed writers left: directories that were not committed or half removed, a tracker that was not renamed."""
    return sorted(path for pattern in ("iter_*.tmp", f"{RELEASE}.tmp", f".{TRACKER_FILE}.*.tmp") for path in root.glob(pattern))


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    logger.warning("moving %s to %s: the run went on without it", path, aside.name)
    _remove(aside)
    path.rename(aside)


def _make_empty(path: Path) -> None:
    _remove(path)
    with explain_write_errors(path, error=CheckpointError):
        path.mkdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
