"""DLG, deep leakage from gradients: search for images and labels with the observed gradient.

Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019, arXiv 1906.08935, algorithm 1. From noise, by L-BFGS,

    x, y = argmin | grad_W loss(f(x; W), softmax(y)) - G |^2.

In a batch the labels start from different random values, or else images would swap places (their section 4.2 breaks
the symmetry by updating one image at a time).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Reconstruction, Watch, registry
from attacks.observation import Observation
from attacks.simulated import SimulatedClient, relative_distance, search_lbfgs


@registry.register("dlg")
@dataclass(frozen=True)
class Dlg(Attack):
    """L-BFGS over images and label logits.

    Attributes:
        restarts: maximum number of starts from new noise; the search stops once it is solved.
        max_evals: maximum number of evaluations of each restart.
    """

    restarts: int = 2
    max_evals: int = 600
    needs: ClassVar[tuple[str, ...]] = ("gradient",)

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        client, count = SimulatedClient(observation), observation.images
        target, classes = client.target(as_gradient=True), observation.network.shape.classes
        pixels = torch.Size((count, *client.image_shape))

        def parts(vector: Tensor) -> tuple[Tensor, Tensor]:
            return vector[: pixels.numel()].view(pixels), vector[pixels.numel() :].view(count, classes)

        def start() -> Tensor:
            logits = torch.randn(count, classes, generator=generator, dtype=client.dtype)
            return torch.cat([client.noise(count, generator).flatten(), logits.flatten()])

        def loss(vector: Tensor) -> Tensor:
            images, logits = parts(vector)
            return relative_distance(client.gradient(images, logits.softmax(1)), target)

        found = search_lbfgs(loss, start, restarts=self.restarts, max_evals=self.max_evals, watch=watch)
        images, logits = parts(found.point)
        return Reconstruction(images.float(), logits.argmax(1), found.loss, found.evals)
