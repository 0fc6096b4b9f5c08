"""Out-of-distribution detection: the plugin `ood` against detectors of pytorch-ood on the same network trained plainly.

The small cnn on MNIST, four clients with 6,000 images (Dirichlet 0.5), federated averaging through `train_locally`: six
rounds of one epoch, in which the plugin's exports are added and reduced as the server does it. The rivals have the same
rounds with the plain head. Far from the digits: CIFAR-10 in grey, uniform noise, inverted digits. Near: a network that
learns the digits 0 to 5 is shown 6 to 9. The threshold is calibrated as at a run's end, on held-out images that are not
among those of the test.

Costs are for one image: forward and backward passes (counted), bytes that autograd saves for a backward pass, and bytes
that the detector itself keeps. Times are over that of a plain prediction, same process, one thread. Seeds that the JSON
already holds, with the same settings, are not run again.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.common import RESULTS, find_data, print_table, run_command, spread, write_results
from client.plugins.ood import OutOfDistribution, WiderHead
from tofu.data import LabeledImages, open_data, to_float
from tofu.models import build_model
from tofu.models.torchvision_compat import torchvision  # noqa: F401  before pytorch_ood
from tofu.plugins import NO_PLUGINS, Plugins, RoundContext, make_plugins
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import load_weights, weights_of

from pytorch_ood.detector import ODIN, EnergyBased, Mahalanobis, MaxSoftmax  # isort: skip


def ood_metrics(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """pytorch-ood's metrics, each in 0..1.

    Args:
        inside: scores [n] of images like the training data.
        outside: scores [m] of others; higher scores count as further outside, and ties as half right.

    Returns:
        auroc; aupr_out and aupr_in (what is outside, or inside, being the positive class); fpr95, the fraction of
        images inside that are flagged where 95% of those outside are.
    """
    import tofu.models.torchvision_compat  # noqa: F401  before pytorch_ood, which imports torchvision

    from pytorch_ood.metrics import OODMetrics  # isort: skip

    metrics = OODMetrics()
    labels = torch.cat([torch.zeros(len(inside), dtype=torch.int64), -torch.ones(len(outside), dtype=torch.int64)])
    values = metrics.update(torch.cat([inside, outside]).detach(), labels).compute()
    return {
        "auroc": float(values["AUROC"]),
        "aupr_out": float(values["AUPR-OUT"]),
        "aupr_in": float(values["AUPR-IN"]),
        "fpr95": float(values["FPR95TPR"]),
    }


CLIENTS = 4
HOW = LocalTrainingConfig(epochs=1, batch_size=64, lr=0.03, momentum=0.9)
AUXILIARY = "auxiliary class"
MIXUP = f"{AUXILIARY}, intra-class mixup"

Score = Callable[[Tensor], Tensor]
"""Images float32 [n, c, h, w] -> scores [n], higher for the unknown."""


@dataclass(frozen=True)
class ReferenceModel:
    """A trained network and the server's plugins."""

    model: nn.Module
    plugins: Plugins


def train(clients: list[LabeledImages], options: str | None, rounds: int, seed: int) -> ReferenceModel:
    """Federated averaging, with the plugin where there are options."""

    def made(about: RoundContext) -> tuple[nn.Module, Plugins]:
        plugins = NO_PLUGINS if options is None else make_plugins("ood", options)
        return plugins.setup(build_model("cnn", about.shape, seed=seed), about), plugins

    shape, examples = clients[0].shape, sum(map(len, clients))
    model, server = made(RoundContext(shape, rounds=rounds, seed=seed))
    for round_ in range(1, rounds + 1):
        mean = {name: torch.zeros_like(value) for name, value in weights_of(model).items()}
        sums: dict[str, Tensor] = {}
        for number, data in enumerate(clients):
            local, plugins = made(RoundContext(shape, round=round_, rounds=rounds, client=str(number), seed=seed))
            load_weights(local, weights_of(model))
            generator = derive_generator(seed, round_, str(number), "train")
            train_locally(local, data, HOW, generator=generator, plugins=plugins)
            for name, value in weights_of(local).items():
                mean[name] += value * (len(data) / examples)
            for name, value in plugins.export(local).sums.items():
                sums[name] = sums.get(name, 0) + value
        load_weights(model, mean)
        if sums:
            server.reduce(sums, examples)
    return ReferenceModel(model.eval(), server)


def kept_bytes(model: nn.Module) -> int:
    """The row of the head for the added class, as float32, and the threshold, as float64."""
    head = next(module for module in model.modules() if isinstance(module, WiderHead))
    return 4 * (head.in_features + 1) + 8


def in_batches(score: Score, images: Tensor) -> Tensor:
    return torch.cat([score(batch).detach() for batch in torch.split(images, 500)])


def plugin_score(network: ReferenceModel) -> Score:
    def score(images: Tensor) -> Tensor:
        with torch.no_grad():
            found = network.plugins.predict(network.model, images).score
        assert found is not None
        return found

    return score


def features_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the last layer is fed."""
    assert isinstance(model, nn.Sequential)
    return model[:-1]


def rivals(model: nn.Module, train_images: LabeledImages) -> dict[str, tuple[Score, int]]:
    """Name -> (score, bytes that the detector keeps)."""
    encoder = features_of(model)
    mahalanobis = Mahalanobis(encoder)
    with torch.no_grad():
        features = torch.cat([encoder(to_float(batch)) for batch in torch.split(train_images.images, 500)])
    mahalanobis.fit_features(features, train_images.labels)
    kept = 4 * (mahalanobis.mu.numel() + mahalanobis.precision.numel())

    def without_gradients(predict: Score) -> Score:
        return torch.no_grad()(predict)

    return {
        "MSP": (without_gradients(MaxSoftmax(model).predict), 0),
        "energy": (without_gradients(EnergyBased(model).predict), 0),
        "ODIN": (ODIN(model).predict, 0),
        "Mahalanobis": (mahalanobis.predict, kept),
    }


def cost(score: Score, model: nn.Module, images: Tensor) -> dict[str, float]:
    """Passes and saved bytes for one image, and time over that of a plain prediction."""
    passes = {"forward": 0, "backward": 0}
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))

    def backward(_: Any) -> None:
        passes["backward"] += 1

    def forward(_: nn.Module, __: Any, output: Tensor) -> None:
        passes["forward"] += 1
        if output.requires_grad and torch.is_grad_enabled():
            output.register_hook(backward)  # type: ignore[no-untyped-call]

    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        if not isinstance(tensor, nn.Parameter):
            saved += tensor.numel() * tensor.element_size()
        return tensor

    handle = first.register_forward_hook(forward)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        score(images[:1])
    handle.remove()

    def plain(batch: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(batch)
        return out

    return passes | {"saved_bytes": saved, "time": seconds(score, images) / seconds(plain, images)}


def seconds(call: Score, images: Tensor) -> float:
    times = []
    for _ in range(7):
        began = time.perf_counter()
        call(images)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def grey(images: LabeledImages, side: int) -> Tensor:
    """float32 [n, 1, side, side] in [-1, 1]: the luma of color images, scaled bilinearly."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    luma = (to_float(images.images) * weights).sum(1, keepdim=True)
    return F.interpolate(luma, size=(side, side), mode="bilinear", align_corners=False)


def only(data: LabeledImages, wanted: range, classes: int) -> LabeledImages:
    rows = torch.isin(data.labels, torch.tensor(list(wanted))).nonzero().flatten()
    return LabeledImages(data.images[rows], data.labels[rows], classes)


def one_seed(seed: int, options: SimpleNamespace, *, near: bool) -> list[dict[str, Any]]:
    """All detectors on one seed's networks."""
    source = open_data(options.mnist, clients=CLIENTS, partition="dirichlet", alpha=0.5, train_images=options.images,
                       seed=seed)  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    clients, test = [source.client(i) for i in range(CLIENTS)], source.test()
    order = torch.randperm(len(test), generator=generator)
    held_out, test = test.subset(order[options.test_images :]), test.subset(order[: options.test_images])
    if near:
        outside = {"digits 6-9": to_float(only(test, range(6, 10), 10).images)}
        clients = [part for part in (only(data, range(6), 6) for data in clients) if len(part)]
        test, held_out = only(test, range(6), 6), only(held_out, range(6), 6)
    else:
        cifar = open_data(options.cifar10, clients=1, partition="iid", seed=0).test().subset(range(options.test_images))
        images = to_float(test.images)
        uniform = torch.rand(images.shape, generator=generator) * 2 - 1
        outside = {"CIFAR-10 in grey": grey(cifar, 28), "uniform noise": uniform, "inverted digits": -images}

    plain = train(clients, None, options.rounds, seed)
    trained = {AUXILIARY: train(clients, "", options.rounds, seed)}
    if not near:
        trained[MIXUP] = train(clients, "ood.intra-class=true", options.rounds, seed)
    everyone = LabeledImages(
        torch.cat([data.images for data in clients]), torch.cat([data.labels for data in clients]), test.classes
    )
    found: dict[str, tuple[Score, nn.Module, int]] = {
        f"plain, {name}": (score, plain.model, kept) for name, (score, kept) in rivals(plain.model, everyone).items()
    }
    for name, network in trained.items():
        found[name] = (plugin_score(network), network.model, kept_bytes(network.model))
    model = trained[AUXILIARY].model
    for kind in ("energy", "angle"):
        network = ReferenceModel(model, make_plugins("ood", f"ood.score={kind}"))
        found[f"{AUXILIARY}, score {kind}"] = (plugin_score(network), model, kept_bytes(model))

    images, rows = to_float(test.images), []
    for name, (score, model, kept) in found.items():
        with torch.no_grad():
            logits = torch.cat([model(batch)[:, : test.classes] for batch in torch.split(images, 500)])
        inside = in_batches(score, images)
        row: dict[str, Any] = {
            "case": "near" if near else "far",
            "seed": seed,
            "detector": name,
            "accuracy": accuracy(logits, test.labels),
            "kept_bytes": kept,
        } | cost(score, model, images[:100])
        scores = {other: in_batches(score, pixels) for other, pixels in outside.items()}
        row["outside"] = {other: ood_metrics(inside, found_scores) for other, found_scores in scores.items()}
        if name in trained:
            plugin = trained[name].plugins[0]
            assert isinstance(plugin, OutOfDistribution)
            row["false_alarms_of_round_start"] = float(plugin.unknown(inside).float().mean())
            plugin.broadcast = plugin.calibrate(model, held_out)
            row["false_alarms"] = float(plugin.unknown(inside).float().mean())
            row["flagged"] = {other: float(plugin.unknown(s).float().mean()) for other, s in scores.items()}
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> None:
    """One table for each case: means and deviations over the seeds."""
    for case in dict.fromkeys(row["case"] for row in rows):
        those = [row for row in rows if row["case"] == case]
        others = list(those[0]["outside"])
        lines = []
        for name in dict.fromkeys(row["detector"] for row in those):
            own = [row for row in those if row["detector"] == name]
            line = [name, spread([100 * row["accuracy"] for row in own], 2)]
            for other in others:
                auroc, fpr = ([100 * row["outside"][other][key] for row in own] for key in ("auroc", "fpr95"))
                line.append(f"{spread(auroc, 2)} ({statistics.fmean(fpr):.1f})")
            line.append(spread([100 * row["false_alarms"] for row in own], 1) if "false_alarms" in own[0] else "")
            line += [f"{own[0]['forward']}+{own[0]['backward']}", f"{statistics.median(r['time'] for r in own):.1f}"]
            line += [f"{own[0]['saved_bytes']:,}", f"{own[0]['kept_bytes']:,}"]
            lines.append(line)
        header = ["detector", "accuracy", *(f"{other}: AUROC (FPR95)" for other in others), "false alarms at 5%"]
        print_table([*header, "passes", "time", "bytes saved", "bytes kept"], lines)
        print()


def main(
    mnist: Annotated[str, typer.Option(help="MNIST: a folder or a hub id")] = find_data("mnist", "ylecun/mnist"),
    cifar10: Annotated[str, typer.Option(help="CIFAR-10: likewise")] = find_data("cifar10", "uoft-cs/cifar10"),
    seeds: Annotated[int, typer.Option(help="how many seeds, from 0 on")] = 3,
    rounds: int = 6,
    images: Annotated[int, typer.Option(help="training images in all")] = 6000,
    test_images: int = 2000,
) -> None:
    """Out-of-distribution detection: the plugin `ood` against detectors of pytorch-ood on a plain network."""
    options = SimpleNamespace(**locals())
    torch.set_num_threads(1)
    settings = {"rounds": options.rounds, "images": options.images, "test_images": options.test_images,
                "clients": CLIENTS, "seeds": list(range(options.seeds))}  # fmt: skip
    path = RESULTS / "plugins-ood.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[dict[str, Any]] = kept["rows"] if kept.get("settings") == settings else []
    for near in (False, True):
        for seed in range(options.seeds):
            if any(row["seed"] == seed and row["case"] == ("near" if near else "far") for row in rows):
                continue
            rows += one_seed(seed, options, near=near)
            write_results(path.stem, settings=settings, rows=rows, script="plugins ood")
            print(f"seed {seed}, {'near' if near else 'far'}: done", flush=True)
    summary(rows)


if __name__ == "__main__":
    run_command(main)
