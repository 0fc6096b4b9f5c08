"""Compression to the utilized rank: what is left to send, what it costs in accuracy, and what it is worth to the codec.

Two clients, federated averaging through `train_locally` with a step size that falls along half a cosine. In the last of
these rounds the plugin `rank` measures; its sums are added and reduced as the server does it, once for each energy.
The factorized network then has two rounds of fine-tuning; so has the whole one, as the control.

Plain SVD: every measured layer cut to the same rank r = min(k_S, k_T) by the singular values of its weights alone.
Codec: the explained variance of a client's next update, sent as proxies with a correction in the bytes that the whole
network's update takes at ratio 100, as the update of the whole network and as that of its cores. Seeds that the JSON
already holds, with the same settings, are not run again.
"""

import copy
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.common import RESULTS, find_data, joined, print_table, run_command, several, spread, write_results
from client.plugins.utilized_rank import LayerRank, UtilizedRank
from tofu.codec.compressor import ProxyCompressor
from tofu.codec.options import CompressorOptions, ProxySettings
from tofu.data import ImageShape, LabeledImages, open_data, to_float
from tofu.models import build_model
from tofu.plugins import NO_PLUGINS, Plugins, RoundContext, make_plugins
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import difference, explained_variance, layout_of, load_weights, weights_of
from tofu.wire import HEADER_BYTES

_BAR, _GAP, _LEFT, _FULL, _RIGHT = 9, 10, 210, 360, 110  # pixels
_COLORS = ("#2b6cb0", "#c05621")


def rank_picture(ranks: Mapping[str, LayerRank]) -> str:
    """An SVG. A bar's whole length is the dimension of a layer's inputs, or outputs; its filled part is k_S, or k_T.

    Args:
        ranks: weight's name -> what its layer uses (`UtilizedRank.ranks`).
    """
    parts = [_text(_LEFT, 14, "k_S of the inputs", _COLORS[0])]
    parts.append(_text(_LEFT + 130, 14, "k_T of the outputs", _COLORS[1]))
    top = 26
    for name, rank in ranks.items():
        parts.append(_text(_LEFT - 8, top + _BAR + 4, name.removesuffix(".weight"), "#222", anchor="end"))
        for used, full, color in ((rank.inputs, rank.columns, _COLORS[0]), (rank.outputs, rank.rows, _COLORS[1])):
            parts.append(f'<rect x="{_LEFT}" y="{top}" width="{_FULL}" height="{_BAR}" fill="#e2e8f0"/>')
            width = _FULL * used / full
            parts.append(f'<rect x="{_LEFT}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{color}"/>')
            parts.append(_text(_LEFT + _FULL + 6, top + _BAR - 1, f"{used} of {full}", "#222"))
            top += _BAR + 1
        top += _GAP
    size = f'width="{_LEFT + _FULL + _RIGHT}" height="{top}" font-family="sans-serif" font-size="10"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def _text(x: float, y: float, text: str, color: str, *, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" fill="{color}" text-anchor="{anchor}">{escape(text)}</text>'


CLIENTS = 2
FINE_TUNING = 2
RATIO = 100.0
ENERGIES = (0.9, 0.95, 0.99, 0.998)
TUNED = (0.99, 0.998)
"""The energies whose networks are fine-tuned too."""


@dataclass(frozen=True)
class Case:
    """A network and its data: how many images, rounds before the compression, and the first and last step size."""

    data: str
    model: str
    images: int
    rounds: int
    lr: float = 0.03
    last_lr: float = 0.006

    def how(self, round_: int) -> LocalTrainingConfig:
        progress = min(1.0, (round_ - 1) / max(1, self.rounds - 1))
        lr = self.last_lr + (self.lr - self.last_lr) * (1 + math.cos(math.pi * progress)) / 2
        return LocalTrainingConfig(epochs=1, batch_size=64, lr=lr, momentum=0.9)


DEEP = "benchmarks.plugins.networks:deep_cnn"
CASES = {
    "mnist": Case("mnist", "cnn", 4000, 5),
    "digits-vit": Case("digits", "vit_tiny", 0, 16, lr=0.05, last_lr=0.01),
    "cifar10": Case("cifar10", "cnn", 4000, 6),
    "mnist-deep": Case("mnist", DEEP, 4000, 8),
    "cifar10-deep": Case("cifar10", DEEP, 4000, 10),
}
USUAL = ("mnist", "digits-vit", "cifar10")
HUB = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}


def one_round(model: nn.Module, clients: list[LabeledImages], how: LocalTrainingConfig, about: RoundContext,
              server: Plugins, options: str) -> dict[str, Tensor]:  # fmt: skip
    """A round of federated averaging in place, of a model that the server set up; the total of the clients' sums."""
    start, examples = weights_of(model), sum(map(len, clients))
    mean = {name: torch.zeros_like(value) for name, value in start.items()}
    sums: dict[str, Tensor] = {}
    for number, data in enumerate(clients):
        plugins = make_plugins("rank", options) if server else NO_PLUGINS
        plugins.load(broadcast=server.broadcast_bytes(max_bytes=1 << 30), max_bytes=1 << 30)
        local = plugins.setup(copy.deepcopy(model), about)
        load_weights(local, start)
        generator = derive_generator(about.seed, about.round, str(number), "train")
        train_locally(local, data, how, generator=generator, plugins=plugins)
        for name, value in weights_of(local).items():
            mean[name] += value * (len(data) / examples)
        for name, value in plugins.export(local).sums.items():
            sums[name] = sums.get(name, 0) + value
    load_weights(model, mean)
    return sums


def accuracy(model: nn.Module, test: LabeledImages) -> float:
    model.eval()
    with torch.no_grad():
        right = [
            int((model(to_float(test.images[rows])).argmax(1) == test.labels[rows]).sum())
            for rows in torch.split(torch.arange(len(test)), 500)
        ]
    return sum(right) / len(test)


def by_svd(model: nn.Module, rank: UtilizedRank) -> nn.Module:
    """A copy whose measured layers are cut to the same ranks by plain SVD."""
    cut = copy.deepcopy(model)
    for name, used in rank.ranks.items():
        weight = cut.get_parameter(name)
        u, s, v = torch.linalg.svd(weight.data.flatten(1), full_matrices=False)
        r = min(used.inputs, used.outputs)
        weight.data = (u[:, :r] * s[:r] @ v[:r]).view(weight.shape)
    return cut


def codec(
    model: nn.Module, shape: ImageShape, data: LabeledImages, how: LocalTrainingConfig, budget: float
) -> dict[str, Any]:
    """Explained variance of one client's next update in a payload of so many bytes, and the payload's real size."""
    base = weights_of(model)
    local = copy.deepcopy(model)
    train_locally(local, data, how, generator=torch.Generator().manual_seed(1))
    update = difference(weights_of(local), base)
    network = ReferenceModel(copy.deepcopy(model).eval(), shape)
    ratio = network.param_spec.float32_bytes / budget
    if ratio <= 1:  # the cores fit as they are
        return {
            "explained_variance": 1.0,
            "payload_bytes": network.param_spec.float32_bytes + HEADER_BYTES,
            "ratio": 1.0,
        }
    compressor = ProxyCompressor(
        network,
        ratio=ratio,
        options=CompressorOptions(correction=0.4, encoder=ProxySettings(bits=4, warm_start=False)),
    )
    compressed = compressor.compress(network, update, generator=torch.Generator().manual_seed(2))
    return {
        "explained_variance": explained_variance(update, compressed.decoded),
        "payload_bytes": HEADER_BYTES + len(compressed.body),
        "ratio": network.param_spec.float32_bytes / (HEADER_BYTES + len(compressed.body)),
    }


def one_seed(case_name: str, seed: int, options: SimpleNamespace) -> tuple[list[dict[str, Any]], str]:
    """Rows for the control and all energies, and the picture at 0.99."""
    case = CASES[case_name]
    place = "digits" if case.data == "digits" else find_data(case.data, HUB[case.data])
    source = open_data(place, clients=CLIENTS, partition="iid", train_images=case.images, seed=seed)
    clients, test = [source.client(i) for i in range(CLIENTS)], source.test()
    test = test.subset(range(min(len(test), options.test_images)))
    shape, rounds = source.shape, case.rounds
    model = build_model(case.model, shape, seed=seed)
    measuring = f"rank.after={rounds}"
    server = make_plugins("rank", measuring)
    for round_ in range(1, rounds + 1):
        about = RoundContext(shape, round=round_, rounds=rounds + FINE_TUNING, seed=seed)
        server.setup(model, about)
        sums = one_round(model, clients, case.how(round_), about, server, measuring)
    base, whole = accuracy(model, test), layout_of(model)
    tune = case.how(rounds)
    common: dict[str, Any] = {"case": case_name, "seed": seed, "accuracy_before": base}
    budget = whole.float32_bytes / RATIO

    control = copy.deepcopy(model)
    for i in range(FINE_TUNING):
        one_round(control, clients, tune, RoundContext(shape, round=rounds + 1 + i, seed=seed), NO_PLUGINS, "")
    rows = [common | {
        "what": "whole network", "parameters": whole.parameter_count, "parameters_share": 1.0,
        "float32_bytes": whole.float32_bytes, "accuracy_tuned": accuracy(control, test),
        "codec": codec(model, shape, clients[0], tune, budget),
    }]  # fmt: skip
    picture = ""
    for energy in ENERGIES:
        text = f"{measuring} rank.energy={energy}"
        server = make_plugins("rank", text)
        server.setup(copy.deepcopy(model), RoundContext(shape, round=rounds, seed=seed))
        server.reduce(sums, sum(map(len, clients)))
        rank = server[0]
        assert isinstance(rank, UtilizedRank)
        small = server.setup(copy.deepcopy(model), RoundContext(shape, round=rounds + 1, seed=seed))
        param_spec = layout_of(small)
        svd_parameters = sum(
            min(r.columns * r.rows, min(r.inputs, r.outputs) * (r.columns + r.rows)) for r in rank.ranks.values()
        )
        rest = whole.parameter_count - sum(r.columns * r.rows for r in rank.ranks.values())
        row = common | {
            "what": f"energy {energy}",
            "energy": energy,
            "utilization": rank.broadcast["utilization"],
            "ranks": {name: [r.inputs, r.columns, r.outputs, r.rows] for name, r in rank.ranks.items()},
            "parameters": param_spec.parameter_count,
            "parameters_share": param_spec.parameter_count / whole.parameter_count,
            "float32_bytes": param_spec.float32_bytes,
            "broadcast_bytes": len(server.broadcast_bytes(max_bytes=1 << 30)),
            "sums_bytes": sum(8 * value.numel() for value in sums.values()),
            "accuracy_projected": accuracy(small, test),
            "accuracy_svd": accuracy(by_svd(model, rank), test),
            "svd_parameters_share": (rest + svd_parameters) / whole.parameter_count,
        }
        if energy in TUNED:
            row["codec"] = codec(small, shape, clients[0], tune, budget)
            for i in range(FINE_TUNING):
                about = RoundContext(shape, round=rounds + 1 + i, seed=seed)
                one_round(small, clients, tune, about, server, text)
            row["accuracy_tuned"] = accuracy(small, test)
        if energy == 0.99:
            picture = rank_picture(rank.ranks)
        rows.append(row)
    return rows, picture


def summary(rows: list[dict[str, Any]]) -> None:
    """A table for each case: means and deviations over the seeds; accuracies in per cent."""

    def cell(own: list[dict[str, Any]], key: str, *, factor: float = 100, digits: int = 2) -> str:
        return spread([factor * row[key] for row in own], digits) if key in own[0] else ""

    for case in dict.fromkeys(row["case"] for row in rows):
        lines = []
        for what in dict.fromkeys(row["what"] for row in rows if row["case"] == case):
            own = [row for row in rows if row["case"] == case and row["what"] == what]
            codecs = [row["codec"]["explained_variance"] for row in own if "codec" in row]
            lines.append([
                what, cell(own, "utilization"), cell(own, "parameters_share", digits=1),
                cell(own, "accuracy_projected") or cell(own, "accuracy_before"), cell(own, "accuracy_svd"),
                cell(own, "svd_parameters_share", digits=1), cell(own, "accuracy_tuned"),
                spread(codecs, 3) if codecs else "",
                f"{statistics.fmean(row['broadcast_bytes'] / row['float32_bytes'] for row in own):.1f}" if "broadcast_bytes" in own[0] else "",  # noqa: E501
            ])  # fmt: skip
        print(case)
        print_table(["", "MLU", "parameters", "accuracy", "plain SVD, same ranks", "its parameters", "fine-tuned",
                     "codec", "broadcast / update"], lines)  # fmt: skip
        print()


def main(
    cases: Annotated[Any, several(str, tuple(CASES))] = joined(list(USUAL)),
    name: Annotated[str, typer.Option(help="of the results' JSON and pictures")] = "plugins-utilized-rank",
    seeds: Annotated[int, typer.Option(help="how many seeds, from 0 on")] = 3,
    test_images: Annotated[int, typer.Option(help="at most so many")] = 2000,
) -> None:
    """Compression to the utilized rank: what is left to send, and what it costs in accuracy."""
    options = SimpleNamespace(**locals())
    torch.set_num_threads(1)
    settings = {
        "clients": CLIENTS,
        "fine_tuning_rounds": FINE_TUNING,
        "ratio": RATIO,
        "energies": list(ENERGIES),
        "seeds": list(range(options.seeds)),
        "cases": {name: vars(CASES[name]) for name in options.cases},
    }
    path = RESULTS / f"{options.name}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[dict[str, Any]] = kept["rows"] if kept.get("settings") == settings else []
    for seed in range(options.seeds):
        for case in options.cases:
            if any(row["seed"] == seed and row["case"] == case for row in rows):
                continue
            new, picture = one_seed(case, seed, options)
            rows += new
            write_results(path.stem, settings=settings, rows=rows, script="plugins utilized-rank")
            if seed == 0:
                (RESULTS / f"{options.name}-{case}.svg").write_text(picture)
            print(f"{case}, seed {seed}: done", flush=True)
    summary(rows)


if __name__ == "__main__":
    run_command(main)
