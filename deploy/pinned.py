"""Restricts a node to the app that its operator pinned.

A SuperNode runs the app bundle (FAB, a zip file) that the SuperLink sends with a run, so whoever controls the SuperLink
chooses the code. With the environment variable TOFU_PINNED_APP, `deploy.prefork` checks a bundle before it is unpacked.
The variable is one of

- `installed`: accept a bundle without code that names the client app of the installed package (as `tofu deploy` does);
- SHA-256 sums in hexadecimal, separated by commas: accept the bundles with these sums (`flwr build` prints them).
"""

import hashlib
import io
import re
import tomllib
import zipfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

VARIABLE = "TOFU_PINNED_APP"
INSTALLED = "installed"

_CLIENT_APP = "client.app:app"
_FILES = {"pyproject.toml", ".info/CONTENT"}
_MAX_BYTES = 1 << 20


def incompatibility(content: bytes, pinned: str, *, app: str, version: str, digest: str) -> str:
    """Return why a bundle is refused; "" if it is accepted.

    Args:
        content: the bundle.
        pinned: "installed", or SHA-256 sums separated by commas.
        app, version, digest: of the bundle, as the run names them (`publisher/name`, `1.0.0`, SHA-256): Flower looks
            for the unpacked files by them, so they must be this bundle's.

    Raises:
        ValueError: `pinned` is neither.
    """
    own = hashlib.sha256(content).hexdigest()
    if digest != own:
        return "its checksum is not the one that the run names"
    if pinned != INSTALLED:
        sums = [part.strip().lower() for part in pinned.split(",")]
        if not all(re.fullmatch("[0-9a-f]{64}", part) for part in sums):
            raise ValueError(f"{VARIABLE}={pinned!r} is not usable: expected {INSTALLED!r} or SHA-256 sums")
        return (
            "" if own in sums else f"its checksum {own} is not pinned (the app may have changed since the node began)"
        )
    try:
        return _not_installed(content, app, version)
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        return f"it cannot be read ({type(error).__name__})"


def _not_installed(content: bytes, app: str, version: str) -> str:
    with zipfile.ZipFile(io.BytesIO(content)) as bundle:
        names = bundle.namelist()
        if extra := sorted(set(names) - _FILES):
            return f"it has files besides pyproject.toml ({extra[0]!r})"
        if twice := [name for name in sorted(set(names)) if names.count(name) > 1]:
            return f"it has {twice[0]!r} twice"
        if (size := bundle.getinfo("pyproject.toml").file_size) > _MAX_BYTES:
            return f"its pyproject.toml has {size} bytes, too large: expected at most {_MAX_BYTES}"
        project = tomllib.loads(bundle.read("pyproject.toml").decode())
    flower = project["tool"]["flwr"]["app"]
    if flower["components"]["clientapp"] != _CLIENT_APP:
        return f"its client app is {flower['components']['clientapp']!r}, expected {_CLIENT_APP!r}"
    if (app, version) != (f"{flower['publisher']}/{project['project']['name']}", project["project"]["version"]):
        return "its name or version is not the one that the run names"
    return ""


def guard(runtime: ModuleType, pinned: str) -> None:
    """Make Flower's module that runs a client app refuse bundles that are not pinned, with an error reply.

    Args:
        runtime: `flwr.supernode.runtime.run_clientapp`.
    """
    pull: Callable[..., Any] = runtime.pull_task_input
    install: Callable[..., Any] = runtime.install_from_fab
    problems = ["it was not checked"]

    def checked_pull(client: Any) -> Any:
        task = pull(client)
        _, _, run, fab = task
        problems[:] = [
            incompatibility(fab.content, pinned, app=run.fab_id, version=run.fab_version, digest=fab.hash_str)
        ]
        return task

    def checked_install(content: bytes, *arguments: Any, **options: Any) -> Any:
        if problems[0]:
            raise PermissionError(f"this node does not run the app that it was sent: {problems[0]}")
        return install(content, *arguments, **options)

    runtime.pull_task_input, runtime.install_from_fab = checked_pull, checked_install  # type: ignore[attr-defined]
