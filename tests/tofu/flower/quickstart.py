"""A small app of the kind that Flower's quickstart has, with digits as data, for tests of mods and strategies."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from tofu.data import open_data, to_float
from tofu.flower.in_process import run_in_process

CLIENTS = 4
SHAPE = (1, 8, 8)
DATA = open_data("digits", clients=CLIENTS, partition="iid", seed=0)


class Net(nn.Module):
    """As a user writes it: no seed, names of its own."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, hidden), nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return out


def accuracy(arrays: ArrayRecord) -> float:
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    test = DATA.test()
    with torch.no_grad():
        return float((model(to_float(test.images)).argmax(1) == test.labels).float().mean())


def train(message: Message, context: Context) -> Message:
    """The train function of a Flower app, unaware of compression."""
    arrays = message.content["arrays"].to_torch_state_dict()
    model = Net(len(arrays["fc1.bias"]))
    model.load_state_dict(arrays)
    partition = int(context.node_config["partition-id"])
    data = DATA.client(partition)
    order = torch.Generator().manual_seed(partition + 100 * int(message.content["config"]["server-round"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=float(message.content["config"]["lr"]))
    for rows in torch.randperm(len(data), generator=order).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(to_float(data.images[rows])), data.labels[rows]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(data)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


def federate(
    strategy: Strategy,
    *mods: Any,
    rounds: int = 8,
    handler: Callable[[Message, Context], Message] = train,
    model: Callable[[], nn.Module] = Net,
    node_config: Callable[[int], dict[str, Any]] | None = None,
    **options: Any,
) -> Any:
    """Run the app in this process and return Flower's result."""
    client, server, results = ClientApp(mods=list(mods)), ServerApp(), []
    client.train()(handler)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        arrays = ArrayRecord(model().state_dict())
        results.append(
            strategy.start(grid, arrays, num_rounds=rounds, train_config=ConfigRecord({"lr": 0.1}), **options)
        )

    run_in_process(server, client, run_config={}, num_supernodes=CLIENTS, node_config=node_config)
    return results[0]


def strategy_of(kind: type[Strategy] = FedAvg, **options: Any) -> Strategy:
    return kind(fraction_evaluate=0.0, **options)  # type: ignore[call-arg]
