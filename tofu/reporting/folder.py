"""The folder of a run. It can be read while the run goes on, and no file in it is ever half-written.

config.json                          all settings
modules.json                         module of the user's own model, compressor, ... -> its folder
metrics.jsonl                        one `RoundRecord` per line
ledger.jsonl                         one message per line, appended after each round
weights.safetensors, plugins.state   the model and the plugins' broadcast state, replaced after each round
samples.npz, panels.json             images and plugin panels for the report, replaced after each round
data.json                            what was read as data, what was left out, and each client's number of images
metrics.prom                         Prometheus metrics (`tofu.observers.prometheus`), replaced after each round
checkpoints/                         state for a resume (`server.checkpoint`)
trackers/                            written by experiment trackers (`tofu.observers.trackers`)
model.json                           class names and preprocessing of the images, written once
summary.json, report.html            `RunSummary` and the report, written at the end
failure.json                         why the run ended with an error; a resume removes it
"""

import dataclasses
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch

from tofu.data import ImageShape
from tofu.data.preprocessing import PLAIN, Preprocessing, Statistics
from tofu.errors import RunError, SettingError
from tofu.files import replace_arrays, replace_file
from tofu.imports import MODULE_FILE, user_modules
from tofu.reporting.panels import write_panels
from tofu.reporting.run_settings import check_new, check_resumed, lock_run, read_config, stored_config
from tofu.rounds.panel import Panel
from tofu.rounds.record import Baseline, RoundRecord, RunSummary, read_rounds, read_summary, round_label, to_dict
from tofu.settings import Settings
from tofu.weights import Weights

_SHAPE = "shape"
_JSON_LINES = ("metrics.jsonl", "ledger.jsonl")
ACCOUNT = "privacy.json"
FAILURE = "failure.json"


class RunFolder:
    """Writes the folder of one run: a new one, or that of `settings.resume`.

    The folder is locked against other processes until `close`.

    Raises:
        SettingError: the folder of a new run exists and is not empty, or cannot be created; or the run to resume has
            finished, is running, or started with other settings.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.run.resume:
            self.path = Path(settings.run.resume)
            self._lock = lock_run(self.path)
            try:
                check_resumed(settings)
                (self.path / FAILURE).unlink(missing_ok=True)
                if settings.training.rounds != read_config(self.path).training.rounds:
                    self._extend(settings)
            except BaseException:
                self._lock.release()
                raise
            return
        self.path = Path(settings.run.run_folder) if settings.run.run_folder else Path()
        try:
            if settings.run.run_folder:
                check_new(self.path)
                self.path.mkdir(parents=True, exist_ok=True)
            else:
                self.path = fresh_folder(settings)
        except OSError as error:
            accepted = f"a folder that can be created ({error.strerror})"
            raise SettingError("run-folder", str(self.path), accepted) from error
        self.write_config(settings)
        self._lock = lock_run(self.path)

    def write_config(self, settings: Settings) -> None:
        """Write the settings, with which `resume` continues."""
        self._replace("config.json", _json(stored_config(settings), indent=1))
        if modules := user_modules(settings.to_config().values()):
            self._replace(MODULE_FILE, _json(modules, indent=1))

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def _extend(self, settings: Settings) -> None:
        """More rounds than the run was started with. It counts as unfinished until these are done."""
        config = read_config(self.path).to_config() | {"rounds": settings.training.rounds}
        self._replace("config.json", _json(config, indent=1))
        for name in ("summary.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)

    def add_round(self, record: RoundRecord, messages: Iterable[Mapping[str, object]] = ()) -> None:
        """Append a round to metrics.jsonl, and its messages to ledger.jsonl."""
        self.add_messages(messages)
        self._append("metrics.jsonl", [to_dict(record)])

    def add_messages(self, messages: Iterable[Mapping[str, object]]) -> None:
        """Append messages to ledger.jsonl, such as those of a round that failed."""
        self._append("ledger.jsonl", messages)

    def rewind(self, record: RoundRecord | None, messages: Iterable[Mapping[str, object]] = ()) -> None:
        """Truncate metrics.jsonl and ledger.jsonl to end with this round, or to nothing without one."""
        last = record.round if record else -1
        finals: tuple[list[Mapping[str, object]], ...] = ([to_dict(record)] if record else [], list(messages))
        for name, final in zip(_JSON_LINES, finals, strict=True):
            earlier = [old for old in _complete_lines(self.path / name) if 0 <= old["round"] < last]
            self._replace(name, b"".join(_json(line) + b"\n" for line in (*earlier, *final)))

    def write_account(self, account: Mapping[str, object]) -> None:
        """Replace privacy.json, durably: the privacy account with the round that clients are about to be asked for."""
        self._replace(ACCOUNT, _json(account, indent=1))

    def read_account(self) -> object:
        """Return what `write_account` wrote last, or None. Raises RunError if the file is damaged."""
        try:
            return json.loads((self.path / ACCOUNT).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / ACCOUNT} cannot be read: {error}") from error

    def records(self) -> tuple[RoundRecord, ...]:
        """Return the rounds so far."""
        return read_rounds(self.path / "metrics.jsonl")

    def write_model(self, weights: Weights, shape: ImageShape, broadcast: bytes, *, group: int = 0) -> None:
        """Replace weights.safetensors, whose metadata hold the image shape, and plugins.state.

        Further client groups have weights-group-N.safetensors.
        """
        numbers = (*shape.chw, shape.classes)
        named = {name: value.contiguous() for name, value in weights.items()}
        data = safetensors.torch.save(named, {_SHAPE: ",".join(map(str, numbers))})
        if broadcast:
            self._replace("plugins.state", broadcast)
        self._replace(_weights_name(group), data)

    def write_model_json(self, names: Sequence[str], preprocessing: Mapping[str, object]) -> None:
        """Write model.json: what the model's outputs mean, in their order, and how its images are prepared."""
        self._replace("model.json", _json({"class_names": list(names), "preprocessing": preprocessing}))

    def write_summary(self, summary: RunSummary) -> None:
        """Replace summary.json."""
        self._replace("summary.json", _json(to_dict(summary), indent=1))

    def write_failure(self, reason: str) -> None:
        """Replace failure.json: why the run ended with an error. A resume removes it."""
        with suppress(OSError):  # the error itself is what the user has to see
            self._replace(FAILURE, _json({"reason": reason}))

    def write_data(self, data: Mapping[str, object]) -> None:
        """Replace data.json."""
        self._replace("data.json", _json(data, indent=1))

    def write_panels(self, panels: Mapping[str, Panel]) -> None:
        """Replace panels.json (plugin name -> panel), if there are any."""
        if panels:
            write_panels(self.path, panels)

    def write_samples(self, samples: Mapping[str, npt.ArrayLike]) -> None:
        """Replace samples.npz."""
        replace_arrays(self.path / "samples.npz", samples)

    def read_samples(self) -> dict[str, npt.NDArray[Any]]:
        """Return the content of samples.npz, or nothing if it cannot be read."""
        try:
            with np.load(self.path / "samples.npz", allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile):
            return {}

    def _append(self, name: str, rows: Iterable[Mapping[str, object]]) -> None:
        with (self.path / name).open("ab") as file:
            file.write(b"".join(_json(row) + b"\n" for row in rows))

    def _replace(self, name: str, data: bytes) -> None:
        replace_file(self.path / name, data)


def _weights_name(group: int) -> str:
    return f"weights-group-{group}.safetensors" if group else "weights.safetensors"


def read_model(run: Path, *, group: int = 0) -> tuple[Weights, ImageShape, bytes]:
    """Return the weights of a client group, the image shape and the plugins' broadcast state of a run.

    Raises:
        SettingError: the run has no weights yet, or a file is damaged.
    """
    name = _weights_name(group)
    wanted = f"the folder of a run, with its {name}"
    try:
        with safetensors.safe_open(run / name, framework="pt") as file:
            shape = ImageShape(*map(int, file.metadata()[_SHAPE].split(",")))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        state = run / "plugins.state"
        return weights, shape, state.read_bytes() if state.exists() else b""
    except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        raise SettingError("run", str(run), wanted) from error


def read_preprocessing(run: Path) -> tuple[Preprocessing, Statistics]:
    """Return the preprocessing of a run's images (resize, crop, normalization); none without model.json.

    Raises:
        RunError: model.json is damaged.
    """
    try:
        values = json.loads((run / "model.json").read_text()).get("preprocessing") or {}
        statistics = tuple(map(float, values.get("mean", PLAIN[0]))), tuple(map(float, values.get("std", PLAIN[1])))
        sizes = values.get("resize", ""), values.get("center_crop", "")
        return Preprocessing(*sizes, int(values.get("gray_bits", 0))), statistics
    except FileNotFoundError:
        return Preprocessing(), PLAIN
    except (OSError, ValueError, TypeError, AttributeError, SettingError) as error:
        raise RunError(f"{run / 'model.json'} cannot be read: {error}") from error


def read_class_names(run: Path, classes: int) -> tuple[str, ...]:
    """Return the names of the classes; their numbers without model.json.

    Raises:
        RunError: model.json is damaged.
    """
    try:
        names = json.loads((run / "model.json").read_text())["class_names"]
    except FileNotFoundError:
        names = []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run / 'model.json'} cannot be read: {error}") from error
    whole = isinstance(names, list) and len(names) == classes and all(isinstance(name, str) for name in names)
    return tuple(names) if whole else tuple(map(str, range(classes)))


def _complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file up to the first damaged one: a crash may leave half a line at the end."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        for line in path.read_bytes().splitlines():
            row = json.loads(line)
            int(row["round"])
            yield row


def _json(value: object, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, allow_nan=False, default=_plain).encode()


def _plain(value: Any) -> object:
    return value.item() if hasattr(value, "item") else str(value)


def fresh_folder(settings: Settings) -> Path:
    """Create a folder under runs/ that no other run has, named by time, model, compressor and schedule."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    label, schedule = round_label("compressed", settings.codec.compressor), settings.rounds.schedule.rpartition(":")[2]
    method = {"compressed": label, "fedavg": schedule, "secure": schedule}.get(schedule, f"{label}-{schedule}")
    name = Path("runs") / f"{stamp}-{settings.model.model.rpartition(':')[2]}-{method}"
    path, n = name, 2
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # also if another process made it just now
            path, n = Path(f"{name}-{n}"), n + 1


def add_baseline(run: Path, baseline: Path) -> None:
    """Store a FedAvg run over the same rounds in another run's summary.json, so that its report shows both."""
    summary, other = read_summary(run / "summary.json"), read_summary(baseline / "summary.json")
    if summary is None or other is None:
        raise SettingError("run", str(run if summary is None else baseline), "a finished run")
    rounds = read_rounds(baseline / "metrics.jsonl")
    stored = Baseline(rounds, other.final_accuracy, other.uplink_bytes, other.run)
    merged = dataclasses.replace(summary, baseline=stored)
    replace_file(run / "summary.json", _json(to_dict(merged), indent=1))
