"""CIFAR-10 with central differential privacy as in pfl-research's benchmark (Granqvist et al., arXiv 2404.06430).

1,000 users of 50 images, IID, 50 of them in each round; one local epoch of SGD; the server clips the updates and adds
the noise. As there, the noise is that of a round of 1,000 users out of a million, divided by 20, so the epsilon is that
of a deployment of this size and not of the run. Settings are those of their configuration file; the network has their
layers and initialization. A run that was interrupted goes on from its last evaluation, which is in FOLDER.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load, save
from torch import nn

from benchmarks.common import RESULTS, find_data, markdown_table, run_command, write_results
from server.server_noise import ServerNoise
from tofu.data import FederatedData
from tofu.evaluation import evaluate
from tofu.files import replace_file
from tofu.rng import derive_generator
from tofu.rounds.aggregation import Mean
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import add_update, difference, layout_of, load_weights, weights_of

FEDERATION: dict[str, Any] = {
    "partition": "iid", "normalization": "dataset", "clients": 1000, "client_fraction": 0.05, "rounds": 3000,
    "schedule": "fedavg", "local_epochs": 1, "batch_size": 10, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0,
    "clip_norm": 0.4, "min_separation": 1,
}  # fmt: skip
EPSILON, DELTA, NOISE_COHORT, POPULATION = 2.0, 1e-6, 1000, 1_000_000
EVERY = 25
"""Rounds between two evaluations."""


@lru_cache
def noise_multiplier(rounds: int) -> float:
    """Return the multiplier of a round of NOISE_COHORT users of POPULATION, by Poisson sampling, for EPSILON."""
    import dp_accounting
    from dp_accounting import pld

    def event(multiplier: float) -> Any:
        drawn = dp_accounting.PoissonSampledDpEvent(
            NOISE_COHORT / POPULATION, dp_accounting.GaussianDpEvent(multiplier)
        )
        return dp_accounting.SelfComposedDpEvent(drawn, rounds)

    interval = dp_accounting.ExplicitBracketInterval(0.3, 3.0)
    return float(dp_accounting.calibrate_dp_mechanism(
        lambda: pld.PLDAccountant(value_discretization_interval=1e-3), event, EPSILON, DELTA, interval, tol=1e-4
    ))  # fmt: skip


def simple_cnn(seed: int) -> nn.Module:
    """Build two convolutions and two dense layers, 1.6 million parameters."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip
    generator = derive_generator(seed, "model")
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            limit = layer.weight[0].numel() ** -0.5
            nn.init.uniform_(layer.bias, -limit, limit, generator=generator)
    faster: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return faster


class Federation:
    """A run with one seed, with or without noise, and its state in a file."""

    def __init__(self, noise: str, seed: int, folder: Path) -> None:
        scale = FEDERATION["client_fraction"] * FEDERATION["clients"] / NOISE_COHORT
        multiplier = scale * noise_multiplier(FEDERATION["rounds"]) if noise == "independent" else 0.0
        own = {"dataset": find_data("cifar10", "uoft-cs/cifar10"), "server_noise": noise, "seed": seed}
        self.settings = Settings.of(FEDERATION | own | {"noise_multiplier": multiplier})
        self.data = FederatedData.of(self.settings.data, seed)
        self.model, self.seed = simple_cnn(seed), seed
        self.server = ServerNoise(self.settings.privacy, layout_of(self.model)) if multiplier else None
        self.file, self.done = folder / f"{noise}-{seed}.safetensors", 0
        if self.file.exists():
            kept = load(self.file.read_bytes())
            self.done = int(kept.pop("rounds"))
            load_weights(self.model, kept)

    def run_round(self) -> None:
        """Run one round, as a run of these settings does."""
        round_, base, training = self.done + 1, weights_of(self.model), self.settings.training
        clients = self.settings.data.clients
        asked = round(self.settings.server.client_fraction * clients)
        drawn = torch.randperm(clients, generator=derive_generator(self.seed, round_, "sample"))[:asked].tolist()
        mean: Any = Mean(layout_of(self.model), 0.0)
        if self.server is not None:
            self.server.participation.begin(map(str, drawn))
            mean = self.server.begin_mean()
        for client in drawn:
            generator = derive_generator(self.seed, round_, str(client), "train")
            config = LocalTrainingConfig.of(training, round_)
            train_locally(self.model, self.data.client(client), config, generator=generator)
            mean.add(difference(weights_of(self.model), base), 1)
            load_weights(self.model, base)
        add_update(self.model, mean.mean())
        self.done = round_

    def row(self) -> dict[str, Any]:
        """Return the accuracy on all test images."""
        accuracy = evaluate(self.model, self.data.test()).accuracy
        noise = self.settings.privacy.server_noise
        return {"noise": noise, "seed": self.seed, "round": self.done, "accuracy": accuracy}

    def save(self) -> None:
        """Keep the state."""
        weights = {name: value.contiguous() for name, value in weights_of(self.model).items()}
        replace_file(self.file, save(weights | {"rounds": torch.tensor(self.done)}))


def main(
    folder: Annotated[Path, typer.Argument(help="keeps the state of runs")],
    noises: Annotated[str, typer.Option(help="none, independent or both, separated by a comma")] = "none,independent",
    rounds: Annotated[int, typer.Option(min=EVERY, help="stop after this round of the 3,000")] = 3000,
    seed: int = 0,
) -> None:
    """Run the rounds that are missing, and evaluate after each 25 of them."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True, parents=True)
    path = RESULTS / "central_dp.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    runs = {noise: Federation(noise, seed, folder) for noise in noises.split(",")}
    for target in range(EVERY, rounds + 1, EVERY):
        for federation in runs.values():
            while federation.done < target:
                federation.run_round()
                if federation.done % EVERY == 0:
                    rows.append(federation.row())
                    multiplier = noise_multiplier(FEDERATION["rounds"])
                    write_results("central_dp", settings=FEDERATION | {"noise_multiplier": multiplier}, rows=rows)
                    federation.save()
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the accuracy in % by round, where both runs have got to it."""
    of = {(row["noise"], row["round"]): f"{100 * row['accuracy']:.1f}" for row in rows}
    shared = sorted(round_ for noise, round_ in of if noise == "none" and ("independent", round_) in of)
    lines = [[str(round_), of["none", round_], of["independent", round_]] for round_ in shared]
    return markdown_table(("round", "without noise or clipping", "with both"), lines)


if __name__ == "__main__":
    run_command(main)
