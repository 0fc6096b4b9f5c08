"""iDLG: infer the labels, then search for the images only.

Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", arXiv 2001.02610. The paper's method is for one
image, whose label is the only negative entry of the last bias's gradient. Our extension to batches counts the labels
(`attacks.labels`); their order is arbitrary, as is that of the images.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Reconstruction, Watch, registry
from attacks.labels import LabelSigns, guessed_labels
from attacks.observation import Observation
from attacks.simulated import SimulatedClient, relative_distance, search_images


@registry.register("idlg")
@dataclass(frozen=True)
class Idlg(Attack):
    """L-BFGS over the images.

    Attributes:
        restarts: maximum number of starts from new noise; the search stops once it is solved.
        max_evals: maximum number of evaluations of each restart.
    """

    restarts: int = 2
    max_evals: int = 600
    needs: ClassVar[tuple[str, ...]] = ("gradient", "linear-last")

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        client = SimulatedClient(observation)
        target, labels = client.target(as_gradient=True), self._labels(observation, generator)

        def loss(images: Tensor) -> Tensor:
            return relative_distance(client.gradient(images, labels), target)

        return search_images(client, labels, loss, generator, self.restarts, self.max_evals, watch)

    def _labels(self, observation: Observation, generator: torch.Generator) -> Tensor:
        if observation.images > 1 or observation.labels is not None:
            return guessed_labels(observation, generator)
        labels = LabelSigns().run(observation, generator=generator).labels
        assert labels is not None
        return labels
