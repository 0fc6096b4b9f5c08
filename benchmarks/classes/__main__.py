"""What it is worth to code positions by class, and what proxies add to that, in the same bytes.

LeNet-5 on MNIST, ten clients (Dirichlet 0.5), 12,000 images: a federation that sends ternary entries (STC) at 200x with
error feedback. What three clients would send in rounds 2, 6 and 12, residuals included, is compressed by STC, by the
proxy codec's correction alone, and by the whole codec. `bits` is what a position takes on average, signs not counted.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.common import find_data, print_table, run_command, spread, write_results
from tofu.codec.correction import slots_length, strata_of
from tofu.compression import uplink_compressor
from tofu.compression.coding import positions_length
from tofu.compression.error_feedback import ErrorFeedback
from tofu.data import FederatedData
from tofu.models import initial_model
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.rounds.aggregation import RunningMean
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, add_update, difference, explained_variance, load_weights, weights_of
from tofu.wire import HEADER_BYTES

FEDERATION: dict[str, Any] = {
    "dataset": "ylecun/mnist", "model": "lenet5", "train_images": 12_000, "clients": 10, "partition": "dirichlet",
    "alpha": 0.5, "local_epochs": 1, "batch_size": 32, "lr": 0.2, "compressor": "stc", "ratio": 200.0,
    "server_lr": 1.0, "proxies_below": 1.0,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "STC": {"compressor": "stc"},
    "correction alone": {"compressor": "proxy", "correction": 1.0},
    "proxies and correction": {"compressor": "proxy"},
}
MOMENTS = (2, 6, 12)
LOOKED_AT = (0, 1, 2)


def targets(settings: Settings, data: FederatedData) -> Iterator[tuple[int, int, ReferenceModel, Weights]]:
    """(round, client, network at the round's weights, what the client would compress), while the federation goes on."""
    model = initial_model(settings.model, data.shape, settings.run.seed)
    network = ReferenceModel(model.eval(), data.shape).as_built()
    config = LocalTrainingConfig.of(settings.training, 1)
    compressor = uplink_compressor(settings, "compressed", network)
    memories = [ErrorFeedback() for _ in range(settings.data.clients)]
    for round_ in range(1, MOMENTS[-1] + 1):
        base, mean = weights_of(model), RunningMean()
        for client in range(settings.data.clients):
            images = data.client(client)
            generator = derive_generator(settings.run.seed, round_, str(client), "train")
            train_locally(model, images, config, generator=generator)
            target = memories[client].target(difference(weights_of(model), base), round_ - 1)
            load_weights(model, base)
            model.eval()
            if round_ in MOMENTS and client in LOOKED_AT:
                yield round_, client, network, target
            generator = derive_generator(settings.run.seed, "none")
            decoded = compressor.compress(network, target, generator=generator).decoded
            memories[client] = ErrorFeedback.after(target, decoded, round_)
            mean.add(decoded, len(images))
        add_update(model, mean.mean())


def measure(network: ReferenceModel, target: Weights, settings: Settings) -> dict[str, Any]:
    compressor = uplink_compressor(settings, "compressed", network)
    made = compressor.compress(network, target, generator=torch.Generator().manual_seed(settings.run.seed))
    vector = torch.cat([made.decoded[name].flatten() for name in network.param_spec.parameters])
    row = {
        "bytes": HEADER_BYTES + len(made.body),
        "explained_variance": explained_variance(target, made.decoded),
        "max_evals": made.evals,
    }
    positions = np.flatnonzero(vector.numpy())
    if not made.evals:  # proxies decode to entries everywhere
        classes = strata_of(network)
        bits = positions_length(positions)
        if settings.codec.compressor == "proxy":
            bits = slots_length(np.sort(classes.slots[positions]), classes)
        row |= {"entries": positions.size, "bits": bits / positions.size}
    return row


def main(
    data: str = find_data("mnist", "ylecun/mnist"),
    seeds: int = 3,
) -> None:
    """What it is worth to code positions by class, and what proxies add to that, in the same bytes."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        settings = Settings.of(FEDERATION | {"dataset": data, "seed": seed})
        for round_, client, network, target in targets(settings, FederatedData.of(settings.data, settings.run.seed)):
            for method, changes in METHODS.items():
                made = measure(network, target, Settings.of(FEDERATION | {"seed": seed} | changes))
                rows.append({"seed": seed, "round": round_, "client": client, "method": method} | made)
            print(rows[-1], flush=True)
    print(write_results("classes", settings=FEDERATION | {"moments": MOMENTS}, rows=rows))
    table = []
    for round_ in MOMENTS:
        for method in METHODS:
            mine = [row for row in rows if (row["round"], row["method"]) == (round_, method)]
            sparse = "bits" in mine[0]
            table.append(
                (
                    f"{round_}",
                    method,
                    spread([row["entries"] for row in mine], 0) if sparse else "",
                    spread([row["bits"] for row in mine], 2) if sparse else "",
                    spread([row["explained_variance"] for row in mine]),
                )
            )
    print_table(("round", "payload", "entries", "bits a position", "explained variance"), table)


if __name__ == "__main__":
    run_command(main)
