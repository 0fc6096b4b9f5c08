"""Memorization by loss curvature: does the plugin `curvature` find wrong labels, and does dropping suspects help?

- `noise`: labels of 1, 5 and 10 % of the digits and of 4,000 MNIST images are replaced by wrong ones; AUROC of finding
  them by the means over training (curvature, loss, gradient), by the last epoch's curvature, and by the confidence of
  the trained network in the given label.
- `cleanlab`: AUROC on the same labels by cleanlab, from probabilities of 5-fold cross-validation; needs cleanlab.
- `duplicates`: copies of CIFAR-10 images with another label are planted; how high both images of a pair rank.
- `federated`: ten clients with digits, two of which have 20 % wrong labels; accuracy with and without dropping.

Seeds that the JSON already holds with the same settings are not run again.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, command_line, find_data, joined, print_table, several, spread, versions
from client.plugins.curvature import SCORES, LossCurvature
from tofu.data import LabeledImages, open_data, to_float
from tofu.files import replace_file
from tofu.models import build_model
from tofu.plugins import NO_PLUGINS, RoundContext, make_plugins
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import load_weights, weights_of

Row = dict[str, Any]

OPTIONS = "curvature.probes=3 curvature.where=local"
NOISE: dict[str, Row] = {
    "digits": {"model": "mlp", "epochs": 40, "every": 1, "lr": 0.05},
    "digits-slow": {"model": "mlp", "epochs": 40, "every": 1, "lr": 0.02},
    "mnist": {"model": "lenet5", "epochs": 16, "every": 2, "lr": 0.02},
    "mnist-long": {"model": "lenet5", "epochs": 24, "every": 2, "lr": 0.05},
}
FRACTIONS = (0.01, 0.05, 0.1)
DUPLICATES: Row = {"images": 2000, "pairs": 40, "model": "lenet5", "epochs": 150, "every": 10, "lr": 0.02}
FEDERATED: Row = {"clients": 10, "noisy": 2, "fraction": 0.2, "rounds": 20, "epochs": 3, "lr": 0.05}
ACTIONS = {
    "no action": "",
    "drop 4 % over all clients": "curvature.action=drop curvature.over=all curvature.quantile=0.96",
    "drop 10 % over all clients": "curvature.action=drop curvature.over=all curvature.quantile=0.9",
    "drop 10 % of each client": "curvature.action=drop curvature.quantile=0.9",
    "drop 4 % over all clients, by loss":
        "curvature.action=drop curvature.over=all curvature.quantile=0.96 curvature.score=loss",
}  # fmt: skip


def auroc(scores: Tensor, positive: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive.numpy(), scores.numpy()))


def with_wrong_labels(data: LabeledImages, fraction: float, seed: int) -> tuple[LabeledImages, Tensor]:
    """A copy in which a random fraction has a random wrong label, and which ones: bool [n]."""
    generator = derive_generator(seed, "wrong labels")
    wrong = torch.zeros(len(data), dtype=torch.bool)
    wrong[torch.randperm(len(data), generator=generator)[: round(fraction * len(data))]] = True
    shift = torch.randint(1, data.classes, (len(data),), generator=generator)
    labels = torch.where(wrong, (data.labels + shift) % data.classes, data.labels)
    return LabeledImages(data.images, labels, data.classes), wrong


def trained(data: LabeledImages, how: Row, seed: int) -> tuple[torch.nn.Module, LossCurvature, Tensor]:
    """One client that trains in one round; the model, the plugin with its means, and the last scoring's curvature."""
    plugins = make_plugins("curvature", f"{OPTIONS} curvature.every={how['every']}")
    plugin = plugins[0]
    assert isinstance(plugin, LossCurvature)
    model = plugins.setup(build_model(how["model"], data.shape, seed=seed), RoundContext(data.shape, seed=seed))
    sums: list[Tensor] = []
    measure = plugin._measure

    def keep_sums(model: torch.nn.Module, data: LabeledImages) -> None:
        measure(model, data)
        total = plugin.state["curvature"]
        assert isinstance(total, Tensor)
        sums.append(total)

    plugin._measure = keep_sums  # type: ignore[method-assign]
    config = LocalTrainingConfig(how["epochs"], 64, how["lr"], 0.9)
    train_locally(model, data, config, generator=derive_generator(seed, "train"), plugins=plugins)
    return model.eval(), plugin, sums[-1] - sums[-2]


def probabilities(model: torch.nn.Module, data: LabeledImages) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(to_float(images)).softmax(1) for images in torch.split(data.images, 500)])


def noisy_data(name: str, fraction: float, seed: int) -> tuple[LabeledImages, Tensor]:
    """Images with wrong labels, and which of them: bool [n]."""
    source = "digits" if name.startswith("digits") else find_data("mnist", "ylecun/mnist")
    most = 4000 if name.startswith("mnist") else 0
    clean = open_data(source, clients=1, partition="iid", train_images=most, seed=seed)
    return with_wrong_labels(clean.client(0), fraction, seed)


def cleanlab(name: str, fraction: float, seed: int) -> Row:
    """By cleanlab's label quality, from the probabilities of 5-fold cross-validation."""
    from cleanlab.rank import get_label_quality_scores

    how, began = NOISE[name], time.perf_counter()
    data, wrong = noisy_data(name, fraction, seed)
    folds = torch.randperm(len(data), generator=derive_generator(seed, "folds")) % 5
    outside = torch.zeros(len(data), data.classes)
    config = LocalTrainingConfig(how["epochs"], 64, how["lr"], 0.9)
    for fold in range(5):
        model = build_model(how["model"], data.shape, seed=seed)
        kept = data.subset((folds != fold).nonzero().flatten())
        train_locally(model, kept, config, generator=derive_generator(seed, fold, "train"))
        held = (folds == fold).nonzero().flatten()
        outside[held] = probabilities(model.eval(), data.subset(held))
    quality = torch.from_numpy(get_label_quality_scores(data.labels.numpy(), outside.numpy()))
    return {"auroc": {"cleanlab": auroc(-quality, wrong)}, "seconds": time.perf_counter() - began}


def noise(name: str, fraction: float, seed: int) -> Row:
    data, wrong = noisy_data(name, fraction, seed)
    began = time.perf_counter()
    model, plugin, last = trained(data, NOISE[name], seed)
    found = {f"mean {score}": auroc(plugin.mean_scores(score), wrong) for score in SCORES}
    found["last epoch's curvature"] = auroc(last, wrong)
    confidence = probabilities(model, data).gather(1, data.labels[:, None]).flatten()
    found["last epoch's confidence"] = auroc(-confidence, wrong)
    return {"auroc": found, "seconds": time.perf_counter() - began}


def duplicates(seed: int) -> Row:
    """Rank (1: highest) of both images of each pair, as a fraction of all; the mean of a random order is 0.5."""
    how = DUPLICATES
    source = find_data("cifar10", "uoft-cs/cifar10")
    clean = open_data(source, clients=1, partition="iid", train_images=how["images"], seed=seed).client(0)
    generator = derive_generator(seed, "pairs")
    originals = torch.randperm(len(clean), generator=generator)[: how["pairs"]]
    shift = torch.randint(1, clean.classes, (len(originals),), generator=generator)
    data = LabeledImages(
        torch.cat([clean.images, clean.images[originals]]),
        torch.cat([clean.labels, (clean.labels[originals] + shift) % clean.classes]),
        clean.classes,
    )
    planted = torch.zeros(len(data), dtype=torch.bool)
    planted[originals] = True
    planted[len(clean) :] = True
    _, plugin, last = trained(data, how, seed)
    named = {f"mean {score}": plugin.mean_scores(score) for score in SCORES} | {"last epoch's curvature": last}
    top = int(planted.sum())
    return {
        "auroc": {name: auroc(scores, planted) for name, scores in named.items()},
        "among the highest": {
            name: float(planted[scores.argsort(descending=True)[:top]].float().mean()) for name, scores in named.items()
        },
        "chance": float(planted.float().mean()),
    }


def federated(action: str, seed: int) -> Row:
    """Federated averaging with digits; test accuracy, and of the images dropped in the last round those mislabeled."""
    how, options = FEDERATED, ACTIONS[action]
    source = open_data("digits", clients=how["clients"], partition="iid", seed=seed)
    clients, wrong = [], []
    for i in range(how["clients"]):
        data, flipped = with_wrong_labels(source.client(i), how["fraction"] if i < how["noisy"] else 0.0, seed + i)
        clients.append(data)
        wrong.append(flipped)
    examples, shape = sum(map(len, clients)), source.shape
    model = build_model("mlp", shape, seed=seed)
    broadcast: dict[str, Any] = {}
    states: list[dict[str, Any]] = [{} for _ in clients]
    dropped = right = 0
    for round_ in range(1, how["rounds"] + 1):
        mean = {name: torch.zeros_like(value) for name, value in weights_of(model).items()}
        sums: dict[str, Tensor] = {}
        for i, data in enumerate(clients):
            plugins = make_plugins("curvature", f"curvature.probes=3 {options}") if options else NO_PLUGINS
            local = build_model("mlp", shape, seed=seed)
            plugins.setup(local, RoundContext(shape, round=round_, rounds=how["rounds"], client=str(i), seed=seed))
            for plugin in plugins:
                plugin.state, plugin.broadcast = states[i], broadcast
            load_weights(local, weights_of(model))
            config = LocalTrainingConfig(how["epochs"], 32, how["lr"], 0.9)
            train_locally(local, data, config, generator=derive_generator(seed, round_, i, "train"), plugins=plugins)
            for name, value in weights_of(local).items():
                mean[name] += value * (len(data) / examples)
            for plugin in plugins:
                assert isinstance(plugin, LossCurvature)
                states[i] = plugin.state
                for name, value in plugin.export().sums.items():
                    sums[name] = sums.get(name, 0) + value
                if round_ == how["rounds"]:
                    dropped += int(plugin._suspects.sum())
                    right += int((plugin._suspects & wrong[i]).sum())
        load_weights(model, mean)
        if sums:
            broadcast = plugins[0].reduce(sums, examples, broadcast)
    test = source.test()
    accuracy = float((probabilities(model.eval(), test).argmax(1) == test.labels).float().mean())
    return {"accuracy": accuracy, "dropped": dropped, "of them mislabeled": right,
            "mislabeled": int(sum(int(each.sum()) for each in wrong))}  # fmt: skip


def tasks(args: SimpleNamespace) -> list[tuple[str, Row, Callable[[], Row]]]:
    """(name, settings, function) of every measurement of the chosen parts."""
    found: list[tuple[str, Row, Callable[[], Row]]] = []
    for seed in range(args.seeds):
        for name, fraction in itertools.product(args.data, args.fractions):
            if "noise" in args.parts:
                settings = NOISE[name] | {"options": OPTIONS}
                found.append((f"noise/{name}/{fraction}/{seed}", settings, partial(noise, name, fraction, seed)))
            if "cleanlab" in args.parts:
                rival = partial(cleanlab, name, fraction, seed)
                found.append((f"cleanlab/{name}/{fraction}/{seed}", NOISE[name], rival))
        if "federated" in args.parts:
            for action, options in ACTIONS.items():
                settings = FEDERATED | {"options": options}
                found.append((f"federated/{action}/{seed}", settings, partial(federated, action, seed)))
        if "duplicates" in args.parts:
            found.append((f"duplicates/{seed}", DUPLICATES | {"options": OPTIONS}, partial(duplicates, seed)))
    return found


def report(rows: Row) -> None:
    """Print mean ± standard deviation over the seeds of everything that was measured."""
    groups: dict[str, list[Row]] = {}
    for name, row in rows.items():
        groups.setdefault(name.rpartition("/")[0], []).append(row)
    noisy = {name: group for name, group in groups.items() if name.startswith(("noise", "cleanlab", "duplicates"))}
    if noisy:
        columns = list(dict.fromkeys(column for group in noisy.values() for row in group for column in row["auroc"]))
        table = []
        for name, group in sorted(noisy.items()):
            cells = [[row["auroc"][column] for row in group if column in row["auroc"]] for column in columns]
            table.append([name, *(spread(cell) if cell else "" for cell in cells)])
        print_table(["AUROC", *columns], table)
    if "duplicates" in groups:
        group = groups["duplicates"]
        for name in group[0]["among the highest"]:
            print(f"planted among the highest, {name}: {spread([row['among the highest'][name] for row in group])}")
    if chosen := {name: group for name, group in groups.items() if name.startswith("federated")}:
        print_table(
            ["federated", "accuracy %", "dropped", "of them mislabeled"],
            [
                [name.partition("/")[2], spread([100 * row["accuracy"] for row in group], 2),
                 f"{statistics.fmean(row['dropped'] for row in group):.0f}",
                 f"{statistics.fmean(row['of them mislabeled'] for row in group):.0f} of "
                 f"{statistics.fmean(row['mislabeled'] for row in group):.0f}"]
                for name, group in chosen.items()
            ],
        )  # fmt: skip


_PARTS = ("noise", "duplicates", "federated")


def main(
    parts: Annotated[Any, several(str, [*_PARTS, "cleanlab"])] = joined(_PARTS),
    data: Annotated[Any, several(str, list(NOISE))] = joined(list(NOISE)),
    fractions: Annotated[Any, several(float)] = joined(list(FRACTIONS)),
    seeds: int = 3,
) -> None:
    """Memorization by loss curvature: does the plugin find wrong labels, and does dropping suspects help?"""
    args = SimpleNamespace(**locals())
    torch.set_num_threads(1)
    path = RESULTS / "plugins-curvature.json"
    saved = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    rows: dict[str, Row] = saved["rows"]
    command = command_line("plugins curvature")
    for name, settings, measure in tasks(args):
        if name in rows and rows[name]["settings"] == json.loads(json.dumps(settings)):
            continue
        began = time.perf_counter()
        rows[name] = {"command": command, "settings": settings} | measure()
        print(f"{name}: {time.perf_counter() - began:.1f} s {json.dumps(rows[name])}", flush=True)
        note = {"note": saved["note"]} if "note" in saved else {}
        replace_file(path, (json.dumps(versions(command) | note | {"rows": rows}, indent=1) + "\n").encode())
    report(rows)
