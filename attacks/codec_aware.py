"""An attack on the proxy codec by an attacker who knows how updates are encoded and what a payload contains.

Two attacks.

`proxy-images` looks at the payload itself: the proxies, at the size of the input, are the guess. If proxies resembled a
client's images, this is where it would show.

`codec-aware` searches for images whose update, *encoded*, would be the one that was decoded. What it knows:

- A scale is fitted for each tensor, so each tensor's direction is what proxies convey, and its length is that of the
  update's projection on it. The distance is thus by tensor, 1 - cosine, weighted by the tensor's share of the power.
- The entries of a top-k message are the update's own, nearly exact, those of a correction to within a step. They are
  where the decoded update differs from the proxies' alone, and are matched one by one as well.
- Proxies lie where gradients like the update's come from. They are one of the starts; the others are noise.

Several local steps are simulated as in `attacks.simulation`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import Attack, Reconstruction, Watch, registry
from attacks.labels import guessed_labels
from attacks.observation import Observation
from attacks.simulated import SimulatedClient, Tensors, relative_distance, search_lbfgs, total_variation
from attacks.simulation import Simulation
from tofu.codec.proxies import decode


@registry.register("proxy-images")
@dataclass(frozen=True)
class ProxyImages(Attack):
    """The proxies as they are, each stretched to the range of pixels."""

    needs: ClassVar[tuple[str, ...]] = ("proxies",)

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        assert observation.proxies is not None
        return Reconstruction(stretched(observation), observation.proxies.labels.argmax(1)[: observation.images])


@registry.register("codec-aware")
@dataclass(frozen=True)
class CodecAware(Attack):
    """L-BFGS on the codec's own distance.

    Attributes:
        restarts: starts, the first from the proxies where there are some, the others from noise.
        max_evals: of each.
        variation: weight of the total variation.
        entries: weight of the entries that the codec sent themselves.
    """

    restarts: int = 2
    max_evals: int = 400
    variation: float = 1e-5
    entries: float = 1.0
    needs: ClassVar[tuple[str, ...]] = ("lr",)

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        client = SimulatedClient(observation)
        plan = Simulation()
        labels = guessed_labels(observation, generator)
        labels = labels[torch.randperm(len(labels), generator=generator)[: plan.max_images]]
        batches, lr = plan.batches(observation, len(labels), generator)
        distance = codec_distance(observation, client.target(), self.entries)
        shape = (len(labels), *client.image_shape)
        starts = [client.noise(len(labels), generator) for _ in range(self.restarts)]
        if observation.proxies is not None:
            proxies = stretched(observation).to(client.dtype)
            starts[0] = proxies[torch.randint(len(proxies), (len(labels),), generator=generator)]
        remaining = iter(starts)

        def start() -> Tensor:
            return next(remaining).flatten()

        def loss(vector: Tensor) -> Tensor:
            images = vector.view(shape)
            return distance(client.update(images, labels, batches, lr)) + self.variation * total_variation(images)

        found = search_lbfgs(loss, start, restarts=self.restarts, max_evals=self.max_evals, watch=watch)
        return Reconstruction(found.point.view(shape).float(), labels, found.loss, found.max_evals)


def stretched(observation: Observation) -> Tensor:
    """The proxies at the size of the network's input, each from -1 to 1: float32 [n, channels, height, width]."""
    assert observation.proxies is not None
    shape = observation.network.shape
    (images,) = observation.proxies.inputs
    images = F.interpolate(images.detach(), size=(shape.height, shape.width), mode="bilinear", align_corners=False)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return 2 * (images - low) / (high - low).clamp_min(1e-9) - 1


def sent_entries(observation: Observation) -> list[Tensor]:
    """For each parameter tensor, which entries the codec sent themselves, as bool."""
    names = list(observation.network.param_spec.parameters)
    if observation.proxies is None or observation.proxy_settings is None:
        sparse = [observation.update[name] != 0 for name in names]
        # Messages without zeros send everything about as well: no entry is special.
        return sparse if not all(bool(s.all()) for s in sparse) else [torch.zeros_like(s) for s in sparse]
    alone = decode(observation.network, observation.proxies, observation.proxy_settings)
    return [observation.update[name] != alone[name] for name in names]


def codec_distance(observation: Observation, target: Tensors, weight: float) -> Callable[[Tensors], Tensor]:
    """How far an update is from one that the codec would have turned into the decoded update."""
    power = torch.stack([t.square().sum() for t in target])
    shares = power / power.sum().clamp_min(1e-30)
    sent = sent_entries(observation)
    entries = tuple(t[s] for t, s in zip(target, sent, strict=True))
    some = any(e.numel() for e in entries)

    def distance(update: Tensors) -> Tensor:
        angles = [1 - F.cosine_similarity(u.flatten(), t.flatten(), dim=0, eps=1e-20)
                  for u, t in zip(update, target, strict=True)]  # fmt: skip
        total = (shares * torch.stack(angles)).sum()
        if not some:
            return total
        return total + weight * relative_distance(tuple(u[s] for u, s in zip(update, sent, strict=True)), entries)

    return distance
