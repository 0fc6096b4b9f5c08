"""Images in closed form, if the network begins with a linear layer on the pixels.

Phong, Aono, Hayashi, Wang, Moriai, "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption", IEEE TIFS
2018, section 3: of a single image x, unit j of the first layer has the gradients dW_j = d_j x and db_j = d_j, so

    x = dW_j / db_j.

Over a batch every unit gives a mixture, sum_i d_ij x_i / sum_i d_ij. A unit that is active for one image only gives it
(Boenisch et al., "When the Curious Abandon Honesty", EuroS&P 2023). An image is distinguished from a mixture by
other units that give the same image, so candidates with the most agreement come first. The learning rate cancels, and
after several local steps the ratio is still a mixture of the images.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Reconstruction, Watch, registry
from attacks.observation import Observation

TINY = 1e-4
"""Units whose bias changed by less than this fraction of the largest change are treated as rounding errors."""

SAME = 0.02
"""Maximum mean absolute difference of pixels in [-1, 1] between two candidates of the same image."""

BEYOND = 1.1
"""Maximum magnitude of a pixel of an image in [-1, 1]."""


@registry.register("analytic")
@dataclass(frozen=True)
class Analytic(Attack):
    """The rows of the first layer's weight update divided by its bias update."""

    needs: ClassVar[tuple[str, ...]] = ("linear-first",)

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        layer, shape = observation.first_linear, observation.network.shape
        rows = observation.update[f"{layer}.weight"].double()
        bias = observation.update[f"{layer}.bias"].double()
        used = bias.abs() > TINY * bias.abs().max()
        candidates = rows[used] / bias[used].unsqueeze(1)
        # The largest bias updates first, because the division amplifies rounding errors.
        candidates = candidates[bias[used].abs().argsort(descending=True)]
        chosen = _chosen(candidates, observation.images, candidates.new_zeros(rows.shape[1]))
        images = chosen.clamp(-1, 1).view(-1, *shape.chw)
        return Reconstruction(images.float(), None)


def _chosen(candidates: Tensor, count: int, blank: Tensor) -> Tensor:
    """Return `count` different candidates of [k, pixels], those with the most agreement first."""
    inside = candidates[candidates.abs().amax(1) < BEYOND] if len(candidates) else candidates
    if not len(inside):
        inside = candidates if len(candidates) else blank.unsqueeze(0)
    apart = torch.cdist(inside, inside, p=1) / inside.shape[1]
    free = torch.ones(len(inside), dtype=torch.bool)
    chosen: list[Tensor] = []
    while len(chosen) < count:
        if not bool(free.any()):
            free[:] = True
        agreeing = ((apart < SAME) & free).sum(1).masked_fill(~free, -1)
        best = int(agreeing.argmax())
        chosen.append(inside[best])
        free &= apart[best] >= SAME
        free[best] = False
    return torch.stack(chosen)
