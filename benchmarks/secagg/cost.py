"""What a round of secure aggregation costs either end, and how it is counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from tofu.secagg.graph import Topology

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Case:
    """What is aggregated.

    Attributes:
        clients: that share keys.
        parameters: float32 values of an update.
        topology: of the neighbors; both implementations use it.
        dropped: clients that go after they shared keys, before they send a vector.
    """

    clients: int
    parameters: int
    topology: Topology
    dropped: int

    @property
    def survivors(self) -> int:
        return self.clients - self.dropped


@dataclass(frozen=True)
class Cost:
    """Of one round.

    Attributes:
        client: seconds of a client that stays, without training.
        server: seconds.
        up: bytes that a client that stays sends, as contents of Flower messages.
        down: bytes that it receives, without the model.
        sampled: whether times were measured on a sample of the operations and scaled to their number.
    """

    client: float
    server: float
    up: float
    down: float
    sampled: bool


class Clock:
    """Adds up the processor seconds of calls: the machine has other work, too."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        began = time.process_time()
        result = call(*args, **kwargs)
        self.seconds += time.process_time() - began
        return result


def sampled(count: int, call: Callable[[], object], *, sample: int = 3) -> float:
    """Seconds that `count` equal calls take, from at most `sample` of them, after one to warm up where more than 1."""
    if not count:
        return 0.0
    clock, sample = Clock(), min(sample, count)
    if sample > 1:
        call()
    for _ in range(sample):
        clock.of(call)
    return clock.seconds / sample * count


def wire_bytes(**values: object) -> int:
    """Bytes of a message's content with these values in one record, as Flower writes it."""
    record = ConfigRecord(values)  # type: ignore[arg-type]
    return len(recorddict_to_proto(RecordDict({"t": record})).SerializeToString())


def update_of(parameters: int, seed: int) -> npt.NDArray[np.float32]:
    """An update: normal values of deviation 0.01."""
    return np.random.default_rng(seed).normal(0, 0.01, parameters).astype(np.float32)
