"""Hierarchical labels under a subpopulation shift: flat, branched and conditional networks on CIFAR-10's tree.

Each of five classes is trained on one label of CIFAR-10 and tested on it and on another one, which is never trained on:
airplanes and ships, cars and trucks, birds and frogs, cats and dogs, deer and horses. All networks of a seed have the
same images, the same initial trunk and the same order of batches, so their differences are paired.

- `flat`: the model alone; `flat-3`: with three times as many epochs, as many optimizer steps as `three-step` takes.
- `branched`: heads for all depths of the tree, one step per batch on the sum of their losses.
- `joint`: the same with conditional losses.
- `three-step`: conditional losses, one step per head and batch, as the authors train.

Seeds that the JSON already holds with the same settings are not run again.
"""

import json
import math
import statistics
import time
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.common import RESULTS, find_data, print_table, run_command, spread, write_results
from client.plugins.label_tree import TREES, LabelTree
from client.plugins.tree_metrics import GraphDistance, HierarchicalF
from tofu.data import LabeledImages, open_data, to_float
from tofu.models import build_model
from tofu.plugins import NO_PLUGINS, RoundContext, make_plugins
from tofu.training import LocalTrainingConfig, train_locally

SHIFT = "0/8 1/9 2/6 3/5 4/7"
TREE = "cifar10-pairs"
NETWORKS = {
    "flat": None,
    "flat-3": None,
    "branched": "hierarchy.schedule=joint hierarchy.conditional=false",
    "joint": "hierarchy.schedule=joint",
    "three-step": "hierarchy.schedule=three-step",
}
PARTS = ("seen", "unseen")
MEASURES = ("accuracy", "distance", "f")


def train(network: str, data: LabeledImages, options: SimpleNamespace, seed: int) -> nn.Module:
    """One network; the learning rate falls to a tenth after half of the epochs, and again after three quarters."""
    chosen = NETWORKS[network]
    model = build_model(options.model, data.shape, seed=seed)
    epochs = options.epochs * (3 if network == "flat-3" else 1)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        plugins = NO_PLUGINS if chosen is None else make_plugins("hierarchy", f"hierarchy.tree={TREE} {chosen}")
        model = plugins.setup(model, RoundContext(data.shape, seed=seed))
        lr = options.lr * 0.1 ** ((epoch >= epochs / 2) + (epoch >= 0.75 * epochs))
        config = LocalTrainingConfig(1, options.batch_size, lr, momentum=0.9, weight_decay=options.weight_decay)
        train_locally(model, data, config, generator=generator, plugins=plugins)
    return model.eval()


@torch.no_grad()
def grade(model: nn.Module, data: LabeledImages, tree: LabelTree) -> dict[str, float]:
    predicted = torch.cat([model(to_float(part)).argmax(1) for part in torch.split(data.images, 500)])
    metrics: dict[str, Any] = {"distance": GraphDistance(tree), "f": HierarchicalF(tree)}
    for metric in metrics.values():
        metric.update(predicted, data.labels)
    right: Tensor = predicted == data.labels
    return {"accuracy": float(right.float().mean())} | {n: float(metric.compute()) for n, metric in metrics.items()}


def one_seed(seed: int, options: SimpleNamespace) -> dict[str, Any]:
    began = time.perf_counter()
    opened = {
        part: open_data(options.data, clients=1, partition="iid", seed=seed, train_images=options.images,
                        subpopulations=SHIFT, test_subpopulations=part)
        for part in PARTS
    }  # fmt: skip
    data, tree = opened["seen"].client(0), LabelTree(TREES[TREE])
    row: dict[str, Any] = {"seed": seed, "networks": {}}
    for network in NETWORKS:
        model = train(network, data, options, seed)
        row["networks"][network] = {part: grade(model, opened[part].test(), tree) for part in PARTS}
        print(f"seed {seed}: {network} after {time.perf_counter() - began:.0f} s", flush=True)
    return row | {"seconds": time.perf_counter() - began}


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean of paired differences, and half the width of its 95 % confidence interval (Student's t)."""
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return differences[0], math.inf
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return statistics.fmean(differences), half


def summary(rows: list[dict[str, Any]]) -> None:
    """Means and deviations of every network, and its paired differences from the flat one."""
    scale = {"accuracy": 100.0, "distance": 1.0, "f": 100.0}
    digits = {"accuracy": 1, "distance": 3, "f": 1}
    for part in PARTS:
        print(f"\n{part} labels")
        lines = []
        for network in NETWORKS:
            line = [network]
            for measure in MEASURES:
                values = [row["networks"][network][part][measure] * scale[measure] for row in rows]
                flat = [row["networks"]["flat"][part][measure] * scale[measure] for row in rows]
                mean, half = interval([value - base for value, base in zip(values, flat, strict=True)])
                difference = "" if network == "flat" else f"{mean:+.{digits[measure]}f} ± {half:.{digits[measure]}f}"
                line += [spread(values, digits[measure]), difference]
            lines.append(line)
        print_table(["network", "accuracy", "minus flat", "graph distance", "minus flat", "F", "minus flat"], lines)


def main(
    name: Annotated[str, typer.Option(help="the results are plugins-hierarchy-NAME.json")] = "lenet5",
    data: Annotated[str, typer.Option(help="CIFAR-10 as a folder or a hub id")] = "",
    model: str = "lenet5",
    seeds: Annotated[int, typer.Option(help="how many seeds, from 0 on")] = 5,
    images: Annotated[int, typer.Option(help="training images; 0: all 25,000")] = 5000,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 0.02,
    weight_decay: float = 5e-4,
) -> None:
    """Hierarchical labels under a subpopulation shift: flat, branched and conditional networks on CIFAR-10's tree."""
    options = SimpleNamespace(**locals())
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "seeds")}
    options.data = options.data or find_data("cifar10", "uoft-cs/cifar10")
    torch.set_num_threads(1)
    path = RESULTS / f"plugins-hierarchy-{options.name}.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[dict[str, Any]] = saved["rows"] if saved.get("settings") == settings else []
    for seed in range(options.seeds):
        if any(row["seed"] == seed for row in rows):
            continue
        rows.append(one_seed(seed, options))
        write_results(path.stem, settings=settings, rows=rows, script="plugins hierarchy")
    summary(rows)


if __name__ == "__main__":
    run_command(main)
