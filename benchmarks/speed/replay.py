"""What encoding costs over the rounds of a run, and what it explains: the updates of a recorded run, encoded again.

A small federation is trained with the default codec, and of some of its clients the weights, the target (the update and
the residual of error feedback) and the initial weights of each round are recorded. `replay` encodes these targets in
order, with the memory that a client has between rounds. So two versions of the codec are compared on the same targets:
run this once with each, on the same recording. Times are CPU seconds of one thread, over those of the client's local
epoch in the same process, alternating with the encodes.
"""

import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import find_data, joined, run_command, several, spread, write_results
from tofu.compression import uplink_compressor
from tofu.compression.error_feedback import ErrorFeedback
from tofu.data import LabeledImages, open_data
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, difference, explained_variance, load_weights, weights_of

CASES: dict[str, dict[str, Any]] = {
    "digits-mlp": {"dataset": "digits", "model": "mlp", "ratio": 100.0, "clients": 10, "rounds": 20, "local_epochs": 5,
                   "batch_size": 16, "lr": 0.1},
    "digits-cnn": {"dataset": "digits", "model": "cnn", "ratio": 200.0, "clients": 5, "rounds": 12, "local_epochs": 5,
                   "batch_size": 16, "lr": 0.05},
    "mnist-lenet5": {"dataset": "ylecun/mnist", "model": "lenet5", "ratio": 200.0, "clients": 3, "rounds": 10,
                     "local_epochs": 1, "batch_size": 32, "lr": 0.05, "train_images": 18_000},
    "cifar10-cnn": {"dataset": "uoft-cs/cifar10", "model": "cnn", "ratio": 200.0, "clients": 3, "rounds": 8,
                    "local_epochs": 1, "batch_size": 32, "lr": 0.03, "train_images": 15_000},
}  # fmt: skip
RECORDED = 2
"""Number of clients whose targets are recorded."""

TIMED_IMAGES = 640
"""Number of images on which the local epoch is timed, or all that a client has."""

Recording = dict[str, Any]


def local_config(settings: Settings) -> LocalTrainingConfig:
    training = settings.training
    return LocalTrainingConfig(epochs=training.local_epochs, batch_size=training.batch_size, lr=training.lr)


def open_case(case: str, seed: int) -> tuple[Settings, list[LabeledImages], ReferenceModel]:
    """The settings, the data of each client, and the reference model at the initial weights."""
    values = CASES[case] | {"seed": seed, "proxies_below": 1.0}
    if "/" in values["dataset"]:
        values["dataset"] = find_data(values["dataset"].split("/")[1], values["dataset"])
    settings = Settings.of(values)
    data = open_data(
        settings.data.dataset, clients=settings.data.clients, partition="dirichlet", alpha=0.5, seed=seed,
        train_images=settings.data.train_images,
    )  # fmt: skip
    model = build_model(settings.model.model, data.shape, seed=seed)
    clients = [data.client(number) for number in range(settings.data.clients)]
    return settings, clients, ReferenceModel(model.eval(), data.shape).as_built()


def record(case: str, seed: int) -> Recording:
    """Train a federation with the default codec, and keep what its first clients encode."""
    settings, clients, reference = open_case(case, seed)
    compressor = uplink_compressor(settings, "compressed", reference)
    feedback, memories = [ErrorFeedback() for _ in clients], [b"" for _ in clients]
    generator = torch.Generator().manual_seed(seed)
    rounds = []
    for round_ in range(settings.training.rounds):
        base, targets, total = weights_of(reference.model), [], None
        for number, data in enumerate(clients):
            load_weights(reference.model, base)
            train_locally(reference.model, data, local_config(settings), generator=generator)
            target = feedback[number].target(difference(weights_of(reference.model), base), round_ - 1)
            load_weights(reference.model, base)
            reference.model.eval()
            made = compressor.compress(reference, target, generator=generator, memory=memories[number])
            feedback[number] = ErrorFeedback.after(target, made.decoded, round_)
            memories[number] = made.memory
            targets.append(target)
            share = {name: value * (len(data) / sum(map(len, clients))) for name, value in made.decoded.items()}
            total = share if total is None else {name: total[name] + value for name, value in share.items()}
        assert total is not None
        rounds.append({"base": base, "targets": targets[:RECORDED]})
        load_weights(reference.model, {name: value + total[name] for name, value in base.items()})
        reference.model.eval()
        print(f"{case}, seed {seed}: recorded round {round_ + 1}", flush=True)
    return {"case": case, "seed": seed, "initial": reference.initial, "rounds": rounds}


def replay(recording: Recording, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each encode."""
    case, seed = recording["case"], recording["seed"]
    settings, clients, reference = open_case(case, seed)
    settings = settings.replace(**changes)
    compressor = uplink_compressor(settings, "compressed", reference)
    rows = []
    for number in range(RECORDED):
        memory = b""
        for round_, moment in enumerate(recording["rounds"]):
            base: Weights = moment["base"]
            load_weights(reference.model, base)
            sample = clients[number].subset(torch.arange(min(TIMED_IMAGES, len(clients[number]))))
            began = time.process_time()
            train_locally(reference.model, sample, local_config(settings), generator=torch.Generator())
            trained = (time.process_time() - began) * len(clients[number]) / len(sample)
            load_weights(reference.model, base)
            reference.model.eval()
            target = moment["targets"][number]
            generator = torch.Generator().manual_seed(1000 * seed + 100 * number + round_)
            began = time.process_time()
            made = compressor.compress(reference, target, generator=generator, memory=memory)
            encoded = time.process_time() - began
            memory = made.memory
            parameters = {name: target[name] for name in reference.param_spec.parameters}
            decoded = {name: made.decoded[name] for name in parameters}
            rows.append({
                "case": case, "seed": seed, "client": number, "round": round_ + 1,
                "explained_variance": explained_variance(parameters, decoded), "evals": made.evals,
                "encode_cpu": encoded, "epoch_cpu": trained, "images": len(clients[number]),
                "proxies": len(memory) > 1,
            })  # fmt: skip
    return rows


def summarize(rows: list[dict[str, Any]]) -> None:
    """Print the means of each case: early (first third of the rounds), late (last third), all."""
    for case in CASES:
        mine = [row for row in rows if row["case"] == case]
        if not mine:
            continue
        last = max(row["round"] for row in mine)
        thirds = [("early", 0, last // 3), ("late", last - last // 3, last), ("all", 0, last)]
        for name, after, until in thirds:
            part = [row for row in mine if after < row["round"] <= until]
            seeds = sorted({row["seed"] for row in part})

            def by_seed(key: str, part: list[dict[str, Any]] = part, seeds: list[int] = seeds) -> list[float]:
                return [statistics.fmean(row[key] for row in part if row["seed"] == seed) for seed in seeds]

            seconds = [a / b for a, b in zip(by_seed("encode_cpu"), by_seed("epoch_cpu"), strict=True)]
            print(
                f"{case:13} {name:5} explained {spread(by_seed('explained_variance'), 4)}  encode/epoch "
                f"{spread(seconds)}  encode {statistics.fmean(by_seed('encode_cpu')):.3f} s  evals "
                f"{statistics.fmean(by_seed('evals')):.0f}  proxies in {statistics.fmean(by_seed('proxies')):.0%}"
            )


def main(
    cases: Annotated[Any, several(str, CASES)] = joined(list(CASES)),
    seeds: Annotated[Any, several(int)] = joined([0, 1, 2]),
    recordings: Annotated[Path, typer.Option(help="folder; made if it lacks one")] = Path("recordings"),
    name: Annotated[str, typer.Option(help="write benchmarks/results/speed-replay-NAME.json")] = "",
    set: Annotated[Any, several(help="FIELD=VALUE, changes of the codec's settings")] = joined([]),
) -> None:
    """What encoding costs and explains over the rounds of a run: the updates of a recorded run, encoded again."""
    options = SimpleNamespace(**locals())
    torch.set_num_threads(1)
    changes = [change.split("=", 1) for change in options.set]
    rows = []
    for case in options.cases:
        for seed in options.seeds:
            path = options.recordings / f"{case}-{seed}.pt"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(record(case, seed), path)
            rows += replay(torch.load(path), {field: json.loads(value) for field, value in changes})
    summarize(rows)
    if options.name:
        print(write_results(f"speed-replay-{options.name}", settings=CASES, rows=rows, script="speed.replay"))


if __name__ == "__main__":
    run_command(main)
