"""Gradient projection memory on permuted MNIST, in the setting of Saha et al. (ICLR 2021), table 1.

Ten tasks, each with its own permutation of the pixels; 784-100-100-10 without biases, ReLU, pixels normalized as there;
SGD of step 0.01, batches of 10, 5 epochs a task; memory of 300 images, thresholds 0.95 (first layer) and 0.99, the
code's rule; 54,000 training images, since the published code keeps a tenth for validation. One model learns task after
task by `train_locally` with the plugin; the server's half is called between tasks. The paper's ACC is 93.91 +- 0.16 and
its BWT -3 (the fraction -0.03).

With --federated digits: three clients average their updates on scikit-learn's digits, each with tasks of its own: the
images as they are, then three permutations that no other client has. With --federated mnist: five clients on MNIST,
each with the images as they are and three permutations of its own, so that sixteen different tasks fill one memory.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import click
import torch
import typer
from torch import Tensor, nn

from benchmarks.common import RESULTS, find_data, print_table, run_command, spread, write_results
from tofu.data import ImageShape, LabeledImages, open_data
from tofu.evaluation import evaluate
from tofu.models import build_model
from tofu.plugins import RoundContext, make_plugins
from tofu.rng import derive_generator, derive_seed
from tofu.tasks import TaskStream, backward_transfer, mean_accuracy
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, load_weights, weights_of

_SIDE, _GAP, _LEFT, _HEAD = 8, 3, 8, 18  # pixels
_LIGHT, _DARK = (247, 251, 255), (8, 48, 107)


def occupancy_picture(panels: Mapping[str, Tensor], tile: int) -> str:
    """An SVG with a panel for each title, one below the other.

    Args:
        panels: title -> occupancy in [0, 1], [input blocks, outputs]: a row for each row of tiles.
        tile: columns of a tile; tiles are set apart.
    """
    parts, top, right = [], 4, 0
    for title, occupancy in panels.items():
        parts.append(f'<text x="{_LEFT}" y="{top + 12}" fill="#222">{escape(title)}</text>')
        top += _HEAD
        for row in occupancy.tolist():
            for i, value in enumerate(row):
                x = _LEFT + i * _SIDE + i // tile * _GAP
                parts.append(f'<rect x="{x}" y="{top}" width="{_SIDE}" height="{_SIDE}" fill="{_color(value)}"/>')
                right = max(right, x + _SIDE)
            top += _SIDE + _GAP
        top += 6
    for i in range(11):
        parts.append(f'<rect x="{_LEFT + 18 * i}" y="{top}" width="18" height="10" fill="{_color(i / 10)}"/>')
    parts.append(f'<text x="{_LEFT + 206}" y="{top + 9}" fill="#222">empty to full column</text>')
    size = f'width="{right + _LEFT}" height="{top + 18}" font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def _color(value: float) -> str:
    return "#" + "".join(f"{round(a + (b - a) * value):02x}" for a, b in zip(_LIGHT, _DARK, strict=True))


METHODS: dict[str, tuple[str, str]] = {
    "fine-tuning": ("", ""),
    "gpm": ("gpm", "gpm.first-threshold=0.95 gpm.threshold=0.99 gpm.rule=code"),
}
FEDERATED: dict[str, tuple[str, str]] = {
    "fine-tuning": ("", ""),
    "gpm, own memories": ("gpm", "gpm.memory=local"),
    "gpm, union": ("gpm", ""),
    "gpm, union, bias frozen": ("gpm", "gpm.bias=freeze"),
    "gpm, union, scaled": ("gpm", "gpm.scaling=10"),
    "gpm, union, first layer noisy": ("gpm", "gpm.first-layer=noise gpm.noise=0.5"),
    "gpm, union, first layer skipped": ("gpm", "gpm.first-layer=skip"),
}
FEDERATIONS: dict[str, dict[str, Any]] = {
    "digits": {"dataset": "digits", "model": "mlp", "clients": 3, "tasks": 4, "rounds": 3, "epochs": 3,
               "batch_size": 16, "lr": 0.05, "methods": tuple(FEDERATED)},
    "mnist": {"dataset": "ylecun/mnist", "images": 12_000, "model": "mlp", "clients": 5, "tasks": 4, "rounds": 10,
              "epochs": 1, "batch_size": 10, "lr": 0.1, "methods": tuple(FEDERATED)[:3]},
}  # fmt: skip
_MAX_BYTES = 1 << 30


class Normalized(nn.Module):
    """Images in [-1, 1] -> MNIST's mean 0 and deviation 1, as in the published code."""

    def forward(self, images: Tensor) -> Tensor:
        return ((images + 1) / 2 - 0.1307) / 0.3081


def build(shape: ImageShape, seed: int) -> nn.Module:
    """784-100-100-10 without biases, torch's initialization under the seed."""
    sizes = (shape.channels * shape.height * shape.width, 100, 100, shape.classes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), Normalized(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def learn(
    make: Callable[[], nn.Module],
    clients: Sequence[Sequence[LabeledImages]],
    tests: Sequence[Sequence[LabeledImages]],
    config: LocalTrainingConfig,
    plugin: tuple[str, str],
    *,
    rounds: int = 1,
    seed: int = 0,
    log: Callable[[str], None] = lambda _: None,
) -> tuple[Tensor, dict[str, float]]:
    """Federated averaging over a stream of tasks, the plugin's two halves included; one client is plain training.

    Args:
        make: a fresh model, always with the same weights.
        clients: by client and task: what is learnt.
        tests: by client and task: what its accuracy is measured on.
        rounds: of `config.epochs` each, a task.
        plugin: names and options for `make_plugins`.

    Returns:
        Accuracies [tasks, tasks] (row: after which task), the mean over clients; and the last metrics of the plugin.
    """
    tasks, weights = len(clients[0]), weights_of(make())
    broadcast, matrix, metrics = b"", torch.zeros(tasks, tasks), {}
    states = [b""] * len(clients)
    for task in range(tasks):
        for turn in range(rounds):
            round_, final = task * rounds + turn + 1, turn == rounds - 1
            where: dict[str, Any] = {"round": round_, "rounds": tasks * rounds, "task": task, "tasks": tasks}
            examples = sum(len(own[task]) for own in clients)
            average: Weights = {name: torch.zeros_like(value) for name, value in weights.items()}
            totals: dict[str, Tensor] = {}
            for i, own in enumerate(clients):
                plugins = make_plugins(*plugin)
                plugins.load(state=states[i], broadcast=broadcast, max_bytes=_MAX_BYTES)
                shape = own[task].shape
                model = plugins.setup(make(), RoundContext(shape, **where, final=final, client=str(i), seed=seed))
                load_weights(model, weights)
                generator = derive_generator(seed, round_, i, "train")
                train_locally(model, own[task], config, generator=generator, plugins=plugins, final=final)
                export = plugins.export(model)
                metrics = dict(export.metrics)
                states[i] = plugins.state_bytes(max_bytes=_MAX_BYTES)
                for name, value in export.sums.items():
                    totals[name] = totals.get(name, torch.zeros_like(value)) + value
                for name, value in weights_of(model).items():
                    average[name] += value * (len(own[task]) / examples)
            server = make_plugins(*plugin)
            server.load(broadcast=broadcast, max_bytes=_MAX_BYTES)
            model = server.setup(make(), RoundContext(clients[0][task].shape, **where, final=final, seed=seed))
            server.check_sums(totals, model, clients=len(clients))
            load_weights(model, weights)
            before = server.before_step(model)
            load_weights(model, average)
            server.on_step(model, before)
            weights = weights_of(model)
            server.reduce(totals, examples)
            broadcast = server.broadcast_bytes(max_bytes=_MAX_BYTES)
        scores = [[evaluate(model, test).accuracy for test in own[: task + 1]] for own in tests]
        matrix[task, : task + 1] = torch.tensor(scores).mean(0)
        log(f"task {task + 1}: " + " ".join(f"{100 * a:.1f}" for a in matrix[task, : task + 1].tolist()))
    return matrix, metrics


def one_run(method: str, seed: int, options: SimpleNamespace) -> dict[str, Any]:
    """The accuracy matrix of one method, and what follows from it."""
    data = open_data(
        options.data,
        clients=1,
        partition="iid",
        train_images=options.images if options.images < 60_000 else 0,
        seed=seed,
    )
    stream = TaskStream("pixels", options.tasks, data.shape.classes, seed=seed)
    train = [stream.images_of(data.client(0), task) for task in range(options.tasks)]
    test = [stream.images_of(data.test(), task) for task in range(options.tasks)]
    first = derive_seed(seed, "initial weights")
    config = LocalTrainingConfig(options.epochs, options.batch_size, options.lr)
    matrix, metrics = learn(
        lambda: build(data.shape, first), [train], [test], config, METHODS[method], seed=seed,
        log=lambda line: print(f"{method}, seed {seed}, {line}", flush=True),
    )  # fmt: skip
    return _row(method, METHODS[method][1], seed, matrix, metrics)


def one_federation(name: str, method: str, seed: int) -> dict[str, Any]:
    """The mean accuracy matrix of clients with permutations of their own."""
    f, plugin = FEDERATIONS[name], FEDERATED[method]
    place = "digits" if name == "digits" else find_data(name, f["dataset"])
    data = open_data(place, clients=f["clients"], partition="iid", train_images=f.get("images", 0), seed=seed)
    streams = [TaskStream("pixels", f["tasks"], data.shape.classes, seed=100 * seed + i) for i in range(f["clients"])]
    train = [[s.images_of(data.client(i), task) for task in range(f["tasks"])] for i, s in enumerate(streams)]
    test = [[s.images_of(data.test(), task) for task in range(f["tasks"])] for s in streams]
    config = LocalTrainingConfig(f["epochs"], f["batch_size"], f["lr"])
    matrix, metrics = learn(
        lambda: build_model(f["model"], data.shape, seed=seed), train, test, config, plugin,
        rounds=f["rounds"], seed=seed,
        log=lambda line: print(f"{method}, seed {seed}, {line}", flush=True),
    )  # fmt: skip
    return _row(method, plugin[1], seed, matrix, metrics)


def _row(method: str, options: str, seed: int, matrix: Tensor, metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "method": method,
        "options": options,
        "seed": seed,
        "acc": mean_accuracy(matrix),
        "bwt": backward_transfer(matrix),
        "accuracies": [[round(100 * a, 2) for a in row] for row in matrix.tolist()],
        "frozen": {name.removeprefix("gpm/frozen/"): round(share, 3) for name, share in metrics.items()},
    }


def draw(row: dict[str, Any], path: Path) -> None:
    """The accuracy matrix as a picture: row by row what was known after each task."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "tofu", "svg.fonttype": "none"}
    import matplotlib.pyplot as plt

    matrix = torch.tensor(row["accuracies"])
    figure, axes = plt.subplots(figsize=(4.6, 4))
    shown = matrix.masked_fill(matrix == 0, float("nan"))
    axes.pcolormesh(shown.flip(0).numpy(), cmap="viridis", vmin=50, vmax=100)
    for i, j in torch.tril_indices(*matrix.shape).T.tolist():
        color = "black" if matrix[i, j] > 80 else "white"
        axes.text(j + 0.5, len(matrix) - i - 0.5, f"{matrix[i, j]:.0f}", ha="center", va="center", size=7, color=color)
    marks = [i + 0.5 for i in range(len(matrix))]
    axes.set_xticks(marks, [str(i + 1) for i in range(len(matrix))])
    axes.set_yticks(marks, [str(len(matrix) - i) for i in range(len(matrix))])
    axes.set_xlabel("accuracy on task, %")
    axes.set_ylabel("after learning task")
    axes.set_title(f"{row['method']}: ACC {row['acc']:.1f}, BWT {row['bwt']:.1f}", size=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(
    data: str = find_data("mnist", "ylecun/mnist"),
    images: Annotated[int, typer.Option(help="training images of a task; 60000 is all")] = 54_000,
    tasks: int = 10,
    epochs: int = 5,
    batch_size: int = 10,
    lr: float = 0.01,
    seeds: int = 1,
    methods: str = ",".join(METHODS),
    name: Annotated[str, typer.Option(help="of the results' JSON and picture")] = "",
    federated: Annotated[
        str | None,
        typer.Option(help="clients with tasks of their own, on this data", click_type=click.Choice(tuple(FEDERATIONS))),
    ] = None,
) -> None:
    """Gradient projection memory on permuted MNIST, in the setting of Saha et al. (ICLR 2021), table 1."""
    options = SimpleNamespace(**locals())
    torch.set_num_threads(1)
    if federated:
        name = name or f"plugins-gpm-federated-{federated}"
        settings = FEDERATIONS[federated] | {"seeds": seeds}
        chosen_methods = list(settings["methods"])
    else:
        name, chosen_methods = name or "plugins-gpm", methods.split(",")
        chosen = ("images", "tasks", "epochs", "batch_size", "lr", "seeds")
        settings = {"dataset": "mnist"} | {key: getattr(options, key) for key in chosen}
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for method in chosen_methods:
            rows.append(one_federation(federated, method, seed) if federated else one_run(method, seed, options))
            write_results(name, settings=settings, rows=rows, script="plugins gpm")
    if not federated:
        draw(rows[-1], RESULTS / f"{name}.svg")
    table = []
    for method in chosen_methods:
        mine = [row for row in rows if row["method"] == method]
        table.append((method, spread([r["acc"] for r in mine], 2), spread([r["bwt"] for r in mine], 2)))
    print_table(("method", "ACC, %", "BWT, points"), table)


if __name__ == "__main__":
    run_command(main)
