"""A run's folder: readable while the run goes on, and never half-written.

config.json      every setting
metrics.jsonl    one object a round (round 0: before training)
ledger.jsonl     one object a message, written round by round
weights.safetensors, summary.json, report.html, samples.npz, plugins.state   replaced whole by a rename
metrics.prom     the same for Prometheus (`tofu.observers.prometheus`), replaced likewise after every round
checkpoints      what a run that was ended needs to go on (`server.checkpoint`)
"""

import fcntl
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch

from tofu.data import ImageShape
from tofu.errors import SettingError
from tofu.settings import Settings
from tofu.weights import Weights

MAY_CHANGE = (
    "workers", "round-timeout", "secure-timeout", "min-clients", "resume", "run-folder", "checkpoint", "log",
    "metrics-port", "device",
)  # fmt: skip
"""Settings that a run may go on with another value of."""

_SHAPE = "shape"


class RunFolder:
    """Creates and fills the folder of one run, or goes on with that of `settings.resume`.

    One process at a time: the folder is held until `close`.

    Raises:
        SettingError: a new run's folder exists and is not empty, or cannot be made; or the run to go on with has ended,
            is under way, or began with other settings.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.resume:
            self.path = Path(settings.resume)
            self._held = _hold(self.path)
            self._check_settings(settings)
            return
        self.path = Path(settings.run_folder) if settings.run_folder else fresh_folder(settings)
        check_new(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError("run-folder", str(self.path), f"a folder that can be made ({error.strerror})") from error
        self._replace("config.json", lambda f: f.write(_json(settings.to_config(), indent=1)))
        self._held = _hold(self.path)

    def close(self) -> None:
        """Let go of the folder."""
        self._held.close()

    def _check_settings(self, settings: Settings) -> None:
        if (self.path / "summary.json").exists():
            raise SettingError("resume", str(self.path), "a run that did not end")
        began, now = read_config(self.path).to_config(), settings.to_config()
        for name, value in began.items():
            if now[name] != value and name not in MAY_CHANGE:
                raise SettingError(name, now[name], f"{value}, as the run in {self.path} began with")

    def add_round(self, row: Mapping[str, object], messages: Iterable[Mapping[str, object]]) -> None:
        """Append one round's row to metrics.jsonl, and its messages to ledger.jsonl."""
        self.add_messages(messages)
        self._append("metrics.jsonl", [row])

    def add_messages(self, messages: Iterable[Mapping[str, object]]) -> None:
        """Append messages to ledger.jsonl, such as those of a round that failed."""
        self._append("ledger.jsonl", messages)

    def go_back(self, row: Mapping[str, Any] | None, messages: Iterable[Mapping[str, object]]) -> None:
        """Make metrics.jsonl and ledger.jsonl end with the round of this row, or be empty without one."""
        last = int(row["round"]) if row else -1
        for name, final in (("metrics.jsonl", [row] if row else []), ("ledger.jsonl", list(messages))):
            earlier = [old for old in _rows(self.path / name) if 0 <= old["round"] < last]
            lines = [_json(line) + b"\n" for line in (*earlier, *final)]
            self._replace(name, lambda f, lines=lines: f.writelines(lines))  # type: ignore[misc]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl so far."""
        return _rows(self.path / "metrics.jsonl")

    def write_metrics(self, text: bytes) -> None:
        """Replace metrics.prom."""
        self._replace("metrics.prom", lambda f: f.write(text))

    def write_model(self, weights: Weights, shape: ImageShape, broadcast: bytes, *, group: int = 0) -> None:
        """Replace weights.safetensors, whose metadata hold the images' shape, and plugins.state.

        Further client groups have weights-group-N.safetensors.
        """
        numbers = (shape.channels, shape.height, shape.width, shape.classes)
        named = {name: value.contiguous() for name, value in weights.items()}
        data = safetensors.torch.save(named, {_SHAPE: ",".join(map(str, numbers))})
        if broadcast:
            self._replace("plugins.state", lambda f: f.write(broadcast))
        name = f"weights-group-{group}.safetensors" if group else "weights.safetensors"
        self._replace(name, lambda f: f.write(data))

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Replace summary.json."""
        self._replace("summary.json", lambda f: f.write(_json(summary, indent=1)))

    def write_samples(self, samples: Mapping[str, npt.ArrayLike]) -> None:
        """Replace samples.npz."""
        self._replace("samples.npz", lambda f: _savez(f, samples))

    def read_samples(self) -> dict[str, npt.NDArray[Any]]:
        """What `write_samples` wrote, or nothing."""
        try:
            with np.load(self.path / "samples.npz", allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile):
            return {}

    def _append(self, name: str, rows: Iterable[Mapping[str, object]]) -> None:
        with (self.path / name).open("ab") as file:
            file.write(b"".join(_json(row) + b"\n" for row in rows))

    def _replace(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        replace_file(self.path / name, write)


def read_model(run: Path) -> tuple[Weights, ImageShape, bytes]:
    """What `write_model` wrote: weights, the images' shape, and the plugins' broadcast.

    Raises:
        SettingError: the run has no weights yet, or the files are not what they should be.
    """
    wanted = "the folder of a run, with its weights.safetensors"
    try:
        with safetensors.safe_open(run / "weights.safetensors", framework="pt") as file:
            shape = ImageShape(*map(int, file.metadata()[_SHAPE].split(",")))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        state = run / "plugins.state"
        return weights, shape, state.read_bytes() if state.exists() else b""
    except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        raise SettingError("run", str(run), wanted) from error


def read_config(run: Path) -> Settings:
    """The settings of a run, from its folder. Raises SettingError where there is no such run."""
    try:
        values = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise SettingError("resume", str(run), "the folder of a run, with its config.json") from error
    if not isinstance(values, dict):
        raise SettingError("resume", str(run), "the folder of a run, with its config.json")
    return Settings.of(values, warn=False)


def _hold(run: Path) -> BinaryIO:
    """Hold a run's folder until the file is closed: two processes would write into each other's files."""
    try:
        file = (run / "config.json").open("rb")
    except OSError as error:
        raise SettingError("resume", str(run), "the folder of a run, with its config.json") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise SettingError("resume", str(run), "a run that is not under way in another process") from error
    return file


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a file, up to the first that is not: a crash may leave half a line at the end."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        for line in path.read_bytes().splitlines():
            row = json.loads(line)
            int(row["round"])
            yield row


def check_new(path: Path) -> None:
    """Raises SettingError where `path` is a file or a folder with something in it."""
    if path.exists() and not path.is_dir():
        raise SettingError("run-folder", str(path), "a folder that can be made (this is a file)")
    if path.is_dir() and any(path.iterdir()):
        raise SettingError("run-folder", str(path), "a new or empty folder")


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file whole: write beside it, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _savez(file: BinaryIO, samples: Mapping[str, npt.ArrayLike]) -> None:
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in samples.items()}
    np.savez_compressed(file, allow_pickle=False, **arrays)


def _json(value: object, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, allow_nan=False, default=_plain).encode()


def _plain(value: Any) -> object:
    return value.item() if hasattr(value, "item") else str(value)


def fresh_folder(settings: Settings) -> Path:
    """A folder under runs/ that does not exist yet, named after the time and the settings."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = Path("runs") / f"{stamp}-{settings.model.rpartition(':')[2]}-{settings.schedule}"
    path, n = name, 2
    while path.exists():
        path, n = Path(f"{name}-{n}"), n + 1
    return path


def add_baseline(run: Path, baseline: Path) -> None:
    """Put a FedAvg run of the same rounds into another run's summary.json, so that its report shows both."""
    summary, other = (json.loads((path / "summary.json").read_text()) for path in (run, baseline))
    rows = [json.loads(line) for line in (baseline / "metrics.jsonl").read_text().splitlines()]
    summary["baseline"] = {key: other[key] for key in ("final_accuracy", "uplink_bytes", "run")} | {"metrics": rows}
    replace_file(run / "summary.json", lambda f: f.write(_json(summary, indent=1)))
