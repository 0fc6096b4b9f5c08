"""Experiment trackers: TensorBoard, MLflow, Weights & Biases and Trackio, one tracker run per federation.

Metrics have their names in metrics.jsonl, such as `accuracy`, or paths such as `by_client/explained_variance/3`.
Settings are logged as parameters. A resumed run continues its tracker run, which `trackers/NAME.json` in the run folder
identifies.
docs/trackers.md lists all metrics, and the environment variables by which each library is configured.
"""

import dataclasses
import importlib
import io
import json
import math
import os
import re
import sys
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any, ClassVar

from tofu.errors import SettingError, first_line
from tofu.files import replace_file
from tofu.imports import from_extra
from tofu.observers.base import Observer
from tofu.registry import Registry
from tofu.rounds.record import RoundRecord, RunSummary, read_json
from tofu.settings.fields import comma_list

FOLDER = "trackers"
"""Folder in the run folder for the trackers' files, among them NAME.json, which identifies a tracker's run."""
PROJECT = "tofu"
"""The project or experiment, if the environment names no other."""

trackers: Registry[type[Observer]] = Registry("tracker", Observer, "tofu.observers.trackers")


def split_trackers(names: str) -> tuple[str, ...]:
    """Return the names in the setting `tracker`.

    Raises:
        SettingError: one is neither registered nor `package.module:Class`.
    """
    found = comma_list(names)
    for name in found:
        if name not in trackers.names() and ":" not in name:
            raise SettingError("tracker", name, f"one of {', '.join(trackers.names())}, or package.module:Class")
    return found


def make_trackers(names: str, note: Callable[[str], None]) -> list[Observer]:
    """Return the observers that the setting `tracker` names.

    Args:
        note: called with the line that reports a tracker's failure during the run.

    Raises:
        SettingError: one is unknown, or its class cannot be made without arguments.
        MissingExtraError: the library of one is not installed.
    """
    made = []
    for name in split_trackers(names):
        kind = trackers.get(name)
        try:
            made.append(kind())
        except TypeError as error:
            raise SettingError("tracker", name, f"a class that is made without arguments ({error})") from error
    for each in made:
        if isinstance(each, Tracker):
            each.note = note
    return made


def metrics_of(record: RoundRecord) -> dict[str, float]:
    """Return the finite numbers of a round by the names that all trackers use.

    >>> from tofu.rounds.record import ClientRecord
    >>> metrics_of(RoundRecord(3, "compressed", accuracy=0.5, by_client=(ClientRecord("a/b", train_seconds=2.0),)))
    ... # doctest: +NORMALIZE_WHITESPACE
    {'accuracy': 0.5, 'clients': 0.0, 'failures': 0.0, 'uplink_bytes': 0.0, 'downlink_bytes': 0.0,
     'fedavg_uplink_bytes': 0.0, 'by_client/train_seconds/a:2f:b': 2.0}
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name == "failures":
            found["failures"] = len(value)
        elif field.name == "by_client":
            for client in value:
                numbers = _numbers(client)
                found |= {f"by_client/{name}/{_escaped(client.client)}": number for name, number in numbers.items()}
        elif isinstance(value, Mapping):
            for key, number in value.items():
                found["/".join((field.name, *map(_escaped, key.split("/"))))] = number
        elif isinstance(value, tuple) and field.name != "notes":
            found |= {f"{field.name}/{index}": number for index, number in enumerate(value)}
    found = _numbers(record) | found
    if record.kind == "secure":
        found["abandoned"] = int(bool(record.abandoned))
    found.pop("round")
    return {name: float(number) for name, number in found.items() if number is not None and math.isfinite(number)}


def summary_metrics(summary: RunSummary) -> dict[str, float]:
    """Return the finite numbers of a finished run, as `summary/uplink_ratio`."""
    return {f"summary/{name}": float(number) for name, number in _numbers(summary).items() if math.isfinite(number)}


def _numbers(record: Any) -> dict[str, float]:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _escaped(name: str) -> str:
    """Return a part of a metric's name that every tracker accepts; different names stay different."""
    text = re.sub(r"[^\w .-]|^\.+$", lambda match: "".join(f":{ord(char):x}:" for char in match[0]), name, flags=re.A)
    return text or "::"


class Tracker(Observer):
    """Base class of trackers.

    A tracker that cannot start ends the run with a SettingError. One that fails later is reported once and left out
    of the rest of the run; a resumed run logs what it missed.

    Attributes:
        name: name in the setting `tracker` and in the run folder.
        round: the last round that was logged, or -1.
        note: called with the line that reports a failure.
        library: module that the tracker needs, of the extra with the tracker's name; "" if it needs none.
    """

    name: ClassVar[str]
    library: ClassVar[str] = ""

    def __init__(self) -> None:
        if self.library:
            with from_extra(self.name):
                self._library: Any = importlib.import_module(self.library)
        self.round = -1
        self.note: Callable[[str], None] = lambda text: print(f"note: {text}", file=sys.stderr)
        self._file = Path()
        self._run = ""
        self._usable = False
        self._completed = False

    @abstractmethod
    def start(self, folder: Path, settings: Mapping[str, object], run: str) -> str:
        """Start a tracker run, or continue one.

        Args:
            folder: the run folder.
            settings: flat name -> value.
            run: what `start` returned when the run began, or "" if it begins now.

        Returns:
            What identifies the tracker run.
        """

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Log the metrics of round `step`, or those of the whole run if it is None."""

    @abstractmethod
    def finish(self, completed: bool) -> None:
        """End the tracker run in this process; `completed` is false if the run failed or was interrupted."""

    def on_history(self, folder: Path, records: Sequence[RoundRecord]) -> None:
        self._file = folder / FOLDER / f"{self.name}.json"
        known: dict[str, Any] = read_json(self._file) if self._file.exists() else {"run": "", "round": -1}
        self.round = known["round"]
        try:
            self._file.parent.mkdir(exist_ok=True)
            self._run = self.start(folder, read_json(folder / "config.json"), known["run"])
            for record in records:
                if record.round > self.round:
                    self._add(record)
        except Exception as error:  # a library may raise anything
            accepted = f"a tracker that can be started ({type(error).__name__}: {first_line(error)})"
            raise SettingError("tracker", self.name, accepted) from error
        self._usable = True

    def on_round_end(self, record: RoundRecord) -> None:
        self._try(lambda: self._add(record))

    def on_run_end(self, summary: RunSummary) -> None:
        self._completed = True
        self._try(lambda: self.log(summary_metrics(summary), None))

    def close(self) -> None:
        self._try(lambda: self.finish(self._completed))
        self._usable = False

    def _add(self, record: RoundRecord) -> None:
        self.log(metrics_of(record), record.round)
        self.round = record.round
        replace_file(self._file, json.dumps({"run": self._run, "round": self.round}).encode())

    def _try(self, act: Callable[[], None]) -> None:
        if not self._usable:
            return
        try:
            act()
        except Exception as error:  # a tracker that is out of reach must not end the run
            self._usable = False
            reason = f"{type(error).__name__}: {first_line(error)}"
            self.note(f"tracker {self.name} is left out of the rest of the run: {reason}")


@trackers.register("tensorboard")
class TensorBoard(Tracker):
    """TensorBoard event files in `trackers/tensorboard` of the run folder, with the settings as HPARAMS."""

    library = "torch.utils.tensorboard"

    def start(self, folder: Path, settings: Mapping[str, object], run: str) -> str:
        # Values of a round that a killed process began, and that is now repeated, are hidden.
        log_dir = str(folder / FOLDER / self.name)
        self._writer = self._library.SummaryWriter(log_dir, purge_step=self.round + 1 if run else None)
        if not run:
            shown = {name: str(value) if isinstance(value, bool) else value for name, value in settings.items()}
            for summary in self._library.summary.hparams(shown, {"accuracy": 0.0, "loss": 0.0}):
                self._writer.file_writer.add_summary(summary)
        return self.name

    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, self.round if step is None else step)
        self._writer.flush()

    def finish(self, completed: bool) -> None:
        self._writer.close()


@trackers.register("mlflow")
class Mlflow(Tracker):
    """MLflow, where MLFLOW_TRACKING_URI says; without it a database in the current folder."""

    library = "mlflow"

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is read by the import
        super().__init__()

    def start(self, folder: Path, settings: Mapping[str, object], run: str) -> str:
        getLogger("mlflow").setLevel(WARNING)
        self._client = self._library.MlflowClient()
        if run:
            self._client.update_run(run, status="RUNNING")
            return run
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run = self._client.create_run(experiment, run_name=folder.resolve().name).info.run_id
        params = [self._library.entities.Param(name, str(value)[:6000]) for name, value in settings.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(run, params=params[start : start + 100])
        return str(run)

    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        now, at = int(time.time() * 1000), self.round if step is None else step
        found = [self._library.entities.Metric(name, value, now, at) for name, value in metrics.items()]
        for start in range(0, len(found), 1000):
            self._client.log_batch(self._run, metrics=found[start : start + 1000])

    def finish(self, completed: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if completed else "FAILED")


@trackers.register("wandb")
class Wandb(Tracker):
    """Weights & Biases. Nothing is sent unless WANDB_MODE=online; `wandb sync` sends `trackers/wandb/offline-run-*`."""

    library = "wandb"

    def start(self, folder: Path, settings: Mapping[str, object], run: str) -> str:
        run = run or uuid.uuid4().hex
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        quiet = self._library.Settings(
            silent=True, console="off", disable_git=True, x_disable_stats=True, x_disable_machine_info=True
        )
        self._tracked = self._library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=run, name=folder.resolve().name, config=dict(settings),
            dir=os.environ.get("WANDB_DIR", folder / FOLDER), mode=mode, resume="allow", reinit="create_new",
            settings=quiet,
        )  # fmt: skip
        return run

    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        if step is None:
            self._tracked.summary.update(dict(metrics))
        else:
            self._tracked.log(dict(metrics), step=step, commit=True)

    def finish(self, completed: bool) -> None:
        self._tracked.finish(exit_code=0 if completed else 1)


@trackers.register("trackio")
class Trackio(Tracker):
    """Trackio, in the folder TRACKIO_DIR or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    library = "trackio"

    def start(self, folder: Path, settings: Mapping[str, object], run: str) -> str:
        name = run or f"{folder.resolve().name}-{uuid.uuid4().hex[:8]}"  # a name identifies a run, so it is unique
        with self._quiet():
            self._tracked = self._library.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, config=dict(settings), embed=False,
                resume="must" if run else "never", auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        return name

    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        self._tracked.log(dict(metrics), step=self.round if step is None else step)

    def finish(self, completed: bool) -> None:
        with self._quiet():
            self._library.finish()  # of the run of this thread; the run's own finish would be called again at exit

    def _quiet(self) -> AbstractContextManager[Any]:
        """Keep Trackio from printing to stdout, which is for results."""
        return redirect_stdout(io.StringIO())
