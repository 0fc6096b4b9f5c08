"""Layers that stay on a Flower app's clients, and rounds that end with the first replies."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

import tofu
from tofu.errors import SettingError
from tofu.flower.in_process import run_in_process

START = {"head.weight": np.zeros(2, np.float32), "body": np.zeros((4, 3), np.float32)}


def app(mods: list[Any], seen: list[tuple[str, int, float]], late: threading.Event | None = None) -> ClientApp:
    """Adds 1 + the client's number to every array; client 2 waits for `late`."""
    made = ClientApp(mods=mods)

    def answer(message: Message, context: Context, step: float) -> Message:
        partition = int(context.node_config["partition-id"])
        arrays = message.content.array_records["arrays"]
        seen.append((message.metadata.message_type, partition, float(arrays["head.weight"].numpy()[0])))
        if late is not None and partition == 2 and step:
            late.wait(60)
        new = ArrayRecord(
            {name: Array(array.numpy() + np.float32(step * (1 + partition))) for name, array in arrays.items()}
        )
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.0})})
        if step:
            content["arrays"] = new
        return Message(content, reply_to=message)

    @made.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, 1.0)

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, 0.0)

    return made


def federate(client: ClientApp, strategy: Any, *, rounds: int = 2, clients: int = 3) -> ArrayRecord:
    results: list[ArrayRecord] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord({name: Array(value) for name, value in START.items()})
        results.append(strategy.start(grid, start, num_rounds=rounds, train_config=ConfigRecord({})).arrays)

    run_in_process(server, client, run_config={}, num_supernodes=clients, workers=clients)
    return results[0]


def test_local_arrays_continue_on_the_client_and_stay_as_they_were_on_the_server() -> None:
    seen: list[tuple[str, int, float]] = []
    arrays = federate(app([tofu.keep_local("head.*")], seen), FedAvg())
    assert not arrays["head.weight"].numpy().any()
    np.testing.assert_allclose(arrays["body"].numpy(), 2 * 2.0)  # the mean of 1, 2 and 3, twice
    trained = sorted(value for kind, partition, value in seen if kind == "train" and partition == 1)
    assert trained == [0.0, 2.0]  # the second round continues from the client's own first step
    assert sorted(value for kind, partition, value in seen if kind == "evaluate" and partition == 1) == [2.0, 4.0]


def test_local_arrays_go_with_compressed_updates() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Module()
            self.head.register_parameter("weight", nn.Parameter(torch.zeros(2)))
            self.body = nn.Parameter(torch.zeros(4, 3))

    names = {"model": Net(), "compressor": "float16", "ratio": 1.0}
    seen: list[tuple[str, int, float]] = []
    client = app([tofu.compress(**names), tofu.keep_local("head.*")], seen)
    arrays = federate(client, tofu.Compressed(FedAvg(), **names))
    np.testing.assert_allclose(arrays["body"].numpy(), 4.0)
    assert not arrays["head.weight"].numpy().any()


def test_a_pattern_without_an_array_is_an_error_of_the_client() -> None:
    seen: list[tuple[str, int, float]] = []
    arrays = federate(app([tofu.keep_local("nothing*")], seen), FedAvg(), rounds=1)
    assert not seen
    assert not arrays  # FedAvg aggregates nothing where all replies are errors
    with pytest.raises(SettingError, match=r"patterns=\(\)"):
        tofu.keep_local()


class Waits(FedAvg):
    """FedAvg that lets the late client go on once a round is aggregated."""

    def __init__(self, late: threading.Event) -> None:
        super().__init__()
        self.late, self.counts = late, []

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        self.counts.append(len(replies))
        self.late.set()
        return super().aggregate_train(server_round, replies)


def test_a_round_ends_with_the_first_replies() -> None:
    late = threading.Event()
    strategy = Waits(late)
    arrays = federate(app([], [], late), tofu.FirstReplies(strategy, fraction=2 / 3), rounds=1)
    assert strategy.counts == [2]
    np.testing.assert_allclose(arrays["body"].numpy(), 1.5)  # the mean of clients 0 and 1
    with pytest.raises(SettingError, match="fraction=0"):
        tofu.FirstReplies(FedAvg(), fraction=0.0)
