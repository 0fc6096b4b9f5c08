"""`tofu.run`, which runs a federation in this process, and its result."""

import base64
import html
import importlib
import importlib.util
import inspect
import logging
import re
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import TensorDataset, default_collate

import tofu
from tofu.arguments import CALLS, check_call, check_elements, check_kind, check_names, shown
from tofu.data import FederatedData, ImageShape, LabeledImages, to_float
from tofu.data.federated import normalization_of
from tofu.data.preprocessing import Statistics, normalize_inputs
from tofu.errors import RunError, SettingError
from tofu.formatting import format_bytes, format_count, format_fraction
from tofu.hooks import check_overrides
from tofu.models.checks import eager_code
from tofu.observers.base import Observer, Observers
from tofu.observers.terminal import make_progress
from tofu.reference_model import Forward, InputShape
from tofu.reporting.folder import read_model
from tofu.reporting.report import write_report
from tofu.reporting.report.chart import standalone
from tofu.reporting.report.figures import accuracy_by_bytes, accuracy_by_round, loss_by_bytes, loss_by_round
from tofu.reporting.report.run_data import read_run
from tofu.reporting.report.template import COLORS, FIGURE_STYLE
from tofu.reporting.run_settings import resumed_settings
from tofu.rounds.record import RoundRecord, RunSummary, from_dict, json_lines, read_rounds
from tofu.settings import FIELDS, Settings, Value, python_call
from tofu.settings.unused import unused_notes
from tofu.user_workload import DatasetLoop, Loss, Metric, OptimizerFactory, TrainFunction, UserWorkload, factory_of
from tofu.weights import Weights, load_weights
from tofu.workload import workload_of

DATASET = "python"
"""The setting `dataset` of a run whose data are Python objects; the setting `model` starts with it, too."""


_NAMED_ONLY: Mapping[str, Value] = {
    "plugins": "", "plugin_options": "", "tasks": "none", "record_clients": "", "class_names": "",
    "initial_weights": "", "augmentation": "",
}  # fmt: skip
"""Settings that need a dataset and a model that the settings name, with their defaults."""
_NAMED_DATA: Mapping[str, Value] = {"resize": "", "center_crop": "", "gray_bits": 0, "normalization": "-1to1"}
"""Settings that need a dataset that the settings name, with their defaults."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: its run folder.
        summary: accuracy, bytes and ratios of the whole run.
    """

    folder: Path
    summary: RunSummary
    _build_model: Callable[[ImageShape], nn.Module] = field(repr=False)

    def __repr__(self) -> str:
        """Return one line, because a notebook shows the last value of a cell: the summary has 20 fields."""
        summary, quality = self.summary, "no test data"
        if self.accuracy is not None:
            quality = f"accuracy {format_fraction(self.accuracy)}"
        elif self.loss is not None:
            quality = f"test loss {self.loss:.4g}"
        uplink = format_bytes(summary.uplink_bytes)
        return f"RunResult({str(self.folder)!r}: {format_count(summary.rounds, 'round')}, {quality}, uplink {uplink})"

    @property
    def accuracy(self) -> float | None:
        """The test accuracy of the final weights in [0, 1]; None where it cannot be measured."""
        return self.summary.final_accuracy

    @property
    def loss(self) -> float | None:
        """The test loss of the final weights; None without test data."""
        path = self.folder / "metrics.jsonl"
        records = read_rounds(path) if path.exists() else ()  # the folder may have been moved
        return records[-1].loss if records else None

    @property
    def history(self) -> tuple[RoundRecord, ...]:
        """The record of each round; round 0 is the evaluation before training."""
        return read_rounds(self.folder / "metrics.jsonl")

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """One row per message: round, kind, direction, client, bytes; the rows make a `pandas.DataFrame`."""
        return [row for row, _ in json_lines(self.folder / "ledger.jsonl")]

    @property
    def weights(self) -> Weights:
        """The final weights by name: trainable parameters and buffers."""
        return read_model(self.folder)[0]

    def model(self) -> nn.Module:
        """Return a new copy of the model with the final weights, in eval mode on the CPU. Plugins are not applied."""
        weights, shape, _ = read_model(self.folder)
        model = self._build_model(shape).eval()
        load_weights(model, weights)
        return model

    def plot(self, against: Literal["rounds", "bytes"] = "rounds") -> "Plot":
        """Draw test accuracy, or else the loss, against rounds or uplink bytes; a notebook shows the figure.

        Raises:
            RunError: the run has neither an accuracy nor a loss.
            SettingError: `against` is neither "rounds" nor "bytes".
        """
        drawings = {
            "rounds": {"accuracy by round": accuracy_by_round, "loss by round": loss_by_round},
            "bytes": {"accuracy by uplink bytes": accuracy_by_bytes, "loss by uplink bytes": loss_by_bytes},
        }
        if against not in drawings:
            raise SettingError("against", against, "'rounds' or 'bytes'")
        found = read_run(self.folder)
        for title, draw in drawings[against].items():
            if markup := draw(found):
                return Plot(standalone([ET.fromstring(markup)], COLORS + FIGURE_STYLE), title)
        raise RunError(f"{self.folder} has no accuracy and no loss to plot: is there test data?")

    def report(self) -> Path:
        """Write report.html, a page that needs no other file, and return its path."""
        return write_report(self.folder)


@dataclass(frozen=True)
class Plot:
    """A figure as SVG, with a title for consoles, which cannot show the figure."""

    svg: str
    title: str = "figure"

    def __repr__(self) -> str:
        return f"Plot({self.title})"

    def save(self, path: str | Path) -> None:
        """Write the figure to an .svg file. Raises SettingError if the name ends otherwise."""
        check_kind("path", path, str | PathLike, "a file's name, such as 'accuracy.svg'")
        if Path(path).suffix.lower() != ".svg":
            raise SettingError("path", str(path), "a name that ends in .svg, the format of the figure")
        Path(path).write_text(self.svg, encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        """As an image: the style of an SVG within a page would apply to all of the page."""
        encoded = base64.b64encode(self.svg.encode()).decode()
        return f'<img alt="{html.escape(self.title)}" src="data:image/svg+xml;base64,{encoded}">'


@python_call
def run(
    *,
    clients: Sequence[Any] | int | None = None,
    test: Any = None,
    model: Callable[[], nn.Module] | nn.Module | str | None = None,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    metrics: Mapping[str, Metric] | None = None,
    train: TrainFunction | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
    input_shape: InputShape | None = None,
    forward: Forward | None = None,
    callbacks: Sequence[Observer] = (),
    progress: bool = True,
    **settings: Any,
) -> RunResult:
    """Run a federation in this process. It works in a notebook, too: nothing here needs an event loop.

    Ctrl-C interrupts a run. `tofu.run(resume=folder, ...)` with the same data and model continues after its last round.

    Args:
        clients: one torch `Dataset` of (input, target) per client, or the number of clients of the setting `dataset`.
        test: the server's test data, a `Dataset` of the same samples. Without it, accuracy and loss are unknown.
        model: a function without arguments that builds the model, or the model; a name if there are only settings.
        loss: (outputs, targets) -> scalar, the mean over a batch; by default cross-entropy with class numbers.
        optimizer: (parameters, lr=) -> optimizer; by default SGD with the settings `lr`, `momentum`, `weight_decay`.
        metrics: name -> function of (outputs, targets) of all test samples. One named "accuracy" replaces the accuracy.
        train: your own training function, `train(model, dataset, context)`, of a
            `tofu.training.TrainingContext`; it trains the model in place and may return the mean loss.
        collate: list of samples -> batch, as for `torch.utils.data.DataLoader`.
        input_shape: of one proxy, as for `tofu.encode`.
        forward: how proxies are passed to the model, as for `tofu.encode`.
        callbacks: observers of the run (`tofu.observers.base.Observer`).
        progress: print the rounds to standard error.
        settings: all settings of `tofu run --help`, with underscores for dashes. A class or function may stand for its
            `module:Name`, a list for names with commas, a mapping for `plugin_options`, a `Path` for a folder or file.

    Raises:
        SettingError, DataError: an argument or the dataset cannot be used.
        RunError: no client gave a valid reply, no round succeeded, training had diverged at the end (the run folder has
            all rounds), or this folder has a `client` or `server` module of its own.

    Example:
        >>> import tempfile, tofu
        >>> result = tofu.run(dataset="digits", clients=3, rounds=2, ratio=20, max_evals=20, progress=False,
        ...                   run_folder=tempfile.mkdtemp() + "/run")
        >>> [record.kind for record in result.history], result.summary.final_accuracy > 0.3
        (['start', 'compressed', 'compressed'], True)
    """
    _check_others(callbacks, progress, settings)
    workload, checked = _workload_and_settings(
        DatasetLoop(loss, optimizer, metrics or {}, train, collate), model, clients, test,
        {name: _setting(value) for name, value in settings.items()}, input_shape=input_shape, forward=forward,
    )  # fmt: skip
    client, server = _apps()
    view = make_progress(sys.stderr, quiet=not progress, notes=tuple(unused_notes(checked, settings)))
    with _process_settings_kept(), eager_code():
        summary = server.serve_in_process(client.make_app(workload), checked, Observers((view, *callbacks)), workload)
    typed = from_dict(RunSummary, summary, "summary")
    return _with_warnings(RunResult(Path(typed.run), typed, (workload or workload_of(checked)).build_model), progress)


_CALLER = 4
"""Frames from a warning to the line that calls `tofu.run`."""


def _with_warnings(result: RunResult, progress: bool) -> RunResult:
    """Warn of replies and images that a run without progress lines left out; return the result.

    By `warnings`, because those of a library's log are not shown unless the user has set up logging.
    """
    if progress:
        return result
    failures = [failure for record in result.history for failure in record.failures]
    if failures:
        first = failures[0]
        text = f"replies missing: {len(failures)}; the first, of client {first.client}: {first.reason}"
        warnings.warn(f"{text} (result.history has all, in failures)", stacklevel=_CALLER)
    if result.summary.unreadable:
        warnings.warn(f"unreadable images, which were left out: {result.summary.unreadable}", stacklevel=_CALLER)
    return result


def _check_others(callbacks: object, progress: object, settings: Mapping[str, Any]) -> None:
    """Raise SettingError for arguments of `run` that are neither data, model nor functions, and for unknown names."""
    check_elements("callbacks", callbacks, Observer, "objects of subclasses of tofu.observers.base.Observer")
    for number, observer in enumerate(callbacks):  # type: ignore[arg-type,var-annotated]
        check_overrides(f"callbacks[{number}]", type(observer), Observer)
    check_kind("progress", progress, bool, "True or False")
    check_names(settings, FIELDS, [name for name in inspect.signature(run).parameters if name != "settings"],
                ", or a setting")  # fmt: skip


@contextmanager
def _process_settings_kept() -> Iterator[None]:
    """Silence Flower's log during a run, and restore its level and torch's number of threads."""
    threads, log = torch.get_num_threads(), logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        log.setLevel(level)


def _setting(value: Any) -> Any:
    """Return the text of a setting that is given as a class, a function, a path, a list of them or of names, or a
    mapping.
    """
    if isinstance(value, type) or inspect.isfunction(value):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, list | tuple):
        return ",".join(str(_setting(item)) for item in value)
    if isinstance(value, Mapping):
        return " ".join(f"{name}={option}" for name, option in value.items())
    return value


def _workload_and_settings(
    loop: DatasetLoop, model: Any, clients: Any, test: Any, settings: dict[str, Value], **call: Any
) -> tuple[UserWorkload | None, Settings]:
    """Return the workload, or None for a run of settings alone; and the settings.

    Args:
        loop: how models are trained and evaluated.
        model, clients, test, settings: as given to `run`.
        call: `input_shape` and `forward`, as given to `run`.

    Raises:
        SettingError: an argument cannot be used.
    """
    named_data = clients is None or isinstance(clients, int)
    named_model = model is None or isinstance(model, str)
    if not named_data and (isinstance(clients, str) or not isinstance(clients, Sequence)):
        raise SettingError("clients", type(clients).__name__, "a list of datasets, one per client, or their number")
    if named_data and test is not None:
        raise SettingError("test", type(test).__name__, "None for a dataset that the settings name")
    settings = settings | ({"clients": clients if named_data else len(clients)} if clients is not None else {})
    if named_data and named_model and not any((loop.loss, loop.optimizer, loop.metrics, loop.train_function)):
        _check_unused({**call, "collate": None if loop.collate is default_collate else loop.collate})
        return None, _checked(settings | ({"model": model} if model is not None else {}))
    if named_model:
        raise SettingError("model", model, "a torch.nn.Module or a function that builds one, as other Python "
                           "objects are given")  # fmt: skip
    if not isinstance(model, nn.Module):
        check_call("model", model, CALLS["model"])
    for name, default in {**_NAMED_ONLY, **({} if named_data else _NAMED_DATA)}.items():
        if settings.get(name, default) != default:
            accepted = f"{default!r} for datasets and models that are Python objects"
            images = name == "augmentation" or name in _NAMED_DATA
            raise SettingError(name, settings[name], accepted + " (a Dataset's transform does this)" * images)
    kind = re.sub(r"\W", "", getattr(model, "__qualname__", type(model).__name__).rpartition(".")[2])
    settings |= {"model": f"{DATASET}:{kind}"} | ({} if named_data else {"dataset": DATASET})
    checked, build = _checked(settings), factory_of(model)
    if checked.run.resume and not named_data:
        _check_test(Path(checked.run.resume), test)
    if named_data:
        data = FederatedData.of(checked.data, checked.run.seed)
        clients, test = _named_datasets(data)
        build = _normalized(build, normalization_of(checked.data, data.shape.channels, checked.run.seed))
    made = UserWorkload(
        **vars(loop),
        model=build,
        clients=clients,
        test_data=() if test is None else test,
        seed=checked.run.seed,
        **call,
    )
    return made, checked


def _check_unused(given: Mapping[str, Any]) -> None:
    """Raise SettingError for arguments of Python objects in a run whose settings name its data and its model."""
    for name, value in given.items():
        if value is not None:
            raise SettingError(name, shown(value), "None where the settings name the data and the model")


def _check_test(resumed: Path, test: object) -> None:
    """Raise SettingError unless there are test data exactly if the run to resume had some.

    Without them it would seem that its training diverged.
    """
    path = resumed / "metrics.jsonl"
    records = read_rounds(path) if path.exists() else ()  # it may have ended before its first record
    had = bool(records) and records[0].loss is not None
    if records and had != (test is not None):
        accepted = f"the test data that the run in {resumed} has" if had else f"None, as in the run in {resumed}"
        raise SettingError("test", None if test is None else type(test).__name__, accepted)


def _checked(settings: Mapping[str, Value]) -> Settings:
    """Return the settings of a new or a resumed run. Raises SettingError if one cannot be used."""
    return resumed_settings(settings) if settings.get("resume") else Settings.of(settings)


def _normalized(build: Callable[[], nn.Module], statistics: Statistics) -> Callable[[], nn.Module]:
    """Return a function that builds the model with the normalization of images in [-1, 1] before its first layer."""

    def built() -> nn.Module:
        model = build()
        normalize_inputs(model, statistics)
        return model

    return built


def _named_datasets(data: FederatedData) -> tuple[list[TensorDataset], TensorDataset]:
    """Return the clients' and the test images of a dataset that the settings name, scaled to [-1, 1]."""

    def tensors(data: LabeledImages) -> TensorDataset:
        return TensorDataset(to_float(data.images), data.labels)

    return [tensors(data.client(number)) for number in range(data.clients)], tensors(data.test())


def _apps() -> tuple[Any, Any]:
    """Return the modules `client.app` and `server.app` of this project.

    Raises:
        RunError: this folder has a module of that name.
    """
    for package in ("client", "server"):
        ours = Path(tofu.__path__[0]).parent / package / "__init__.py"
        spec = importlib.util.find_spec(package)
        found = spec.origin if spec is not None else None
        if found is None or Path(found).resolve() != ours.resolve():
            raise RunError(f"tofu.run needs {ours}, but Python finds {found or 'no module'} for {package!r}: "
                           "rename that file, or run in another folder")  # fmt: skip
    return importlib.import_module("client.app"), importlib.import_module("server.app")
