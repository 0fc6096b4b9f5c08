"""How long a run will take, from steps of local training and an encode that are timed on this machine."""

import dataclasses
import time
from dataclasses import dataclass

import torch

from tofu.compression import uplink_compressor
from tofu.data import LabeledImages
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, copy_model, difference, weights_of

_TIMED_BATCHES = 16


@dataclass(frozen=True)
class PlannedSeconds:
    """Estimated time of a run on this machine, in seconds of wall clock.

    Evaluation, plugins and messages are not counted, and encodes of later rounds may take longer or shorter.

    Attributes:
        training: local training of all clients in all rounds.
        encoding: their encodes.
    """

    training: float
    encoding: float

    @property
    def total(self) -> float:
        return self.training + self.encoding


def estimate_seconds(
    settings: Settings, network: ReferenceModel, data: LabeledImages, *, images: int, compressed_rounds: int
) -> PlannedSeconds:
    """Train on the first batches of a client, encode the update, and multiply.

    Args:
        network: as the run will build it.
        data: the images of one client.
        images: number of training images of all clients.
        compressed_rounds: number of rounds with an encode per client.
    """
    training, server = settings.training, settings.server
    torch.set_num_threads(settings.run.threads)
    asked = max(server.min_clients, round(server.client_fraction * settings.data.clients), 1)
    parallel = min(settings.run.workers, asked)
    per_image, update = _train(settings, network, data)
    trained = images * asked / settings.data.clients * training.local_epochs
    encode = _encode_seconds(settings, network, update) if compressed_rounds else 0.0
    return PlannedSeconds(
        training.rounds * trained * per_image / parallel, compressed_rounds * asked * encode / parallel
    )


def _train(settings: Settings, network: ReferenceModel, data: LabeledImages) -> tuple[float, Weights]:
    """Seconds per image of local training, and the update that some batches make. The first batch is not counted."""
    config = dataclasses.replace(LocalTrainingConfig.of(settings.training, 1), epochs=1)
    generator = torch.Generator().manual_seed(settings.run.seed)
    some = data.subset(torch.arange(min(len(data), _TIMED_BATCHES * config.batch_size)))
    train_locally(copy_model(network.model), some.subset(torch.arange(1)), config, generator=generator)
    model = copy_model(network.model)
    result = train_locally(model, some, config, generator=generator)
    return result.seconds / len(some), difference(weights_of(model), weights_of(network.model))


def _encode_seconds(settings: Settings, network: ReferenceModel, update: Weights) -> float:
    compressor = uplink_compressor(settings, "proxy", network)
    began = time.perf_counter()
    compressor.compress(network, update, generator=torch.Generator().manual_seed(settings.run.seed))
    return time.perf_counter() - began
