"""GradInversion: the gradient, BatchNorm's statistics, and agreement between several searches.

Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, "See through Gradients: Image Batch Recovery via GradInversion", CVPR
2021, arXiv 2104.07586, equations 5 to 12: with several seeds s searched for at once,

    |grad_W loss(x_s) - G|^2 + a_tv TV(x_s) + a_l2 |x_s|^2 + a_bn sum_l (|mu_l(x_s) - mu_l| + |var_l(x_s) - var_l|)
    + a_group |x_s - mean_s x_s|^2.

For an update of one step, mu_l and var_l are those of the batch itself, which follow from the change of the running
statistics; the paper uses the running statistics. The paper registers the seeds' images onto their mean before it
compares them; ours are too small to need this.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.base import Attack, Reconstruction, Watch, registry
from attacks.labels import guessed_labels
from attacks.observation import Observation
from attacks.simulated import SimulatedClient, relative_distance, search_adam, total_variation
from tofu.weights import removing


@registry.register("gradinversion")
@dataclass(frozen=True)
class GradInversion(Attack):
    """Adam on a group of seeds at once.

    Attributes:
        seeds: number of images searched for at once; the best is returned.
        max_evals: number of steps of all seeds together.
        variation, power, statistics, group: weights of the regularization terms.
        step: step size of Adam.
    """

    seeds: int = 2
    max_evals: int = 1000
    variation: float = 1e-3
    power: float = 1e-4
    statistics: float = 1.0
    group: float = 0.01
    step: float = 0.1
    needs: ClassVar[tuple[str, ...]] = ("gradient", "batchnorm")

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        client = SimulatedClient(observation, torch.float32)
        target, labels = client.target(as_gradient=True), guessed_labels(observation, generator)
        wanted = observation.batch_statistics

        def one(images: Tensor) -> Tensor:
            with _statistics(client.model) as seen:
                distance = relative_distance(client.gradient(images, labels), target)
            off = [
                (mean - wanted[name][0]).square().mean() + (variance - wanted[name][1]).square().mean()
                for name, (mean, variance) in seen.items()
            ]
            prior = self.variation * total_variation(images) + self.power * images.square().mean()
            return distance + prior + self.statistics * torch.stack(off).mean()

        def loss(seeds: Tensor) -> Tensor:
            apart = (seeds - seeds.mean(0, keepdim=True)).square().mean()
            return torch.stack([one(images) for images in seeds]).sum() + self.group * apart

        start = torch.stack([client.noise(len(labels), generator) for _ in range(self.seeds)])
        found = search_adam(loss, start, max_evals=self.max_evals, step=self.step, watch=watch)
        losses = [float(one(images.requires_grad_()).detach()) for images in found.point.unbind()]
        best = found.point[losses.index(min(losses))].detach()
        return Reconstruction(best, labels, min(losses), found.evals)


@contextmanager
def _statistics(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within the block: BatchNorm layer -> mean and variance of the last batch that it received."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, batch: Tensor) -> None:
        values = batch.transpose(0, 1).flatten(1)
        seen[name] = values.mean(1), values.var(1)  # BatchNorm's running variance is the unbiased one

    # Hooks before the layers: with others the gradients would be added in another order.
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs[0]))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.BatchNorm2d)
    ]
    with removing(handles):
        yield seen
