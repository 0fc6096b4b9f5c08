"""Published attacks by two of ten clients against every rule that combines updates, on digits.

The clients train a multilayer perceptron, and the malicious ones know the updates of all others. Reported are the final
accuracy and, where a backdoor is attacked, the fraction of test images with the trigger that get the attacker's class.
A run that was interrupted goes on with the rows that its results lack.
"""

import json
import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import RESULTS, run_command, several, write_results
from tofu.data import FederatedData, LabeledImages
from tofu.errors import PayloadError, RunError
from tofu.evaluation import evaluate
from tofu.models import initial_model
from tofu.rng import derive_generator
from tofu.rounds import aggregators
from tofu.rounds.aggregation import limit_norm
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, add_update, difference, layout_of, load_weights, weights_of

FEDERATION: dict[str, Any] = {
    "dataset": "digits", "model": "mlp", "clients": 10, "rounds": 20, "local_epochs": 1, "batch_size": 32, "lr": 0.2,
    "server_lr": 1.0, "proxies_below": 1.0,
}  # fmt: skip
MALICIOUS = 2
MAX_NORM = 0.5
"""Of the rule max-update-norm, in the size of the honest updates."""

RULES = (*aggregators.names(), "max-update-norm")
TARGET, TRIGGER = 0, 2
"""The class that the backdoor's attacker wants, and the side of the white square that triggers it."""

PARTITIONS: dict[str, dict[str, Any]] = {
    "iid": {"partition": "iid"},
    "alpha 0.5": {"partition": "dirichlet", "alpha": 0.5},
}
BOOST = FEDERATION["clients"] / MALICIOUS
"""Factor with which both malicious updates together take the place of the mean (Bagdasaryan et al. 2020)."""


def random_direction(rows: Tensor, own: Tensor) -> Tensor:
    """A Gaussian vector 100 times as long as the mean of the others."""
    vector = torch.randn(own.shape, generator=torch.Generator().manual_seed(int(rows.numel())), dtype=own.dtype)
    return vector * float(100 * rows.mean(0).norm() / vector.norm())


ON_UPDATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sign flip": lambda rows, own: -4 * own,
    "ALIE": lambda rows, own: rows.mean(0) - 1.5 * rows.std(0),
    "IPM": lambda rows, own: -5 * rows.mean(0),
    "norm": random_direction,
    "boosted backdoor": lambda rows, own: BOOST * own,
}
"""Attack -> (updates of the honest clients [8, values], the malicious client's own [values]) -> what it sends.

ALIE: Baruch, Baruch, Goldberg 2019, with z = 1.5. IPM: Xie, Koyejo, Gupta 2019, with epsilon = 5.
"""
BACKDOORS = ("backdoor", "boosted backdoor")
ATTACKS = ("none", "sign flip", "ALIE", "IPM", "norm", "label flip", *BACKDOORS)


def with_trigger(images: Tensor) -> Tensor:
    """Images with a white square in the corner."""
    marked = images.clone()
    marked[..., -TRIGGER:, -TRIGGER:] = 255
    return marked


def poisoned(data: LabeledImages, attack: str) -> LabeledImages:
    """What a malicious client trains on: half of the images with the trigger, or all labels mirrored."""
    if attack in BACKDOORS:
        half = len(data) // 2
        images = torch.cat([with_trigger(data.images[:half]), data.images[half:]])
        labels = torch.cat([torch.full_like(data.labels[:half], TARGET), data.labels[half:]])
        return LabeledImages(images, labels, data.classes)
    if attack == "label flip":
        return LabeledImages(data.images, data.classes - 1 - data.labels, data.classes)
    return data


def as_row(update: Weights) -> Tensor:
    return torch.cat([value.flatten() for value in update.values()]).double()


def as_update(row: Tensor, like: Weights) -> Weights:
    parts = torch.split(row.float(), [value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def federate(rule: str, attack: str, settings: Settings) -> dict[str, float]:
    """Accuracy and backdoor success after the last round."""
    data = FederatedData.of(settings.data, settings.run.seed)
    clients = [data.client(number) for number in range(settings.data.clients)]
    clients = [poisoned(one, attack) if number < MALICIOUS else one for number, one in enumerate(clients)]
    model = initial_model(settings.model, data.shape, settings.run.seed)
    spec = layout_of(model)
    for round_ in range(1, settings.training.rounds + 1):
        base, config, updates = weights_of(model), LocalTrainingConfig.of(settings.training, round_), []
        for number, images in enumerate(clients):
            generator = derive_generator(settings.run.seed, round_, str(number), "train")
            train_locally(model, images, config, generator=generator)
            updates.append(difference(weights_of(model), base))
            load_weights(model, base)
        if forge := ON_UPDATES.get(attack):
            honest = torch.stack([as_row(update) for update in updates[MALICIOUS:]])
            updates[:MALICIOUS] = [as_update(forge(honest, as_row(u)), u) for u in updates[:MALICIOUS]]
        combined = aggregators.get("mean" if rule == "max-update-norm" else rule)(spec, MALICIOUS / len(clients))
        for update, images in zip(updates, clients, strict=True):
            combined.add(limit_norm(update, spec, MAX_NORM) if rule == "max-update-norm" else update, len(images))
        add_update(model, combined.mean())
    test = data.test()
    result = {"accuracy": evaluate(model, test).accuracy}
    if attack in BACKDOORS:
        others = test.labels != TARGET
        marked = LabeledImages(
            with_trigger(test.images[others]), torch.full_like(test.labels[others], TARGET), test.classes
        )
        result["backdoor"] = evaluate(model, marked).accuracy
    return result


def main(
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 3,
    partitions: Annotated[Any, several(accepted=PARTITIONS)] = "iid",
) -> None:
    """Published attacks by two of ten clients against every rule that combines updates, on digits."""
    torch.set_num_threads(1)
    path = RESULTS / "robust.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["partition"], row["rule"], row["attack"], row["seed"]) for row in rows}
    described = {**FEDERATION, "malicious": MALICIOUS, "max_norm": MAX_NORM}
    for partition in partitions:
        changes = PARTITIONS[partition]
        for seed in range(seeds):
            for attack in ATTACKS:
                for rule in RULES:
                    if (partition, rule, attack, seed) in done:
                        continue
                    try:
                        found = federate(rule, attack, Settings.of(FEDERATION | changes | {"seed": seed}))
                    except (PayloadError, RunError):  # the weights are so large that a loss or a sum is not finite
                        found = {"accuracy": math.nan}
                    key = {"partition": partition, "rule": rule, "attack": attack, "seed": seed}
                    rows.append(key | {n: v if math.isfinite(v) else None for n, v in found.items()})
                    print(rows[-1], flush=True)
                    write_results("robust", settings=described, rows=rows)


if __name__ == "__main__":
    run_command(main)
