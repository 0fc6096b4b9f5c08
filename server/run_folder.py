"""A run's folder: readable while the run goes on, and never half-written.

config.json      every setting
metrics.jsonl    one object a round (round 0: before training)
ledger.jsonl     one object a message
weights.safetensors, summary.json, report.html, samples.npz   replaced whole by a rename
"""

import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import safetensors.torch

from tofu.errors import SettingError
from tofu.settings import Settings
from tofu.weights import Weights


class RunFolder:
    """Creates and fills the folder of one run.

    Raises:
        SettingError: the folder exists and is not empty, or cannot be made.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = Path(settings.run_folder) if settings.run_folder else fresh_folder(settings)
        check_new(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError("run-folder", str(self.path), f"a folder that can be made ({error.strerror})") from error
        self._replace("config.json", lambda f: f.write(_json(settings.to_config(), indent=1)))

    def add_metrics(self, row: Mapping[str, object]) -> None:
        """Append one round's row to metrics.jsonl."""
        self._append("metrics.jsonl", row)

    def add_message(self, row: Mapping[str, object]) -> None:
        """Append one message's row to ledger.jsonl."""
        self._append("ledger.jsonl", row)

    def write_weights(self, weights: Weights) -> None:
        """Replace weights.safetensors."""
        data = safetensors.torch.save({name: value.contiguous() for name, value in weights.items()})
        self._replace("weights.safetensors", lambda f: f.write(data))

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Replace summary.json."""
        self._replace("summary.json", lambda f: f.write(_json(summary, indent=1)))

    def write_samples(self, samples: Mapping[str, npt.ArrayLike]) -> None:
        """Replace samples.npz."""
        self._replace("samples.npz", lambda f: _savez(f, samples))

    def _append(self, name: str, row: Mapping[str, object]) -> None:
        with (self.path / name).open("ab") as file:
            file.write(_json(row) + b"\n")

    def _replace(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        replace_file(self.path / name, write)


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
