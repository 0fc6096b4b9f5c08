"""Joint inversion of several messages of one client about the same images.

A client trains on the same images in every round, and compression loses different parts of each update. Images that fit
all messages,

    x = argmin sum_r | SGD(W_r; x, y) - W_r - U_r |^2 / |U_r|^2 + alpha TV(x),

are better determined than those that fit one. Each message is matched at its own base weights, which the server knows.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Reconstruction, Watch, registry
from attacks.labels import guessed_labels
from attacks.observation import Observation
from attacks.simulated import SimulatedClient, relative_distance, search_images, total_variation
from attacks.simulation import MAX_IMAGES, simulated_batches


@registry.register("accumulation")
@dataclass(frozen=True)
class Accumulation(Attack):
    """L-BFGS on the mean distance over all messages.

    Attributes:
        restarts: number of starts from new noise.
        max_evals: maximum number of evaluations of each restart.
        variation: alpha, the weight of the total variation.
    """

    restarts: int = 2
    max_evals: int = 300
    variation: float = 1e-5
    needs: ClassVar[tuple[str, ...]] = ("lr", "earlier")

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        messages = [*observation.earlier, observation]
        clients = [SimulatedClient(message) for message in messages]
        labels = guessed_labels(observation, generator)
        labels = labels[torch.randperm(len(labels), generator=generator)[:MAX_IMAGES]]
        plans = [simulated_batches(message, len(labels), generator) for message in messages]

        def loss(images: Tensor) -> Tensor:
            distances = [
                relative_distance(client.update(images, labels, batches, lr), client.target())
                for client, (batches, lr) in zip(clients, plans, strict=True)
            ]
            return torch.stack(distances).mean() + self.variation * total_variation(images)

        return search_images(clients[0], labels, loss, generator, self.restarts, self.max_evals, watch)
