"""A client of a Flower app that sends other records, arrays or numbers than the others fails alone; no run ends."""

import io
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

import tofu
from tests.tofu.flower.quickstart import SHAPE, Net, accuracy, federate, strategy_of, train

Change = Callable[[RecordDict], None]
SHAPES = {name: tuple(value.shape) for name, value in Net().state_dict().items()}


def renamed(kind: str) -> Change:
    def change(content: RecordDict) -> None:
        for key in list(getattr(content, f"{kind}_records")):
            content[f"other {key}"] = content[key]
            del content[key]

    return change


def dropped(kind: str) -> Change:
    def change(content: RecordDict) -> None:
        for key in list(getattr(content, f"{kind}_records")):
            del content[key]

    return change


def with_metric(name: str, value: Any) -> Change:
    def change(content: RecordDict) -> None:
        for record in content.metric_records.values():
            record[name] = value

    return change


def with_array(data: bytes | None = None, **declared: Any) -> Change:
    """The first array has other bytes, or declares another type or shape."""

    def change(content: RecordDict) -> None:
        for key, record in list(content.array_records.items()):
            name, array = next(iter(record.items()))
            given = {"dtype": "float32", "shape": SHAPES[name], "stype": array.stype, **declared}
            made = Array(data=array.data if data is None else data, **given)
            content[key] = ArrayRecord({**record, name: made})

    return change


def header(shape: str, descr: str = "'<f4'") -> bytes:
    """The start of an npy file."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text


def archive() -> bytes:
    """An npz file, whose array of zeros would take 80 MB."""
    file = io.BytesIO()
    np.savez_compressed(file, a=np.zeros(10**7))
    return file.getvalue()


OF_RECORDS: list[Change] = [
    dropped("metric"), renamed("metric"), lambda content: content.clear(),
    lambda content: content.__setitem__("more", MetricRecord({"num-examples": 1})),
    lambda content: content.__setitem__("metrics", ConfigRecord({"num-examples": 1})),
    *(with_metric("num-examples", value) for value in (math.nan, math.inf, -math.inf, -5, [1, 2], [])),
    *(with_metric("unusual", value) for value in (1.0, math.nan, [1.0])), with_metric("loss", [1.0, 2.0]),
]  # fmt: skip
OF_ARRAYS: list[Change] = [
    dropped("array"), lambda content: content.__setitem__("more", ArrayRecord()),
    *(with_array(data) for data in (b"", header("(1099511627776,)"), header("(0, 9223372036854775807, 2)"),
                                    header("(4,"), header("(4,)", "'|O'"), b"PK\3\4" + bytes(30), archive(),
                                    header("(128, 64)", "'<c8'") + bytes(8 * 8192), b"\x80\4N.",
                                    header("(128, 64)", "'>f4'") + bytes(4 * 8192))),
    *(with_array(header("(128, 64)") + value * 8192) for value in (b"\0\0\xc0\x7f", b"\0\0\x80\x7f")),
    with_array(stype="pickle"),
]  # fmt: skip
TOLERATED: list[Change] = [renamed("array"), with_array(dtype="garbage"), with_array(shape=(-1, 2**62))]
"""Not what the strategy reads: key of the arrays, declared type and shape."""

OPTIONS: dict[str, Any] = {"compressor": "topk", "ratio": 20}


def run(
    strategy: Any, mods: tuple[Any, ...], changes: list[Change], caplog: pytest.LogCaptureFixture
) -> tuple[Any, list[str]]:
    """A run in which client 0 makes a change in each round -> its result, and the warnings about replies."""

    def lying(message: Message, context: Context, call_next: Any) -> Message:
        round_ = message.content["config"]["server-round"] if "config" in message.content else 0
        reply: Message = call_next(message, context)
        if round_ and context.node_config["partition-id"] == 0 and not reply.has_error():
            changes[round_ - 1](reply.content)
        return reply

    def with_loss(message: Message, context: Context) -> Message:
        reply = train(message, context)
        reply.content["metrics"]["loss"] = 0.5
        return reply

    with caplog.at_level(logging.WARNING, "tofu.flower"):
        result = federate(strategy, lying, *mods, rounds=len(changes), handler=with_loss)
    lines = [record.getMessage() for record in caplog.records if record.name == "tofu.flower"]
    return result, [line for line in lines if "not usable" in line or "not recorded" in line]


@pytest.mark.parametrize("recorded", [False, True])
def test_with_a_robust_rule(recorded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strategy: Any = tofu.Robust(strategy_of(), "median")
    if recorded:
        strategy = tofu.record(strategy, tmp_path, input_shape=SHAPE, batch_size=32)
    changes = OF_RECORDS + OF_ARRAYS + TOLERATED
    result, lines = run(strategy, (), changes, caplog)
    assert accuracy(result.arrays) > 0.5
    refused = {int(line.split("round ")[1].split(":")[0]) for line in lines if "the reply of node" in line}
    assert refused == set(range(1, len(changes) - 1))  # of the tolerated ones, another key alone
    assert all("\n" not in line and len(line) < 400 for line in lines)


@pytest.mark.parametrize("wrapped", ["record", "first replies"])
def test_with_flowers_own_average(wrapped: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of arrays that FedAvg reads, a wrong number may spoil the average; nothing ends the run."""
    strategy: Any = strategy_of()
    if wrapped == "record":
        strategy = tofu.record(strategy, tmp_path, input_shape=SHAPE, batch_size=32)
    else:
        strategy = tofu.FirstReplies(strategy, fraction=1.0)
    unreadable = [*OF_ARRAYS[:12], OF_ARRAYS[-1], with_array(header("(4,)") + bytes(16))]
    _, lines = run(strategy, (), OF_RECORDS + unreadable, caplog)
    refused = {int(line.split("round ")[1].split(":")[0]) for line in lines if "the reply of node" in line}
    assert refused == set(range(1, len(OF_RECORDS + unreadable) + 1))


def test_with_compression(caplog: pytest.LogCaptureFixture) -> None:
    changes = [*OF_RECORDS, dropped("config"), renamed("config"), OF_ARRAYS[1]]
    changes += [with_payload(value) for value in (b"", 7, "text", [b"a"], math.nan, True)]
    strategy = tofu.Compressed(strategy_of(), Net, SHAPE, **OPTIONS)
    result, lines = run(strategy, (tofu.compress(Net, SHAPE, **OPTIONS),), changes, caplog)
    assert accuracy(result.arrays) > 0.5
    assert len(lines) == len(changes)


def with_payload(value: Any) -> Change:
    def change(content: RecordDict) -> None:
        for record in content.config_records.values():
            record["payload"] = value

    return change


METRICS = ("[" * 100_000, '[["a", 1e400]]', [1], ["a"], [b"a"], 7, math.nan, True, b"x", "[]", "[[]]")


def test_with_secure_sums(caplog: pytest.LogCaptureFixture) -> None:
    """What the metrics are called is text of the client; its masked vector alone is in the sum."""

    def with_names(value: Any) -> Change:
        return lambda content: content.config_records["tofu-secure"].__setitem__("metrics", value)

    changes = [*map(with_names, METRICS), dropped("config"), renamed("config")]
    result, lines = run(tofu.SecureAggregation(strategy_of()), (tofu.secure(),), changes, caplog)
    assert accuracy(result.arrays) > 0.5
    assert len(lines) == 2
    clients = [result.train_metrics_clientapp[round_]["tofu-clients"] for round_ in range(1, len(changes) + 1)]
    assert clients == [4] * len(METRICS) + [3, 3]


@pytest.mark.parametrize("name", METRICS)
def test_names_of_metrics_that_all_clients_send_end_no_run(name: Any, caplog: pytest.LogCaptureFixture) -> None:
    def lying(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        if "tofu-secure" in reply.content:
            reply.content["tofu-secure"]["metrics"] = name
        return reply

    federate(tofu.SecureAggregation(strategy_of()), lying, tofu.secure(), rounds=1)
