"""Crossbar-aware pruning: the energy of analog-to-digital converters at equal sparsity, and what masks do to a run.

Parts `mnist` (all layers but the first and the last), `mnist-all` and `cifar10` (VGG11): federated averaging of two
clients through `train_locally`, once plainly and once with the plugin `crossbar`, which then prunes. Its rivals have
exactly as many weights left: unstructured magnitude pruning of the plainly trained network, with as many in each layer
(`per layer`) or in all (`global`). Balanced pruning without the penalty has the same percentile. All are fine-tuned
equally, with their masks; the whole network is the control. Energies are those of the whole network.

Part `federated`: runs of `tofu.run` with the server's masks, with each client's own and without the plugin: accuracy,
zeros and energy of the global model, and bytes of a round before and after pruning, in open and in secure rounds.

What the JSON already holds, with the same settings, is not run again.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tofu
from benchmarks.common import RESULTS, find_data, print_table, spread, versions
from benchmarks.plugins.occupancy_picture import occupancy_picture
from client.plugins.crossbar import CrossbarPruning
from client.plugins.crossbar_tiles import (
    AdcEnergy,
    ExponentialAdc,
    SurveyAdc,
    adc_energy,
    column_counts,
    column_hoyer,
    to_tiles,
)
from client.plugins.layers import matrix, rows_per_image, sites
from tofu.data import LabeledImages, open_data, to_float
from tofu.models import build_model
from tofu.plugins import NO_PLUGINS, Plugins, RoundContext, keep_entries, make_plugins
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import load_weights, weights_of

CLIENTS = 2
HUB = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A network and its data: training images (0: all), rounds before and after pruning, step size, the plugin's."""

    data: str
    model: str
    norm: str
    images: int
    rounds: int
    tuning: int
    lr: float
    tile: int
    strength: float
    percentiles: tuple[float, ...]
    layers: str = "all"
    weight_decay: float = 0.0
    picture: str = "conv2.weight"

    def local(self, round_: int) -> LocalTrainingConfig:
        """One epoch; the step size falls along half a cosine to a fifth, at which fine-tuning goes on."""
        progress = min(1.0, (round_ - 1) / max(1, self.rounds - 1))
        lr = self.lr * (0.2 + 0.8 * (1 + math.cos(math.pi * progress)) / 2)
        return LocalTrainingConfig(1, 64, lr, 0.9, self.weight_decay)


CASES = {
    "mnist": Case("mnist", "cnn", "none", 4000, 6, 3, 0.05, 32, 0.3, (0.95,), layers="inner"),
    "mnist-all": Case("mnist", "cnn", "none", 4000, 6, 3, 0.05, 32, 0.3, (0.9, 0.95)),
    "cifar10": Case("cifar10", "vgg11", "batch", 10000, 10, 5, 0.05, 64, 0.3, (0.95,), layers="conv",
                    weight_decay=5e-4, picture="features.4.weight"),
}  # fmt: skip


def averaged(model: nn.Module, clients: Sequence[LabeledImages], case: Case, seed: int, first: int, count: int,
             make: Callable[[], Plugins]) -> nn.Module:  # fmt: skip
    """Rounds of federated averaging of a model, in place; the plugins' half of the clients sees every step."""
    examples = sum(map(len, clients))
    for round_ in range(first, first + count):
        start = weights_of(model)
        mean = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in start.items()}
        for number, data in enumerate(clients):
            context = RoundContext(data.shape, round=round_, rounds=1000, client=str(number), seed=seed)
            plugins, local = make(), copy.deepcopy(model)
            local = plugins.setup(local, context)
            generator = derive_generator(seed, round_, str(number), "train")
            train_locally(local, data, case.local(round_), generator=generator, plugins=plugins)
            for name, value in weights_of(local).items():
                mean[name] += value * (len(data) / examples)
        load_weights(model, mean)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, test: LabeledImages) -> float:
    model.eval()
    rows = torch.split(torch.arange(len(test)), 500)
    return sum(int((model(to_float(test.images[r])).argmax(1) == test.labels[r]).sum()) for r in rows) / len(test)


def balanced(model: nn.Module, case: Case, percentile: float) -> Masks:
    """The masks that the plugin's server half makes of a model."""
    plugin = CrossbarPruning(tile=case.tile, percentile=percentile, layers=case.layers)
    return plugin._make_masks(model)


def unstructured(model: nn.Module, like: Masks, *, whole: bool) -> Masks:
    """The largest magnitudes: as many as `like` keeps in each layer, or with `whole` in all of them together."""
    magnitudes = {name: model.get_parameter(name).detach().abs() for name in like}
    if whole:
        kept = sum(int(mask.sum()) for mask in like.values())
        threshold = torch.cat([m.flatten() for m in magnitudes.values()]).sort(descending=True).values[kept - 1]
        return {name: m >= threshold for name, m in magnitudes.items()}
    masks = {}
    for name, m in magnitudes.items():
        masks[name] = m >= m.flatten().sort(descending=True).values[int(like[name].sum()) - 1]
    return masks


def energies(model: nn.Module, masks: Masks, case: Case, shape: Any) -> dict[str, float]:
    """How many times less energy than the dense network: by energy model, per image, and with all tiles equal."""
    positions = rows_per_image(model, shape.channels, shape.height, shape.width)

    def saving(adc: AdcEnergy, *, per_image: bool) -> float:
        spent = dense = 0.0
        for site in sites(model):
            whole = torch.ones_like(model.get_parameter(site.weight), dtype=torch.bool)
            kept = masks.get(site.weight, whole).flatten(1)[site.start : site.stop]
            own = adc_energy(adc, kept, case.tile, positions=positions[site.name] if per_image else 1)
            spent, dense = spent + own[0], dense + own[1]
        return dense / spent

    return {"exponential": saving(ExponentialAdc(), per_image=True), "survey": saving(SurveyAdc(), per_image=True),
            "exponential, tiles equal": saving(ExponentialAdc(), per_image=False)}  # fmt: skip


def occupancy(model: nn.Module, name: str, tile: int, masks: Masks | None = None) -> Tensor:
    """Occupancy of a layer's columns in [0, 1], [input blocks, outputs]: of the mask, or the squared Hoyer measure."""
    (site,) = (site for site in sites(model) if site.name == name)
    if masks is not None:
        found = column_counts(to_tiles(masks[name].flatten(1), tile)).double()
    else:
        found = column_hoyer(to_tiles(matrix(site, model).detach(), tile)).double()
    return found.transpose(0, 1).flatten(1)[:, : site.stop - site.start] / tile


def one_seed(name: str, seed: int) -> tuple[list[dict[str, Any]], str]:
    """Rows of the whole network and of all pruned ones, and the picture at the first percentile."""
    case = CASES[name]
    source = open_data(find_data(case.data, HUB[case.data]), clients=CLIENTS, partition="iid", seed=seed,
                       train_images=case.images)  # fmt: skip
    clients, test, shape = [source.client(i) for i in range(CLIENTS)], source.test(), source.shape
    began = time.perf_counter()

    def trained(make: Callable[[], Plugins]) -> nn.Module:
        model = build_model(case.model, shape, norm=case.norm, seed=seed)
        return averaged(model, clients, case, seed, 1, case.rounds, make)

    def tuned(model: nn.Module, masks: Mapping[str, Tensor]) -> float:
        copied = copy.deepcopy(model)
        keep_entries(copied, masks)
        averaged(copied, clients, case, seed, case.rounds + 1, case.tuning, lambda: NO_PLUGINS)
        return accuracy(copied, test)

    plain = trained(lambda: NO_PLUGINS)
    penalty = f"crossbar.tile={case.tile} crossbar.strength={case.strength} crossbar.layers={case.layers}"
    even = trained(lambda: make_plugins("crossbar", f"{penalty} crossbar.after=999"))
    common = {"case": name, "seed": seed}
    rows: list[dict[str, Any]] = [common | {"what": "whole network", "accuracy_before": accuracy(plain, test),
                                            "accuracy": tuned(plain, {}), "zeros": 0.0}]  # fmt: skip
    picture = ""
    for percentile in case.percentiles:
        own = balanced(even, case, percentile)
        without = balanced(plain, case, percentile)
        per_layer, globally = (unstructured(plain, own, whole=whole) for whole in (False, True))
        for what, model, masks in (
            ("crossbar", even, own),
            ("unstructured, per layer", plain, per_layer),
            ("unstructured, global", plain, globally),
            ("crossbar without penalty", plain, without),
        ):
            kept, entries = (sum(int(f(m)) for m in masks.values()) for f in (torch.sum, torch.numel))
            rows.append(common | {
                "what": f"{what}, percentile {percentile}", "percentile": percentile, "zeros": 1 - kept / entries,
                "accuracy_before": accuracy(model, test), "saving": energies(model, masks, case, shape),
                "accuracy": tuned(model, masks),
            })  # fmt: skip
            print(f"{rows[-1]} {time.perf_counter() - began:.0f} s", flush=True)
        if not picture:
            layer = case.picture
            picture = occupancy_picture({
                "trained plainly": occupancy(plain, layer, case.tile),
                "trained with the penalty": occupancy(even, layer, case.tile),
                "unstructured pruning": occupancy(plain, layer, case.tile, per_layer),
                "crossbar pruning": occupancy(even, layer, case.tile, own),
            }, case.tile)  # fmt: skip
    return rows, picture


# Federated runs

RUN: dict[str, Any] = {
    "dataset": "digits", "model": "cnn", "clients": 6, "rounds": 8, "local_epochs": 2, "batch_size": 16, "lr": 0.05,
    "lr_final_factor": 0.2, "ratio": 50.0, "max_evals": 10, "ema_decay": 0.0,
}  # fmt: skip
PRUNED_AFTER = 5
PLUGIN = f"crossbar.percentile=0.9 crossbar.after={PRUNED_AFTER}"


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name -> settings of every run of a seed."""
    with_masks = {"plugins": "crossbar", "plugin_options": PLUGIN}
    for partition, more in (("iid", {"partition": "iid"}), ("label skew", {"partition": "dirichlet", "alpha": 0.3})):
        for schedule in ("fedavg", "proxy", "secure") if partition == "iid" else ("fedavg",):
            base = more | {"schedule": schedule}
            yield f"{partition}, {schedule}: without the plugin", base
            yield f"{partition}, {schedule}: common masks", base | with_masks
            if schedule == "fedavg":
                own = with_masks | {"plugin_options": f"{PLUGIN} crossbar.masks=local"}
                yield f"{partition}, {schedule}: own masks", base | own


def federated(seed: int, what: str, more: dict[str, Any]) -> dict[str, Any]:
    """One run: accuracy, the global model's zeros and energy, and bytes by round."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        tofu.run(**RUN | more | {"seed": seed, "run_folder": str(run)})
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
        panels = json.loads((run / "panels.json").read_text()) if (run / "panels.json").exists() else {}
    layers = panels["crossbar"]["figures"][0]["rows"] if panels else []
    sizes = {name: entries for name, entries in _entries().items() if name in {row[0] for row in layers}}
    return {
        "what": what, "seed": seed, "accuracy": records[-1]["accuracy"],
        "accuracy_by_round": [record["accuracy"] for record in records],
        "uplink_bytes": [record["uplink_bytes"] for record in records],
        "downlink_bytes": [record["downlink_bytes"] for record in records],
        "explained_variance": [record["explained_variance"] for record in records],
        "zeros": sum(row[1] * sizes[row[0]] for row in layers) / sum(sizes.values()) if layers else 0.0,
        "saving": sum(row[3] for row in layers) / sum(row[2] for row in layers) if layers else 1.0,
    }  # fmt: skip


def _entries() -> dict[str, int]:
    shape = open_data(RUN["dataset"], clients=1, partition="iid", seed=0).shape
    return {name: p.numel() for name, p in build_model(RUN["model"], shape, seed=0).named_parameters()}


# Tables


def summary(rows: list[dict[str, Any]]) -> None:
    """Means and deviations over seeds; accuracies and zeros in percent."""
    groups = [[row for row in rows if row["what"] == what] for what in dict.fromkeys(row["what"] for row in rows)]
    if "uplink_bytes" in rows[0]:
        lines, rounds = [], (PRUNED_AFTER - 1, PRUNED_AFTER, -1)
        for own in groups:
            before, after = (
                [row[key][i] for row in own] for key, i in (("uplink_bytes", PRUNED_AFTER - 1), ("uplink_bytes", -1))
            )
            explained = [statistics.fmean(row["explained_variance"][-3:]) for row in own
                         if row["explained_variance"][-1] is not None]  # fmt: skip
            lines.append([
                own[0]["what"], spread([100 * row["accuracy"] for row in own], 2),
                spread([100 * row["zeros"] for row in own], 1), spread([row["saving"] for row in own], 2),
                *(f"{statistics.fmean(each):,.0f}" for each in (before, after)),
                *(f"{statistics.fmean(row['downlink_bytes'][i] for row in own):,.0f}" for i in rounds),
                spread(explained, 3) if explained else "",
            ])  # fmt: skip
        print_table(["", "accuracy", "zeros", "ADC energy, times less", "uplink before", "uplink after",
                     "downlink before", "downlink once", "downlink after", "explained variance"], lines)  # fmt: skip
        return
    lines = []
    for own in groups:
        kinds = ("exponential", "exponential, tiles equal", "survey")
        cells = [
            spread([row["saving"][k] for row in own], 2) if "saving" in row else "" for row in own[:1] for k in kinds
        ]
        lines.append([own[0]["what"], spread([100 * row["zeros"] for row in own], 1),
                      *(spread([100 * row[key] for row in own], 2) for key in ("accuracy_before", "accuracy")),
                      *cells])  # fmt: skip
    print_table(["", "zeros", "before pruning", "fine-tuned", "ADC energy, times less", "all tiles equal", "survey"],
                lines)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(*CASES, "federated"), default="mnist")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    for field in ("images", "rounds", "tuning", "strength", "lr"):
        kind = float if field in ("strength", "lr") else int
        parser.add_argument(f"--{field}", type=kind, help="replaces that of the case")
    parser.add_argument("--name", default="", help="of the results: plugins-crossbar-NAME.json; by default the part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    part, name = options.part, options.name or options.part
    if part in CASES:
        changes = {f: getattr(options, f) for f in ("images", "rounds", "tuning", "strength", "lr")}
        CASES[part] = Case(**vars(CASES[part]) | {f: value for f, value in changes.items() if value is not None})
    settings = json.loads(
        json.dumps({"clients": CLIENTS} | vars(CASES[part]) if part in CASES else RUN | {"options": PLUGIN})
    )
    path = RESULTS / f"plugins-crossbar-{name}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[dict[str, Any]] = kept["rows"] if kept.get("settings") == settings else []
    command = " ".join(["python -m benchmarks.plugins crossbar", *sys.argv[1:]])

    def add(*new: dict[str, Any]) -> None:
        rows.extend(new)
        path.write_text(json.dumps(versions(command) | {"settings": settings, "rows": rows}, indent=1) + "\n")
        print(f"{name}, seed {new[-1]['seed']}: {new[-1]['what']} done", flush=True)

    for seed in range(options.seeds):
        done = {row["what"] for row in rows if row["seed"] == seed}
        if part not in CASES:
            for what, more in variants():
                if what not in done:
                    add(federated(seed, what, more))
        elif not done:
            new, picture = one_seed(part, seed)
            if seed == 0:
                path.with_suffix(".svg").write_text(picture)
            add(*new)
    summary(rows)


if __name__ == "__main__":
    main()
