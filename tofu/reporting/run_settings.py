"""The settings in a run's folder, and whether a run may start or go on there. Nothing here imports torch."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tofu.errors import SettingError
from tofu.files import FileLock, lock_file
from tofu.imports import remember_modules
from tofu.settings import Settings, Value
from tofu.settings.deprecated import present_names
from tofu.settings.groups import EMBEDDED_TABLES

MAY_CHANGE = (
    "workers", "round-timeout", "secure-timeout", "min-clients", "resume", "run-folder", "checkpoint", "log",
    "metrics-port", "device", "rounds", "tracker",
)  # fmt: skip
"""Settings that may differ when a run is resumed. Rounds may only become more."""


def stored_config(settings: Settings) -> dict[str, Value]:
    """Return the settings with absolute paths, so that a run can be resumed in another folder."""
    config = settings.to_config()
    if settings.data.dataset not in ("digits", *EMBEDDED_TABLES):
        config["dataset"] = _absolute(settings.data.dataset)
    if settings.model.initial_weights:
        config["initial-weights"] = _absolute(settings.model.initial_weights)
    if settings.secure.secure_identities:
        config["secure-identities"] = _absolute(settings.secure.secure_identities)
    return config


def portable_settings(settings: Settings) -> Settings:
    """Return the settings with absolute paths, which mean the same in any folder."""
    return Settings.of(stored_config(settings), warn=False)


def _absolute(path: str) -> str:
    """Return an absolute path, if it is the path of a file or folder; it may also be a hub id."""
    with suppress(OSError, RuntimeError, ValueError):
        expanded = Path(path).expanduser()
        if path and expanded.exists():
            return str(expanded.absolute())
    return path


def read_config(run: Path, *, field: str = "resume") -> Settings:
    """Return the settings of a run; errors on modules that they name then say where the run had them.

    Raises:
        SettingError: with the name of `field`, if there is no such run.
    """
    remember_modules(run)
    try:
        values = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise SettingError(field, str(run), "the folder of a run, with its config.json") from error
    if not isinstance(values, dict):
        raise SettingError(field, str(run), "the folder of a run, with its config.json")
    return Settings.of(values, warn=False)


def resumed_settings(overrides: Mapping[str, object]) -> Settings:
    """Return the settings of the run to resume, with some changed; `RunFolder` refuses what must not differ.

    Raises:
        SettingError: there is no such run, or a setting cannot be used.
    """
    began = read_config(Path(str(overrides["resume"]))).to_config()
    return Settings.of(began | present_names(overrides))


def check_resumed(settings: Settings) -> None:
    """Raise SettingError if the run of `resume` has finished, or if it was started with other settings."""
    path = Path(settings.run.resume)
    began_with = read_config(path).training.rounds
    if settings.training.rounds < began_with:
        accepted = f"at least the {began_with} that the run in {path} has"
        raise SettingError("rounds", settings.training.rounds, accepted)
    if (path / "summary.json").exists():
        if settings.training.rounds == began_with:
            accepted = f"a run that has not finished, or --rounds above {began_with}"
            raise SettingError("resume", str(path), accepted)
        if not any((path / "checkpoints").glob("round-*.checkpoint")):
            accepted = "a finished run with its last checkpoint, or --initial-weights in its place"
            raise SettingError("resume", str(path), accepted)
    began, now = stored_config(read_config(path)), stored_config(settings)
    for name, value in began.items():
        if now[name] != value and name not in MAY_CHANGE:
            raise SettingError(name, now[name], f"{value}, as the run in {path} started with")


def check_new(path: Path) -> None:
    """Raises SettingError if `path` is a file or a folder that is not empty."""
    if path.exists() and not path.is_dir():
        raise SettingError("run-folder", str(path), "a folder that can be created (this is a file)")
    if path.is_dir() and any(path.iterdir()):
        raise SettingError("run-folder", str(path), "a new or empty folder")


def lock_run(run: Path) -> FileLock:
    """Lock a run folder: two processes would overwrite each other's files. Raises SettingError if one has it."""
    if not (run / "config.json").is_file():
        raise SettingError("resume", str(run), "the folder of a run, with its config.json")
    lock = lock_file(run / "config.json")
    if lock is None:
        raise SettingError("resume", str(run), "a run that is not running in another process")
    return lock
