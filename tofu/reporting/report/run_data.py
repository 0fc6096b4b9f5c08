"""Read a run folder into checked, typed values.

| file            | holds                                              | needed |
|-----------------|----------------------------------------------------|--------|
| `config.json`   | the settings, a flat object                        | yes    |
| `metrics.jsonl` | one object a round                                 | yes    |
| `ledger.jsonl`  | one object a message                               | no     |
| `summary.json`  | the totals, once the run has ended                 | no     |
| `samples.npz`   | real images and the proxies some rounds sent       | no     |

A run that still goes on may be in the middle of appending a line: an unfinished last line (one without its newline)
is left out. Everything else that does not read is a `RunError` that names the file and the line.
"""

import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tofu.errors import RunError
from tofu.reporting.report.fields import Fields, finite, read_lines, read_object

_PROXIES = re.compile(r"proxies_(\d{1,9})")


@dataclass(frozen=True)
class Failure:
    """A client whose reply of one round was not used, and why."""

    round: int
    client: str
    reason: str


@dataclass(frozen=True)
class Round:
    """One line of `metrics.jsonl`. What a round has not measured (or measured as NaN) is None.

    Attributes:
        clients: whose replies were used; in a secure round, those in the sum.
        clipped: values beyond their range in a secure round, of all clients together.
        furthest: how far out the furthest was at most, in units of its range.
        abandoned: why a secure round came to nothing, or "".
        epsilon: of differential privacy, spent up to this round; infinite beyond any bound, None without privacy.
        task: position of the task that this round trained.
        task_accuracies: of the model after this round, on each task; () where there are no tasks.
        plugins: "plugin/metric" -> its mean over the clients.
    """

    round: int
    kind: str
    accuracy: float | None
    loss: float | None
    train_loss: float | None
    explained_variance: float | None
    cosine: float | None
    seconds: float | None
    clients: int
    uplink_bytes: int
    downlink_bytes: int
    fedavg_uplink_bytes: int
    failures: tuple[Failure, ...]
    clipped: int | None
    furthest: float | None
    abandoned: str
    epsilon: float | None
    task: int | None
    task_accuracies: tuple[float | None, ...]
    plugins: Mapping[str, float | None]


@dataclass
class Traffic:
    """All messages of one direction and one kind of round; `payload_bytes` is None where nobody counted it."""

    direction: str
    kind: str
    messages: int | None
    bytes: int
    payload_bytes: int | None


@dataclass(frozen=True)
class Samples:
    """Images for the eye.

    `real` is uint8 [k, c, h, w] or None; `proxies` maps a round to float32 [n, c, h, w], what one client sent in it.
    """

    real: npt.NDArray[np.uint8] | None
    real_caption: str
    proxies: dict[int, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Baseline:
    """FedAvg run for the same rounds."""

    rounds: tuple[Round, ...]
    final_accuracy: float | None
    uplink_bytes: int


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it.

    Attributes:
        finished: whether there is a summary; without one the totals are those of the rounds so far.
        epsilon: of differential privacy, spent by all rounds; infinite beyond any bound, None without privacy.
        delta: that goes with it.
        stopped: why the run ended before its last round, or "".
        mean_accuracy: ACC over the tasks, in percent.
        backward_transfer: BWT over the tasks, in points.
    """

    config: dict[str, Any]
    rounds: tuple[Round, ...]
    traffic: tuple[Traffic, ...]
    samples: Samples | None
    baseline: Baseline | None
    finished: bool
    final_accuracy: float | None
    uplink_bytes: int
    downlink_bytes: int
    fedavg_uplink_bytes: int
    payload_ratio: float | None
    both_ratio: float | None
    seconds: float | None
    weights_sha256: str
    epsilon: float | None
    delta: float | None
    stopped: str
    mean_accuracy: float | None
    backward_transfer: float | None

    def setting(self, name: str) -> float:
        """A setting that is a number; 0 where an older run has not got it."""
        return _setting(self.config, name)

    @property
    def secure(self) -> tuple[Round, ...]:
        """The secure rounds, abandoned ones too."""
        return tuple(row for row in self.rounds if row.kind == "secure")

    @property
    def trained(self) -> tuple[Round, ...]:
        """The rounds in which clients trained: all but round 0."""
        return tuple(row for row in self.rounds if row.round > 0)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """All failures, in the order of the rounds."""
        return tuple(failure for row in self.rounds for failure in row.failures)

    @property
    def saving(self) -> float | None:
        """FedAvg's uplink bytes over this run's; None before anything was sent."""
        if not self.uplink_bytes or not self.fedavg_uplink_bytes:
            return None
        return self.fedavg_uplink_bytes / self.uplink_bytes


def read_run(run: Path) -> RunFolder:
    """Read the run folder `run`; `RunError` names the file (and line) that is missing or does not read."""
    if not run.is_dir():
        raise RunError(f"{run} is not a run folder")
    config = read_object(run / "config.json")
    rounds = _rounds(read_lines(run / "metrics.jsonl"))
    finished = (run / "summary.json").exists()
    summary = Fields(read_object(run / "summary.json") if finished else {}, f"{run / 'summary.json'}")

    def total(name: str) -> int:
        return summary.count(name) if name in summary.values else sum(getattr(row, name) for row in rounds)

    epsilon, delta = _privacy(summary, config, rounds)
    durations = [row.seconds for row in rounds if row.seconds is not None]
    return RunFolder(
        config=config,
        rounds=rounds,
        traffic=_traffic(run / "ledger.jsonl", rounds),
        samples=_samples(run / "samples.npz"),
        baseline=_baseline(summary),
        finished=finished,
        final_accuracy=_stated_or_last(summary, rounds),
        uplink_bytes=total("uplink_bytes"),
        downlink_bytes=total("downlink_bytes"),
        fedavg_uplink_bytes=total("fedavg_uplink_bytes"),
        payload_ratio=summary.number("payload_ratio"),
        both_ratio=summary.number("both_ratio") if "both_ratio" in summary.values else None,
        seconds=summary.number("seconds") if "seconds" in summary.values else (sum(durations) if durations else None),
        weights_sha256=summary.text_or_empty("weights_sha256"),
        epsilon=epsilon,
        delta=delta,
        stopped=summary.text_or_empty("stopped"),
        mean_accuracy=summary.number("mean_accuracy"),
        backward_transfer=summary.number("backward_transfer"),
    )


def _round(fields: Fields) -> Round:
    if "round" not in fields.values:
        raise RunError(f"{fields.where}: 'round' is missing")
    number = fields.count("round")
    entries = [Fields(entry, f"{fields.where} failures") for entry in fields.objects("failures")]
    return Round(
        round=number,
        kind=fields.text("kind"),
        accuracy=fields.number("accuracy"),
        loss=fields.number("loss"),
        train_loss=fields.number("train_loss"),
        explained_variance=fields.number("explained_variance"),
        cosine=fields.number("cosine"),
        seconds=fields.number("seconds"),
        clients=fields.count("clients"),
        uplink_bytes=fields.count("uplink_bytes"),
        downlink_bytes=fields.count("downlink_bytes"),
        fedavg_uplink_bytes=fields.count("fedavg_uplink_bytes"),
        failures=tuple(Failure(number, entry.text("client"), entry.text("reason")) for entry in entries),
        clipped=fields.count_or_none("clipped"),
        furthest=fields.number("furthest"),
        abandoned=fields.text_or_empty("abandoned"),
        epsilon=_epsilon(fields),
        task=fields.count_or_none("task"),
        task_accuracies=fields.numbers("task_accuracies"),
        plugins=fields.numbers_by_name("plugins"),
    )


def _epsilon(fields: Fields) -> float | None:
    """None where there is none; JSON has no infinity, and a run writes null for it."""
    value = fields.number("epsilon")
    return math.inf if value is None and "epsilon" in fields.values else value


def _rounds(lines: Iterator[Fields]) -> tuple[Round, ...]:
    # A run that was killed and resumed may have written a round twice: the later line is the one that counts.
    rows = {row.round: row for row in map(_round, lines)}
    return tuple(rows[number] for number in sorted(rows))


def _traffic(ledger: Path, rounds: tuple[Round, ...]) -> tuple[Traffic, ...]:
    found: dict[tuple[str, str], Traffic] = {}
    if ledger.exists():
        for fields in read_lines(ledger):
            direction, kind = fields.text("direction"), fields.text("kind")
            if direction not in ("uplink", "downlink"):
                raise RunError(f"{fields.where}: 'direction' must be 'uplink' or 'downlink', found {direction!r}")
            entry = found.setdefault((direction, kind), Traffic(direction, kind, 0, 0, 0))
            entry.messages = (entry.messages or 0) + 1
            entry.bytes += fields.count("bytes")
            entry.payload_bytes = (entry.payload_bytes or 0) + fields.count("payload_bytes")
    else:
        for row in rounds:
            for direction, size in (("uplink", row.uplink_bytes), ("downlink", row.downlink_bytes)):
                entry = found.setdefault((direction, row.kind), Traffic(direction, row.kind, None, 0, None))
                entry.bytes += size
    # Uplink first; within a direction the kinds stay in the order in which the run came to them.
    return tuple(
        sorted((entry for entry in found.values() if entry.bytes), key=lambda entry: entry.direction != "uplink")
    )


def _stated_or_last(fields: Fields, rounds: tuple[Round, ...]) -> float | None:
    """The final accuracy that a summary states, or the last one that its rounds measured."""
    measured = [row.accuracy for row in rounds if row.accuracy is not None]
    stated = fields.number("final_accuracy")
    return stated if stated is not None else (measured[-1] if measured else None)


def _setting(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    return (finite(value) or 0.0) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _privacy(
    summary: Fields, config: Mapping[str, Any], rounds: tuple[Round, ...]
) -> tuple[float | None, float | None]:
    """(epsilon, delta) of a run that has ended or still goes on; (None, None) without differential privacy."""
    if summary.number("delta") is not None:
        return _epsilon(summary), summary.number("delta")
    if summary.values or not _setting(config, "noise-multiplier"):
        return None, None
    return (rounds[-1].epsilon or 0.0) if rounds else 0.0, _setting(config, "privacy-delta")


def _baseline(summary: Fields) -> Baseline | None:
    found = summary.values.get("baseline")
    if found is None:
        return None
    where = f"{summary.where} baseline"
    if not isinstance(found, dict):
        raise RunError(f"{where} must be an object")
    fields = Fields(found, where)
    rounds = _rounds(Fields(row, f"{where} row {n}") for n, row in enumerate(fields.objects("metrics"), start=1))
    return Baseline(
        rounds=rounds,
        final_accuracy=_stated_or_last(fields, rounds),
        uplink_bytes=fields.count("uplink_bytes") or sum(row.uplink_bytes for row in rounds),
    )


def _samples(path: Path) -> Samples | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(
            f"{path} does not read as arrays: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    proxies: dict[int, npt.NDArray[np.float32]] = {}
    for name, array in arrays.items():
        if match := _PROXIES.fullmatch(name):
            proxies[int(match[1])] = _images(array, path, name).astype(np.float32)
    real = _images(arrays["real"], path, "real") if "real" in arrays else None
    if real is not None and real.dtype != np.uint8:
        raise RunError(f"{path}: 'real' must be uint8, found {real.dtype}")
    captions = np.atleast_1d(arrays.get("real_caption", np.array("real images"))).ravel()
    caption = " ".join(str(text) for text in captions[:4]) or "real images"
    return Samples(real, caption, {number: proxies[number] for number in sorted(proxies)})


def _images(array: npt.NDArray[Any], path: Path, name: str) -> npt.NDArray[Any]:
    if array.ndim != 4 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise RunError(f"{path}: {name!r} must hold images [n, c, h, w], found {array.dtype} {list(array.shape)}")
    return array
