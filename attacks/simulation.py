"""Reconstruct images from an update of several local steps by simulating the steps.

Dimitrov, Balunovic, Konstantinov, Vechev, "Data Leakage in Federated Averaging", TMLR 2022, arXiv 2206.12395: the
client's whole local training is part of the function that is inverted,

    x = argmin | SGD(W; x, y) - W - U |^2 / |U|^2,

differentiated through every step. The paper has a copy of each image for each epoch, coupled by a penalty that does not
depend on their order; here the epochs share the images, and their order is drawn once. If a step uses all of a client's
images, there is no order and no approximation.

A client with many images and steps is simulated with at most `max_images` images and `max_steps` steps, whose step size
is increased accordingly.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Reconstruction, Watch, registry
from attacks.labels import guessed_labels
from attacks.observation import Observation
from attacks.simulated import SimulatedClient, relative_distance, search_images

MAX_IMAGES, MAX_STEPS = 16, 10


@registry.register("simulation")
@dataclass(frozen=True)
class Simulation(Attack):
    """L-BFGS through the simulated steps.

    Attributes:
        restarts: maximum number of starts from new noise; the search stops once it is solved.
        max_evals: maximum number of evaluations of each restart.
        max_images: maximum number of simulated images.
        max_steps: maximum number of simulated steps.
    """

    restarts: int = 2
    max_evals: int = 400
    max_images: int = MAX_IMAGES
    max_steps: int = MAX_STEPS
    needs: ClassVar[tuple[str, ...]] = ("lr",)

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        client = SimulatedClient(observation)
        labels = guessed_labels(observation, generator)
        if len(labels) > self.max_images:
            labels = labels[torch.randperm(len(labels), generator=generator)[: self.max_images]]
        batches, lr = simulated_batches(observation, len(labels), generator, self.max_steps)
        target = client.target()

        def loss(images: Tensor) -> Tensor:
            return relative_distance(client.update(images, labels, batches, lr), target)

        return search_images(client, labels, loss, generator, self.restarts, self.max_evals, watch)


def simulated_batches(observation: Observation, count: int, generator: torch.Generator,
                      max_steps: int = MAX_STEPS) -> tuple[list[Tensor], float]:  # fmt: skip
    """Return the rows of each simulated step on `count` images, and the steps' size."""
    assert observation.lr is not None
    size = min(observation.batch_size, count)
    epochs = max(1, min(math.ceil(observation.steps / math.ceil(count / size)), observation.epochs))
    batches = [rows for _ in range(epochs) for rows in torch.split(torch.randperm(count, generator=generator), size)]
    batches = batches[: min(max_steps, observation.steps)]
    return batches, observation.lr * observation.steps / len(batches)
