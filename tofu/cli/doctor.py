"""`tofu doctor`: checks of the installation."""

import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, requires, version
from io import StringIO
from pathlib import Path
from typing import Annotated

import typer

_PACKAGES = ("tofu-fl", "torch", "torchvision", "flwr", "flwr-datasets", "numpy", "pydantic")
_EXTRAS = {
    "attacks": "tofu attack, metrics of label trees",
    "privacy": "noise-multiplier above 0",
    "simulation": "flwr run on ray",
    "tensorboard": "tracker=tensorboard",
    "mlflow": "tracker=mlflow",
    "wandb": "tracker=wandb",
    "trackio": "tracker=trackio",
}
"""Extra -> what needs it."""
_FLOWER_PORTS = (9091, 9092, 9093)
_MIN_DISK = 2 * 10**9
_TORCHVISION = "tofu.models.torchvision_compat"
"""Imported by another process: an extension that does not fit torch ends the process that loads it."""


class _CheckError(Exception):
    """A check failed; the message says what to do."""


def doctor(
    folder: Annotated[Path, typer.Option("--folder", help="where runs will be written")] = Path("runs"),
) -> None:
    """Check this installation: versions, devices, ports, disk, and one encode of a small update.

    Prints one line per check; the status is 1 if one failed. A line of "note" is no failure.
    """
    failed = 0
    for name, check in _checks(folder):
        try:
            print(f"ok       {name:<16}{check()}")
        except _Note as note:
            print(f"note     {name:<16}{note}")
        except _CheckError as problem:
            failed += 1
            print(f"problem  {name:<16}{problem}")
    if failed:
        raise typer.Exit(1)


class _Note(Exception):  # noqa: N818
    """Something that only some uses need is missing."""


def _checks(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "python", _python
    for package in _PACKAGES:
        yield package, lambda package=package: _installed(package)  # type: ignore[misc]
    for extra in _EXTRAS:
        for package in sorted(set(_packages_of("tofu-fl", extra))):
            yield package, lambda package=package, extra=extra: _optional(package, extra)  # type: ignore[misc]
    yield "flower commands", _flower_commands
    yield "device", _device
    yield "folders", _shadowed
    yield "ports", _ports
    yield "write access", lambda: _writable(folder)
    yield "disk", lambda: _disk(folder)
    yield "encode", _encode


def _python() -> str:
    return f"{sys.version.split()[0]} ({sys.executable})"


def _installed(package: str) -> str:
    modules = {"tofu-fl": "tofu", "flwr-datasets": "flwr_datasets"}
    try:
        found = version(package)
        if package == "torchvision":
            return _imported_elsewhere(found)
        with redirect_stderr(StringIO()):
            importlib.import_module(modules.get(package, package))
        return found
    except PackageNotFoundError:
        raise _CheckError("not installed: pip install tofu-fl") from None
    except (_CheckError, _Note):
        raise
    except Exception as error:  # a broken installation raises anything
        raise _CheckError(f"{found} cannot be imported: {type(error).__name__}: {error}") from error


def _imported_elsewhere(found: str) -> str:
    same_kind = "install torch and torchvision of one kind"
    if reason := _import_error(_TORCHVISION):
        raise _CheckError(f"{found} cannot be imported: {reason}; {same_kind}")
    if reason := _import_error("torchvision"):
        raise _Note(
            f"{found} works for every command and model of tofu, but `import torchvision` in your own files (models, "
            f"transforms) may end in {reason}: {same_kind}, from one index"
        )
    return found


def _import_error(module: str) -> str:
    """Return the last line of the error of an import in another process; "" without one."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return lines[-1][:200] if done.returncode else ""


def _packages_of(distribution: str, extra: str) -> Iterator[str]:
    """Yield the packages that an extra of an installed distribution needs, and those of the extras that it names."""
    try:
        needed = requires(distribution) or []
    except PackageNotFoundError:  # reported by another check
        return
    for requirement in needed:
        if found := re.match(rf"([\w.-]+)(?:\[([\w-]+)\])?.*;.*\bextra == ['\"]{extra}['\"]", requirement):
            yield from _packages_of(found[1], found[2]) if found[2] else (found[1],)


def _optional(package: str, extra: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise _Note(f"not installed; needed for {_EXTRAS[extra]}: pip install 'tofu-fl[{extra}]'") from None


def _flower_commands() -> str:
    from deploy.processes import missing_commands

    if missing := missing_commands():
        raise _CheckError(f"{missing[0]} is missing: pip install --force-reinstall --no-deps flwr")
    return "flwr, flower-superlink, flower-supernode and flower-superexec"


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"cpu, {os.cpu_count()} cores"
    names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
    return f"cuda ({', '.join(sorted(names))}); use it with --device auto"


def _shadowed() -> str:
    """A `client` or `server` module of the current folder would take the place of ours in a script of the user."""
    here = [name for name in ("client", "server", "tofu") if Path(f"{name}.py").exists() or Path(name).is_dir()]
    ours = Path(__file__).parents[2]
    if here and Path.cwd() != ours:
        raise _Note(f"this folder has {', '.join(here)}: scripts that call tofu.run need another folder")
    return "no client, server or tofu module in this folder"


def _ports() -> str:
    taken = []
    for port in _FLOWER_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                taken.append(str(port))
    if taken:
        raise _Note(f"{', '.join(taken)} in use: another SuperLink or service runs here")
    return f"{', '.join(map(str, _FLOWER_PORTS))} are free (needed by a SuperLink only)"


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _writable(folder: Path) -> str:
    place = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place):
            return str(place)
    except OSError as error:
        raise _CheckError(f"{place} cannot be written ({error.strerror}): choose another with --run-folder") from error


def _disk(folder: Path) -> str:
    from tofu.formatting import format_bytes

    free = shutil.disk_usage(_existing(folder)).free
    if free < _MIN_DISK:
        raise _CheckError(f"{format_bytes(free)} free, expected at least {format_bytes(_MIN_DISK)}")
    return f"{format_bytes(free)} free"


def _encode() -> str:
    import torch

    from tofu import api

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    update = {name: torch.randn(value.shape) / 100 for name, value in model.state_dict().items()}
    try:
        payload = api.encode(model, update, ratio=10, input_shape=(1, 8, 8))
        api.decode(model, payload, input_shape=(1, 8, 8))
    except Exception as error:  # whatever a broken installation does
        raise _CheckError(f"{type(error).__name__}: {error}") from error
    return f"an update of {4 * sum(v.numel() for v in update.values()):,} bytes as {len(payload):,}, and back"
