"""Crossbar-aware pruning: the energy of analog-to-digital converters at equal sparsity, and what masks do to a run.

Parts `mnist` (all layers but the first and the last), `mnist-all` and `cifar10` (VGG11): federated averaging of two
clients through `train_locally`, once plainly and once with the plugin `crossbar`, which then prunes. Its rivals have
exactly as many weights left: unstructured magnitude pruning of the plainly trained network, with as many in each layer
(`per layer`) or in all (`global`). Balanced pruning without the penalty has the same percentile. All are fine-tuned
equally, with their masks; the whole network is the control. Energies are those of the whole network.

Part `federated`: runs of `tofu.run` with the server's masks, with each client's own and without the plugin: accuracy,
zeros and energy of the global model, and bytes of a round before and after pruning, in open and in secure rounds.

What the JSON already holds, with the same settings, is not run again. With --checkpoints, training that was interrupted
goes on after its last round.
"""

import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import click
import torch
import typer
from torch import Tensor, nn

import tofu
from benchmarks.common import RESULTS, find_data, print_table, run_command, spread, write_results
from benchmarks.plugins.gpm import occupancy_picture
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
RIVALS = ("unstructured, per layer", "unstructured, global", "crossbar without penalty")
Masks = dict[str, Tensor]
Row = dict[str, Any]


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
    batch_size: int = 64
    bfloat16: bool = False  # arithmetic of convolutions and matrix products; weights and averages stay float32
    rivals: tuple[str, ...] = RIVALS

    def local(self, round_: int) -> LocalTrainingConfig:
        """One epoch; the step size falls along half a cosine to a fifth, at which fine-tuning goes on."""
        progress = min(1.0, (round_ - 1) / max(1, self.rounds - 1))
        lr = self.lr * (0.2 + 0.8 * (1 + math.cos(math.pi * progress)) / 2)
        return LocalTrainingConfig(1, self.batch_size, lr, 0.9, self.weight_decay)


CASES = {
    "mnist": Case("mnist", "cnn", "none", 4000, 6, 3, 0.05, 32, 0.3, (0.95,), layers="inner"),
    "mnist-all": Case("mnist", "cnn", "none", 4000, 6, 3, 0.05, 32, 0.3, (0.9, 0.95)),
    "cifar10": Case("cifar10", "vgg11", "batch", 12000, 10, 4, 0.02, 64, 0.3, (0.95, 0.8), layers="conv",
                    weight_decay=5e-4, picture="features.4.weight", bfloat16=True, rivals=RIVALS[:1]),
}  # fmt: skip


def bfloat16_if(case: Case) -> torch.autocast:
    """Arithmetic in bfloat16, if the case has it. Without a cache, which would keep the weights of the first step."""
    return torch.autocast("cpu", enabled=case.bfloat16, cache_enabled=False)


def averaged(model: nn.Module, clients: Sequence[LabeledImages], case: Case, seed: int, first: int, count: int,
             make: Callable[[], Plugins], checkpoint: Path | None = None) -> nn.Module:  # fmt: skip
    """Rounds of federated averaging of a model, in place; the plugins' half of the clients sees every step."""
    examples, last = sum(map(len, clients)), first + count
    if checkpoint and checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        load_weights(model, saved["weights"])
        first = saved["round"] + 1
    for round_ in range(first, last):
        start = weights_of(model)
        mean = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in start.items()}
        for number, data in enumerate(clients):
            context = RoundContext(data.shape, round=round_, rounds=1000, client=str(number), seed=seed)
            plugins, local = make(), copy.deepcopy(model)
            local = plugins.setup(local, context)
            generator = derive_generator(seed, round_, str(number), "train")
            with bfloat16_if(case):
                train_locally(local, data, case.local(round_), generator=generator, plugins=plugins)
            for name, value in weights_of(local).items():
                mean[name] += value * (len(data) / examples)
        load_weights(model, mean)
        if checkpoint:
            torch.save({"round": round_, "weights": mean}, checkpoint)
            print(f"{checkpoint.stem}: round {round_} done", flush=True)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, test: LabeledImages, case: Case) -> float:
    model.eval()
    rows = torch.split(torch.arange(len(test)), 500)
    with bfloat16_if(case):
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


def one_seed(name: str, seed: int, done: Collection[str], checkpoints: Path | None, path: Path) -> Iterator[Row]:
    """Rows of the whole network and of all pruned ones, but for those `done`; draws the picture of seed 0."""
    case = CASES[name]
    source = open_data(find_data(case.data, HUB[case.data]), clients=CLIENTS, partition="iid", seed=seed,
                       train_images=case.images)  # fmt: skip
    clients, test, shape = [source.client(i) for i in range(CLIENTS)], source.test(), source.shape
    began = time.perf_counter()

    def trained(what: str, make: Callable[[], Plugins]) -> nn.Module:
        model = build_model(case.model, shape, norm=case.norm, seed=seed)
        saved = checkpoints / f"{path.stem}-{seed}-{what}.pt" if checkpoints else None
        return averaged(model, clients, case, seed, 1, case.rounds, make, saved)

    def row(what: str, model: nn.Module, masks: Masks, **more: Any) -> Row:
        tuned = copy.deepcopy(model)
        keep_entries(tuned, masks)
        averaged(tuned, clients, case, seed, case.rounds + 1, case.tuning, lambda: NO_PLUGINS)
        kept, entries = (sum(int(count(mask)) for mask in masks.values()) for count in (torch.sum, torch.numel))
        return {"case": name, "seed": seed, "what": what, "accuracy_before": accuracy(model, test, case),
                "accuracy": accuracy(tuned, test, case), "seconds": time.perf_counter() - began,
                "zeros": 1 - kept / entries if entries else 0.0} | more  # fmt: skip

    plain = trained("plain", lambda: NO_PLUGINS)
    penalty = f"crossbar.tile={case.tile} crossbar.strength={case.strength} crossbar.layers={case.layers}"
    even = trained("penalty", lambda: make_plugins("crossbar", f"{penalty} crossbar.after=999"))
    if "whole network" not in done:
        yield row("whole network", plain, {})
    for percentile in case.percentiles:
        own = balanced(even, case, percentile)
        masks = {
            "crossbar": own,
            "unstructured, per layer": unstructured(plain, own, whole=False),
            "unstructured, global": unstructured(plain, own, whole=True),
            "crossbar without penalty": balanced(plain, case, percentile),
        }
        for what in ("crossbar", *case.rivals):
            if (title := f"{what}, percentile {percentile}") not in done:
                saving = energies(plain, masks[what], case, shape)
                yield row(
                    title, even if what == "crossbar" else plain, masks[what], percentile=percentile, saving=saving
                )
        if seed == 0 and percentile == case.percentiles[0]:
            path.with_suffix(".svg").write_text(occupancy_picture({
                "trained plainly": occupancy(plain, case.picture, case.tile),
                "trained with the penalty": occupancy(even, case.picture, case.tile),
                "unstructured pruning": occupancy(plain, case.picture, case.tile, masks["unstructured, per layer"]),
                "crossbar pruning": occupancy(even, case.picture, case.tile, own),
            }, case.tile))  # fmt: skip


# Federated runs

RUN: dict[str, Any] = {
    "dataset": "digits", "model": "cnn", "clients": 6, "rounds": 8, "local_epochs": 2, "batch_size": 16, "lr": 0.05,
    "lr_final_factor": 0.2, "ratio": 50.0, "max_evals": 10, "ema_decay": 0.0, "server_lr": 1.0, "proxies_below": 1.0,
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


def summary(rows: list[Row]) -> None:
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


_REPLACES = "replaces that of the case"


def main(
    part: Annotated[str, typer.Option(click_type=click.Choice((*CASES, "federated")))] = "mnist",
    seeds: Annotated[int, typer.Option(help="how many seeds, from 0 on")] = 3,
    images: Annotated[int | None, typer.Option(help=_REPLACES)] = None,
    rounds: Annotated[int | None, typer.Option(help=_REPLACES)] = None,
    tuning: Annotated[int | None, typer.Option(help=_REPLACES)] = None,
    strength: Annotated[float | None, typer.Option(help=_REPLACES)] = None,
    lr: Annotated[float | None, typer.Option(help=_REPLACES)] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="folder for the weights after each round of training")
    ] = None,
    name: Annotated[str, typer.Option(help="of the results: plugins-crossbar-NAME.json; by default the part")] = "",
) -> None:
    """Crossbar-aware pruning: the energy of analog-to-digital converters at equal sparsity; masks in a run."""
    options = SimpleNamespace(**locals())
    torch.set_num_threads(1)
    if options.checkpoints:
        options.checkpoints.mkdir(parents=True, exist_ok=True)
    part, name = options.part, options.name or options.part
    if part in CASES:
        changes = {f: getattr(options, f) for f in ("images", "rounds", "tuning", "strength", "lr")}
        CASES[part] = Case(**vars(CASES[part]) | {f: value for f, value in changes.items() if value is not None})
    settings = json.loads(
        json.dumps({"clients": CLIENTS} | vars(CASES[part]) if part in CASES else RUN | {"options": PLUGIN})
    )
    path = RESULTS / f"plugins-crossbar-{name}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[Row] = kept["rows"] if kept.get("settings") == settings else []

    def add(row: Row) -> None:
        rows.append(row)
        write_results(path.stem, settings=settings, rows=rows, script="plugins crossbar")
        print(f"{name}, seed {row['seed']}: {row['what']} done, accuracy {row['accuracy']:.4f}", flush=True)

    for seed in range(options.seeds):
        done = {row["what"] for row in rows if row["seed"] == seed}
        if part not in CASES:
            for what, more in variants():
                if what not in done:
                    add(federated(seed, what, more))
        elif len(done) < 1 + len(CASES[part].percentiles) * (1 + len(CASES[part].rivals)):
            for row in one_seed(part, seed, done, options.checkpoints, path):
                add(row)
    summary(rows)


if __name__ == "__main__":
    run_command(main)
