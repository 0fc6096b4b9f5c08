"""Labels from the update of the last layer.

Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", arXiv 2001.02610, read the label of a single image
from a sign: with p the softmax and y the one-hot label, the gradient of the last bias is p - y, negative at the label
only. Wainakh et al., "User-Level Label Leakage from Gradients in Federated Learning", PoPETs 2022, take the labels of
a batch one by one from these gradients, with an offset that noise images can give. Here they are counted at once: over
n images

    db_c = mean_i (p_ic - y_ic),    so    n_c = n (p_c - db_c)

where p_c, the mean softmax, is estimated from the outputs for noise. Without a bias, the row sums of the weight's
gradient are used, divided by the mean sum of the features. The update of S local steps gives the mean of db over
the steps, and p_c is taken at the weights a fraction (S - 1) / 2S of the way from the old to the new ones.

Counts are rounded to integers that sum to n; the largest remainders are rounded up.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attacks.base import Attack, Reconstruction, Watch, registry
from attacks.observation import Observation

PROBES = 64
"""Number of noise images that the softmax is estimated from."""


@registry.register("label-signs")
@dataclass(frozen=True)
class LabelSigns(Attack):
    """The classes with the most negative entries of the last layer's gradient; in a batch, each class once."""

    needs: ClassVar[tuple[str, ...]] = ("linear-last",)

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        order = _last_gradient(observation, 1.0).argsort()
        labels = order[: observation.images]
        # With more images than classes, the labels repeat.
        return Reconstruction(None, labels.repeat(-(-observation.images // len(labels)))[: observation.images])


@registry.register("label-counts")
@dataclass(frozen=True)
class LabelCounts(Attack):
    """The number of images of each class that the update was computed from."""

    needs: ClassVar[tuple[str, ...]] = ("linear-last", "lr")

    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        assert observation.lr is not None
        images = observation.images
        mean = _last_gradient(observation, observation.lr * observation.steps)
        probability, features = _probed(observation, generator)
        if not _has_bias(observation):
            mean = mean / features.clamp_min(1e-6)
        return Reconstruction(None, _rounded(images * (probability - mean), images))


def guessed_labels(observation: Observation, generator: torch.Generator) -> Tensor:
    """Labels, int64 [n]: the known ones, or else by `LabelCounts`, or else random."""
    if observation.labels is not None:
        return observation.labels
    attack = LabelCounts()
    if attack.incompatibility(observation) is None:
        labels = attack.run(observation, generator=generator).labels
        assert labels is not None
        return labels
    return torch.randint(observation.network.shape.classes, (observation.images,), generator=generator)


def _has_bias(observation: Observation) -> bool:
    return f"{observation.last_linear}.bias" in observation.update


def _last_gradient(observation: Observation, lr: float) -> Tensor:
    """Return the gradient of the last bias, or without a bias the row sums
    of the weight's gradient: float32 [classes].
    """
    name = observation.last_linear
    if _has_bias(observation):
        return -observation.update[f"{name}.bias"] / lr
    return -observation.update[f"{name}.weight"].sum(1) / lr


def _probed(observation: Observation, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the mean softmax [classes] on noise over the local steps,
    and the mean sum of the last layer's inputs [1].
    """
    network = observation.network
    shape = network.shape
    noise = torch.randn(PROBES, *shape.chw, generator=generator).clamp(-1, 1)
    features: list[Tensor] = []
    layer = dict(network.model.named_modules())[observation.last_linear or ""]
    assert isinstance(layer, nn.Linear)
    hook = layer.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].sum(-1).mean()))
    with hook, torch.no_grad():
        way = (observation.steps - 1) / (2 * observation.steps)
        weights = {n: w + way * observation.update[n] for n, w in network.base.items()}
        probability = functional_call(network.model, weights, (noise,)).softmax(1).mean(0)
    return torch.nan_to_num(probability, nan=1 / shape.classes), features[0]


def _rounded(counts: Tensor, total: int) -> Tensor:
    """Labels [total] whose counts are nearest to the given ones [classes], which may be negative."""
    positive = counts.double().clamp_min(0)
    if positive.sum() <= 0:
        positive = torch.ones_like(positive)
    positive = positive * total / positive.sum()
    whole = positive.floor().long()
    order = (positive - whole).argsort(descending=True)
    whole[order[: total - int(whole.sum())]] += 1
    return torch.arange(len(counts)).repeat_interleave(whole)
