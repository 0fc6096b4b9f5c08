"""How well an update is encoded after how much time, and what the server's decoding costs.

The small cnn (GroupNorm) on 5,000 CIFAR-10 images and LeNet-5 on 6,000 of MNIST: a network after two epochs, the update
of the next, and the default codec at 200x with more and more max_evals. Times are over that of the local epoch, in
the same process with one thread.
"""

import statistics
import time
from typing import Any

import torch

from benchmarks.common import find_data, print_table, run_command, spread, write_results
from tofu.compression import uplink_compressor
from tofu.data import open_data
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import cosine, difference, explained_variance, load_weights, weights_of

CASES: dict[str, dict[str, Any]] = {
    "mnist": {"dataset": "ylecun/mnist", "model": "lenet5", "train_images": 6_000},
    "cifar10": {"dataset": "uoft-cs/cifar10", "model": "cnn", "train_images": 5_000},
}
RATIO = 200.0
EVALUATIONS = (10, 25, 50, 100, 200, 400)
PAYLOADS = 100


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
    epoch = train_locally(model, data, config, generator=generator).seconds
    update = difference(weights_of(model), base)
    load_weights(model, base)
    model.eval()
    rows = []
    for max_evals in EVALUATIONS:
        settings = Settings.of(
            {"model": values["model"], "ratio": RATIO, "max_evals": max_evals, "tolerance": 0.0, "proxies_below": 1.0}
        )
        compressor = uplink_compressor(settings, "compressed", network)
        began = time.perf_counter()
        made = compressor.compress(network, update, generator=torch.Generator().manual_seed(seed))
        encode = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(PAYLOADS):
            compressor.decompress(network, made.body)
        decode = time.perf_counter() - began
        parameters = {name: update[name] for name in network.param_spec.parameters}
        row = {
            "case": case,
            "seed": seed,
            "max_evals": max_evals,
            "made": made.evals,
            "default": max_evals == Settings.of({}).codec.max_evals,
            "cosine": cosine(parameters, made.decoded),
            "explained_variance": explained_variance(parameters, made.decoded),
            "encode_over_epoch": encode / epoch,
            "decode_100_over_epoch": decode / epoch,
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main(
    seeds: int = 3,
) -> None:
    """How well an update is encoded after how much time, and what the server's decoding costs."""
    torch.set_num_threads(1)
    rows = [row for case in CASES for seed in range(seeds) for row in measure(case, seed)]
    print(write_results("speed", settings={"cases": CASES, "ratio": RATIO, "lr": 0.05, "batch_size": 32}, rows=rows))
    table = []
    for case in CASES:
        for max_evals in EVALUATIONS:
            mine = [row for row in rows if (row["case"], row["max_evals"]) == (case, max_evals)]
            table.append(
                (
                    case,
                    f"{max_evals}{' (default)' if mine[0]['default'] else ''}",
                    f"{statistics.fmean(row['made'] for row in mine):.0f}",
                    spread([row["cosine"] for row in mine]),
                    spread([row["encode_over_epoch"] for row in mine], 2),
                    spread([row["decode_100_over_epoch"] for row in mine], 2),
                )
            )
    header = ("case", "max_evals", "made, with trials", "cosine", "encode / epoch", "100 decodes / epoch")
    print_table(header, table)


if __name__ == "__main__":
    run_command(main)
