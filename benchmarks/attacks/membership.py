"""Membership inference on the digits: of a final model, and of single messages in every form."""

from collections.abc import Sequence
from typing import Any

import torch

from attacks.membership import (
    Membership,
    calibrated_statistic,
    loss_statistic,
    payload_statistic,
    roc,
    shadow_models,
)
from attacks.messages import local_round, observe, parse_message
from attacks.trials import Scenario, open_clients, trained_network
from benchmarks.common import print_table, spread
from tofu.data import LabeledImages
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig

MODEL = "mlp"
ROUNDS = 50
IMAGES = 16
"""Of the client whose message is looked at."""


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
