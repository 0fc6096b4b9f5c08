"""Steps from the server to the clients of a Flower app, and clients that cannot follow them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, Strategy

import tofu
from attacks.recorded import attack_run
from tests.tofu.flower.quickstart import CLIENTS, SHAPE, Net, accuracy, federate, strategy_of, train
from tests.tofu.flower.test_record import WHERE, named
from tofu.errors import RunError
from tofu.flower.update_codec import RECORD
from tofu.wire import RESYNC

OPTIONS: dict[str, Any] = {"compressor": "sparse", "ratio": 20, "downlink": 10, "step_ahead": 0.0}
"""Without step-ahead, so that all clients train from the arrays that these tests compare."""


class Watched:
    """Outermost mod: what each client is sent and what arrays its app gets, by (partition, round)."""

    def __init__(self, mod: Any) -> None:
        self.mod = mod
        self.steps, self.arrays = dict[tuple[int, int], int](), dict[tuple[int, int], ArrayRecord]()
        self.resyncs = list[tuple[int, int]]()

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        record = message.content.config_records[RECORD]
        where = int(context.node_config["partition-id"]), int(record["round"])  # type: ignore[arg-type]
        assert ("steps" in record) != bool(message.content.array_records)
        self.steps[where] = len(record.get("steps", []))  # type: ignore[arg-type]

        def app(message: Message, context: Context) -> Message:
            self.arrays[where] = message.content.array_records["arrays"]
            reply: Message = call_next(message, context)
            return reply

        reply: Message = self.mod(message, context, app)
        if reply.has_error() and reply.error.code == RESYNC:
            self.resyncs.append(where)
        return reply


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedAdam])
def test_the_run_learns_from_steps(kind: type[Strategy]) -> None:
    extra: dict[str, Any] = {"eta": 0.01, "tau": 1e-3} if kind is FedAdam else {}
    watched = Watched(tofu.compress(**OPTIONS))
    result = federate(tofu.Compressed(strategy_of(kind, **extra), **OPTIONS), watched, rounds=8)
    up = federate(
        tofu.Compressed(strategy_of(kind, **extra), **(OPTIONS | {"downlink": 0})),
        tofu.compress(**(OPTIONS | {"downlink": 0})),
        rounds=8,
    )
    assert accuracy(result.arrays) > accuracy(up.arrays) - 0.05
    assert [watched.steps[0, round_] for round_ in range(1, 9)] == [0] + [1] * 7
    metrics = result.train_metrics_clientapp
    assert metrics[1]["tofu-downlink-bytes"] == 4 * 9610
    assert metrics[8]["tofu-downlink-bytes"] < 4 * 9610 / 9.9
    for round_ in range(1, 9):  # all clients hold the same, to the bit
        held = {watched.arrays[partition, round_].object_id for partition in range(CLIENTS)}
        assert len(held) == 1
    assert not watched.resyncs


def test_with_proxies_the_steps_are_proxies(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": 30, "downlink": 20}
    strategy = tofu.record(
        tofu.Compressed(strategy_of(), Net, SHAPE, **options), tmp_path, input_shape=SHAPE, batch_size=32
    )
    result = federate(strategy, tofu.compress(Net, SHAPE, **options), rounds=5, handler=named)
    assert accuracy(result.arrays) > 0.7
    # A recorded payload is decoded at the arrays that the clients held.
    rows = attack_run(tmp_path, tmp_path / "a", attacks=("proxy-images",), rounds=5, log=lambda _: None, **WHERE)
    assert len(rows) == 5 * CLIENTS


def test_what_compression_loses_on_the_way_down_is_sent_later() -> None:
    """If no client learns anything, they come to hold the server's arrays, although each step is a tenth of them."""
    torch.manual_seed(3)
    moved = ArrayRecord(Net().state_dict())

    class Jumping(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            return (moved if server_round == 1 else arrays), metrics

    def idle(message: Message, context: Context) -> Message:
        reply = train(message, context)
        reply.content["arrays"] = message.content["arrays"]
        return reply

    watched = Watched(tofu.compress(**OPTIONS))
    federate(tofu.Compressed(strategy_of(Jumping), **OPTIONS), watched, rounds=30, handler=idle)

    def distance(round_: int) -> float:
        goal, held = moved.to_torch_state_dict(), watched.arrays[0, round_].to_torch_state_dict()
        return float(sum((goal[name] - held[name]).square().sum() for name in goal)) ** 0.5

    assert distance(30) < 0.1 * distance(2)


def test_a_client_that_missed_rounds_is_sent_the_steps_that_it_lacks() -> None:
    mod = tofu.compress(**OPTIONS)

    def absent(message: Message, context: Context, call_next: Any) -> Message:
        round_ = message.content.config_records[RECORD]["round"]
        if context.node_config["partition-id"] == 1 and round_ in (2, 3):
            return Message(Error(code=0, reason="away"), reply_to=message)
        reply: Message = mod(message, context, call_next)
        return reply

    watched = Watched(absent)
    federate(tofu.Compressed(strategy_of(), **OPTIONS), watched, rounds=5)
    assert [watched.steps[1, round_] for round_ in range(1, 6)] == [0, 1, 2, 3, 1]
    assert watched.arrays[1, 4].object_id == watched.arrays[0, 4].object_id
    assert not watched.resyncs


@pytest.mark.parametrize("damage", ["lost", "stale", "bytes"])
def test_a_client_that_cannot_follow_gets_full_arrays_in_the_same_round(damage: str) -> None:
    mod, states = tofu.compress(**OPTIONS), list[ConfigRecord]()

    def forgetful(message: Message, context: Context, call_next: Any) -> Message:
        round_ = message.content.config_records[RECORD]["round"]
        found = [key for key in context.state if key.startswith("tofu.downlink.")]
        if context.node_config["partition-id"] == 1 and found:
            [key] = found
            states.append(context.state.config_records[key])
            if round_ == 4 and damage == "lost":
                del context.state[key]
            elif round_ == 4 and damage == "stale":
                context.state[key] = states[0]
            elif round_ == 4:
                context.state[key]["arrays"] = os.urandom(300)
        reply: Message = mod(message, context, call_next)
        return reply

    watched = Watched(forgetful)
    federate(tofu.Compressed(strategy_of(), **OPTIONS), watched, rounds=5)
    assert watched.resyncs[0] == (1, 4)
    assert watched.steps[1, 4] == 0 or damage != "lost"
    assert watched.steps[1, 5] == 1
    assert watched.arrays[1, 5].object_id == watched.arrays[0, 5].object_id


@pytest.mark.parametrize("steps", [[b""], [os.urandom(500)], [b"\xff" * 40, b"\0" * 40]])
def test_steps_that_are_not_the_servers_are_refused(steps: list[bytes]) -> None:
    mod, errors = tofu.compress(**OPTIONS), list[str]()

    def tampered(message: Message, context: Context, call_next: Any) -> Message:
        record = message.content.config_records[RECORD]
        if context.node_config["partition-id"] == 1 and "steps" in record:
            record["steps"] = steps
        reply: Message = mod(message, context, call_next)
        errors.extend([reply.error.reason or ""] if reply.has_error() else [])
        return reply

    result = federate(tofu.Compressed(strategy_of(), **OPTIONS), tampered, rounds=3)
    assert len(errors) == 2
    assert all("\n" not in error for error in errors)
    assert accuracy(result.arrays) > 0.3


class Personal(FedAvg):
    """A strategy that sends each client arrays of its own."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        for message in super().configure_train(server_round, arrays, config, grid):
            content = RecordDict({"arrays": ArrayRecord(Net().state_dict()), "config": config})
            yield Message(content, message.metadata.dst_node_id, "train")


def test_misuse_is_one_line() -> None:
    with pytest.raises(RunError, match=r"Personal sends clients different arrays: expected downlink=0"):
        federate(tofu.Compressed(strategy_of(Personal), **OPTIONS), tofu.compress(**OPTIONS), rounds=1)
    with pytest.raises(RunError, match=r"different arguments \(downlink: 11 at this client, 10 at the server\)"):
        federate(
            tofu.Compressed(strategy_of(), **OPTIONS), tofu.compress(**(OPTIONS | {"downlink": 11})), rounds=1
        )  # fmt: skip
