"""Was this image among those that were trained on? Asked of a final model, and of a single message.

Three statistics, higher for members:

- loss: minus the model's loss on the image (Yeom et al., "Privacy Risk in Machine Learning", CSF 2018).
- calibrated: the offline attack of Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022,
  section VI: with phi = log(p / (1 - p)), p the softmax of the true label, and mu(x), sigma the mean and deviation of
  phi(x) over shadow models that were not trained on x,

      (phi(x) - mu(x)) / sigma.

  With few shadows one sigma serves all images, as their section VI-C does.
- payload: the cosine of the image's own gradient, downhill, and a decoded update. It needs no shadow models and one
  message, whatever its codec, and works on exact updates alike.

What counts is not the average: an attack that is sure of a few members is a breach of these. Therefore the
true-positive rates at false-positive rates of 1% and 0.1% are reported besides the area under the curve.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import AttackError
from attacks.observation import Observation
from attacks.simulated import SimulatedClient
from tofu.data import LabeledImages, to_float
from tofu.models import build_model
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig, train_locally

RATES = (0.01, 0.001)


@dataclass(frozen=True)
class Membership:
    """How well a statistic distinguishes members from others.

    Attributes:
        area: area under the ROC curve; 0.5 is chance.
        found: false-positive rate -> largest fraction of members found at that rate or a lower one. If there are fewer
            others than 1 / rate, none of them may be taken for a member.
        members, others: how many of each there were.
        curve: (false, true) positive rates, from (0, 0) to (1, 1).
    """

    area: float
    found: dict[float, float]
    members: int
    others: int
    curve: tuple[tuple[float, float], ...]


def roc(members: Tensor, others: Tensor) -> Membership:
    """The ROC curve of a statistic, float [n] of members and float [m] of others; ties count half.

    Raises:
        AttackError: one of the two is empty or holds a value that is no number.
    """
    for name, values in (("members", members), ("others", others)):
        if not len(values) or bool(values.isnan().any()):
            raise AttackError(f"the statistic of {name} has {len(values)} values, expected some, and all numbers")
    levels = torch.unique(torch.cat([members, others])).flip(0)
    true = (members.unsqueeze(0) >= levels.unsqueeze(1)).double().mean(1).tolist()
    false = (others.unsqueeze(0) >= levels.unsqueeze(1)).double().mean(1).tolist()
    curve = [(0.0, 0.0), *zip(false, true, strict=True)]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))
    found = {rate: max(t for f, t in curve if f <= rate) for rate in RATES}
    return Membership(area, found, len(members), len(others), tuple(curve))


@torch.no_grad()
def loss_statistic(model: nn.Module, data: LabeledImages) -> Tensor:
    """Minus the loss: float32 [n]."""
    return -F.cross_entropy(model.eval()(to_float(data.images)), data.labels, reduction="none")


@torch.no_grad()
def confidence(model: nn.Module, data: LabeledImages) -> Tensor:
    """phi = log(p / (1 - p)) of the true label, by differences of logits so that nothing overflows: float32 [n]."""
    logits = model.eval()(to_float(data.images))
    own = logits.gather(1, data.labels.unsqueeze(1)).squeeze(1)
    rest = logits.scatter(1, data.labels.unsqueeze(1), -math.inf).logsumexp(1)
    phi: Tensor = own - rest
    return phi


def calibrated_statistic(model: nn.Module, shadows: Sequence[nn.Module], data: LabeledImages) -> Tensor:
    """The offline statistic: float32 [n]; the shadows must not have been trained on `data`."""
    out = torch.stack([confidence(shadow, data) for shadow in shadows])
    spread = out.std(0, correction=0).square().mean().sqrt() if len(shadows) > 1 else torch.ones(())
    return (confidence(model, data) - out.mean(0)) / spread.clamp_min(1e-6)


def shadow_models(
    name: str, pool: LabeledImages, config: LocalTrainingConfig, *, norm: str, count: int, seed: int
) -> list[nn.Module]:
    """Models each trained on a random half of `pool`, images that the attacker has and the clients have not."""
    shadows = []
    for number in range(count):
        model = build_model(name, pool.shape, norm=norm, seed=seed + 1 + number)
        generator = derive_generator(seed, "shadow", number)
        half = pool.subset(torch.randperm(len(pool), generator=generator)[: max(1, len(pool) // 2)])
        train_locally(model, half, config, generator=generator)
        shadows.append(model.eval())
    return shadows


def payload_statistic(observation: Observation, candidates: LabeledImages) -> Tensor:
    """Cosine of each candidate's own step downhill with the decoded update: float32 [n].

    Raises:
        AttackError: candidates of another shape than the network takes.
    """
    if candidates.shape != observation.network.shape:
        raise AttackError(f"candidates are {candidates.shape}, the network takes {observation.network.shape}")
    client = SimulatedClient(observation, torch.float32)
    client.model.eval()  # one image has no batch statistics
    target = torch.cat([t.flatten() for t in client.target()])
    images, found = to_float(candidates.images), []
    for image, label in zip(images, candidates.labels, strict=True):
        gradient = client.gradient(image.unsqueeze(0), label.unsqueeze(0))
        found.append(F.cosine_similarity(-torch.cat([g.detach().flatten() for g in gradient]), target, dim=0))
    return torch.stack(found)
