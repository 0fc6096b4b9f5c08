"""Atomic replacement of files, and locks between processes."""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

__all__ = ["FileLock", "is_locked", "lock_file", "replace_arrays", "replace_file"]

_LOCK_SECONDS = 0.2
"""How long `lock_file` waits, because `is_locked` of another process holds the lock for an instant."""


def replace_file(path: Path, data: bytes | Callable[[BinaryIO], object]) -> None:
    """Replace a file atomically: readers see the old file or the new one, also after a crash.

    The data goes to `.NAME.part` in the same folder, is flushed to disk, and is renamed. If writing fails, the old file
    stays and the temporary one is removed.

    Args:
        data: the content, or a function that writes it to an open file.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                data(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def replace_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Replace a file atomically with arrays in numpy's compressed format (.npz), without pickles."""
    import numpy as np  # most users of this module need no arrays

    values: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    replace_file(path, lambda file: np.savez_compressed(file, allow_pickle=False, **values))


def _sync_folder(folder: Path) -> None:
    """Flush a folder: a rename is on disk only after this. Platforms that cannot open a folder skip it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock_file(path: Path) -> FileLock | None:
    """Acquire the exclusive lock of `path`; None if another process has it. `release` releases it.

    The lock file is `.NAME.lock` in the same folder. The system releases the lock of a process that dies.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout:
        return None
    return lock


def is_locked(path: Path) -> bool:
    """Return whether a process of this machine, also this one, holds the lock of `lock_file` on `path`."""
    place = path.with_name(f".{path.name}.lock")
    if not place.exists():
        return False
    try:
        with FileLock(place, blocking=False):
            return False
    except (Timeout, OSError):
        return True
