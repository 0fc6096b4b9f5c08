"""Images in closed form, where a network begins with a linear layer on the pixels.

Phong, Aono, Hayashi, Wang, Moriai, "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption", IEEE TIFS
2018, section 3: of a single image x, unit j of the first layer has the gradients dW_j = d_j x and db_j = d_j, so

    x = dW_j / db_j.

Over a batch every unit gives a mixture, sum_i d_ij x_i / sum_i d_ij. A unit that only one image switched on still gives
that image (Boenisch et al., "When the Curious Abandon Honesty", EuroS&P 2023). Different units that give the same image
tell these from mixtures, so candidates that others agree with come first. Step sizes cancel, and over several local
steps the ratio is still a mixture of the images.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Reconstruction, Watch, registry
from attacks.observation import Observation

TINY = 1e-4
"""Units whose bias moved less than this fraction of the largest displacement are treated as rounding errors."""

SAME = 0.02
"""Mean absolute difference of pixels, on a span of 2, up to which two candidates are the same image."""

BEYOND = 1.1
"""Pixels further out are no image's."""


@registry.register("analytic")
@dataclass(frozen=True)
class Analytic(Attack):
    """Rows of the first layer's weight over its bias."""

    needs: ClassVar[tuple[str, ...]] = ("linear-first",)

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        layer, shape = observation.first_linear, observation.network.shape
        rows = observation.update[f"{layer}.weight"].double()
        bias = observation.update[f"{layer}.bias"].double()
        used = bias.abs() > TINY * bias.abs().max()
        candidates = rows[used] / bias[used].unsqueeze(1)
        # The surest units first, since the division multiplies rounding.
        candidates = candidates[bias[used].abs().argsort(descending=True)]
        chosen = _chosen(candidates, observation.images, candidates.new_zeros(rows.shape[1]))
        images = chosen.clamp(-1, 1).view(-1, shape.channels, shape.height, shape.width)
        return Reconstruction(images.float(), None)


def _chosen(candidates: Tensor, count: int, blank: Tensor) -> Tensor:
    """`count` candidates [k, pixels] unlike each other, those that most others agree with first."""
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
