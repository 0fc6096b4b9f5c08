"""One trial: one attack on one kind of message in one scenario, with one seed.

A scenario is the dataset, the model, the rounds of training before the attack, and the client's number of images and of
local steps. The attacked client takes part in none of the earlier rounds, so its images are new to the model. Its batch
repeats as few labels as possible, which favors the attacker: gradients of images of one class are hard to distinguish
(Yin et al. 2021 assume that no label repeats).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attacks.base import AttackError, Reconstruction, Watch, make_attack
from attacks.messages import ClientRound, Message, local_round, observe
from attacks.metrics import Scores, lpips_network, score
from attacks.networks import attacked_model
from attacks.observation import Observation
from tofu.data import FederatedData, LabeledImages, open_data, to_float
from tofu.errors import DataError, SettingError
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import load_weights, weights_of

CLIENTS = 10
"""Number of simulated clients: the first is attacked, the others train the model before."""

TRAIN_IMAGES = 2000
"""Maximum number of training images of all clients together."""

OTHERS = 200
"""Number of images outside the batch by which the threshold of recovered images is calibrated."""


@dataclass(frozen=True)
class Scenario:
    """The conditions that all trials of one seed share.

    Attributes:
        dataset, model, norm: as in a run.
        lr: learning rate of all local training.
        seed: seed of the partition, the weights, the batch and all draws of codec and attack.
        pretrain_rounds: rounds of federated training before the attack.
        batch_size: images of the client, all of them in each step.
        steps: local steps.
        rounds: number of messages about these images that the attacker has, including this one.
        know_labels: whether the attacker knows the labels.
    """

    dataset: str
    model: str
    norm: str
    lr: float
    seed: int
    pretrain_rounds: int
    batch_size: int
    steps: int
    rounds: int = 1
    know_labels: bool = False

    @property
    def stream_name(self) -> str:
        """Names the random streams. Other texts would give other draws than those of the committed results."""
        return repr(self).replace("Scenario(", "Situation(", 1).replace("pretrain_rounds=", "moment=", 1)


@dataclass(frozen=True)
class AttackResult:
    """Result of one attack on one message.

    Attributes:
        scores: None if the attack was refused.
        refused: the reason, or "".
        loss: the attacker's final objective.
        evals: number of evaluations of the objective.
        payload_bytes: size of the message.
        originals, reconstructions: float32 in [-1, 1], paired by index; None if there are none.
        stopped_after: the time limit in seconds, if the attack was stopped by it; None if it ended by itself.
    """

    scores: Scores | None
    refused: str
    loss: float
    evals: int
    payload_bytes: int
    originals: Tensor | None
    reconstructions: Tensor | None
    stopped_after: float | None = None

    @staticmethod
    def of(
        found: Reconstruction, observation: Observation, truth: LabeledImages, others: LabeledImages,
        perceptual: torch.nn.Module | None, watch: Watch,
    ) -> "AttackResult":  # fmt: skip
        """Return the result of an attack that ran.

        Args:
            truth: the images that the attack is after.
            others: images that the update was not computed from.
            perceptual: network of LPIPS; None does not compute it.
            watch: that of the attack.
        """
        originals = to_float(truth.images)
        scores = score(
            found.images, found.labels, truth=originals, true_labels=truth.labels,
            others=to_float(others.images[:OTHERS]), classes=truth.classes, perceptual=perceptual,
        )  # fmt: skip
        shown = None
        if found.images is not None:
            pairs = torch.tensor(scores.pairs)
            shown = found.images[pairs.clamp_min(0)].clone()
            shown[pairs < 0] = 0.0
        return AttackResult(scores, "", found.loss, found.evals, observation.payload_bytes, originals, shown,
                            watch.seconds if watch.stopped else None)  # fmt: skip

    @staticmethod
    def refuse(reason: str, observation: Observation) -> "AttackResult":
        """Return the result of an attack that was refused."""
        return AttackResult(None, reason, math.nan, 0, observation.payload_bytes, None, None)


@dataclass
class TrialRunner:
    """Runs attacks and caches what trials have in common: data, trained networks and messages.

    The cache lives as long as this object.
    """

    perceptual: torch.nn.Module | None = field(default_factory=lpips_network)
    _networks: dict[object, ReferenceModel] = field(default_factory=dict)
    _messages: dict[object, tuple[Observation, LabeledImages]] = field(default_factory=dict)

    def run(self, scenario: Scenario, message: Message, attack: str, watch: Watch) -> AttackResult:
        """Attack one message.

        Raises:
            SettingError: the message or the attack cannot be made in this scenario.
        """
        observation, truth = self._message(scenario, message)
        generator = derive_generator(scenario.seed, scenario.stream_name, message.text, attack)
        try:
            found = make_attack(attack).run(observation, generator=generator, watch=watch)
        except AttackError as error:
            return AttackResult.refuse(str(error), observation)
        return AttackResult.of(found, observation, truth, open_clients(scenario).test(), self.perceptual, watch)

    def _message(self, scenario: Scenario, message: Message) -> tuple[Observation, LabeledImages]:
        key = (scenario, message)
        if key not in self._messages:
            self._messages.clear()  # trials are sorted by message, so one entry is enough
            self._messages[key] = _make_message(scenario, message, self._network(scenario))
        return self._messages[key]

    def _network(self, scenario: Scenario) -> ReferenceModel:
        key = (scenario.dataset, scenario.model, scenario.norm, scenario.lr, scenario.seed, scenario.pretrain_rounds)
        if key not in self._networks:
            self._networks[key] = trained_network(scenario)
        return self._networks[key]


def open_clients(scenario: Scenario) -> FederatedData:
    """Return the dataset, partitioned evenly over `CLIENTS` clients."""
    whole = open_data(scenario.dataset, clients=CLIENTS, partition="iid", seed=0)
    if int(whole.class_counts().sum()) <= TRAIN_IMAGES:
        return open_data(scenario.dataset, clients=CLIENTS, partition="iid", seed=scenario.seed)
    return open_data(scenario.dataset, clients=CLIENTS, partition="iid", train_images=TRAIN_IMAGES, seed=scenario.seed)


def trained_network(scenario: Scenario) -> ReferenceModel:
    """Return the model after `pretrain_rounds` rounds of federated averaging over all clients but the first."""
    data = open_clients(scenario)
    model = attacked_model(scenario.model, data.shape, norm=scenario.norm, seed=scenario.seed)
    network = ReferenceModel(model.eval(), data.shape).as_built()
    config = LocalTrainingConfig(epochs=1, batch_size=16, lr=scenario.lr)
    for round_ in range(1, scenario.pretrain_rounds + 1):
        results = []
        for client in range(1, CLIENTS):
            local = copy.deepcopy(model)
            generator = derive_generator(scenario.seed, round_, client, "train")
            train_locally(local, data.client(client), config, generator=generator)
            results.append(weights_of(local))
        load_weights(model, {n: torch.stack([r[n].float() for r in results]).mean(0) for n in results[0]})
    model.eval()
    return network


def _make_message(scenario: Scenario, message: Message, network: ReferenceModel) -> tuple[Observation, LabeledImages]:
    clients = drawn_clients(scenario, message.clients)
    config = LocalTrainingConfig(epochs=scenario.steps, batch_size=scenario.batch_size, lr=scenario.lr)
    generator = derive_generator(scenario.seed, scenario.stream_name, message.text)
    seen: list[Observation] = []
    for _ in range(scenario.rounds):
        rounds = [local_round(network, data, config, generator) for data in clients]
        seen.append(observe(message, rounds, generator=generator, know_labels=scenario.know_labels))
        network = _stepped(network, rounds)
    last = seen[-1]
    if scenario.rounds > 1:
        last = replace(last, earlier=tuple(seen[:-1]))
    images, labels = (torch.cat([getattr(one, name) for one in clients]) for name in ("images", "labels"))
    return last, LabeledImages(images, labels, clients[0].classes)


def drawn_clients(scenario: Scenario, count: int) -> list[LabeledImages]:
    """Return the images of `count` clients, of which the first is attacked,
    each with as few repeated labels as possible.
    """
    data = open_clients(scenario)
    if count > data.clients:
        raise SettingError("messages", f"secure:{count}", f"at most {data.clients} clients")
    drawn = []
    for number in range(count):
        own = data.client(number)
        if len(own) < scenario.batch_size:
            raise DataError(f"client {number} has {len(own)} images, a batch takes {scenario.batch_size}")
        generator = derive_generator(scenario.seed, number, "batch")
        order = torch.randperm(len(own), generator=generator)
        drawn.append(own.subset(order[_spread(own.labels[order])[: scenario.batch_size]]))
    return drawn


def _spread(labels: Tensor) -> Tensor:
    """Return an order of the rows in which every class comes once before any comes twice, and so on."""
    turns: list[int] = []
    met: dict[int, int] = {}
    for label in labels.tolist():
        turns.append(met.get(label, 0))
        met[label] = turns[-1] + 1
    return torch.tensor(turns).argsort(stable=True)


def _stepped(network: ReferenceModel, rounds: Sequence[ClientRound]) -> ReferenceModel:
    """Return the network after a round in which the mean update of these clients has a weight of 1 / `CLIENTS`."""
    model = copy.deepcopy(network.model)
    weights: Mapping[str, Tensor] = weights_of(model)
    displacement = {n: torch.stack([one.update[n] for one in rounds]).mean(0) / CLIENTS for n in weights}
    load_weights(model, {n: weights[n].float() + displacement[n] for n in weights})
    return replace(network, model=model.eval())
