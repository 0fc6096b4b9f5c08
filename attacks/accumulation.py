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
from attacks.simulated import SimulatedClient, relative_distance, search_lbfgs, total_variation
from attacks.simulation import Simulation


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
        plan = Simulation()
        labels = guessed_labels(observation, generator)
        labels = labels[torch.randperm(len(labels), generator=generator)[: plan.max_images]]
        plans = [plan.batches(message, len(labels), generator) for message in messages]
        shape = (len(labels), *clients[0].image_shape)

        def start() -> Tensor:
            return clients[0].noise(len(labels), generator).flatten()

        def loss(vector: Tensor) -> Tensor:
            images = vector.view(shape)
            distances = [
                relative_distance(client.update(images, labels, batches, lr), client.target())
                for client, (batches, lr) in zip(clients, plans, strict=True)
            ]
            return torch.stack(distances).mean() + self.variation * total_variation(images)

        found = search_lbfgs(loss, start, restarts=self.restarts, max_evals=self.max_evals, watch=watch)
        return Reconstruction(found.point.view(shape).float(), labels, found.loss, found.max_evals)
