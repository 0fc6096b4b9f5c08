"""How long a run will take, from a training step and a gradient of the codec that are timed on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from tofu.reference_model import ReferenceModel
from tofu.settings import Settings

_ENOUGH_SECONDS = 0.5
_MAX_REPEATS = 20
_PASSES = 3
"""An evaluation of the proxies' objective and its gradient, in passes forward and backward over the proxies."""


@dataclass(frozen=True)
class PlannedSeconds:
    """Estimated time of a run on this machine, in seconds of wall clock.

    Attributes:
        training: local training of all clients in all rounds.
        encoding: their encodes, at most: an encode stops early once it gains little.
    """

    training: float
    encoding: float

    @property
    def total(self) -> float:
        return self.training + self.encoding


def estimate_seconds(
    settings: Settings, network: ReferenceModel, *, images: int, proxies: int, compressed_rounds: int
) -> PlannedSeconds:
    """Time one step of training and one batch of proxies, and multiply.

    Args:
        network: as the run will build it.
        images: number of training images of all clients.
        proxies: number of proxies in a payload; 0 for other compressors, whose time is not counted.
        compressed_rounds: number of rounds with an encode per client.
    """
    training, server = settings.training, settings.server
    torch.set_num_threads(settings.run.threads)
    asked = max(server.min_clients, round(server.client_fraction * settings.data.clients), 1)
    parallel = min(settings.run.workers, asked)
    batch = training.batch_size
    step = _seconds(lambda: _step(network, batch))
    steps = images * asked / settings.data.clients * training.local_epochs / batch
    gradient = _seconds(lambda: _step(network, proxies)) if proxies else 0.0
    encode = gradient * settings.codec.max_evals * _PASSES
    return PlannedSeconds(training.rounds * steps * step / parallel, compressed_rounds * asked * encode / parallel)


def _step(network: ReferenceModel, count: int) -> None:
    shape = network.shape
    inputs = torch.zeros(count, shape.channels, shape.height, shape.width)
    model = network.model
    loss = functional.cross_entropy(model(inputs), torch.zeros(count, dtype=torch.int64))
    torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def _seconds(run: Callable[[], None]) -> float:
    """The median time of `run`, after one call that is not counted."""
    run()
    times: list[float] = []
    while len(times) < _MAX_REPEATS and sum(times) < _ENOUGH_SECONDS:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]
