"""Atomic replacement and locks of files."""

from pathlib import Path
from typing import BinaryIO

import pytest

from tofu.files import is_locked, lock_file, replace_file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def broken(file: BinaryIO) -> None:
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, broken)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_a_lock_is_held_once_until_it_is_released(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    first = lock_file(tmp_path / "file")
    assert first is not None
    assert is_locked(tmp_path / "file")
    assert lock_file(tmp_path / "file") is None
    first.release()
    assert not is_locked(tmp_path / "file")
    again = lock_file(tmp_path / "file")
    assert again is not None
    again.release()
