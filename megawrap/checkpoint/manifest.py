"""manifest.json: what makes a directory a checkpoint. Sizes and sha256 of every file, and what it was made with.

Comes in: a directory. Goes out: its manifest, or a `CheckpointError` naming the file that is missing, extra, truncated
or altered. The manifest carries its own sha256 and has one spelling only, so an altered one is noticed too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megawrap.errors import CheckpointError
from megawrap.io import atomic_write, read_json, readable_size, safe_join, sha256_file

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


def _spelling(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _own_sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(_spelling({key: value for key, value in body.items() if key != "manifest_sha256"})).hexdigest()


def describe(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{"size": bytes, "sha256": hex} of each named file of a directory, hashed by several threads."""
    names = list(names)
    with ThreadPoolExecutor(_num_threads()) as pool:
        sums = list(pool.map(lambda name: sha256_file(directory / name), names))
    return {name: {"size": (directory / name).stat().st_size, "sha256": digest} for name, digest in zip(names, sums, strict=True)}


def write_manifest(directory: Path, iteration: int | str, files: dict[str, dict[str, Any]], info: dict[str, Any]) -> None:
    """Write manifest.json.

    Args:
        directory: the finished directory.
        iteration: number of the checkpoint, or "release".
        files: as `describe` gives them, for every file.
        info: what else is to be known: world layout, config hash, data fingerprint; JSON types.
    """
    body = {"format_version": FORMAT_VERSION, "iteration": iteration, "files": files, "info": info}
    body["manifest_sha256"] = _own_sha256(body)
    atomic_write(directory / MANIFEST_FILE, _spelling(body))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory, after checking that it is whole itself.

    Raises:
        CheckpointError: missing, damaged, or written by a newer megawrap.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so {directory} is no complete checkpoint", corrupt=True)
    body = read_json(path, error=CheckpointError)
    version = body.get("format_version") if isinstance(body, dict) else None
    whole = isinstance(body, dict) and path.read_bytes() == _spelling(body) and body.get("manifest_sha256") == _own_sha256(body)
    if isinstance(version, int) and version > FORMAT_VERSION and whole:
        message = f"{path} has format version {version}; this megawrap reads up to {FORMAT_VERSION}"
        raise CheckpointError(message, hint="Load it with the megawrap that wrote it, or a newer one")
    if not whole or version != FORMAT_VERSION or not _has_entries(body):
        raise CheckpointError(f"{path} was altered or is not a megawrap manifest", corrupt=True)
    return body


def _has_entries(body: dict[str, Any]) -> bool:
    files, info = body.get("files"), body.get("info")
    entries = files.values() if isinstance(files, dict) else ()
    good = (isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str) for entry in entries)
    return bool(entries) and all(good) and isinstance(info, dict) and isinstance(body.get("iteration"), int | str)


def files_in(directory: Path) -> dict[str, int]:
    """Names (relative, with "/") and sizes of the files of a directory, without its manifest."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".nfs"):  # what NFS keeps of a file that was removed while open
                found[path.relative_to(directory).as_posix()] = path.lstat().st_size
    found.pop(MANIFEST_FILE, None)
    return found


def check_sizes(directory: Path, manifest: dict[str, Any]) -> None:
    """Compare the files of a directory with its manifest by name and size.

    Raises:
        CheckpointError: naming every missing, extra and truncated file.
    """
    expected, found, wrong = manifest["files"], files_in(directory), []
    for name in expected:
        safe_join(directory, name, error=CheckpointError)
    wrong += [f"{name} is missing" for name in sorted(set(expected) - set(found))]
    wrong += [f"{name} does not belong there" for name in sorted(set(found) - set(expected))]
    for name in sorted(set(found) & set(expected)):
        if found[name] != expected[name]["size"]:
            wrong.append(f"{name} has {found[name]} bytes instead of {expected[name]['size']}")
    if wrong:
        raise CheckpointError(f"{directory} is damaged: {'; '.join(wrong)}", corrupt=True)


def check_contents(directory: Path, manifest: dict[str, Any], names: Iterable[str] | None = None) -> int:
    """Compare the sha256 of files with the manifest.

    Args:
        directory: the checkpoint.
        manifest: as read.
        names: files to check here; default all.

    Returns:
        Bytes read.

    Raises:
        CheckpointError: naming every altered file.
    """
    names = list(manifest["files"]) if names is None else list(names)
    try:
        found = describe(directory, names)
    except OSError as problem:
        raise CheckpointError(f"cannot read {problem.filename}: {problem.strerror}", corrupt=True) from problem
    wrong = [name for name in names if found[name] != manifest["files"][name]]
    if wrong:
        sizes = ", ".join(f"{name} ({readable_size(found[name]['size'])})" for name in wrong)
        raise CheckpointError(f"{directory} is damaged: sha256 of {sizes} is not the one in {MANIFEST_FILE}", corrupt=True)
    return sum(entry["size"] for entry in found.values())


def share(manifest: dict[str, Any], rank: int, size: int) -> list[str]:
    """The files that one of `size` ranks checks: largest first, each to the rank with the fewest bytes so far."""
    loads = [(0, number) for number in range(size)]
    mine = []
    for name in sorted(manifest["files"], key=lambda name: (-manifest["files"][name]["size"], name)):
        load, number = min(loads)
        loads[number] = (load + manifest["files"][name]["size"], number)
        if number == rank:
            mine.append(name)
    return mine


def _num_threads() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0))))
