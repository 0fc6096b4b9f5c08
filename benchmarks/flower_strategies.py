"""Flower's adaptive strategies with compressed updates: python -m benchmarks.flower_strategies (ten minutes).

Four clients train a small perceptron on scikit-learn's digits; final test accuracy, plain and at 50x, and of FedAvg
with the server's step where clients have different labels (Dirichlet 0.3). Rows that the results have are not run.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg
from torch import nn

import tofu
from benchmarks.common import RESULTS, print_table, run_command, spread, write_results
from tofu.data import open_data, to_float
from tofu.flower.in_process import run_in_process

CLIENTS, ROUNDS, RATIO = 4, 12, 50.0
STRATEGIES: dict[str, Callable[[], FedAvg]] = {
    "FedAvg": lambda: FedAvg(fraction_evaluate=0.0),
    "FedAdam": lambda: FedAdam(fraction_evaluate=0.0),
    "FedAdagrad": lambda: FedAdagrad(fraction_evaluate=0.0),
    "FedAdagrad, eta=0.03": lambda: FedAdagrad(fraction_evaluate=0.0, eta=0.03),
}
UPDATES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "proxies": {"proxies_below": 1.0},
    "sparse": {"compressor": "sparse"},
    "sparse, over_relaxation=1": {"compressor": "sparse", "over_relaxation": 1.0},
}
STEPS: dict[str, dict[str, Any] | None] = {"plain": None} | {
    f"{name}, {ratio}x, server_step={step}": {**options, "ratio": ratio, "server_step": step}
    for name, options in (("sparse", {"compressor": "sparse"}), ("default", {}))
    for ratio in (50, 150)
    for step in (1, "auto")
}  # fmt: skip


def network() -> nn.Module:
    """A perceptron for images of 8 by 8 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def accuracy(strategy: FedAvg, options: dict[str, Any] | None, seed: int, partition: str) -> float:
    """Train with a strategy, compressed by these options if they are given; return the test accuracy."""
    data = open_data("digits", clients=CLIENTS, partition=partition, alpha=0.3, seed=seed)
    arguments: dict[str, Any] = {"model": network, "input_shape": (1, 8, 8), "ratio": RATIO, **(options or {})}
    step = arguments.pop("server_step", 1)
    client = ClientApp(mods=[] if options is None else [tofu.compress(**arguments)])
    server, model = ServerApp(), network()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        own, part = network(), data.client(int(context.node_config["partition-id"]))
        own.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        order = torch.Generator().manual_seed(int(message.content.config_records["config"]["server-round"]))  # type: ignore[arg-type]
        for rows in torch.split(torch.randperm(len(part), generator=order), 32):
            optimizer.zero_grad()
            F.cross_entropy(own(to_float(part.images[rows])), part.labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(part)})
        return Message(RecordDict({"arrays": ArrayRecord(own.state_dict()), "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(seed)
        whole = strategy if options is None else tofu.Compressed(strategy, server_step=step, **arguments)
        result = whole.start(grid, ArrayRecord(network().state_dict()), num_rounds=ROUNDS, train_config=ConfigRecord())
        model.load_state_dict(result.arrays.to_torch_state_dict())

    run_in_process(server, client, run_config={}, num_supernodes=CLIENTS)
    test = data.test()
    with torch.no_grad():
        return float((model(to_float(test.images)).argmax(1) == test.labels).float().mean())


def main() -> None:
    """Run all strategies with all kinds of updates, with seeds 0 to 2."""
    torch.set_num_threads(1)
    path = RESULTS / "flower-strategies.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    settings = {"seeds": [0, 1, 2], "ratio": RATIO, "rounds": ROUNDS}
    skewed = {"FedAvg, label skew": STRATEGIES["FedAvg"]}
    for partition, strategies, updates in (("iid", STRATEGIES, UPDATES), ("dirichlet", skewed, STEPS)):
        for name, build in strategies.items():
            for kind, options in updates.items():
                if any((row["strategy"], row["updates"]) == (name, kind) for row in rows):
                    continue
                found = [round(accuracy(build(), options, seed, partition), 4) for seed in range(3)]
                rows.append({"strategy": name, "updates": kind, "accuracy": found})
                print(rows[-1], flush=True)
                write_results("flower-strategies", settings=settings, rows=rows, script="flower_strategies")
    lines = [[row["strategy"], row["updates"], spread(row["accuracy"])] for row in rows]
    print_table(["strategy", "updates", "accuracy"], lines)


if __name__ == "__main__":
    run_command(main)
