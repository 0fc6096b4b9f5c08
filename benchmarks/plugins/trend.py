"""Transfer of attacks between models with quantized inputs, and robustness of ensembles of them: the plugin `trend`.

Every member is trained by federated averaging of its own group of clients, from an initialization of its own. fp-b is a
second full-precision member; the members cnn, lenet5 and mlp have full precision and another architecture, and w-BITS
and a-BITS have quantized weights and activations (`benchmarks.plugins.dorefa`). Every member is attacked by PGD in the
maximum norm through its straight-through quantizer, and the examples are shown to all. The metric, fitted to the counts
on one half of the test images, chooses the ensemble among all members, or among those of --candidates; it is attacked
on the other half, by the paper's three attacks, and compared with its most robust member under the attack on that
member alone. Strengths are for images in [0, 1]. Seeds that the JSON already holds, with the same settings, are not run
again.
"""

import itertools
import json
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.common import RESULTS, find_data, joined, print_table, run_command, several, spread, write_results
from benchmarks.plugins.dorefa import quantize_activations, quantize_weights
from client.plugins.transferability import (
    ATTACKS,
    attack,
    choose_ensemble,
    count_transfers,
    transferability,
    vote,
)  # fmt: skip
from tofu.data import ImageShape, LabeledImages, open_data, to_float
from tofu.models import build_model
from tofu.plugins import RoundContext, make_plugins
from tofu.rng import derive_generator
from tofu.settings.groups import TrainingSettings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import load_weights, weights_of

MEMBERS = {
    "fp": "fp", "fp-b": "fp", "1": "1", "2": "2", "4": "4", "halftone": "halftone",
    **dict.fromkeys(("cnn", "lenet5", "mlp", "w-1", "w-2", "w-4", "a-1", "a-2", "a-4"), "fp"),
}  # fmt: skip
"""Name of a member -> its input quantizer."""

ARCHITECTURES = ("cnn", "lenet5", "mlp")


def train(clients: Sequence[LabeledImages], member: int, options: SimpleNamespace, seed: int) -> nn.Module:
    """Federated averaging of one group, with the member's quantizer and an initialization of its own."""
    kinds = ",".join(MEMBERS[name] for name in options.members)
    examples = sum(map(len, clients))

    def build(round_: int, client: str = "") -> tuple[nn.Module, Any]:
        plugins = make_plugins("trend", f"trend.members={kinds}")
        context = RoundContext(clients[0].shape, round=round_, rounds=1, client=client, seed=seed, group=member)
        model = build_member(options.members[member], options.model, context.shape, 100 * seed + member)
        return plugins.setup(model, context), plugins

    model, _ = build(1)
    schedule = TrainingSettings(rounds=options.rounds, lr=options.lr, lr_final_factor=options.lr_final_factor or 1)
    for round_ in range(1, options.rounds + 1):
        config = LocalTrainingConfig(epochs=1, batch_size=32, lr=schedule.lr_of(round_), momentum=0.9)
        mean = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in weights_of(model).items()}
        for number, data in enumerate(clients):
            local, plugins = build(round_, str(number))
            load_weights(local, weights_of(model))
            generator = derive_generator(seed, round_, f"{member}/{number}", "train")
            train_locally(local, data, config, generator=generator, plugins=plugins)
            for name, value in weights_of(local).items():
                mean[name] += value * (len(data) / examples)
        load_weights(model, mean)
    return model.eval()


def build_member(name: str, architecture: str, shape: ImageShape, seed: int) -> nn.Module:
    """A member without its input quantizer."""
    model = build_model(name if name in ARCHITECTURES else architecture, shape, seed=seed)
    what, _, bits = name.partition("-")
    if what == "w":
        quantize_weights(model, int(bits))
    if what == "a":
        quantize_activations(model, int(bits))
    return model


@torch.no_grad()
def robustness(models: Sequence[nn.Module], images: Tensor, labels: Tensor, combine: str, options: SimpleNamespace,
               seed: int) -> float:  # fmt: skip
    """Accuracy of the vote on images made against these models."""
    adversarial = attack(models, images, labels, epsilon=options.epsilon, steps=options.steps,
                         step_size=2.5 * options.epsilon / options.steps, combine=combine,
                         generator=derive_generator(seed, "ensemble", combine))  # fmt: skip
    return accuracy(models, adversarial, labels)


@torch.no_grad()
def accuracy(models: Sequence[nn.Module], images: Tensor, labels: Tensor) -> float:
    logits = vote(torch.stack([model(images) for model in models]))
    return float((logits.argmax(1) == labels).float().mean())


def one_seed(seed: int, options: SimpleNamespace) -> dict[str, Any]:
    """The transfer matrix, the metric, and the robustness of every member and of every ensemble."""
    began = time.perf_counter()
    data = open_data(options.data, clients=options.clients, partition="iid", seed=seed,
                     train_images=options.images, test_images=2 * options.attacked)  # fmt: skip
    clients = [data.client(number) for number in range(options.clients)]
    names = options.members
    models = [train(clients, member, options, seed) for member in range(len(names))]
    print(f"seed {seed}: trained after {time.perf_counter() - began:.0f} s", flush=True)
    test = data.test()
    halves = [(to_float(test.images[half::2]), test.labels[half::2]) for half in range(2)]
    epsilons = options.epsilons or [options.epsilon / 3, options.epsilon * 2 / 3, options.epsilon]
    counts = count_transfers(models, *halves[0], epsilons=epsilons, steps=options.steps,
                             generator=derive_generator(seed, "transfer"))  # fmt: skip
    metric = transferability(counts, epsilons, options.at)
    print(f"seed {seed}: transfers counted after {time.perf_counter() - began:.0f} s", flush=True)
    images, labels = halves[1]
    alone = [robustness([model], images, labels, "average", options, seed) for model in models]
    candidates = [names.index(name) for name in options.candidates or names]
    best = choose_ensemble(metric[candidates][:, candidates], options.voters)
    chosen = tuple(candidates[member] for member in best)
    ensembles = []
    compared = list(itertools.combinations(candidates, options.voters)) if options.all else [chosen]
    for members in dict.fromkeys(compared):
        voters = [models[member] for member in members]
        ensembles.append({
            "members": [names[member] for member in members], "chosen": members == chosen,
            "accuracy": accuracy(voters, images, labels),
            "best_member_robust": max(alone[member] for member in members),
            "robust": {how: robustness(voters, images, labels, how, options, seed) for how in ATTACKS},
        })  # fmt: skip
    return {
        "seed": seed, "members": names, "epsilons": epsilons,
        "accuracy": [accuracy([model], images, labels) for model in models], "robust": alone,
        "right": counts.right.tolist(), "fooled": counts.fooled.tolist(), "transferred": counts.transferred.tolist(),
        "rates": counts.rates[:, :, epsilons.index(options.epsilon)].tolist(), "metric": metric.tolist(),
        "ensembles": ensembles, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> None:
    """Transfer rates at each strength, and the ensembles; means and deviations over seeds, in percent."""
    names = rows[0]["members"]
    for k, epsilon in enumerate(rows[0]["epsilons"]):
        lines = []
        for i, name in enumerate(names):
            line = [name]
            for j in range(len(names)):
                counts = [(row["transferred"][i][j][k], row["fooled"][i][j][k]) for row in rows]
                line.append(spread([100 * transferred / max(1, fooled) for transferred, fooled in counts], 1))
            line += [spread([100 * row[key][i] for row in rows], 1) for key in ("accuracy", "robust")]
            lines.append(line)
        print(f"\nTransfer at {epsilon:g}; robust at the strength of the attack on ensembles\n")
        print_table(["target", *(f"from {name}" for name in names), "accuracy", "robust"], lines)
    print()
    lines = []
    for members in dict.fromkeys(tuple(e["members"]) for row in rows for e in row["ensembles"]):
        own = [e for row in rows for e in row["ensembles"] if tuple(e["members"]) == members]
        line = [", ".join(members), str(sum(e["chosen"] for e in own)), str(len(own))]
        line += [spread([100 * e[key] for e in own], 1) for key in ("accuracy", "best_member_robust")]
        line += [spread([100 * e["robust"][how] for e in own], 1) for how in ATTACKS]
        lines.append(line)
    print_table(["ensemble", "chosen", "seeds", "accuracy", "best member", *ATTACKS], lines)


def main(
    name: Annotated[str, typer.Option(help="DATASET or DATASET-WORD, of plugins-trend-NAME.json")] = "mnist",
    data: Annotated[str, typer.Option(help="a dataset: a folder or a hub id; by default the first word of NAME")] = "",
    model: str = "lenet5",
    members: Annotated[Any, several(str, list(MEMBERS))] = joined(["fp", "fp-b", "1", "2"]),
    seeds: Annotated[int, typer.Option(help="how many seeds, from 0 on")] = 3,
    clients: Annotated[int, typer.Option(help="clients of each member's group")] = 2,
    rounds: int = 5,
    images: Annotated[int, typer.Option(help="training images of all clients of a group")] = 2400,
    lr: float = 0.05,
    lr_final_factor: Annotated[
        float | None, typer.Option(help="step size of the last round, along half a cosine from 1")
    ] = None,
    attacked: Annotated[int, typer.Option(help="images that are attacked, and as many for the fit")] = 150,
    epsilon: Annotated[float, typer.Option(help="strength of the attack, for images in [0, 1]")] = 0.15,
    epsilons: Annotated[Any, several(float, help="strengths of the fit; by default thirds of EPSILON")] = None,
    at: Annotated[float, typer.Option(help="strength at which the metric is evaluated")] = 8 / 255,
    steps: int = 10,
    voters: Annotated[int, typer.Option(help="members of an ensemble")] = 3,
    candidates: Annotated[Any, several(str, list(MEMBERS), help="members that an ensemble may have")] = None,
    all: Annotated[
        bool, typer.Option("--all", help="attack all ensembles of that size, not only the chosen one")
    ] = False,
) -> None:
    """Transfer of attacks between models with quantized inputs, and robustness of their ensembles."""
    options = SimpleNamespace(**locals())
    hub = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
    if options.epsilons and options.epsilon not in options.epsilons:
        raise typer.BadParameter(f"--epsilons must contain --epsilon, {options.epsilon:g}")
    if not set(options.candidates or ()) <= set(options.members):
        raise typer.BadParameter("--candidates must be among --members")
    given = {name: value for name, value in vars(options).items() if value is not None}
    settings = {name: value for name, value in given.items() if name not in ("data", "seeds")}
    dataset = options.name.partition("-")[0]
    options.data = options.data or find_data(dataset, hub.get(dataset, dataset))
    torch.set_num_threads(1)
    path = RESULTS / f"plugins-trend-{options.name}.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[dict[str, Any]] = saved["rows"] if saved.get("settings") == settings else []
    for seed in range(options.seeds):
        if any(row["seed"] == seed for row in rows):
            continue
        rows.append(one_seed(seed, options))
        write_results(path.stem, settings=settings, rows=rows, script="plugins trend")
        print(f"seed {seed}: done after {rows[-1]['seconds']:.0f} s", flush=True)
    summary(rows)


if __name__ == "__main__":
    run_command(main)
