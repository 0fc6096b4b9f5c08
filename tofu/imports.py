"""Imports that may fail: the user's own code as `package.module:attribute`, and packages of optional extras."""

import hashlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tofu.errors import MissingExtraError, RunError

MODULES = "TOFU_MODULES"
"""Environment variable: a further folder of the user's modules, for the apps of `tofu deploy`, which run elsewhere."""

MODULE_FILE = "modules.json"
"""File in a run's folder: module -> the folder in which the run found it, for commands in another folder."""

_of_runs: dict[str, str] = {}
_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")


def import_object(name: str) -> Any:
    """Import `package.module:attribute`, also from the current folder, as flwr, uvicorn and flask do.

    So is the folder that `MODULES` names. Both are appended to the import path and not prepended, so that a project
    with its own `client.py` or `server.py` does not hide the packages of these names that Tofu imports later. A folder
    that only a file names is not searched: a run's folder from someone else could name any.

    Raises:
        Exception: whatever the user's module raises; AttributeError if it has no such attribute, and
            ModuleNotFoundError if it is named as a file.

    Example:
        >>> import_object("math:sqrt")(9.0)
        3.0
    """
    check_module(name)
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the user's module imports something that is not installed
        raise _not_found(error.name) from None


def check_module(name: str) -> None:
    """Raise ModuleNotFoundError unless the module, or its package, of `package.module:attribute` is found.

    The folders in which `import_object` looks are appended to the import path. Nothing is imported.
    """
    for folder in _user_folders():
        if folder and folder not in sys.path and (folder != os.getcwd() or "" not in sys.path):
            sys.path.append(folder)
    module, _, attribute = name.partition(":")
    top = module.partition(".")[0]
    if module.endswith(".py"):
        raise ModuleNotFoundError(f"a module is named without .py: {module.removesuffix('.py')}:{attribute}")
    if top and top not in sys.modules and importlib.util.find_spec(top) is None:
        raise _not_found(top)


def _user_folders() -> tuple[str, ...]:
    return (os.getcwd(), os.environ.get(MODULES, ""))


def _not_found(module: str) -> ModuleNotFoundError:
    of_run = _of_runs.get(module.partition(".")[0])
    remedy = f"run the command in the folder of {module}.py"
    if of_run and of_run != os.getcwd():
        if _has_module(of_run, module.partition(".")[0]):
            remedy = f"write {MODULES}={shlex.quote(of_run)} before the command to search where the run had it"
        else:
            remedy = f"it is no longer in {of_run}, where the run had it; {remedy}"
    where = f"in {os.getcwd()} or among the installed packages"
    return ModuleNotFoundError(f"No module named {module!r} {where}: {remedy}", name=module)


def _has_module(folder: str, top: str) -> bool:
    return Path(folder, f"{top}.py").is_file() or Path(folder, top).is_dir()


def user_modules(names: Iterable[object]) -> dict[str, str]:
    """Return module -> its folder for the user's modules that settings name as `package.module:attribute`.

    Those are the modules in the current folder, in the one that `MODULES` names, and in those of `remember_modules`.
    Installed modules are found anywhere and are left out. Nothing is imported.

    Args:
        names: values of settings; one can have several names, separated by commas or spaces.
    """
    texts = (text for name in names if isinstance(name, str) for text in re.split(r"[,\s]+", name))
    found: dict[str, str] = {}
    for top in {text.partition(":")[0].partition(".")[0] for text in texts if _NAME.fullmatch(text)}:
        for folder in (*_user_folders(), _of_runs.get(top, "")):
            if folder and _has_module(folder, top):
                found.setdefault(top, os.path.abspath(folder))
    return dict(sorted(found.items()))


def remember_modules(run: Path) -> None:
    """Let errors say where a run found its modules (`MODULE_FILE` in its folder).

    Raises:
        RunError: the file is damaged.
    """
    try:
        found = json.loads((run / MODULE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise RunError(f"{run / MODULE_FILE} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(folder, str) for folder in found.values()):
        raise RunError(f"{run / MODULE_FILE} must hold an object: module -> folder")
    _of_runs.update(found)


@cache
def code_digest(*packages: str) -> bytes:
    """Return the SHA-256 of the names and contents of all Python files of packages, as they would be imported.

    Example:
        >>> code_digest("tofu") == code_digest("tofu", "no_such_package") != code_digest("tofu", "client")
        True
    """
    digest = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path(os.devnull)
        for name in sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py")):
            content = hashlib.sha256((root / name).read_bytes()).digest()
            digest.update(f"{package}/{name}\0".encode() + content)
    return digest.digest()


def check_extra(extra: str, package: str) -> None:
    """Raise MissingExtraError unless a package of `pip install 'tofu-fl[extra]'` is there; it is not imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra)


@contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """A context for imports of packages that `pip install 'tofu-fl[extra]'` installs.

    Raises:
        MissingExtraError: such a package is not installed.

    Example:
        >>> with from_extra("privacy"):
        ...     import no_such_package
        Traceback (most recent call last):
        tofu.errors.MissingExtraError: no_such_package is not installed: pip install 'tofu-fl[privacy]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), extra) from None
