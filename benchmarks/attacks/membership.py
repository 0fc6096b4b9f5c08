"""Membership inference on the digits: was an image among those that a final model, or one message, was trained on?

Three statistics, higher for members:

- loss: minus the model's loss on the image (Yeom et al., "Privacy Risk in Machine Learning", CSF 2018).
- calibrated: the offline attack of Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022,
  section VI: (phi(x) - mu(x)) / sigma with phi = log(p / (1 - p)), p the softmax of the true label, and mu(x), sigma
  the mean and deviation of phi(x) over shadow models that were not trained on x. As in their section VI-C, one sigma
  serves all images, because there are few shadow models.
- payload: the cosine of the image's own negative gradient and a decoded update. It needs one message and no shadow
  models.

Besides the area under the ROC curve, true-positive rates at false-positive rates of 1% and 0.1% are reported, because
an attack that is certain of a few members is a breach for these.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import auc, roc_curve
from torch import Tensor, nn

from attacks.base import AttackError
from attacks.messages import local_round, observe, parse_message
from attacks.observation import Observation
from attacks.simulated import SimulatedClient
from attacks.trials import Scenario, open_clients, trained_network
from benchmarks.common import print_table, spread
from tofu.data import LabeledImages, to_float
from tofu.models import build_model
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig, train_locally

MODEL = "mlp"
ROUNDS = 50
IMAGES = 16
"""Of the client whose message is looked at."""

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
    true = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    false, found, _ = roc_curve(true, torch.cat([members, others]).numpy(), drop_intermediate=False)
    at = {rate: float(found[false <= rate].max()) for rate in RATES}
    curve = tuple(zip(false.tolist(), found.tolist(), strict=True))
    return Membership(float(auc(false, found)), at, len(members), len(others), curve)


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


def membership_rows(messages: Sequence[str], *, seeds: int) -> list[dict[str, Any]]:
    """One row for each seed and statistic: area under the curve, and true positives at 1% and 0.1% false ones."""
    rows = []
    for seed in range(seeds):
        trained = Scenario("digits", MODEL, "group", 0.1, seed, ROUNDS, IMAGES, 1)
        data, network = open_clients(trained), trained_network(trained)
        members = _joined([data.client(number) for number in range(1, data.clients)])
        test = data.test()
        others, pool = test.subset(range(0, len(test), 2)), _joined([test.subset(range(1, len(test), 2))])
        pool = _joined([pool, data.client(0)])
        shadows = shadow_models(
            MODEL, pool, LocalTrainingConfig(ROUNDS, 16, 0.1), norm="group", count=4, seed=1000 + seed
        )
        model = network.model
        rows.append(_row(seed, "final model, loss", roc(loss_statistic(model, members), loss_statistic(model, others))))
        statistics = [calibrated_statistic(model, shadows, part) for part in (members, others)]
        rows.append(_row(seed, "final model, calibrated", roc(statistics[0], statistics[1])))
        fresh = trained_network(Scenario("digits", MODEL, "group", 0.1, seed, 0, IMAGES, 1))
        together = max(parse_message(message).clients for message in messages)
        clients = [data.client(number).subset(range(IMAGES)) for number in range(together)]
        generator = derive_generator(seed, "membership")
        sent = [local_round(fresh, images, LocalTrainingConfig(5, IMAGES, 0.1), generator) for images in clients]
        for message in messages:
            seen = observe(parse_message(message), sent, generator=generator)
            found = roc(payload_statistic(seen, clients[0]), payload_statistic(seen, others))
            rows.append(_row(seed, f"message {message}", found))
    return rows


def print_membership(rows: Sequence[dict[str, Any]]) -> None:
    """Mean and deviation over seeds."""
    table = []
    for statistic in dict.fromkeys(row["statistic"] for row in rows):
        mine = [row for row in rows if row["statistic"] == statistic]
        table.append([statistic, *(spread([row[key] for row in mine]) for key in ("area", "at_1_percent"))])
    if table:
        print()
        print_table(("statistic", "area under ROC", "found at 1% false"), table)


def _row(seed: int, statistic: str, found: Membership) -> dict[str, Any]:
    return {"seed": seed, "statistic": statistic, "area": found.area, "at_1_percent": found.found[0.01],
            "at_0.1_percent": found.found[0.001], "members": found.members, "others": found.others}  # fmt: skip


def _joined(parts: Sequence[LabeledImages]) -> LabeledImages:
    images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    return LabeledImages(images, labels, parts[0].classes)
