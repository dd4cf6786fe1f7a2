"""The directory a conversion writes: a hidden temporary one beside it, renamed when it is complete.

In: the wanted path. Out: a directory to write into, which becomes the path when the block ends well and disappears when
it does not. What a killed conversion left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megawrap.errors import ConversionError
from megawrap.io import DirectoryLock, explain_write_errors, publish, require_free_space


def require_absent(path: Path) -> None:
    """Refuse a path where something is.

    Raises:
        ConversionError: it exists and is not an empty directory.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConversionError(f"{path} exists and is no directory", hint="Choose another output directory")
    if path.is_dir() and any(path.iterdir()):
        raise ConversionError(f"{path} is not empty", hint="Choose another output directory; nothing is ever overwritten")


@contextlib.contextmanager
def new_directory(path: Path, num_bytes: int) -> Iterator[Path]:
    """A directory to write into, published as `path` at the end.

    Args:
        path: must not exist, or be an empty directory.
        num_bytes: what is going to be written, to refuse before starting when it cannot fit.

    Raises:
        ConversionError: something is there, another conversion writes it, or there is no space.
    """
    path = path.absolute()
    require_absent(path)
    require_free_space(path, num_bytes, error=ConversionError)
    with explain_write_errors(path, error=ConversionError):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:200]}.tmp"
    with DirectoryLock(path.parent / f".{path.name[:200]}.lock", error=ConversionError):
        if temporary.exists():
            shutil.rmtree(temporary)
        try:
            with explain_write_errors(path, num_bytes, error=ConversionError):
                temporary.mkdir()
            yield temporary
            require_absent(path)
            if path.is_dir():
                path.rmdir()
            publish(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
