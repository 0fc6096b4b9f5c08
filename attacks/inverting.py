"""Inverting Gradients: cosine distance to the gradient, total variation as a prior, and signed steps.

Geiping, Bauermeister, Droege, Moeller, "Inverting Gradients: How easy is it to break privacy in federated learning?",
NeurIPS 2020, arXiv 2003.14053, equation 4:

    x = argmin over x in [-1, 1] of 1 - <grad_W loss(x), G> / (|grad_W loss(x)| |G|) + alpha TV(x)

by Adam on the sign of the derivative; the paper's images are in [0, 1]. Labels are inferred first; the paper's
experiments assume that they are known.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Reconstruction, Watch, registry
from attacks.labels import guessed_labels
from attacks.observation import Observation
from attacks.simulated import SimulatedClient, angular_distance, search_adam, total_variation


@registry.register("inverting")
@dataclass(frozen=True)
class Inverting(Attack):
    """Adam with signed gradients on the cosine distance.

    Attributes:
        restarts: number of starts; the result with the smallest loss is kept.
        max_evals: number of steps of each restart; 4,800 or more in the paper.
        variation: alpha, the weight of the total variation.
        step: step size of Adam; the paper's normalized images have about twice the range of ours.
    """

    restarts: int = 2
    max_evals: int = 1000
    variation: float = 1e-4
    step: float = 0.1
    needs: ClassVar[tuple[str, ...]] = ("gradient",)

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        client = SimulatedClient(observation, torch.float32)
        target, labels = client.target(as_gradient=True), guessed_labels(observation, generator)

        def loss(images: Tensor) -> Tensor:
            return angular_distance(client.gradient(images, labels), target) + self.variation * total_variation(images)

        trials = []
        for _ in range(self.restarts):
            start = client.noise(len(labels), generator)
            trials.append(search_adam(loss, start, max_evals=self.max_evals, step=self.step, watch=watch, signed=True))
            if not watch.go_on():
                break
        best = min(trials, key=lambda trial: trial.loss)
        return Reconstruction(best.point, labels, best.loss, sum(trial.evals for trial in trials))
