"""Two attacks that use how the proxy codec encodes updates and what a payload contains.

`proxy-images` takes the proxies of the payload, at the size of the input, as the reconstruction. It would succeed if
proxies resembled a client's images.

`codec-aware` searches for images whose update would be decoded as the one that was received:

- The codec fits a scale for each tensor, so proxies convey each tensor's direction. The distance is therefore the mean
  over tensors of 1 - cosine, weighted by their fractions of the power.
- Entries of a top-k message are nearly exact, and those of a correction are exact to within a quantization step. These
  entries, in which the decoded update differs from that of the proxies alone, are also matched one by one.
- The first start are the proxies, whose gradients resemble the update; the other starts are noise.

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
from attacks.simulated import SimulatedClient, Tensors, relative_distance, search_images, total_variation
from attacks.simulation import MAX_IMAGES, simulated_batches
from tofu.codec.proxies import decode


@registry.register("proxy-images")
@dataclass(frozen=True)
class ProxyImages(Attack):
    """The proxies, each stretched to the range of pixels."""

    needs: ClassVar[tuple[str, ...]] = ("proxies",)

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        assert observation.proxies is not None
        return Reconstruction(stretched(observation), observation.proxies.labels.argmax(1)[: observation.images])


@registry.register("codec-aware")
@dataclass(frozen=True)
class CodecAware(Attack):
    """L-BFGS on the distance of `codec_distance`.

    Attributes:
        restarts: number of starts, the first from the proxies if there are any, the others from noise.
        max_evals: maximum number of evaluations of each restart.
        variation: weight of the total variation.
        entries: weight of the entries that the payload contains.
    """

    restarts: int = 2
    max_evals: int = 400
    variation: float = 1e-5
    entries: float = 1.0
    needs: ClassVar[tuple[str, ...]] = ("lr",)

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        client = SimulatedClient(observation)
        labels = guessed_labels(observation, generator)
        labels = labels[torch.randperm(len(labels), generator=generator)[:MAX_IMAGES]]
        batches, lr = simulated_batches(observation, len(labels), generator)
        distance = codec_distance(observation, client.target(), self.entries)
        starts = [client.noise(len(labels), generator) for _ in range(self.restarts)]
        if observation.proxies is not None:
            proxies = stretched(observation).to(client.dtype)
            starts[0] = proxies[torch.randint(len(proxies), (len(labels),), generator=generator)]

        def loss(images: Tensor) -> Tensor:
            return distance(client.update(images, labels, batches, lr)) + self.variation * total_variation(images)

        return search_images(client, labels, loss, generator, self.restarts, self.max_evals, watch, iter(starts))


def stretched(observation: Observation) -> Tensor:
    """Return the proxies at the size of the network's input, each from -1 to 1:
    float32 [n, channels, height, width].
    """
    assert observation.proxies is not None
    shape = observation.network.shape
    (images,) = observation.proxies.inputs
    images = F.interpolate(images.detach(), size=(shape.height, shape.width), mode="bilinear", align_corners=False)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return 2 * (images - low) / (high - low).clamp_min(1e-9) - 1


def sent_entries(observation: Observation) -> list[Tensor]:
    """Return for each parameter tensor, as bool, which entries the payload contains."""
    names = list(observation.network.param_spec.parameters)
    if observation.proxies is None or observation.proxy_settings is None:
        sparse = [observation.update[name] != 0 for name in names]
        # A message without zeros has about the same precision in all entries.
        return sparse if not all(bool(s.all()) for s in sparse) else [torch.zeros_like(s) for s in sparse]
    alone = decode(observation.network, observation.proxies, observation.proxy_settings)
    return [observation.update[name] != alone[name] for name in names]


def codec_distance(observation: Observation, target: Tensors, weight: float) -> Callable[[Tensors], Tensor]:
    """Return a distance between an update and those that the codec decodes to `target`."""
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
