"""The bytes of an indexed dataset: PREFIX.bin (token ids), PREFIX.idx (index), PREFIX.manifest.json (proof of completeness).

In: a prefix. Out: `IndexedDataset`, which refuses anything damaged when it is opened, or `IndexedWriter`, which streams
blocks and makes the three files visible at once. The layout is megatron-core's: every reader of it reads our files.
One document is one sample, one sequence one of its fields, and the mode of a sequence is 1 where it is trained on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from megawrap.errors import DataError
from megawrap.io import DirectoryLock, explain_write_errors, sha256_file, sync

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, length of document_indices
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
MANIFEST_FORMAT = "megawrap-indexed-dataset"
MANIFEST_VERSION = 1
_CHUNK = 1 << 22  # elements per vectorised step: bounds the memory of checks and of writing the index


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest dtype megatron-core uses for token ids below `vocab_size`: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: Path) -> Path:
    """PREFIX.bin; the prefix may itself contain dots."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """PREFIX.idx."""
    return prefix.with_name(prefix.name + ".idx")


def manifest_path(prefix: Path) -> Path:
    """PREFIX.manifest.json."""
    return prefix.with_name(prefix.name + ".manifest.json")


def marker_path(prefix: Path) -> Path:
    """PREFIX.manifest.json.tmp: there from the first byte of a write until the rename that completes it."""
    return prefix.with_name(prefix.name + ".manifest.json.tmp")


def _damaged(path: Path, field: str, sentence: str, hint: str = "") -> NoReturn:
    raise DataError(f"{path}: {field}: {sentence}", hint=hint or "Preprocess again, or copy the files again", corrupt=True)


class IndexedDataset:
    """A PREFIX.bin/.idx pair, checked whole at open except for the hashes and the token values (`verify` does those).

    Args:
        prefix: path without `.bin`/`.idx`.
        mmap: map the files; False reads the index into memory and tokens by file reads (for file systems where mapping is slow).

    Attributes:
        lengths: int32 [N], tokens of each sequence.
        pointers: int64 [N], byte offset of each sequence in .bin.
        document_indices: int64 [D + 1], first sequence of each document, then N.
        modes: int8 [N] of 0 and 1, or None when the file has none.
        dtype: dtype of the token ids.
        manifest: content of PREFIX.manifest.json, or None for files of other tools.

    A prefix of twin files gives their view as one dataset, `megawrap.data.twins.TwinDataset`.

    Raises:
        DataError: a file is missing, damaged, left by an interrupted write, or does not agree with its manifest.
    """

    def __new__(cls, prefix: Path | str, *, mmap: bool = True) -> IndexedDataset:
        """As `pathlib.Path` does: what is there decides which kind of dataset it is."""
        if cls is IndexedDataset and not any(path(Path(prefix)).exists() for path in (bin_path, idx_path, marker_path)):
            from megawrap.data.twins import TwinDataset, twin_names

            if twin_names(prefix):
                return object.__new__(TwinDataset)
        return object.__new__(cls)

    def __init__(self, prefix: Path | str, *, mmap: bool = True) -> None:
        self.prefix = Path(prefix)
        self.mmap = mmap
        self.bin_path, self.idx_path = bin_path(self.prefix), idx_path(self.prefix)
        self._require_files()
        self.manifest: dict[str, Any] | None = _read_manifest(self.prefix)
        self._read_index()
        self._check_lengths()
        self._check_document_indices()
        self._check_modes()
        if self.manifest is not None:
            self._check_manifest(self.manifest)

    def _require_files(self) -> None:
        present = [path.is_file() for path in (self.bin_path, self.idx_path)]
        marker = marker_path(self.prefix)
        if not manifest_path(self.prefix).exists() and marker.exists():
            _damaged(
                self.prefix,
                "manifest",
                f"writing was interrupted ({marker.name} is there and {manifest_path(self.prefix).name} is not)",
                "Run the same preprocess command again; it replaces what is left over",
            )
        if not any(present):
            raise DataError(
                f"{self.prefix}: no indexed dataset here: neither {self.bin_path.name} nor {self.idx_path.name} exists",
                hint="Give the prefix without .bin or .idx" if self.prefix.suffix in (".bin", ".idx") else "Check the prefix",
            )
        if not all(present):
            there, missing = (self.bin_path, self.idx_path) if present[0] else (self.idx_path, self.bin_path)
            _damaged(missing, "file", f"missing, though {there.name} is there")
        for path in (self.bin_path, self.idx_path):
            if not os.access(path, os.R_OK):
                raise DataError(f"{path}: cannot be read: permission denied", hint="Ask its owner for read permission")

    def _read_index(self) -> None:
        path, size = self.idx_path, self.idx_path.stat().st_size
        if size < HEADER.size:
            _damaged(path, "header", f"the file has {size} bytes, the header alone has {HEADER.size}")
        index = np.memmap(path, mode="r", dtype=np.uint8) if self.mmap else np.fromfile(path, dtype=np.uint8)
        magic, version, code, num_sequences, num_indices = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC:
            _damaged(path, "magic", f"{magic!r} instead of {MAGIC!r}: not an index of an indexed dataset")
        if version != VERSION:
            _damaged(path, "version", f"{version}, only version {VERSION} is known")
        if code not in DTYPES or np.dtype(DTYPES[code]).kind == "f":
            integers = ", ".join(f"{known} ({np.dtype(dtype)})" for known, dtype in DTYPES.items() if np.dtype(dtype).kind != "f")
            _damaged(path, "dtype code", f"{code}, token ids are one of {integers}")
        self.dtype: np.dtype[Any] = np.dtype(DTYPES[code]).newbyteorder("<")
        if not 0 < num_sequences <= (size - HEADER.size) // 12:  # before anything is allocated or multiplied
            _damaged(path, "sequence count", f"{num_sequences} sequences, a file of {size} bytes holds 1 to {(size - HEADER.size) // 12}")
        left = size - HEADER.size - 12 * num_sequences
        if not 1 < num_indices <= left // 8:
            _damaged(path, "document count", f"{num_indices} document indices, {left} bytes are left for 2 to {left // 8}")
        extra = left - 8 * num_indices
        if extra not in (0, num_sequences):
            _damaged(path, "size", f"{extra} bytes after the document indices; expected 0, or {num_sequences} bytes of sequence modes")

        def column(dtype: str, count: int, offset: int) -> np.ndarray:
            return np.frombuffer(index, dtype=dtype, count=count, offset=offset)

        self.num_sequences, self.num_documents = num_sequences, num_indices - 1
        self.lengths = column("<i4", num_sequences, HEADER.size)
        self.pointers = column("<i8", num_sequences, HEADER.size + 4 * num_sequences)
        self.document_indices = column("<i8", num_indices, HEADER.size + 12 * num_sequences)
        self.modes = column("i1", num_sequences, size - num_sequences) if extra else None

    def _check_lengths(self) -> None:
        """Lengths, pointers and the size of .bin must tell the same story."""
        itemsize, size, total = self.dtype.itemsize, self.bin_path.stat().st_size, 0
        pointer_error: tuple[int, int, int] | None = None
        for first in range(0, self.num_sequences, _CHUNK):
            lengths = self.lengths[first : first + _CHUNK].astype(np.int64)
            if lengths.min() < 0:
                at = int(np.argmin(lengths))
                _damaged(self.idx_path, "lengths", f"sequence {first + at} has {lengths[at]} tokens")
            expected = (np.cumsum(lengths) - lengths + total) * itemsize
            wrong = np.flatnonzero(self.pointers[first : first + _CHUNK] != expected)
            if len(wrong) and pointer_error is None:
                at = int(wrong[0])
                pointer_error = (first + at, int(self.pointers[first + at]), int(expected[at]))
            total += int(lengths.sum())
        if pointer_error:
            _damaged(self.idx_path, "pointers", "sequence {} starts at byte {}, by the lengths before it at byte {}".format(*pointer_error))
        if total == 0:
            _damaged(self.idx_path, "lengths", f"all {self.num_sequences} sequences are empty")
        if size != total * itemsize:
            story = f"{self.idx_path.name} tells of {total} {self.dtype} tokens, {total * itemsize} bytes"
            _damaged(self.bin_path, "size", f"{size} bytes, {story}")
        self.num_tokens = total

    def _check_document_indices(self) -> None:
        indices, path, name = self.document_indices, self.idx_path, "document_indices"
        if indices[0] != 0:
            _damaged(path, name, f"the first is {indices[0]}, it must be 0")
        if indices[-1] != self.num_sequences:
            _damaged(path, name, f"the last is {indices[-1]}, it must be the number of sequences, {self.num_sequences}")
        # Plain files of megatron-core may hold empty documents; in one with modes a document is a sample and has a sequence.
        least = 0 if self.modes is None else 1
        for first in range(0, self.num_documents, _CHUNK):
            steps = np.diff(indices[first : first + _CHUNK + 1])
            if steps.min() < least:
                at = first + int(np.argmin(steps))
                _damaged(path, name, f"document {at} runs from sequence {indices[at]} to {indices[at + 1]}")

    def _check_modes(self) -> None:
        if self.modes is None:
            return
        if self.modes.min() < 0 or self.modes.max() > 1:
            at = int(np.flatnonzero((self.modes < 0) | (self.modes > 1))[0])
            _damaged(self.idx_path, "modes", f"sequence {at} has mode {self.modes[at]}, allowed are 0 (context) and 1 (trained)")
        if not self.modes.any():
            _damaged(self.idx_path, "modes", f"all {self.num_sequences} sequences have mode 0: nothing would be trained")

    def _check_manifest(self, manifest: dict[str, Any]) -> None:
        path, counts, files = manifest_path(self.prefix), manifest["counts"], manifest["files"]
        found = {"documents": self.num_documents, "sequences": self.num_sequences, "tokens": self.num_tokens}
        for name, number in found.items():
            if counts.get(name) != number:
                _damaged(path, f"counts.{name}", f"{counts.get(name)} in the manifest, {number} in {self.idx_path.name}")
        for name, file in (("bin", self.bin_path), ("idx", self.idx_path)):
            if files[name]["bytes"] != file.stat().st_size:
                _damaged(path, f"files.{name}.bytes", f"{files[name]['bytes']} in the manifest, {file.name} has {file.stat().st_size}")
        if manifest.get("dtype") != str(np.dtype(self.dtype.type)):
            _damaged(path, "dtype", f"{manifest.get('dtype')} in the manifest, {np.dtype(self.dtype.type)} in {self.idx_path.name}")
        if bool(manifest.get("modes")) != (self.modes is not None):
            _damaged(path, "modes", f"{manifest.get('modes')} in the manifest, {self.modes is not None} in {self.idx_path.name}")

    @cached_property
    def tokens(self) -> np.ndarray:
        """All token ids, [num_tokens], back to back: a read-only map of .bin, or with mmap=False an array in memory."""
        if self.mmap:
            return np.memmap(self.bin_path, mode="r", dtype=self.dtype)
        return self.read(0, self.num_tokens)

    def read(self, first: int, count: int) -> np.ndarray:
        """Token ids first..first+count-1 of the whole file by a file read; memory is theirs alone."""
        with self.bin_path.open("rb") as stream:
            stream.seek(first * self.dtype.itemsize)
            tokens = np.fromfile(stream, dtype=self.dtype, count=count)
        if len(tokens) != count:  # megatron-core returns uninitialised memory here
            _damaged(self.bin_path, "size", f"{count} tokens at {first} were there at open, {len(tokens)} are now")
        return tokens

    def sequence(self, index: int) -> np.ndarray:
        """Token ids of one sequence, [lengths[index]]; a view of the map, valid as long as it is kept."""
        first, count = int(self.pointers[index]) // self.dtype.itemsize, int(self.lengths[index])
        return self.tokens[first : first + count] if self.mmap else self.read(first, count)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the sha256 of both files, hex: from the manifest, else the files are read once (whole)."""
        if self.manifest is not None:
            digests = [self.manifest["files"][name]["sha256"] for name in ("bin", "idx")]
        else:
            digests = [sha256_file(path) for path in (self.bin_path, self.idx_path)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @cached_property
    def max_token_id(self) -> int:
        """Largest token id; reads all of .bin when there is no manifest."""
        if self.manifest is not None:
            return int(self.manifest["counts"]["max_token_id"])
        return max(int(block.max()) for block in self._token_blocks())

    def _token_blocks(self) -> Iterator[np.ndarray]:
        """All token ids by file reads: what is checked never stays in memory, and a file cut meanwhile is an error, not a crash."""
        for first in range(0, self.num_tokens, _CHUNK):
            yield self.read(first, min(_CHUNK, self.num_tokens - first))

    def verify(self, vocab_size: int | None = None) -> dict[str, Any]:
        """Read every byte once, in blocks: token ids against the vocabulary, sha256 and counts against the manifest.

        Args:
            vocab_size: ids must be below this; default the manifest's.

        Returns:
            What was found: `max_token_id`, `vocab_size` (None when unknown), `trained_tokens` (None without modes), and
            `sha256` of the files that were compared with a manifest (empty without one).

        Raises:
            DataError: a byte changed, a token id is negative or not in the vocabulary, or a count of the manifest is wrong.
        """
        manifest = self.manifest or {}
        vocab_size = vocab_size or (manifest.get("tokenizer") or {}).get("vocab_size")
        digests, highest = {}, -1
        content = hashlib.sha256()
        for number, block in enumerate(self._token_blocks()):
            if manifest:
                content.update(block.data)
            low, high = int(block.min()), int(block.max())
            highest = max(highest, high)
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                at = number * _CHUNK + int(np.argmin(block) if low < 0 else np.argmax(block))
                where = int(np.searchsorted(self.pointers, at * self.dtype.itemsize, side="right")) - 1
                limit = "negative" if low < 0 else f"the vocabulary ends at {vocab_size}"
                _damaged(self.bin_path, "token ids", f"{low if low < 0 else high} in sequence {where}: {limit}")
        if manifest:
            digests = {"bin": content.hexdigest(), "idx": sha256_file(self.idx_path)}
            for name, path in (("bin", self.bin_path), ("idx", self.idx_path)):
                wanted = manifest["files"][name]["sha256"]
                if wanted != digests[name]:
                    _damaged(path, "sha256", f"{digests[name]}, the manifest says {wanted}: the content changed after it was written")
        found = {"max_token_id": highest, "trained_tokens": self._num_trained()}
        self._check_counts(manifest.get("counts", {}), found)
        return {**found, "vocab_size": vocab_size, "sha256": digests}

    def _num_trained(self) -> int | None:
        """Tokens of sequences with mode 1; None without modes."""
        if self.modes is None:
            return None
        spans = (slice(first, first + _CHUNK) for first in range(0, self.num_sequences, _CHUNK))
        return sum(int(self.lengths[span].sum(where=self.modes[span] == 1, dtype=np.int64)) for span in spans)

    def _check_counts(self, counts: dict[str, Any], found: dict[str, int | None]) -> None:
        """What only a whole reading can tell; twin files record the counts of both, and have no modes."""
        wanted = {"max_token_id": found["max_token_id"]}
        if found["trained_tokens"] is not None:
            wanted |= {"target_tokens": found["trained_tokens"], "context_tokens": self.num_tokens - found["trained_tokens"]}
        for name, number in wanted.items():
            if name in counts and counts[name] != number:
                _damaged(manifest_path(self.prefix), f"counts.{name}", f"{counts[name]} in the manifest, {number} in the files")


def _read_manifest(prefix: Path) -> dict[str, Any] | None:
    path = manifest_path(prefix)
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        files = manifest["files"]
        complete = (
            all(isinstance(files[name]["bytes"], int) and isinstance(files[name]["sha256"], str) for name in ("bin", "idx"))
            and isinstance(manifest["counts"]["max_token_id"], int)
            and _is_tokenizer(manifest.get("tokenizer") or {})
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _damaged(path, "content", f"not a manifest of megawrap ({type(error).__name__}: {error})")
    if not complete or manifest.get("format") != MANIFEST_FORMAT:
        _damaged(path, "format", f"{manifest.get('format')!r}, expected {MANIFEST_FORMAT!r}")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > MANIFEST_VERSION:
        found = f"version {manifest.get('version')} of the manifest, this megawrap knows up to {MANIFEST_VERSION}"
        raise DataError(f"{path}: {found}", hint="Upgrade megawrap")
    return manifest


def _is_tokenizer(facts: Any) -> bool:
    """Whether what is compared with a model is of the right kind; it may be missing."""
    kinds = {"sha256": str, "vocab_size": int}
    return isinstance(facts, dict) and all(facts.get(name) is None or type(facts[name]) is kind for name, kind in kinds.items())


class IndexedWriter:
    """Stream documents into PREFIX.bin/.idx in memory that does not grow with their number.

    Until `commit` only temporary names exist. PREFIX.manifest.json.tmp is created first and becomes the manifest by the
    last rename: while it is there without a manifest, readers refuse the prefix, so a half-written pair never looks
    complete, and the next writer replaces what is left.

    Args:
        prefix: path without `.bin`/`.idx`; its directory is made when missing.
        dtype: of the token ids on disk, see `token_dtype`.

    Raises:
        DataError: a dataset is already there, another process is writing it, or the disk refuses.
    """

    def __init__(self, prefix: Path | str, dtype: Any) -> None:
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"dtype {dtype}, allowed are {[str(d) for d in CODES]}")
        self.num_tokens = self.num_sequences = self.num_documents = 0
        self._max_token, self._has_modes, self._digest = -1, False, hashlib.sha256()
        self._finals = (bin_path(self.prefix), idx_path(self.prefix), manifest_path(self.prefix))
        self._temporary = tuple(path.with_name(path.name + ".tmp") for path in self._finals)
        self._open: list[IO[bytes]] = []
        self._made_directory = False
        self._lock = DirectoryLock(self.prefix.with_name(f".{self.prefix.name}.lock"), error=DataError)
        with self._disk_errors():
            self._made_directory = not self.prefix.parent.exists()
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._claim()
            self._bin = self._keep(self._temporary[0].open("wb"))
            self._idx = self._keep(self._temporary[1].open("wb"))
            self._idx.seek(HEADER.size)  # lengths go where they belong; the header comes last, when the counts are known
            self._documents, self._modes = (self._keep(tempfile.TemporaryFile(dir=self.prefix.parent)) for _ in range(2))  # noqa: SIM115

    def _keep(self, stream: IO[bytes]) -> IO[bytes]:
        self._open.append(stream)
        return stream

    def _claim(self) -> None:
        """Lock the prefix, create the marker, drop what an interrupted write left."""
        marker, manifest = self._temporary[2], self._finals[2]
        self._lock.acquire()
        existing = [path.name for path in self._finals if path.exists()]
        if manifest.exists() or (existing and not marker.exists()):
            self._lock.release()
            raise DataError(
                f"{self.prefix}: {', '.join(existing)} already there, nothing was written",
                hint="Choose another output prefix, or remove the files",
            )
        self._marker = self._keep(marker.open("wb"))
        for path in (*self._temporary[:2], *self._finals[:2]):  # they would be replaced in any case; this frees their space first
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Remove what was written, and say path and sizes, when the disk refuses."""
        try:
            with explain_write_errors(self._finals[0], self.num_tokens * self.dtype.itemsize, error=DataError):
                yield
        except OSError as error:
            self.abort()
            raise DataError(f"cannot write {self._finals[0]}: {error.strerror or error}", hint="Choose another output prefix") from error
        except BaseException:
            self.abort()
            raise

    def add(self, tokens_flat: np.ndarray, lengths: np.ndarray, sequences_per_document: np.ndarray, modes: np.ndarray | None) -> None:
        """Append whole documents.

        Args:
            tokens_flat: integer [sum(lengths)], sequences back to back.
            lengths: integer [n], tokens of each sequence; 0 is allowed.
            sequences_per_document: integer [d], summing to n.
            modes: integer [n] of 0 and 1, in every call or in none.

        Raises:
            DataError: the disk refuses; the write is aborted.
            ValueError: the arrays do not agree, or an id does not fit the dtype.
        """
        if len(sequences_per_document) == 0:
            return
        if self.num_sequences == 0:
            self._has_modes = modes is not None
        if (modes is not None) != self._has_modes or (modes is not None and len(modes) != len(lengths)):
            raise ValueError("modes: one per sequence in every call, or None in every call")
        if (
            int(np.sum(lengths)) != len(tokens_flat)
            or np.min(lengths, initial=0) < 0
            or int(np.sum(sequences_per_document)) != len(lengths)
        ):
            raise ValueError("tokens, lengths and sequences_per_document do not agree")
        if len(tokens_flat):
            limits = np.iinfo(self.dtype)
            low, high = int(tokens_flat.min()), int(tokens_flat.max())
            if low < 0 or high > limits.max:
                raise ValueError(f"token id {low if low < 0 else high} does not fit {self.dtype} (0..{limits.max})")
            self._max_token = max(self._max_token, high)
        block = np.ascontiguousarray(tokens_flat, dtype=self.dtype.newbyteorder("<")).data.cast("B") if len(tokens_flat) else b""
        with self._disk_errors():
            self._bin.write(block)
            self._idx.write(np.asarray(lengths, dtype="<i4").tobytes())
            self._documents.write(np.asarray(sequences_per_document, dtype="<i4").tobytes())
            if modes is not None:
                self._modes.write(np.asarray(modes, dtype="i1").tobytes())
        self._digest.update(block)
        self.num_tokens += len(tokens_flat)
        self.num_sequences += len(lengths)
        self.num_documents += len(sequences_per_document)

    def prepare(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write and sync everything under its temporary name; `publish` then only renames.

        Args:
            manifest: what to record besides format, dtype, files and counts; its `counts` are kept beside ours.

        Returns:
            The complete manifest.
        """
        if self.num_tokens == 0:
            raise DataError(f"{self.prefix}: there is no token to write, nothing was written")
        with self._disk_errors():
            self._finish_index()
            for stream in (self._bin, self._idx):
                stream.flush()
                os.fsync(stream.fileno())
            counts = {"documents": self.num_documents, "sequences": self.num_sequences, "tokens": self.num_tokens}
            whole = {
                "format": MANIFEST_FORMAT,
                "version": MANIFEST_VERSION,
                "dtype": str(self.dtype),
                "modes": self._has_modes,
                "files": {
                    "bin": {"bytes": self.num_tokens * self.dtype.itemsize, "sha256": self._digest.hexdigest()},
                    "idx": {"bytes": self._temporary[1].stat().st_size, "sha256": sha256_file(self._temporary[1])},
                },
                **manifest,
                "counts": {**manifest.get("counts", {}), **counts, "max_token_id": self._max_token},
            }
            self._marker.write(json.dumps(whole, indent=1).encode() + b"\n")
            self._marker.flush()
            os.fsync(self._marker.fileno())
        return whole

    def _finish_index(self) -> None:
        """Pointers, document indices and modes after the lengths, then the header, a chunk at a time."""
        self._idx.flush()
        total = 0
        with self._temporary[1].open("rb") as written:
            written.seek(HEADER.size)
            for first in range(0, self.num_sequences, _CHUNK):
                lengths = np.fromfile(written, "<i4", min(_CHUNK, self.num_sequences - first)).astype(np.int64)
                self._idx.write(((np.cumsum(lengths) - lengths + total) * self.dtype.itemsize).astype("<i8").tobytes())
                total += int(lengths.sum())
        self._idx.write(np.zeros(1, "<i8").tobytes())
        self._documents.seek(0)
        total = 0
        while block := self._documents.read(4 * _CHUNK):
            ends = np.cumsum(np.frombuffer(block, "<i4"), dtype=np.int64) + total
            self._idx.write(ends.astype("<i8").tobytes())
            total = int(ends[-1])
        self._modes.seek(0)
        while block := self._modes.read(_CHUNK):
            self._idx.write(block)
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.num_sequences, self.num_documents + 1))

    def publish(self) -> None:
        """Rename .bin, .idx and, last, the manifest: only that rename makes the dataset complete."""
        with self._disk_errors():
            for temporary, final in zip(self._temporary, self._finals, strict=True):
                os.replace(temporary, final)
                sync(self.prefix.parent)
        self._close()

    def commit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """`prepare` and `publish`; returns the complete manifest."""
        whole = self.prepare(manifest)
        self.publish()
        return whole

    def abort(self) -> None:
        """Remove everything this writer wrote and did not publish; nothing after `publish`, and harmless twice."""
        if self._open and self._temporary[2].exists():
            for path in (*self._finals[:2], *self._temporary):
                with contextlib.suppress(OSError):  # what cannot be removed must not hide why the write failed, or keep the rest
                    path.unlink(missing_ok=True)
        self._close()
        if self._made_directory:
            with contextlib.suppress(OSError):  # not empty: something else, or our own output, lives there
                self.prefix.parent.rmdir()

    def _close(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):  # a full disk fails the flush of what abort has already removed
                self._open.pop().close()
        self._lock.release()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
