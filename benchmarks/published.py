"""Published benchmarks, in which many clients take part rarely: FedAvg, our codec and rivals at equal rounds.

- `pfl-iid`, `pfl-dirichlet`: CIFAR-10 of pfl-research (Granqvist et al., arXiv 2404.06430): 1,000 users of 50 images,
  IID or Dirichlet 0.1, 50 in each round, one local epoch, batches of 10, step size 0.1, their network of 1.6 million
  parameters. They train 1,500 rounds. `benchmarks.central_dp` has their setting with the noise of a server, which the
  library adds to exact sums only, so that there is nothing to compare.
- `resnet-0.5`, `resnet-0.1`: ResNet-18 with GroupNorm (Hsieh et al., arXiv 1910.00189), 100 clients, Dirichlet 0.5 or
  0.1, 10 in each round. These want a GPU: `--device cuda`.
- `femnist`: LEAF's FEMNIST by its 3,550 natural writers, from the Hugging Face hub, 35 in each round.

Every method has the same clients, seeds, local training and running average of weights, error feedback, and the
server's step that is best on a seed of its own, as in `benchmarks.error_feedback`. After each run its row is written
to the results, so an interrupted benchmark continues with the same command. Accuracy in a round is that on 1,000 test
images, the final one that on all.
"""

import json
import statistics
import sys
import time
from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.central_dp import simple_cnn
from benchmarks.common import RESULTS, find_data, joined, print_table, run_command, several, spread, versions
from benchmarks.error_feedback.__main__ import AUTO, AUTO_STEP, CURVE_IMAGES, SEEDS, TUNING_SEED, Row, Table, step_text
from tofu.compression import uplink_compressor
from tofu.compression.error_feedback import ErrorFeedback
from tofu.device import open_device
from tofu.errors import TofuError
from tofu.files import replace_file
from tofu.formatting import format_bytes
from tofu.plugins import NO_PLUGINS
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.rounds.aggregation import Mean
from tofu.rounds.optimizers import automatic_step
from tofu.rounds.steps import AddResidual, Compress, KeepResidual, Outgoing, apply_steps
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, TrainingContext
from tofu.weights import Weights, add_update, difference, load_weights, weights_of
from tofu.wire import HEADER_BYTES
from tofu.workload import workload_of

PFL: dict[str, Any] = {
    "dataset": "uoft-cs/cifar10", "model": "benchmarks.published:pfl_cnn", "normalization": "dataset",
    "partition": "iid", "clients": 1000, "client_fraction": 0.05, "batch_size": 10, "lr": 0.1, "momentum": 0.0,
}  # fmt: skip
RESNET: dict[str, Any] = {
    "dataset": "uoft-cs/cifar10", "model": "resnet18", "norm": "group", "normalization": "dataset",
    "augmentation": "crop,flip", "partition": "dirichlet", "clients": 100, "client_fraction": 0.1, "batch_size": 50,
    "lr": 0.1, "weight_decay": 1e-3,
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "pfl-iid": PFL,
    "pfl-dirichlet": PFL | {"partition": "dirichlet", "alpha": 0.1},
    "resnet-0.5": RESNET | {"alpha": 0.5},
    "resnet-0.1": RESNET | {"alpha": 0.1},
    "femnist": {
        "dataset": "flwrlabs/femnist", "model": "cnn", "partition": "natural", "client_column": "writer_id",
        "clients": 3550, "client_fraction": 0.01, "batch_size": 20, "lr": 0.1,
    },
}  # fmt: skip
SHARED: dict[str, Any] = {"local_epochs": 1, "ema_decay": 0.5, "threads": 1}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"schedule": "compressed", "compressor": "none"},
    "default": {"compressor": "proxy", "over_relaxation": AUTO},
    "correction": {"compressor": "proxy", "correction": 1.0, "over_relaxation": AUTO},
    "stc": {"compressor": "stc", "over_relaxation": 1.8},
    "topk": {"compressor": "topk", "over_relaxation": 1.8},
    "powersgd": {"compressor": "powersgd", "over_relaxation": 1.8},
}
RATIOS = (50, 200, 500, 1000, 2000)
STEPS: tuple[tuple[float, float], ...] = ((AUTO_STEP, 0.5), (AUTO_STEP, 0.0), (1.0, 0.5), (1.0, 0.0))
"""(server's step, step-ahead a) of the tuning runs; FedAvg, which has no error feedback, has each step once."""
TUNED_RATIO = 200


def pfl_cnn(*, channels: int, height: int, width: int, classes: int) -> nn.Module:
    """Build pfl-research's network for CIFAR-10."""
    assert (channels, height, width, classes) == (3, 32, 32, 10)
    return simple_cnn(int(torch.randint(2**31, ())))


@dataclass(frozen=True)
class Run:
    """One run; `fedavg` has the ratio 1 and no step-ahead."""

    task: str
    method: str
    ratio: int
    seed: int
    rounds: int
    server_lr: float
    a: float

    @property
    def name(self) -> str:
        method = self.method if self.method == "fedavg" else f"{self.method}-{self.ratio}x-a{self.a:g}"
        return f"{self.task}/{method}-step{step_text(self.server_lr)}-{self.rounds}rounds-seed{self.seed}"

    def settings(self, device: str) -> Settings:
        task = TASKS[self.task]
        hub = task["dataset"]
        own = METHODS[self.method] | {"ratio": float(self.ratio), "step_ahead": self.a, "server_lr": self.server_lr}
        common = {"dataset": find_data(hub.split("/")[1], hub), "seed": self.seed, "rounds": self.rounds}
        return Settings.of(SHARED | task | own | common | {"device": device})


class Federation:
    """The clients, the global model and each client's state, in the library's own steps but without messages.

    At 1.6 million parameters messages, and models that are built anew, take longer than the local training of a client
    with 50 images. Uplink is bytes of payloads, downlink bytes of the float32 weights.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.workload = settings, workload_of(settings)
        self.device = open_device(settings.run.device)
        self.tests: dict[int, Sized] = {}
        shape = self.workload.shape
        self.reference = ReferenceModel(self.workload.build_model(shape).eval(), shape).as_built()
        self.averaged = weights_of(self.reference.model)
        self.compressor = uplink_compressor(settings, "compressed", self.reference)
        self.feedback: dict[int, ErrorFeedback] = {}
        self.memory: dict[int, bytes] = {}
        self.seconds, self.with_proxies = {"train": 0.0, "encode": 0.0}, 0

    def run_round(self, round_: int) -> tuple[int, int]:
        """Run one round -> bytes that its clients sent and received."""
        settings, model, spec = self.settings, self.reference.model, self.reference.param_spec
        count, base = settings.data.clients, weights_of(model)
        asked = round(settings.server.client_fraction * count)
        drawn = torch.randperm(count, generator=derive_generator(settings.run.seed, round_, "sample"))[:asked].tolist()
        mean, sent = Mean(spec, 0.0), 0
        for client in drawn:
            data = self.workload.client(client)
            outgoing = self.reply(client, round_, base, data)
            sent += HEADER_BYTES + len(outgoing.body)
            mean.add(outgoing.decoded, len(data))
        update = mean.mean()
        step = settings.server.server_lr
        if not step:
            diversity = mean.diversity(update)
            step = 1.0 if diversity is None else automatic_step(diversity, round_, settings.training.rounds)
        add_update(model, {name: step * value if name in spec.parameters else value for name, value in update.items()})
        decay = min(settings.server.ema_decay, 1 - 1 / round_)
        now = weights_of(model)
        self.averaged = {name: decay * old + (1 - decay) * now[name] for name, old in self.averaged.items()}
        return sent, len(drawn) * spec.float32_bytes

    def reply(self, client: int, round_: int, base: Weights, data: Any) -> Outgoing:
        """Train one client from the global weights and compress its update, as `client.local_round` does."""
        settings, model, spec = self.settings, self.reference.model, self.reference.param_spec
        fraction, feedback = settings.residual_fraction, self.feedback.get(client, ErrorFeedback())
        acknowledged, began = feedback.sent_round, time.perf_counter()
        start = feedback.ahead(base, acknowledged, settings.step_ahead_of(round_), spec.parameters, fraction=fraction)
        load_weights(model, start)
        context = TrainingContext(
            **vars(LocalTrainingConfig.of(settings.training, round_)), client=str(client), round=round_, final=False,
            generator=derive_generator(settings.run.seed, round_, str(client), "train"), device=self.device,
        )  # fmt: skip
        self.workload.train(model, data, context, NO_PLUGINS)
        update = difference(weights_of(model), start)
        load_weights(model, base)
        model.eval()
        self.seconds["train"] += time.perf_counter() - began
        began, generator = time.perf_counter(), derive_generator(settings.run.seed, round_, str(client), "encode")
        outgoing = apply_steps([
            AddResidual(acknowledged, fraction), Compress(self.compressor, self.reference, generator),
            KeepResidual(round_, fraction),
        ], Outgoing(update, feedback, self.memory.get(client, b"")))  # fmt: skip
        # No reply is lost here, so what was sent is not kept.
        self.feedback[client], self.memory[client] = replace(outgoing.feedback, sent={}), outgoing.memory
        self.seconds["encode"] += time.perf_counter() - began
        content = self.compressor.describe(outgoing.body)
        self.with_proxies += content is not None and content.proxies is not None
        return outgoing

    def accuracy(self, images: int) -> float:
        """Accuracy of the averaged weights on this number of test images; 0: on all of them."""
        model = self.reference.model
        if images not in self.tests:
            self.tests[images] = workload_of(self.settings.replace(test_images=images)).test()
        weights = weights_of(model)
        load_weights(model, self.averaged)
        found = self.workload.evaluate(model, self.tests[images], device=self.device).accuracy
        assert found is not None
        load_weights(model, weights)
        return found


def make(run: Run, device: str) -> Row:
    """Make one run. Training that diverges is a result, too."""
    row: Row = {"run": run.name, **vars(run)}
    federation, began = Federation(run.settings(device)), time.perf_counter()
    curve, bytes_by_round = [], []
    for round_ in range(1, run.rounds + 1):
        try:
            bytes_by_round.append(federation.run_round(round_))
        except TofuError as error:
            return row | {"failed": f"round {round_}: {error}"}
        curve.append(federation.accuracy(CURVE_IMAGES))
    clients = federation.settings.server.client_fraction * federation.settings.data.clients * run.rounds
    return row | {
        "final_accuracy": federation.accuracy(0),
        "accuracy_by_round": curve,
        "uplink_by_round": [up for up, _ in bytes_by_round],
        "downlink_by_round": [down for _, down in bytes_by_round],
        **{f"{name}_seconds": value / clients for name, value in federation.seconds.items()},
        "with_proxies": federation.with_proxies / clients,
        "seconds": time.perf_counter() - began,
    }


class Results:
    """The rows of a file, which grows run by run."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def row(self, run: Run) -> Row:
        """The row of a run, which is made unless the file has it."""
        for row in self.rows:
            if row["run"] == run.name:
                return row
        row = make(run, self.device)
        self.rows.append(row)
        print(f"{run.name}: {row.get('final_accuracy', row.get('failed'))}", file=sys.stderr, flush=True)
        document = versions("python -m benchmarks.published") | {
            "settings": {name: SHARED | task for name, task in TASKS.items()}, "curve_images": CURVE_IMAGES,
            "methods": METHODS, "rows": self.rows,
        }  # fmt: skip
        replace_file(self.path, (json.dumps(document, indent=1) + "\n").encode())
        return row

    def chosen(self, task: str, method: str, rounds: int, *, tuned: bool) -> tuple[float, float]:
        """The (server's step, a) with the highest final accuracy on the tuning seed; the defaults if not `tuned`."""
        if not tuned:
            return AUTO_STEP, 0.0 if method == "fedavg" else 0.5
        tried = {
            step: self.row(Run(task, method, 1 if method == "fedavg" else TUNED_RATIO, TUNING_SEED, rounds, *step))
            for step in (((AUTO_STEP, 0.0), (1.0, 0.0)) if method == "fedavg" else STEPS)
        }
        return max(tried, key=lambda step: tried[step].get("final_accuracy") or 0.0)


def bytes_to(row: Row, target: float) -> int | None:
    """Uplink and downlink bytes until the mean accuracy of five rounds reaches a target; None if it never does."""
    curve: list[float] = row["accuracy_by_round"]
    spent: int = 0
    for index, (up, down) in enumerate(zip(row["uplink_by_round"], row["downlink_by_round"], strict=True)):
        spent += up + down
        last = curve[max(0, index - 4) : index + 1]
        if len(last) == 5 and statistics.fmean(last) >= target:
            return spent
    return None


def table(rows: list[Row], task: str, rounds: int) -> Table:
    """Final and best accuracy, bytes and the clients' time, by method and ratio.

    *to the target* is what all clients send and receive until a run has FedAvg's mean final accuracy less 2 points.
    """
    mine = [row for row in rows if (row["task"], row["rounds"]) == (task, rounds) and row["seed"] in SEEDS]
    fedavg = [row["final_accuracy"] for row in mine if row["method"] == "fedavg" and "failed" not in row]
    target = statistics.fmean(fedavg) - 0.02 if fedavg else 1.0
    lines = []
    for method, ratio in sorted({(row["method"], row["ratio"]) for row in mine}, key=_order):
        made = [row for row in mine if (row["method"], row["ratio"]) == (method, ratio)]
        found = [row for row in made if "failed" not in row]
        if not found:
            lines.append([method, f"{ratio:,}x", f"0 of {len(made)}", "diverged", "", "", "", "", ""])
            continue
        spent = [bytes_to(row, target) for row in found]
        reached = [value for value in spent if value is not None]
        lines.append([
            method, "" if method == "fedavg" else f"{ratio:,}x", f"{len(found)} of {len(made)}",
            spread([100 * row["final_accuracy"] for row in found], 1),
            spread([100 * max(row["accuracy_by_round"]) for row in found], 1),
            format_bytes(round(statistics.fmean(sum(row["uplink_by_round"]) for row in found))),
            format_bytes(round(statistics.fmean(sum(row["downlink_by_round"]) for row in found))),
            format_bytes(round(statistics.fmean(reached))) if len(reached) == len(found) else "not reached",
            f"{statistics.fmean(row['encode_seconds'] / row['train_seconds'] for row in found):.2f}",
        ])  # fmt: skip
    header = ["method", "ratio", "seeds", "accuracy, %", "best, %", "uplink", "downlink", "to the target",
              "encode / training"]  # fmt: skip
    return header, lines


def _order(cell: tuple[str, int]) -> tuple[int, int]:
    """FedAvg first, then by ratio."""
    method, ratio = cell
    return ratio, list(METHODS).index(method)


def main(
    tasks: Annotated[Any, several(str, TASKS, f"some of {', '.join(TASKS)}")] = "pfl-iid",
    methods: Annotated[Any, several(str, METHODS)] = joined(METHODS),
    ratios: Annotated[Any, several(int)] = joined(RATIOS),
    seeds: Annotated[Any, several(int)] = joined(SEEDS),
    rounds: Annotated[int, typer.Option(min=5, help="of every run")] = 1500,
    tuned: Annotated[bool, typer.Option("--tuned/--untuned", help="choose the server's step and a first")] = True,
    device: Annotated[str, typer.Option(help="cuda: run on a GPU")] = "cpu",
    output: Annotated[Path, typer.Option(help="results")] = RESULTS / "published.json",
    table_only: Annotated[bool, typer.Option("--table", help="print the results so far, and stop")] = False,
) -> None:
    """Accuracy, bytes and client time of methods in published settings."""
    results = Results(output, device)
    for task in tasks:
        for seed in [] if table_only else seeds:
            for ratio in ratios:
                for method in methods:
                    step, a = results.chosen(task, method, rounds, tuned=tuned)
                    results.row(Run(task, method, 1 if method == "fedavg" else ratio, seed, rounds, step, a))
        print(f"\n{task}, {rounds} rounds\n")
        print_table(*table(results.rows, task, rounds))


if __name__ == "__main__":
    run_command(main)
