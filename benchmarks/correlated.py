"""Accuracy with the server's correlated noise against its independent noise at equal epsilon, on digits.

100 clients, of which each takes part in at most one of ten rounds in succession, with both kinds of noise: so the same
noise multiplier is the same epsilon. Step size and clip norm are the same for both and were not tuned. A run that was
interrupted goes on with the rows that its results lack.
"""

import json
import math
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import RESULTS, markdown_table, run_command, spread, write_results
from server.server_noise import ServerNoise
from tofu.data import FederatedData
from tofu.evaluation import evaluate
from tofu.models import initial_model
from tofu.privacy import epsilon_of
from tofu.rng import derive_generator
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import add_update, difference, layout_of, load_weights, weights_of

FEDERATION: dict[str, Any] = {
    "dataset": "digits", "model": "mlp", "clients": 100, "client_fraction": 0.1, "rounds": 60, "schedule": "fedavg",
    "local_epochs": 1, "lr": 0.2, "clip_norm": 0.25, "min_separation": 10,
}  # fmt: skip
KINDS, MULTIPLIERS = ("independent", "correlated"), (1.0, 2.0, 4.0)


def federate(kind: str, multiplier: float, seed: int) -> dict[str, Any]:
    """One run, with the server's own noise and choice of clients -> its row of results."""
    settings = Settings.of(FEDERATION | {"server_noise": kind, "noise_multiplier": multiplier, "seed": seed})
    data = FederatedData.of(settings.data, seed)
    model = initial_model(settings.model, data.shape, seed)
    server, returns = ServerNoise(settings.privacy, layout_of(model)), 0
    asked = round(settings.server.client_fraction * settings.data.clients)
    for round_ in range(1, settings.training.rounds + 1):
        base, config = weights_of(model), LocalTrainingConfig.of(settings.training, round_)
        able = server.participation.eligible(map(str, range(settings.data.clients)))
        drawn = torch.randperm(len(able), generator=derive_generator(seed, round_, "sample"))[:asked]
        returns += server.participation.may_return
        server.participation.begin(able[int(row)] for row in drawn)
        mean = server.begin_mean()
        for row in drawn:
            name = able[int(row)]
            generator = derive_generator(seed, round_, name, "train")
            train_locally(model, data.client(int(name)), config, generator=generator)
            mean.add(difference(weights_of(model), base), 1)
            load_weights(model, base)
        add_update(model, mean.mean())
    epsilon = epsilon_of(multiplier / math.sqrt(returns), settings.privacy.privacy_delta)
    accuracy = evaluate(model, data.test()).accuracy
    return {"kind": kind, "noise_multiplier": multiplier, "seed": seed, "accuracy": accuracy, "epsilon": epsilon}


def main(seeds: Annotated[int, typer.Option(min=1)] = 3) -> None:
    """Run both kinds of noise with each multiplier."""
    torch.set_num_threads(1)
    path = RESULTS / "correlated.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["kind"], row["noise_multiplier"], row["seed"]) for row in rows}
    for seed in range(seeds):
        for multiplier in MULTIPLIERS:
            for kind in KINDS:
                if (kind, multiplier, seed) not in done:
                    rows.append(federate(kind, multiplier, seed))
                    write_results("correlated", settings=FEDERATION, rows=rows)
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy in % by multiplier, and what correlation gains by seed."""
    lines = []
    for multiplier in MULTIPLIERS:
        kept = [row for row in rows if row["noise_multiplier"] == multiplier]
        of = {kind: [100 * row["accuracy"] for row in kept if row["kind"] == kind] for kind in KINDS}
        gained = [after - before for before, after in zip(*of.values(), strict=True)]
        cells = [spread(values, 1) for values in (*of.values(), gained)]
        lines.append([f"{multiplier:g}", f"{kept[0]['epsilon']:.2f}", *cells])
    return markdown_table(("noise multiplier", "epsilon", *KINDS, "gained, by seed"), lines)


if __name__ == "__main__":
    run_command(main)
