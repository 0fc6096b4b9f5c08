"""Narrow, fast and coarse spiking networks: the plugin `spatio-temporal`, on one node.

A network that is wider than MNIST needs is trained without spikes, converted (every threshold is a percentile of its
layer's pre-activations, in order), and fine-tuned as a spiking network of T steps: "wide". The plugin measures
the channels and narrows it; fine-tuning gives "narrow". "direct" evaluates that at fewer steps, "reduced" after
fine-tuning at T - 1, T - 2, ..., 1 steps by Adam, with the plugin's thresholds. "post" rounds the weights of the last
one to b bits, "aware" fine-tunes with rounded weights, by Adam. The non-spiking networks of the same widths, "dense"
and "dense narrow", are trained for as many epochs, the second from the channels that are left. Noise is Gaussian, on
images in [0, 1]. Energies count operations (`client.plugins.spiking_energy`).

Seeds that the JSON already holds, with the same settings, are not run again.
"""

import copy
import json
import time
from types import SimpleNamespace
from typing import Annotated, Any

import click
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.common import (
    RESULTS,
    command_line,
    find_data,
    joined,
    print_table,
    run_command,
    several,
    spread,
    versions,
)
from client.plugins.spatio_temporal import Quantized, SpatioTemporalPruning, spikes_per_layer
from client.plugins.spiking_energy import dense_microjoules, microjoules, operations
from tofu.data import ImageShape, LabeledImages, open_data, to_float
from tofu.models.spiking import LeakyIntegrateFire, SpikingNetwork, spiking_vgg
from tofu.plugins import RoundContext, make_plugins
from tofu.plugins.masking import chain_of
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig, train_locally

NETWORKS: dict[str, tuple[int | str, ...]] = {
    "mnist": ("A", 32, "A", 64, "A", 128),
    "cifar10": (64, "A", 128, 128, "A", 128, "A"),
}


def mnist_network(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """The network for MNIST, for `tofu run --model benchmarks.plugins.spatio_temporal:mnist_network`."""
    return spiking_vgg(NETWORKS["mnist"], ImageShape(channels, height, width, classes), steps=12)


@torch.no_grad()
def balance_thresholds(network: SpikingNetwork, images: Tensor, percentile: float) -> None:
    """Set the thresholds of a network that was trained without spikes, layer after layer, at its number of steps.

    Args:
        images: uint8 [n, channels, height, width].
    """
    network.eval()
    for layer in [module for module in network.modules() if isinstance(module, LeakyIntegrateFire)]:
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].flatten()))
        network(to_float(images))
        handle.remove()
        currents = torch.cat(seen)
        # torch.quantile takes at most 2^24 numbers.
        layer.threshold.fill_(float(currents[:: len(currents) // 2**23 + 1].quantile(percentile)))


@torch.no_grad()
def accuracy(network: nn.Module, data: LabeledImages, *, noise: float = 0.0, seed: int = 0) -> float:
    """Accuracy on images with Gaussian noise of a standard deviation, for pixels in [0, 1]."""
    network.eval()
    generator, right = derive_generator(seed, "noise"), 0
    for images, labels in zip(torch.split(data.images, 100), torch.split(data.labels, 100), strict=True):
        pixels = to_float(images)
        pixels = pixels + 2 * noise * torch.randn(pixels.shape, generator=generator)
        right += int((network(pixels).argmax(1) == labels).sum())
    return right / len(data)


class Bench:
    """One seed: the data, and training by SGD or Adam at a learning rate that falls linearly."""

    def __init__(self, options: SimpleNamespace, seed: int) -> None:
        data = open_data(options.data, clients=1, partition="iid", seed=seed, train_images=options.images,
                         test_images=options.test_images)  # fmt: skip
        self.options, self.seed, self.train_data, self.test = options, seed, data.client(0), data.test()
        self.shape, self._trained = data.shape, 0

    def fit(self, network: nn.Module, epochs: int, lr: float) -> nn.Module:
        """Train in place."""
        for epoch in range(epochs):
            self._trained += 1
            config = LocalTrainingConfig(1, 32, lr * (1 - epoch / epochs), momentum=0.9)
            generator = derive_generator(self.seed, self._trained, "train")
            train_locally(network, self.train_data, config, generator=generator)
        return network

    def tune(self, network: nn.Module, epochs: int, lr: float) -> None:
        """Train in place by Adam, as the authors fine-tune spiking networks."""
        self._trained += 1
        generator = derive_generator(self.seed, self._trained, "tune")
        optimizer = torch.optim.Adam(network.parameters())
        images, labels = self.train_data.images, self.train_data.labels
        batches = [b for _ in range(epochs) for b in torch.split(torch.randperm(len(labels), generator=generator), 32)]
        network.train()
        for done, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = lr * (1 - done / len(batches))
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(to_float(images[batch])), labels[batch]))
            optimizer.step()

    def score(self, network: SpikingNetwork) -> dict[str, Any]:
        """Accuracy, with noise too, spikes and energy per image."""
        with torch.no_grad():
            counts = spikes_per_layer(network.eval(), self.test.images[:200])
        spikes = {name: count / 200 for name, (count, _) in counts.items()}
        found = operations(network, self.shape)
        return {
            "accuracy": accuracy(network, self.test),
            "noise": [accuracy(network, self.test, noise=std, seed=self.seed) for std in self.options.noise],
            "spikes": sum(spikes.values()) if network.spiking else 0.0,
            "microjoules": microjoules(found, spikes) if network.spiking else dense_microjoules(found),
            "parameters": sum(p.numel() for p in network.parameters()),
        }  # fmt: skip


def one_seed(seed: int, options: SimpleNamespace) -> dict[str, Any]:
    """All measurements of a seed."""
    began, bench = time.perf_counter(), Bench(options, seed)
    row: dict[str, Any] = {"seed": seed}
    torch.manual_seed(seed)
    network = spiking_vgg(NETWORKS[options.name], bench.shape, steps=options.steps)

    def note(name: str, measured: SpikingNetwork) -> None:
        row[name] = bench.score(measured)
        print(f"seed {seed}: {name} {row[name]['accuracy']:.4f} after {time.perf_counter() - began:.0f} s", flush=True)

    network.spiking = False
    bench.fit(network, options.dense_epochs, options.lr)
    note("dense", network)
    network.spiking = True
    balance_thresholds(network, bench.train_data.images[:300], options.percentile)
    note("converted", network)
    bench.fit(network, options.epochs, options.snn_lr)
    note("wide", network)
    narrow, row["widths"] = narrowed(network, bench, options)
    pruned = copy.deepcopy(narrow)
    note("cut", narrow)
    bench.fit(narrow, options.narrow_epochs, options.snn_lr)
    note("narrow", narrow)
    row["direct"] = {}
    for steps in options.shown_steps:
        narrow.steps = steps
        row["direct"][steps] = accuracy(narrow, bench.test)
    row["reduced"] = {}
    plugin = SpatioTemporalPruning(steps=options.steps, one_step_threshold=options.one_step_threshold)
    for steps in range(options.steps - 1, 0, -1):
        narrow.steps, narrow.threshold_factor = steps, plugin.threshold_factor(steps)
        few = steps <= 2  # where few spikes are left
        epochs, lr = (options.last_epochs, options.last_lr) if few else (options.step_epochs, options.step_lr)
        bench.tune(narrow, epochs, lr)
        row["reduced"][steps] = accuracy(narrow, bench.test)
    note("fast", narrow)
    for bits in options.bits:
        coarse = quantized(narrow, bits)
        note(f"post {bits}", coarse)
        bench.tune(coarse, 2 * options.step_epochs, options.step_lr / 5)
        note(f"aware {bits}", coarse)
    pruned.spiking = False
    bench.fit(pruned, options.dense_epochs, options.lr / 4)
    note("dense narrow", pruned)
    return row | {"seconds": time.perf_counter() - began}


def narrowed(
    network: SpikingNetwork, bench: Bench, options: SimpleNamespace
) -> tuple[SpikingNetwork, dict[str, tuple[int, int]]]:
    """A narrower copy, made by the plugin's own steps, and the widths."""
    text = f"spatio-temporal.prune-after=1 spatio-temporal.variance={options.variance} "
    text += f"spatio-temporal.images={options.measured} spatio-temporal.steps={options.steps}"
    plugins = make_plugins("spatio-temporal", text)
    rounds = 1000  # far from the end of the schedule
    model = plugins.setup(copy.deepcopy(network), RoundContext(bench.shape, round=1, rounds=rounds))
    plugins.on_train_begin(model, bench.train_data)
    plugins.reduce(plugins.export(model).sums, len(bench.train_data))
    narrow = plugins.setup(model, RoundContext(bench.shape, round=2, rounds=rounds))
    plugin = plugins[0]
    assert isinstance(narrow, SpikingNetwork)
    assert isinstance(plugin, SpatioTemporalPruning)
    return narrow, plugin.widths


def quantized(network: SpikingNetwork, bits: int) -> SpikingNetwork:
    """A copy whose weights are rounded to so many bits in forward passes."""
    coarse = copy.deepcopy(network)
    for layer in chain_of(coarse).values():
        parametrize.register_parametrization(layer, "weight", Quantized(bits))
    return coarse


def summary(rows: list[dict[str, Any]], options: SimpleNamespace) -> None:
    """Means and deviations over seeds, accuracies in percent."""
    names = [name for name, value in rows[0].items() if isinstance(value, dict) and "accuracy" in value]
    lines = []
    for name in names:
        own = [row[name] for row in rows]
        lines.append([
            name, spread([100 * one["accuracy"] for one in own], 2), spread([one["parameters"] for one in own], 0),
            spread([one["spikes"] for one in own], 0), spread([one["microjoules"] for one in own], 3),
            *(spread([100 * one["noise"][i] for one in own], 1) for i in range(len(options.noise))),
        ])  # fmt: skip
    noises = (f"noise {std:g}" for std in options.noise)
    print_table(["network", "accuracy", "parameters", "spikes", "microjoules", *noises], lines)
    for kind in ("direct", "reduced"):
        print_table(["steps", kind], [
            [str(steps), spread([100 * {int(k): v for k, v in row[kind].items()}[int(steps)] for row in rows], 2)]
            for steps in rows[0][kind]
        ])  # fmt: skip


def main(
    name: Annotated[
        str, typer.Option(help="dataset; names the result, too", click_type=click.Choice(list(NETWORKS)))
    ] = "mnist",
    data: Annotated[str, typer.Option(help="a folder or a hub id; by default that of NAME")] = "",
    seeds: Annotated[int, typer.Option(help="how many seeds, from 0 on")] = 3,
    images: Annotated[int, typer.Option(help="training images; 0: all")] = 20_000,
    test_images: Annotated[int, typer.Option(help="test images; 0: all")] = 4000,
    measured: Annotated[int, typer.Option(help="images whose potentials are measured")] = 1000,
    variance: float = 0.96,
    steps: int = 12,
    dense_epochs: int = 10,
    epochs: Annotated[int, typer.Option(help="of the wide spiking network")] = 2,
    narrow_epochs: int = 5,
    step_epochs: Annotated[int, typer.Option(help="at each number of steps")] = 1,
    step_lr: Annotated[float, typer.Option(help="of Adam, at each number of steps")] = 0.001,
    last_epochs: Annotated[int, typer.Option(help="at 2 steps and at 1")] = 15,
    last_lr: Annotated[float, typer.Option(help="of Adam, at 2 steps and at 1")] = 0.002,
    one_step_threshold: Annotated[float, typer.Option(help="factor of the thresholds at 1 step")] = 0.6,
    percentile: Annotated[float, typer.Option(help="of pre-activations: the thresholds")] = 0.95,
    lr: float = 0.02,
    snn_lr: float = 0.02,
    bits: Annotated[Any, several(int)] = joined([8, 5, 3]),
    noise: Annotated[Any, several(float)] = joined([0.3]),
    shown_steps: Annotated[Any, several(int)] = joined([12, 8, 6, 4, 3, 2, 1]),
) -> None:
    """Narrow, fast and coarse spiking networks: the plugin `spatio-temporal`, on one node."""
    options = SimpleNamespace(**locals())
    hub = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "seeds")}
    options.data = options.data or find_data(options.name, hub[options.name])
    torch.set_num_threads(1)
    path = RESULTS / f"plugins-spatio-temporal-{options.name}.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[dict[str, Any]] = saved["rows"] if saved.get("settings") == settings else []
    for seed in range(options.seeds):
        if any(row["seed"] == seed for row in rows):
            continue
        rows.append(one_seed(seed, options))
        path.write_text(
            json.dumps(
                versions(command_line("plugins spatio-temporal")) | {"settings": settings, "rows": rows}, indent=1
            )
            + "\n"
        )
        print(f"seed {seed}: done after {rows[-1]['seconds']:.0f} s", flush=True)
    summary(rows, options)


if __name__ == "__main__":
    run_command(main)
