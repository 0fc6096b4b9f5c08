"""Writes the files of a deployment, and runs its command lines.

Keys never replace a file, and are created readable by their owner only.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from tofu.errors import SettingError, TofuError

_DEFAULT_USER = "1000"
_ENV = """\
# Who the containers run as: the owner of deploy/secrets, deploy/state, deploy/journal and deploy/results.
TOFU_UID={user}
TOFU_GID={group}
# The address at which port 8443 listens for clients on other machines (127.0.0.1: for nobody but this machine).
#TOFU_LISTEN=0.0.0.0
# The folder with the folders server, node-0, node-1, ... of data.
#TOFU_DATA=./data
# The index from which the image takes its CPU build of torch; nothing: the default build, with CUDA.
#TORCH_INDEX=https://download.pytorch.org/whl/cpu
# What nodes run: "installed" is the app in their image; or the SHA-256 sums of app bundles that flwr build prints.
#TOFU_PINNED_APP=installed
"""


def run_command(app: typer.Typer, arguments: Sequence[str] | None, name: str, *, refused: int = 2) -> int:
    """Run a command line -> its exit status: 0, or `refused` with one line on standard error for a `TofuError`."""
    try:
        app(arguments, prog_name=name)
    except TofuError as error:
        print(f"error: {error}", file=sys.stderr)
        return refused
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def refuse_to_overwrite(*files: Path) -> None:
    """Raises SettingError if one of the files exists."""
    for file in files:
        if file.exists():
            raise SettingError("folder", str(file.parent), f"a folder without {file.name}, which is not overwritten")


def write_new(file: Path, data: bytes, mode: int) -> None:
    """Write a new file. Raises SettingError if it exists or cannot be created."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Created with its mode, so that a private key is never readable by others.
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
            opened.write(data)
    except OSError as error:
        wanted = f"a folder to write {file.name} in ({error.strerror})"
        raise SettingError("folder", str(file.parent), wanted) from error


def make_deployment(secrets: Path, nodes: Sequence[str]) -> None:
    """Make the folders that deploy/compose.yaml mounts, and the file .env that says who its containers run as.

    As root, all files are given to the user who called sudo, or else to the user 1000: no container runs as root.

    Args:
        secrets: folder of the secrets, in the folder of the compose file.
        nodes: names of the nodes, each of which has a folder for its data.

    Raises:
        SettingError: a folder or file cannot be made.
    """
    folder = secrets.parent
    user, group = (os.environ.get(name, "") for name in ("SUDO_UID", "SUDO_GID"))
    if os.getuid():
        user, group = str(os.getuid()), str(os.getgid())
    elif not user or user == "0":
        user, group = _DEFAULT_USER, _DEFAULT_USER
    try:
        own = [f"{top}/{node}" for top in ("data", "journal") for node in nodes]
        for name in ("state", "results", "data/server", *own):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not (folder / ".env").exists():
            write_new(folder / ".env", _ENV.format(user=user, group=group).encode(), 0o644)
        if not os.getuid():
            for top in (secrets.name, "state", "results", "data", "journal"):
                for path in ((folder / top), *(folder / top).rglob("*")):
                    os.chown(path, int(user), int(group), follow_symlinks=False)
    except OSError as error:
        raise SettingError("folder", str(folder), f"a folder that can be written ({error.strerror})") from error
