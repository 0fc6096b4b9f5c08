"""Records of rounds and of the whole run: the only schema of metrics.jsonl and summary.json.

The server builds these dataclasses, observers receive them, and reports read them back. `to_dict` and the `read_*`
functions are the only code that knows the JSON. Measurements that are missing, NaN or infinite are null in JSON and
None in Python. A file that does not match the schema raises a RunError of one line that names file, line and field.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BeforeValidator, Field, TypeAdapter, ValidationError

from tofu.errors import RunError
from tofu.rounds.panel import StrictFields
from tofu.settings.deprecated import present_kind


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number or null")
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _epsilon(value: object) -> float:
    number = _number(value)
    return math.inf if number is None else number


def _kind(value: object) -> object:
    return present_kind(value) if isinstance(value, str) else value


def _text(value: object) -> object:
    return "" if value is None else value


Number = Annotated[float | None, BeforeValidator(_number)]
Epsilon = Annotated[float | None, BeforeValidator(_epsilon)]
"""None without differential privacy; infinite if no bound holds, which JSON writes as null."""
Count = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(strict=True), BeforeValidator(_text)]
RoundKind = Annotated[str, Field(strict=True), BeforeValidator(_kind)]


@dataclass(frozen=True)
class Failure(StrictFields):
    """A client whose reply could not be used in a round.

    Attributes:
        node: Flower's node id, as text because it has 64 bits; empty where it is not known.
    """

    client: Annotated[str, Field(strict=True)]
    reason: Annotated[str, Field(strict=True)]
    node: Text = ""


@dataclass(frozen=True)
class ClientRecord(StrictFields):
    """Measurements of one client's reply in an open round.

    Attributes:
        explained_variance: explained variance of the decoded update, 1 - |decoded - update|^2 / |update|^2.
        examples: number of images that the client trained on; None under differential privacy.
        train_seconds, encode_seconds: time the client spent on local training and on compression.
        test_accuracy: accuracy, on its own test data, of the received weights with its own local layers.
    """

    client: Annotated[str, Field(strict=True)]
    node: Text = ""
    explained_variance: Number = None
    examples: Count | None = None
    train_seconds: Number = None
    encode_seconds: Number = None
    test_accuracy: Number = None


@dataclass(frozen=True)
class RoundRecord(StrictFields):
    """One round: one line of metrics.jsonl. Round 0 is the evaluation before training.

    Attributes:
        kind: "start", "compressed", "fedavg" or "secure".
        compressor: name of the clients' compressor in a compressed round, or "".
        accuracy, loss: those of the global model on the test data after the round; None where they cannot be measured.
        metrics: the user's own metrics of the global model, by name.
        clients: number of clients whose updates were aggregated.
        explained_variance, cosine: the decoded against the true update, mean over clients; None if not compressed.
        with_proxies: number of updates that came as proxies, with or without a correction, in a round whose compressor
            has any; the others are corrections alone.
        step_explained_variance: that of the compressed server step; None if the full weights were sent.
        server_step: the server's learning rate in this round, which server-lr=auto chooses; None in abandoned rounds.
        train_loss, train_seconds, encode_seconds: means over clients, weighted by examples.
        uplink_bytes, downlink_bytes: whole messages of all clients, headers included.
        fedavg_uplink_bytes: uplink of the same replies with float32 updates.
        seconds: wall-clock time of the round.
        epsilon: spent by the end of this round; None without differential privacy, infinite if no bound holds.
        model_epsilon: epsilon against observers of the models only; None without secret-sampling or server-noise.
        clip_norm: L2 norm to which clients clipped their updates; None without clip-quantile.
        by_client: one entry per reply of an open round.
        plugins: "plugin/metric" -> mean over clients, weighted by examples.
        task: task that this round trained, counted from 0; None without tasks.
        task_accuracies: accuracy on each task after this round.
        group_accuracies: accuracy of each client group's model; empty with one group.
        clipped: values of all clients that a secure round clipped.
        largest_clipped: upper bound of the largest clipped magnitude, in units of the clipping range (also read under
            its former name, furthest).
        abandoned: why a secure round was abandoned, or "".
        late: number of clients whose replies the round did not wait for; None without over-sampling.
        accuracy_quantiles: percent -> quantile of the clients' own `ClientRecord.test_accuracy` in an open round.
        notes: what the rounds send that the settings do not show; of round 0 only.
        link_seconds: client -> seconds that its messages would take over its simulated link.
    """

    round: Count
    kind: RoundKind
    compressor: Text = ""
    accuracy: Number = None
    loss: Number = None
    metrics: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    clients: Count = 0
    failures: tuple[Failure, ...] = ()
    explained_variance: Number = None
    cosine: Number = None
    with_proxies: Count | None = None
    step_explained_variance: Number = None
    server_step: Number = None
    train_loss: Number = None
    train_seconds: Number = None
    encode_seconds: Number = None
    uplink_bytes: Count = 0
    downlink_bytes: Count = 0
    fedavg_uplink_bytes: Count = 0
    seconds: Number = None
    epsilon: Epsilon = None
    model_epsilon: Epsilon = None
    clip_norm: Number = None
    by_client: tuple[ClientRecord, ...] = ()
    plugins: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    task: Count | None = None
    task_accuracies: tuple[Number, ...] = ()
    group_accuracies: tuple[Number, ...] = ()
    clipped: Count | None = None
    largest_clipped: Annotated[Number, Field(validation_alias=AliasChoices("largest_clipped", "furthest"))] = None
    abandoned: Text = ""
    late: Count | None = None
    accuracy_quantiles: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    link_seconds: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    notes: tuple[Text, ...] = ()

    @property
    def label(self) -> str:
        """The name of the round in reports: its compressor or its kind."""
        return round_label(self.kind, self.compressor)

    @property
    def shown_loss(self) -> tuple[str, float] | None:
        """The name and value of the loss that views show where there is no accuracy; None if no loss is known."""
        found = {"test loss": self.loss, "training loss": self.train_loss}
        return next(((name, loss) for name, loss in found.items() if self.accuracy is None and loss is not None), None)

    def __repr__(self) -> str:
        """Return one line, because a notebook shows records: there are 30 fields, one of them for each client."""
        accuracy = "unknown" if self.accuracy is None else f"{self.accuracy:.4f}"
        return (
            f"RoundRecord(round={self.round}, {self.label}, accuracy={accuracy}, clients={self.clients}, "
            f"uplink_bytes={self.uplink_bytes})"
        )


@dataclass(frozen=True)
class Baseline(StrictFields):
    """A FedAvg run over the same rounds, stored in summary.json for the report."""

    metrics: tuple[RoundRecord, ...] = ()
    final_accuracy: Number = None
    uplink_bytes: Count = 0
    run: Text = ""


@dataclass(frozen=True)
class ClassRecord(StrictFields):
    """The final model on the test samples of one class.

    Attributes:
        name: of the class, or its number.
        samples: number of its test samples.
        right: number of those that are classified right.
    """

    name: Annotated[str, Field(strict=True)]
    samples: Count
    right: Count


@dataclass(frozen=True)
class RunSummary(StrictFields):
    """The summary of a finished run: summary.json.

    Attributes:
        rounds: number of rounds that were run.
        uplink_ratio, both_ratio: FedAvg's bytes over this run's, uplink and both directions, whole messages.
        payload_ratio: float32 bytes of the updates over the bytes of their payloads.
        weights_sha256: SHA-256 of the final weights.
        mean_accuracy, backward_transfer: ACC in percent and BWT in points; None without tasks.
        epsilon, delta: of client-level differential privacy; None without it.
        model_epsilon: as of a round.
        stopped: why the run ended before its last round, or "".
        unreadable: number of images that clients and server left out because they cannot be read.
        declined: number of clients that could not take part.
        run: folder of the run.
        baseline: a FedAvg run to compare with, or None.
        by_class: the final model on each class of the test data; () if it does not classify.
    """

    final_accuracy: Number = None
    rounds: Count = 0
    uplink_bytes: Count = 0
    downlink_bytes: Count = 0
    fedavg_uplink_bytes: Count = 0
    fedavg_downlink_bytes: Count = 0
    uplink_ratio: Number = None
    both_ratio: Number = None
    payload_ratio: Number = None
    weights_sha256: Text = ""
    mean_accuracy: Number = None
    backward_transfer: Number = None
    epsilon: Epsilon = None
    model_epsilon: Epsilon = None
    delta: Number = None
    stopped: Text = ""
    unreadable: Count = 0
    declined: Count = 0
    run: Text = ""
    seconds: Number = None
    baseline: Baseline | None = None
    by_class: tuple[ClassRecord, ...] = ()


QUANTILES = (0, 10, 25, 50, 75, 90, 100)
"""Percentages of `RoundRecord.accuracy_quantiles`; 0 and 100 are the extremes."""

_SPARSE = frozenset((
    "epsilon", "model_epsilon", "delta", "clip_norm", "by_client", "metrics", "plugins", "task", "task_accuracies",
    "group_accuracies", "clipped", "largest_clipped", "abandoned", "late", "accuracy_quantiles", "link_seconds",
    "test_accuracy", "mean_accuracy", "backward_transfer", "stopped", "baseline", "node", "examples",
    "compressor", "notes", "by_class", "declined",
))  # fmt: skip
"""Fields that JSON omits at their default, since most runs do not have them."""


def round_label(kind: str, compressor: str) -> str:
    """Return the name of a round in lines, reports and folders: its kind, or the compressor where the user chose one.

    The default compressor may send proxies, a sparse correction alone, or both, so its rounds are called compressed.

    >>> round_label("compressed", "topk"), round_label("compressed", "my.module:Mine"), round_label("secure", "topk")
    ('topk', 'Mine', 'secure')
    >>> round_label("compressed", "proxy")
    'compressed'
    """
    return compressor.rpartition(":")[2] if kind == "compressed" and compressor not in ("", "proxy") else kind


_OF_SECURE = frozenset(("clipped", "largest_clipped", "abandoned"))

T = TypeVar("T")


def to_dict(record: Any) -> dict[str, Any]:
    """Return a record as plain JSON values.

    >>> to_dict(RoundRecord(3, "secure", accuracy=0.5, epsilon=math.inf))["epsilon"] is None
    True
    """
    found: dict[str, Any] = {}
    keep = _OF_SECURE if getattr(record, "kind", "") == "secure" else frozenset()
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        empty = value is None or value == "" or (isinstance(value, Sequence | Mapping) and not value)
        if not empty or field.name not in _SPARSE or field.name in keep:
            found[field.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}
"""The validator of each kind of record; building one takes milliseconds."""


def from_dict(kind: type[T], values: object, where: str) -> T:
    """Return a record from JSON values.

    Args:
        where: file and line, for the error.

    Raises:
        RunError: a field is unknown, missing or has the wrong type.
    """
    if not isinstance(values, dict):
        raise RunError(f"{where} must hold a JSON object, found {type(values).__name__}")
    try:
        record: T = (_ADAPTERS.get(kind) or _ADAPTERS.setdefault(kind, TypeAdapter(kind))).validate_python(values)
        return record
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] == "missing" else f", found {_shown(first['input'])}"
        raise RunError(f"{where}: {field!r}: {reason}{found}") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises RunError if it is missing or not JSON."""
    return parse_json(read_text(path), f"{path}")


def read_text(path: Path) -> str:
    """Return the text of a file of a run. Raises RunError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: is {path.parent} the folder of a run?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text. Raises RunError, with the line in a text of several lines, if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line, reason = "", str(error)
        if isinstance(error, json.JSONDecodeError):
            line, reason = f" line {error.lineno}" if "\n" in text else "", error.msg
        raise RunError(f"{where}{line} is not JSON: {reason}") from error


def json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """(value, "file line n") for each line of a file.

    A running or killed process may have written half of the last line; a last line without its newline is skipped if
    it is not JSON.

    Raises:
        RunError: another line is not JSON.
    """
    # str.splitlines would also split at characters that JSON allows inside a string.
    *lines, unfinished = read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield parse_json(line, where), where
    try:
        last = json.loads(unfinished)
    except (ValueError, RecursionError):
        return
    yield last, f"{path} line {len(lines) + 1}"


def read_rounds(path: Path) -> tuple[RoundRecord, ...]:
    """Return the rounds of a metrics.jsonl in ascending order;
    if a round occurs twice, as after a resume, the later line.
    """
    return ordered(from_dict(RoundRecord, values, where) for values, where in json_lines(path))


def ordered(records: Iterable[RoundRecord]) -> tuple[RoundRecord, ...]:
    """Records in ascending order; of several of one round, the last."""
    by_round = {record.round: record for record in records}
    return tuple(by_round[number] for number in sorted(by_round))


def read_summary(path: Path) -> RunSummary | None:
    """Return the summary of a run, or None if the run has not finished."""
    return from_dict(RunSummary, read_json(path), f"{path}") if path.exists() else None


def _shown(value: object) -> str:
    return " ".join(repr(value).split())[:60]
