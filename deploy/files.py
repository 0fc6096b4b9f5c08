"""Files with keys: new ones only, and private from the moment they are there."""

import os
from pathlib import Path

from tofu.errors import SettingError


def refuse_to_overwrite(*files: Path) -> None:
    """Raises SettingError where one of them exists."""
    for file in files:
        if file.exists():
            raise SettingError("folder", str(file.parent), f"a folder without {file.name}, which is not overwritten")


def write_new(file: Path, data: bytes, mode: int) -> None:
    """Write a file that does not exist yet. Raises SettingError where it cannot be made."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Created with its mode, so that a private key is at no moment readable by others.
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
            opened.write(data)
    except OSError as error:
        wanted = f"a folder to write {file.name} in ({error.strerror})"
        raise SettingError("folder", str(file.parent), wanted) from error
