"""Read a run folder into checked, typed values.

| file            | holds                                              | required |
|-----------------|----------------------------------------------------|----------|
| `config.json`   | the settings, a flat object                        | yes      |
| `metrics.jsonl` | one `RoundRecord` per round                        | yes      |
| `ledger.jsonl`  | one object per message                             | no       |
| `summary.json`  | the `RunSummary`, once the run has finished        | no       |
| `samples.npz`   | real images, and the proxies of some rounds        | no       |
| `panels.json`   | panels of the plugins                              | no       |

A running process may be appending a line: a last line without its newline is skipped. Everything else that cannot be
read raises a `RunError` that names the file and the line.
"""

import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tofu.errors import RunError
from tofu.reporting.panels import read_panels
from tofu.rounds.panel import Panel
from tofu.rounds.record import (
    Baseline,
    Count,
    RoundKind,
    RoundRecord,
    RunSummary,
    from_dict,
    json_lines,
    read_json,
    read_rounds,
    read_summary,
)

_PROXIES = re.compile(r"proxies_(\d{1,9})")


@dataclass(frozen=True)
class _Message:
    """One line of ledger.jsonl."""

    kind: RoundKind
    direction: Literal["uplink", "downlink"]
    round: Count = 0
    client: str = ""
    bytes: Count = 0
    payload_bytes: Count = 0


@dataclass
class Traffic:
    """All messages of one direction and one kind of round; without a ledger, `payload_bytes` is None."""

    direction: str
    kind: str
    messages: int | None
    bytes: int
    payload_bytes: int | None


@dataclass(frozen=True)
class ReportImages:
    """Images for the report.

    Attributes:
        real: uint8 [k, c, h, w] or None.
        proxies: round -> float32 [n, c, h, w], sent by one client.
    """

    real: npt.NDArray[np.uint8] | None
    real_caption: str
    proxies: dict[int, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class RunData:
    """A run as read from its folder.

    Attributes:
        finished: whether there is a summary; without one, the totals are those of the rounds so far.
        epsilon, delta: of differential privacy; None without it, epsilon is infinite if no bound holds.
        model_epsilon: epsilon against those who see the models only; `epsilon` if none was recorded.
        panels: plugin name -> panel.
        left_out: who, and the file or row that was left out, with the reason; empty without data.json.
        client_bytes: client -> bytes of its messages, uplink and downlink; empty without a ledger.
    """

    config: dict[str, Any]
    rounds: tuple[RoundRecord, ...]
    traffic: tuple[Traffic, ...]
    left_out: tuple[tuple[str, str], ...]
    client_bytes: Mapping[str, tuple[int, int]]
    samples: ReportImages | None
    panels: Mapping[str, Panel]
    summary: RunSummary
    finished: bool
    final_accuracy: float | None
    uplink_bytes: int
    downlink_bytes: int
    fedavg_uplink_bytes: int
    seconds: float | None
    epsilon: float | None
    model_epsilon: float | None
    delta: float | None

    @property
    def baseline(self) -> Baseline | None:
        """A FedAvg run over the same rounds."""
        return self.summary.baseline

    @property
    def baseline_accuracy(self) -> float | None:
        """The final accuracy of the baseline."""
        found = self.baseline
        return _first(found.final_accuracy, _last_accuracy(found.metrics)) if found else None

    def setting(self, name: str) -> float:
        """Return a numeric setting; 0 if the run does not have it."""
        return _setting(self.config, name)

    @property
    def secure(self) -> tuple[RoundRecord, ...]:
        """The secure rounds, abandoned ones included."""
        return tuple(row for row in self.rounds if row.kind == "secure")

    @property
    def trained(self) -> tuple[RoundRecord, ...]:
        """All rounds but round 0."""
        return tuple(row for row in self.rounds if row.round > 0)

    @property
    def compresses(self) -> bool:
        """Whether the run has compressed rounds, or may have."""
        return has_compressed_rounds(self.config, self.rounds)

    @property
    def failures(self) -> int:
        """Number of replies that could not be used."""
        return sum(len(row.failures) for row in self.rounds)

    @property
    def saving(self) -> float | None:
        """FedAvg's uplink bytes over this run's; None before the first message."""
        if not self.uplink_bytes or not self.fedavg_uplink_bytes:
            return None
        return self.fedavg_uplink_bytes / self.uplink_bytes


def has_compressed_rounds(config: Mapping[str, Any], rounds: Sequence[RoundRecord]) -> bool:
    """Whether a run has compressed rounds: by its rounds, or before the first one by its schedule."""
    kinds = {row.kind for row in rounds if row.round > 0}
    return "compressed" in kinds if kinds else config.get("schedule") not in ("fedavg", "secure")


def read_run(run: Path) -> RunData:
    """Read a run folder. Raises RunError, naming file and line, if a file is missing or cannot be read."""
    if not run.is_dir():
        raise RunError(f"{run} is not a run folder")
    config = read_json(run / "config.json")
    if not isinstance(config, dict):
        raise RunError(f"{run / 'config.json'} must hold a JSON object, found {type(config).__name__}")
    rounds = read_rounds(run / "metrics.jsonl")
    found = read_summary(run / "summary.json")
    summary = found or RunSummary()
    durations = [row.seconds for row in rounds if row.seconds is not None]
    epsilon, delta = _privacy(found, config, rounds)
    messages = _messages(run / "ledger.jsonl")
    return RunData(
        config=config,
        rounds=rounds,
        traffic=_traffic(messages, rounds),
        left_out=_left_out(run / "data.json"),
        client_bytes=_client_bytes(messages or ()),
        samples=_samples(run / "samples.npz"),
        panels=read_panels(run),
        summary=summary,
        finished=found is not None,
        final_accuracy=_first(summary.final_accuracy, _last_accuracy(rounds)),
        uplink_bytes=summary.uplink_bytes or sum(row.uplink_bytes for row in rounds),
        downlink_bytes=summary.downlink_bytes or sum(row.downlink_bytes for row in rounds),
        fedavg_uplink_bytes=summary.fedavg_uplink_bytes or sum(row.fedavg_uplink_bytes for row in rounds),
        seconds=_first(summary.seconds, sum(durations) if durations else None),
        epsilon=epsilon,
        model_epsilon=next((row.model_epsilon for row in rounds[-1:] if row.model_epsilon is not None), epsilon),
        delta=delta,
    )


_LEFT_OUT = {"all": "left_out", "training data": "train_left_out", "server": "test_left_out"}


def _left_out(file: Path) -> tuple[tuple[str, str], ...]:
    """Return what data.json lists as left out: by the server, and by the clients that told; the file may be missing."""
    data = read_json(file) if file.exists() else {}
    try:
        found = {name: data.get(key) for name, key in _LEFT_OUT.items()}
        found |= {f"client {name}": client.get("left_out") for name, client in data.get("clients", {}).items()}
        return tuple((who, str(text)) for who, texts in found.items() for text in texts or ())
    except (AttributeError, TypeError) as error:
        raise RunError(f"{file} must hold an object, with lists of what was left out") from error


def _messages(ledger: Path) -> list[_Message] | None:
    if not ledger.exists():
        return None
    return [from_dict(_Message, values, where) for values, where in json_lines(ledger)]


def _traffic(messages: list[_Message] | None, rounds: tuple[RoundRecord, ...]) -> tuple[Traffic, ...]:
    found: dict[tuple[str, str], Traffic] = {}
    for message in messages or ():
        key = message.direction, message.kind
        entry = found.setdefault(key, Traffic(*key, 0, 0, 0))
        entry.messages = (entry.messages or 0) + 1
        entry.bytes += message.bytes
        entry.payload_bytes = (entry.payload_bytes or 0) + message.payload_bytes
    for row in rounds if messages is None else ():
        for direction, size in (("uplink", row.uplink_bytes), ("downlink", row.downlink_bytes)):
            entry = found.setdefault((direction, row.kind), Traffic(direction, row.kind, None, 0, None))
            entry.bytes += size
    # Uplink first; within a direction, kinds in the order of their first round.
    return tuple(
        sorted((entry for entry in found.values() if entry.bytes), key=lambda entry: entry.direction != "uplink")
    )


def _client_bytes(messages: Iterable[_Message]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for message in messages:
        up, down = found.get(message.client, (0, 0))
        more = message.bytes
        found[message.client] = (up + more, down) if message.direction == "uplink" else (up, down + more)
    return found


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _last_accuracy(rounds: tuple[RoundRecord, ...]) -> float | None:
    return _first(*(row.accuracy for row in reversed(rounds)))


def _setting(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    try:
        return float(value) if math.isfinite(value) else 0.0
    except OverflowError:
        return 0.0


def _privacy(
    summary: RunSummary | None, config: Mapping[str, Any], rounds: tuple[RoundRecord, ...]
) -> tuple[float | None, float | None]:
    """(epsilon, delta) of a finished or running run; (None, None) without differential privacy."""
    if summary is not None:
        return (None, None) if summary.delta is None else (summary.epsilon, summary.delta)
    if not _setting(config, "noise-multiplier"):
        return None, None
    return (rounds[-1].epsilon or 0.0) if rounds else 0.0, _setting(config, "privacy-delta")


def _samples(path: Path) -> ReportImages | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(
            f"{path} cannot be read as arrays: {str(error).splitlines()[0] if str(error) else error!r}"
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
    return ReportImages(real, caption, {number: proxies[number] for number in sorted(proxies)})


def _images(array: npt.NDArray[Any], path: Path, name: str) -> npt.NDArray[Any]:
    if array.ndim != 4 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise RunError(f"{path}: {name!r} must hold images [n, c, h, w], found {array.dtype} {list(array.shape)}")
    return array
