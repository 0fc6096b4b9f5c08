"""DCT-SNN: encoder, conversion, speed, proxies and federations.

    python -m benchmarks.plugins dct-snn [--parts encoder,speed,codec,cifar,dropping,overlapping,federated]

- encoder: squared correlation of the summed spikes and the expanded pixels of CIFAR-10, compared with a Poisson code.
- speed: seconds to train on one batch: without spikes, spiking and fused over time, and spiking with one call of
  snnTorch's neuron and of every layer per time step (the same network before fusing).
- codec: explained variance of an update of a spiking network in the same bytes: by proxies and correction through the
  surrogate of firing rates, through the neurons themselves, and by the sparse correction alone.
- cifar: a small VGG trained without spikes on expanded pixels (Adam), converted at T = 48 and fine-tuned for one pass
  (Adam, the surrogate gradient); accuracy by kept frequencies; the same with a signed Poisson code.
- dropping: the same networks and training, but each batch with 16, 10, 6 or 3 frequencies, drawn at random; DCT only.
- overlapping: as dropping, with blocks that overlap by half, on fewer images, since that takes 3.5 times as long.
- federated: digits, 10 clients, Dirichlet 0.5, T = 16, compared with the same training by one client with all images.

Seeds that benchmarks/results/plugins-dct-snn-PART.json has already, with the same settings, are kept, so an interrupted
run continues.
"""

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import snntorch
import torch
import torch.nn.functional as F
from snntorch import spikegen
from torch import Tensor

from benchmarks.common import RESULTS, find_data, print_table, spread, write_results
from client.app import app
from server.app import serve_in_process
from tofu.codec.compressor import ProxyCompressor
from tofu.codec.options import CompressorOptions, ProxySettings
from tofu.data import LabeledImages, open_data, to_float
from tofu.models import build_model
from tofu.models.spiking import (
    FREQUENCIES,
    TRAINED_FREQUENCIES,
    DctEncoder,
    LeakyIntegrateFire,
    MeanOverTime,
    OverTime,
    QuantileSketch,
    RepeatOverTime,
    SpikingNetwork,
    balance_thresholds,
    dct_model,
    potentials,
    record_activity,
    spike,
)  # fmt: skip
from tofu.models.spiking.layers import split_time
from tofu.models.spiking.neuron import LEAK, _linear
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import difference, explained_variance, weights_of

PARTS = ("encoder", "speed", "codec", "cifar", "dropping", "overlapping", "federated")
KEPT = (16, 10, 6, 3, 1)
SETTINGS: dict[str, Any] = {
    "cifar": {"model": "dct-snn-small", "images": 50_000, "test": 2000, "epochs": 20, "fine-tuning images": 20_000,
              "ann lr": 2e-3, "snn lr": 5e-4, "batch size": 32, "steps": 48},
    "dropping": {"model": "dct-snn-small", "images": 50_000, "test": 2000, "epochs": 20, "fine-tuning images": 20_000,
                 "ann lr": 2e-3, "snn lr": 5e-4, "batch size": 32, "steps": 48},
    "overlapping": {"stride": 2, "images": 15_000, "test": 1000, "epochs": 10, "fine-tuning images": 5000,
                    "ann lr": 2e-3, "snn lr": 5e-4, "batch size": 32, "steps": 48},
    "codec": {"dataset": "digits", "model": "snn-small", "ratios": [50, 100], "local epochs": 5, "lr": 0.1},
    "federated": {"dataset": "digits", "model": "dct-snn-small", "cycles": 1, "rounds": 24, "local epochs": 3,
                  "lr": 0.1, "last lr factor": 0.05, "momentum": 0.9, "ema decay": 0.5, "clients": 10, "alpha": 0.5,
                  "ratio": 20, "secure ratio": 4, "max evals": 20},
}  # fmt: skip

Row = dict[str, Any]


class RateEncoder(OverTime):
    """A signed Poisson code of the expanded pixels: a pixel of size |p| <= 1/2 spikes at the rate 2 |p|."""

    def __init__(self, encoder: DctEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.encoder.expanded(images)
        if not self.spiking:
            return pixels
        spikes: Tensor = spikegen.rate((2 * pixels.abs()).clamp(max=1), num_steps=self.steps)
        return (spikes * pixels.sign()).flatten(0, 1)


def cifar(images: int, test: int, seed: int) -> tuple[LabeledImages, LabeledImages]:
    """Training and test images of CIFAR-10."""
    data = open_data(
        find_data("cifar10", "uoft-cs/cifar10"), clients=1, partition="iid", seed=seed, train_images=images,
        test_images=test,
    )  # fmt: skip
    return data.client(0), data.test()


def fit_encoder(encoder: DctEncoder, images: Tensor, tail: float = 0.03) -> None:
    """Set the thresholds to the percentiles of these images' components."""
    sketch = QuantileSketch()
    for part in torch.split(images, 32):
        sketch.add(encoder.components(part))
    encoder.thresholds.copy_(torch.tensor([sketch.quantile(q, ignore_zeros=True) for q in (tail, 1 - tail)]))


def encoder_rows(seed: int) -> list[Row]:
    """r2 and spikes per pixel and step of both codes, on test images; thresholds from training images."""
    train, test = cifar(500, 200, seed)
    rows = []
    for stride in (2, 4):
        encoder = DctEncoder(stride)
        fit_encoder(encoder, to_float(train.images[:200]))
        images = to_float(test.images)
        pixels = encoder.expanded(images)
        for steps in (16, 32, 48):
            encoder.steps = steps
            ours = split_time(encoder(images), steps)
            poisson = spikegen.rate((pixels + 0.5).clamp(0, 1), num_steps=steps)
            rows.append({"stride": stride, "steps": steps, "thresholds": encoder.thresholds.tolist(),
                         "dct r2": _r2(ours, pixels), "poisson r2": _r2(poisson, pixels),
                         "dct spikes": float(ours.abs().mean()), "poisson spikes": float(poisson.mean())})  # fmt: skip
    return rows


def _r2(spikes: Tensor, pixels: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([spikes.sum(0).flatten(), pixels.flatten()]))[0, 1] ** 2)


def loop_over_time(network: SpikingNetwork, images: Tensor) -> Tensor:
    """The forward pass before fusing: every layer and snnTorch's neuron once per time step."""
    encoded = split_time(network[0](images), network.steps)
    neurons: dict[str, Any] = {}
    states: dict[str, Tensor] = {}
    total = torch.zeros(())
    for currents in encoded:
        x = currents
        for name, module in network.named_children():
            if isinstance(module, LeakyIntegrateFire):
                neuron = neurons.setdefault(
                    name, snntorch.Leaky(LEAK, spike_grad=snntorch.surrogate.custom_surrogate(_linear))
                )
                x, states[name] = neuron(x, states.get(name, torch.zeros_like(x)))
            elif not isinstance(module, DctEncoder | MeanOverTime):
                x = module(x)
        total = total + x
    return total / network.steps


def speed_rows(seed: int) -> list[Row]:
    """CPU seconds for one training step of dct-snn-small on 16 images, the fastest of five."""
    rows = []
    for dataset in ("digits", "cifar10"):
        digits = open_data("digits", clients=1, partition="iid", seed=seed)
        data = digits.client(0) if dataset == "digits" else cifar(100, 100, seed)[0]
        images, labels = to_float(data.images[:16]), data.labels[:16]
        network = build_model("dct-snn-small", data.shape, seed=seed)
        assert isinstance(network, SpikingNetwork)
        row: Row = {"dataset": dataset, "steps": network.steps}
        row["fused"] = _fastest(network, images, labels)
        row["loop"] = _fastest(partial(loop_over_time, network), images, labels)
        with torch.no_grad():
            row["largest difference"] = float((network(images) - loop_over_time(network, images)).abs().max())
        network.spiking = False
        row["without spikes"] = _fastest(network, images, labels)
        rows.append(row)
    return rows


def _fastest(forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    times = []
    for _ in range(5):
        began = time.process_time()
        torch.autograd.backward(F.cross_entropy(forward(images), labels))
        times.append(time.process_time() - began)
    return min(times)


def codec_rows(seed: int) -> list[Row]:
    """Two clients' updates, of the initial model and of one that has been trained for three passes."""
    given = SETTINGS["codec"]
    data = open_data("digits", clients=10, partition="dirichlet", alpha=0.5, seed=seed)
    start = build_model(given["model"], data.shape, seed=seed)
    initial = {name: p.detach().clone() for name, p in start.named_parameters()}
    config = LocalTrainingConfig(epochs=given["local epochs"], batch_size=16, lr=given["lr"])
    rows = []
    for passes in (0, 3):
        model = copy.deepcopy(start)
        for number in range(10 * passes):
            train_locally(model, data.client(number % 10), LocalTrainingConfig(epochs=1, batch_size=16, lr=given["lr"]),
                          generator=derive_generator(seed, number, "warm up"))  # fmt: skip
        trained = copy.deepcopy(model)
        train_locally(trained, data.client(seed), config, generator=derive_generator(seed, passes, "local"))
        update = difference(weights_of(trained), weights_of(model))
        reference = ReferenceModel(model.eval(), data.shape, initial=initial)
        for ratio in given["ratios"]:
            row: Row = {"passes": passes, "ratio": ratio, "sparse": _explained(reference, update, ratio, 1.0, seed)}
            row["rates"] = _explained(reference, update, ratio, 0.4, seed)
            with through_neurons():
                row["neurons"] = _explained(reference, update, ratio, 0.4, seed)
            rows.append(row)
    return rows


def _explained(reference: ReferenceModel, update: Any, ratio: float, correction: float, seed: int) -> float:
    options = CompressorOptions(correction=correction, encoder=ProxySettings(bits=4, warm_start=False))
    compressor = ProxyCompressor(reference, ratio=ratio, options=options)
    sent = compressor.compress(reference, update, generator=derive_generator(seed, "codec"))
    return explained_variance(update, compressor.decompress(reference, sent.body))


@contextmanager
def through_neurons() -> Iterator[None]:
    """Inside, the codec differentiates the neurons with their training surrogate, over all time steps."""

    def neuron(layer: LeakyIntegrateFire, current: Tensor) -> Tensor:
        u = potentials(split_time(current, layer.steps), layer.threshold, layer.leak)
        return spike(u / layer.threshold - 1).flatten(0, 1)  # type: ignore[no-any-return]

    def repeat(layer: RepeatOverTime, current: Tensor) -> Tensor:
        return current.expand(layer.steps, *current.shape).flatten(0, 1)

    def mean(layer: MeanOverTime, spikes: Tensor) -> Tensor:
        return split_time(spikes, layer.steps).mean(0)

    with (
        mock.patch.object(LeakyIntegrateFire, "forward", neuron),
        mock.patch.object(RepeatOverTime, "forward", repeat),
        mock.patch.object(MeanOverTime, "forward", mean),
    ):
        yield


def cifar_rows(seed: int) -> list[Row]:
    """The network without spikes, then converted and fine-tuned with both codes."""
    return training_rows(seed, SETTINGS["cifar"], codes=("dct", "poisson"))


def dropping_rows(seed: int) -> list[Row]:
    """The same for DCT, trained with random frequencies; also the network without spikes with fewer frequencies."""
    return training_rows(seed, SETTINGS["dropping"], codes=("dct",), dropping=True)


def overlapping_rows(seed: int) -> list[Row]:
    """The same as `dropping_rows` with overlapping blocks."""
    return training_rows(seed, SETTINGS["overlapping"], codes=("dct",), dropping=True)


def training_rows(seed: int, given: Row, *, codes: Sequence[str], dropping: bool = False) -> list[Row]:
    """Accuracy of a network without spikes, and of spiking ones that it is converted to, fine-tuned with a code."""
    train, test = cifar(given["images"], given["test"], seed)
    torch.manual_seed(seed)
    if "stride" in given:
        network = dct_model("small", given["stride"], train.shape, "none")
    else:
        network = build_model(given["model"], train.shape, seed=seed)
    assert isinstance(network, SpikingNetwork)
    network.spiking = False
    fit(network, train, epochs=given["epochs"], lr=given["ann lr"], dropping=dropping)
    rows = [{"code": "none", "accuracy": accuracy(network, test)} | (by_kept(network, test) if dropping else {})]
    for code in codes:
        spiking = copy.deepcopy(network)
        encoder = spiking.encoder
        assert isinstance(encoder, DctEncoder)
        fit_encoder(encoder, to_float(train.images[:200]))
        if code == "poisson":
            spiking.encoder = RateEncoder(encoder)
        spiking.steps = given["steps"]
        balance = balance_thresholds(spiking, to_float(train.images[:64]))
        row: Row = {"code": code, "steps": given["steps"], "scale": balance.scale}
        row["converted"] = accuracy(spiking, test)
        tuning = train.subset(torch.arange(given["fine-tuning images"]))
        fit(spiking, tuning, epochs=1, lr=given["snn lr"], dropping=dropping)
        row |= {"accuracy": accuracy(spiking, test), "spikes": _spikes(spiking, to_float(test.images[:64]))}
        rows.append(row | (by_kept(spiking, test) if code == "dct" else {}))
    return rows


def by_kept(network: SpikingNetwork, data: LabeledImages) -> Row:
    """Accuracy with fewer frequencies, without more training."""
    encoder = network.encoder
    assert isinstance(encoder, DctEncoder)
    found = {}
    for kept in KEPT[1:]:
        encoder.frequencies = kept
        found[f"accuracy, {kept} kept"] = accuracy(network, data)
    encoder.frequencies = FREQUENCIES
    return found


def fit(network: SpikingNetwork, data: LabeledImages, *, epochs: int, lr: float, dropping: bool = False) -> None:
    """Adam with a linear decay, horizontal flips, and if wanted a random number of frequencies in each batch."""
    size = SETTINGS["cifar"]["batch size"]
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    total, done = epochs * -(-len(data) // size), 0
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(data)), size):
            images = to_float(data.images[rows])
            images = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, images, images.flip(3))
            optimizer.param_groups[0]["lr"] = lr * (1 - done / total)
            if dropping:
                drawn = TRAINED_FREQUENCIES[int(torch.randint(len(TRAINED_FREQUENCIES), ()))]
                setattr(network.encoder, "frequencies", drawn)  # noqa: B010
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(images), data.labels[rows]))
            optimizer.step()
            done += 1
    if dropping:
        setattr(network.encoder, "frequencies", FREQUENCIES)  # noqa: B010


@torch.no_grad()
def accuracy(network: SpikingNetwork, data: LabeledImages) -> float:
    parts = torch.split(torch.arange(len(data)), 20)
    right = [(network(to_float(data.images[rows])).argmax(1) == data.labels[rows]).sum() for rows in parts]
    return int(torch.stack(right).sum()) / len(data)


@torch.no_grad()
def _spikes(network: SpikingNetwork, images: Tensor) -> dict[str, float]:
    """Spikes per image, of the input and of each layer."""
    with record_activity(network) as activity:
        network(images)
    inputs: Tensor = network[0](images)
    layers = {name: float(layer.spikes.sum()) / len(images) for name, layer in activity.items()}
    return {"input": float(inputs.abs().sum()) / len(images)} | layers


def federated_rows(seed: int) -> list[Row]:
    """Final accuracies of 10 clients in proxy and secure rounds, and of one client with all images."""
    given = SETTINGS["federated"]
    common = {
        "dataset": given["dataset"], "model": given["model"], "plugins": "dct-snn", "lr": given["lr"],
        "plugin_options": f"dct-snn.cycles={given['cycles']}", "rounds": given["rounds"], "alpha": given["alpha"],
        "local_epochs": given["local epochs"], "ratio": given["ratio"], "secure_ratio": given["secure ratio"],
        "momentum": given["momentum"], "lr_final_factor": given["last lr factor"], "ema_decay": given["ema decay"],
        "max_evals": given["max evals"], "server_lr": 1.0, "proxies_below": 1.0, "seed": seed, "checkpoint": False,
    }  # fmt: skip
    rows = []
    for schedule, clients in (("fedavg", 1), ("fedavg", 10), ("secure", 10), ("proxy", 10)):
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings.of(common | {"schedule": schedule, "clients": clients, "run_folder": f"{folder}/run"})
            end = serve_in_process(app, settings)
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        accuracies = [json.loads(line)["accuracy"] for line in lines]
        rows.append({"schedule": schedule, "clients": clients, "accuracy": float(end["final_accuracy"]),
                     "by round": accuracies})  # fmt: skip
    return rows


ROWS: dict[str, Callable[[int], list[Row]]] = {
    "encoder": encoder_rows, "speed": speed_rows, "codec": codec_rows, "cifar": cifar_rows, "dropping": dropping_rows,
    "overlapping": overlapping_rows, "federated": federated_rows,
}  # fmt: skip


def summary(part: str, rows: Sequence[Row]) -> None:
    """Print the mean and standard deviation over seeds of every number."""
    labels = ("dataset", "stride", "steps", "passes", "ratio", "code", "schedule", "clients")
    groups: dict[tuple[tuple[str, Any], ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple((name, row[name]) for name in labels if name in row), []).append(row)
    table = [
        [", ".join(f"{n}={v}" for n, v in key), name, spread([row[name] for row in group], 4)]
        for key, group in groups.items() for name, value in group[0].items()
        if isinstance(value, float) and name not in labels
    ]  # fmt: skip
    print_table([part, "figure", f"mean of {len({row['seed'] for row in rows})} seeds"], table)


def main(
    parts: str = ",".join(PARTS),
    seeds: str = "0,1,2",
) -> None:
    """DCT-SNN: encoder, conversion, speed, proxies and federations."""
    for part in parts.split(","):
        path = RESULTS / f"plugins-dct-snn-{part}.json"
        saved = json.loads(path.read_text()) if path.exists() else {}
        rows: list[Row] = saved["rows"] if saved.get("settings") == SETTINGS.get(part, {}) else []
        for seed in map(int, seeds.split(",")):
            if any(row["seed"] == seed for row in rows):
                continue
            began = time.monotonic()
            torch.manual_seed(seed)
            rows += [{"seed": seed} | row for row in ROWS[part](seed)]
            write_results(path.stem, settings=SETTINGS.get(part, {}), rows=rows, script="plugins dct-snn")
            print(f"{part}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
        summary(part, rows)
