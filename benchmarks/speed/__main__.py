"""How well an update is encoded after how much time, and what the server's decoding costs.

The small cnn (GroupNorm) on 5,000 CIFAR-10 images and LeNet-5 on 6,000 of MNIST: a network after two epochs, the update
of the next, and the default codec at 200x with more and more max_evals. Of `TRIAL_INTERVAL` encodes in succession the
first is a trial of the surrogate-beta, so that all of them count. Times are CPU seconds of one thread, over those of
the local epoch in the same process, which is timed before and after the encodes of each number of max_evals.
"""

import statistics
import time
from typing import Any

import torch

from benchmarks.common import find_data, print_table, run_command, spread, write_results
from tofu.codec.compressor import TRIAL_INTERVAL
from tofu.compression import uplink_compressor
from tofu.compression.base import CompressedUpdate, Compressor
from tofu.data import open_data
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, cosine, difference, explained_variance, load_weights, weights_of

CASES: dict[str, dict[str, Any]] = {
    "mnist": {"dataset": "ylecun/mnist", "model": "lenet5", "train_images": 6_000},
    "cifar10": {"dataset": "uoft-cs/cifar10", "model": "cnn", "train_images": 5_000},
}
RATIO = 200.0
EVALUATIONS = (10, 25, 45, 70, 100, 200)
PAYLOADS = 100

HEADER = ("data, network", "max-evals", "evaluations in the mean", "cosine", "encode / epoch", "trial / epoch",
          "100 decodes / epoch")  # fmt: skip


def measure(case: str, seed: int) -> list[dict[str, Any]]:
    """One row for each number of max_evals."""
    values = CASES[case]
    local = find_data(values["dataset"].split("/")[1], values["dataset"])
    data = open_data(local, clients=1, partition="iid", seed=seed, train_images=values["train_images"]).client(0)
    model = build_model(values["model"], data.shape, seed=seed)
    network = ReferenceModel(model, data.shape).as_built()
    config = LocalTrainingConfig(epochs=1, batch_size=32, lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        train_locally(model, data, config, generator=generator)
    base = weights_of(model)

    def timed_epoch() -> tuple[float, Weights]:
        """CPU seconds of a local epoch from `base`, and its update."""
        began = time.process_time()
        train_locally(model, data, config, generator=generator)
        taken, update = time.process_time() - began, difference(weights_of(model), base)
        load_weights(model, base)
        model.eval()
        return taken, update

    last, update = timed_epoch()
    parameters = {name: update[name] for name in network.param_spec.parameters}
    rows = []
    for max_evals in (EVALUATIONS[0], *EVALUATIONS):  # the first encode of a process takes longer, and is left out
        settings = Settings.of(
            {"model": values["model"], "ratio": RATIO, "max_evals": max_evals, "tolerance": 0.0, "proxies_below": 1.0}
        )
        compressor = uplink_compressor(settings, "compressed", network)
        made, times = encodes(compressor, network, update, seed)
        before, last = last, timed_epoch()[0]
        epoch = (before + last) / 2
        began = time.process_time()
        for _ in range(PAYLOADS):
            compressor.decompress(network, made[0].body)
        decode = time.process_time() - began
        row = {
            "case": case,
            "seed": seed,
            "max_evals": max_evals,
            "made": [one.evals for one in made],
            "default": max_evals == Settings.of({}).codec.max_evals,
            "cosine": statistics.fmean(cosine(parameters, one.decoded) for one in made),
            "explained_variance": statistics.fmean(explained_variance(parameters, one.decoded) for one in made),
            "encode_over_epoch": statistics.fmean(times) / epoch,
            "trial_over_epoch": times[0] / epoch,
            "decode_100_over_epoch": decode / epoch,
        }
        rows.append(row)
        print(row, flush=True)
    return rows[1:]


def encodes(
    compressor: Compressor, network: ReferenceModel, update: Weights, seed: int
) -> tuple[list[CompressedUpdate], list[float]]:
    """Encode an update as often as a client does from one trial to the next; return what was sent, and CPU seconds."""
    made: list[CompressedUpdate] = []
    times = []
    for number in range(TRIAL_INTERVAL):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        began = time.process_time()
        made.append(compressor.compress(network, update, generator=generator, memory=made[-1].memory if made else b""))
        times.append(time.process_time() - began)
    return made, times


def main(
    seeds: int = 3,
) -> None:
    """How well an update is encoded after how much time, and what the server's decoding costs."""
    torch.set_num_threads(1)
    rows = [row for case in CASES for seed in range(seeds) for row in measure(case, seed)]
    print(write_results("speed", settings={"cases": CASES, "ratio": RATIO, "lr": 0.05, "batch_size": 32}, rows=rows))
    print_table(HEADER, table_rows(rows))


def table_rows(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row for each case and each number of max_evals; mean and standard deviation over the seeds."""
    table = []
    for case, max_evals in dict.fromkeys((row["case"], row["max_evals"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["max_evals"]) == (case, max_evals)]
        table.append((
            f"{case}, {CASES[case]['model']}",
            f"{max_evals}{', the default' if mine[0]['default'] else ''}",
            f"{statistics.fmean(statistics.fmean(row['made']) for row in mine):.0f}",
            *(spread([row[key] for row in mine], 2 + (key == "cosine"))
              for key in ("cosine", "encode_over_epoch", "trial_over_epoch", "decode_100_over_epoch")),
        ))  # fmt: skip
    return table


if __name__ == "__main__":
    run_command(main)
