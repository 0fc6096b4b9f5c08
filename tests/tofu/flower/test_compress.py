"""The mod and the strategy wrapper, on an app of the kind that Flower's quickstart has, with digits as data."""

import inspect
import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum, Strategy
from torch import nn

import tofu
from tests.tofu.flower.quickstart import SHAPE, Net, accuracy, federate, strategy_of, train
from tofu.errors import RunError, SettingError
from tofu.flower.update_codec import RECORD, UpdateCodec
from tofu.settings import Settings


def test_updates_are_a_fiftieth_of_their_size_and_the_accuracy_is_that_of_the_app() -> None:
    plain = federate(strategy_of())
    options: dict[str, Any] = {"ratio": 50, "over_relaxation": 1.5}
    small = federate(tofu.Compressed(strategy_of(), Net, SHAPE, **options), tofu.compress(Net, SHAPE, **options))
    metrics = small.train_metrics_clientapp[8]
    assert metrics["tofu-ratio"] > 50
    assert metrics["tofu-payload-bytes"] < 4 * 9610 / 50
    assert 0 < metrics["tofu-explained-variance"] <= 1
    assert accuracy(small.arrays) > accuracy(plain.arrays) - 0.04
    assert accuracy(plain.arrays) > 0.85


class Halving(FedAvg):
    """A user's strategy: a schedule of its own, and a `start` that keeps state on itself."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if server_round == 3:
            config["lr"] = float(config["lr"]) / 2  # type: ignore[arg-type]
        return super().configure_train(server_round, arrays, config, grid)

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *arguments: Any, **options: Any) -> Any:
        self.best = -1.0
        result = super().start(grid, initial_arrays, *arguments, **options)
        self.best = max(self.best, accuracy(result.arrays))
        return result


@pytest.mark.parametrize("kind", [FedAdam, FedMedian, Krum, Halving])
def test_any_inner_strategy_gets_plain_replies(kind: type[Strategy]) -> None:
    extra: dict[str, Any] = {"eta": 0.01, "tau": 1e-3} if kind is FedAdam else {}
    extra |= {"num_malicious_nodes": 1} if kind is Krum else {}
    options: dict[str, Any] = {"compressor": "sparse", "ratio": 10, "over_relaxation": 1.3}
    strategy = tofu.Compressed(strategy_of(kind, **extra), **options)
    result = federate(strategy, tofu.compress(**options), rounds=6)
    assert accuracy(result.arrays) > 0.6
    if kind is Halving:
        assert strategy.best > 0.6


def test_error_feedback_and_step_ahead_matter_at_a_high_ratio() -> None:
    """And they are kept between rounds: without them most of each update is lost for good."""
    reached = {}
    for feedback, ahead in ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5)):
        options: dict[str, Any] = {
            "compressor": "sparse",
            "ratio": 400,
            "error_feedback": feedback,
            "step_ahead": ahead,
        }
        result = federate(tofu.Compressed(strategy_of(), **options), tofu.compress(**options), rounds=10)
        reached[feedback, ahead] = accuracy(result.arrays)
    assert reached[1.0, 0.0] > reached[0.0, 0.0] + 0.05
    assert reached[1.0, 0.5] > reached[0.0, 0.0]


def test_a_ratio_without_room_for_a_proxy_has_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    codec = UpdateCodec(Net, SHAPE, ratio=700)
    reference = codec.reference(Net().state_dict()).reference
    with caplog.at_level("WARNING", logger="tofu"):
        codec.compressor(reference)
        codec.compressor(reference)
    (line,) = caplog.messages
    assert line.startswith("at ratio 700 a payload of this model has 54 bytes and no room for a proxy")


def test_a_client_that_lost_its_state_goes_on_without_it() -> None:
    def forgetful(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            for name in list(context.state):
                del context.state[name]
        return train(message, context)

    options: dict[str, Any] = {"compressor": "sparse", "ratio": 20}
    result = federate(tofu.Compressed(strategy_of(), **options), tofu.compress(**options), handler=forgetful)
    assert accuracy(result.arrays) > 0.7


def test_each_client_is_told_of_its_own_last_reply_that_arrived() -> None:
    """FedAvg's messages share one content, so a record put into it would tell all clients the same."""
    mod, seen = tofu.compress(compressor="sparse", ratio=20), dict[tuple[int, int], int]()

    def watching(message: Message, context: Context, call_next: Any) -> Message:
        record = message.content.config_records[RECORD]
        partition, round_ = int(context.node_config["partition-id"]), int(record["round"])  # type: ignore[arg-type]
        seen[partition, round_] = int(record["acknowledged"])  # type: ignore[arg-type]
        reply = mod(message, context, call_next)
        return Message(Error(code=0, reason="lost"), reply_to=message) if (partition, round_) == (0, 2) else reply

    federate(tofu.Compressed(strategy_of(), compressor="sparse", ratio=20), watching, rounds=3)
    assert [seen[0, round_] for round_ in (1, 2, 3)] == [-1, 1, 1]
    assert [seen[3, round_] for round_ in (1, 2, 3)] == [-1, 1, 2]


def test_misuse_is_one_line() -> None:
    with pytest.raises(RunError, match=r"add tofu\.compress"):
        federate(tofu.Compressed(strategy_of(), ratio=20))
    with pytest.raises(
        RunError, match=r"round 1: no reply of 4 clients can be used .*\(ratio: 21 at this client, 20 at"
    ) as caught:
        federate(tofu.Compressed(strategy_of(), ratio=20), tofu.compress(ratio=21))
    assert "\n" not in str(caught.value)
    mod = tofu.compress(ratio=20)

    def other(message: Message, context: Context, call_next: Any) -> Message:
        message.content.config_records[RECORD]["acknowledged"] = "never"
        return mod(message, context, call_next)

    with pytest.raises(RunError, match=r"record has round=1 and acknowledged=never, expected whole numbers"):
        federate(tofu.Compressed(strategy_of(), ratio=20), other)
    narrow = tofu.compress(lambda: Net(64), SHAPE, ratio=20)
    with pytest.raises(RunError, match=r"fc1.weight of shape \[64, 64\].*expected \[128, 64\]"):
        federate(tofu.Compressed(strategy_of(), Net, SHAPE, ratio=20), narrow)
    with pytest.raises(SettingError, match=r"ratio=1e\+06|ratio=1000000"):
        federate(tofu.Compressed(strategy_of(), ratio=1e6), tofu.compress(ratio=1e6))


def test_a_mod_without_its_strategy_answers_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flwr"):
        federate(strategy_of(), tofu.compress(ratio=20), rounds=1)
    assert "the server's strategy is not tofu.Compressed" in caplog.text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"compressor": "proxy"}, "compressor='proxy'"),
        ({"compressor": "none such"}, "compressor='none such'"),
        ({"ratio": 0.5}, "ratio=0.5"),
        ({"step_ahead": 2}, "step_ahead=2"),
        ({"over_relaxation": 0.5}, "over_relaxation=0.5"),
        ({"proxies_below": 1.5}, "proxies_below=1.5"),
    ],
)
def test_an_argument_out_of_range_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=f"^{named} is not usable: expected"):
        UpdateCodec(**options)


@pytest.mark.parametrize("payload", [b"", b"\xff" * 300, os.urandom(200), 7, "text"])
def test_a_hostile_payload_costs_that_reply_alone(payload: object) -> None:
    mod = tofu.compress(compressor="sparse", ratio=20)

    def lying(message: Message, context: Context, call_next: Any) -> Message:
        reply = mod(message, context, call_next)
        if context.node_config["partition-id"] == 0 and not reply.has_error():
            reply.content[RECORD] = ConfigRecord({"key": "arrays", "payload": payload})  # type: ignore[dict-item]
        return reply

    result = federate(tofu.Compressed(strategy_of(), compressor="sparse", ratio=20), lying, rounds=4)
    assert all(bool(torch.isfinite(v).all()) for v in result.arrays.to_torch_state_dict().values())
    assert accuracy(result.arrays) > 0.5


def test_arrays_in_another_order_or_with_buffers_are_coded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    base = {name: value.clone() for name, value in model.state_dict().items()}
    renamed = dict(zip((str(i) for i in range(len(base))), base.values(), strict=True))  # a list of arrays
    codec = UpdateCodec(model, SHAPE, ratio=10)
    coded = codec.reference(renamed)
    new = {name: value + 1 if value.dtype == torch.int64 else value + 0.01 for name, value in renamed.items()}
    update = coded.update(renamed, new)
    made = codec.compressor(coded.reference).compress(
        coded.reference, update, generator=torch.Generator().manual_seed(0)
    )
    data = codec.payload(codec.compressor(coded.reference), coded.reference, made.body, 3)
    decoded = coded.add(renamed, codec.decode(coded.reference, data, 3))
    assert decoded.keys() == renamed.keys()
    counter = next(name for name, value in renamed.items() if value.dtype == torch.int64)
    assert torch.equal(decoded[counter], new[counter].float()) or torch.equal(decoded[counter], new[counter])


class OtherNet(Net):
    """The same weights, read by another version of the code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(torch.tanh(self.fc1(x.flatten(1))))
        return out


@pytest.mark.parametrize("options", [{}, {"downlink": 20}])
def test_a_model_that_computes_something_else_than_the_servers_is_refused(options: dict[str, Any]) -> None:
    strategy = tofu.Compressed(strategy_of(), Net, SHAPE, ratio=20, **options)
    with pytest.raises(RunError, match=r"OtherNet.* computes the same on server and client \(outputs differ by 0\.7"):
        federate(strategy, tofu.compress(OtherNet, SHAPE, ratio=20, **options), rounds=1)


def test_error_feedback_has_the_defaults_of_our_own_apps() -> None:
    ours, theirs = Settings().codec, inspect.signature(UpdateCodec).parameters
    for name in ("error_feedback", "over_relaxation", "step_ahead", "proxies_below", "correction"):
        assert theirs[name].default == getattr(ours, name), name


@pytest.mark.parametrize(("feedback", "gain"), [(1.0, 1.8), (0.0, 1.0)])
def test_without_error_feedback_no_update_is_over_relaxed(feedback: float, gain: float) -> None:
    """What an over-relaxed message adds too much is subtracted by the next ones, which need a residual."""
    codec = UpdateCodec(compressor="sparse", ratio=50, over_relaxation=1.8, error_feedback=feedback)
    model = codec.reference({"w": torch.zeros(5000)})
    update = {"w": torch.randn(5000, generator=torch.Generator().manual_seed(0))}
    generator = torch.Generator().manual_seed(1)
    decoded = codec.compressor(model.reference).compress(model.reference, update, generator=generator).decoded["w"]
    assert decoded.dot(decoded) / decoded.dot(update["w"]) == pytest.approx(gain, rel=0.02)


@pytest.mark.parametrize(("feedback", "below", "searches"), [(1.0, 0.05, False), (1.0, 1.0, True), (0.0, 0.05, True)])
def test_a_client_searches_where_the_rest_of_an_update_would_not_follow(
    feedback: float, below: float, searches: bool
) -> None:
    codec = UpdateCodec(Net, SHAPE, ratio=50, proxies_below=below, error_feedback=feedback)
    model = codec.reference(dict(Net().state_dict()))
    noise = torch.Generator().manual_seed(0)
    update = {name: torch.randn(value.shape, generator=noise) for name, value in model.reference.base.items()}
    compressor = codec.compressor(model.reference)
    assert (compressor.compress(model.reference, update, generator=noise).evals > 0) == searches


class Quarters(nn.Module):
    """Parameters of which every client moves its own quarter, and a buffer that all of them move."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8, bias=False)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x.flatten(1)) + self.mean
        return out


def own_quarter(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"].to_torch_state_dict()
    part = int(context.node_config["partition-id"])
    arrays["layer.weight"].view(4, -1)[part] += 1
    arrays["mean"] += 1
    metrics = MetricRecord({"num-examples": 10})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


@pytest.mark.parametrize(("step", "expected"), [(1, [1.0, 1.0]), ("auto", [2.0, 1.0])])
def test_the_servers_step_lengthens_the_mean_of_parameters_by_half_of_the_diversity(
    step: Any, expected: list[float]
) -> None:
    """The four updates are orthogonal; in the last round the step is 1. Buffers are means."""
    options: dict[str, Any] = {"model": Quarters, "input_shape": SHAPE, "compressor": "sparse", "ratio": 4}
    strategy = tofu.Compressed(strategy_of(), **options, server_step=step)
    result = federate(strategy, tofu.compress(**options), rounds=2, handler=own_quarter, model=Quarters)
    if step == "auto":
        assert [metrics["tofu-server-step"] for metrics in result.train_metrics_clientapp.values()] == expected
    torch.manual_seed(0)
    new, old = result.arrays.to_torch_state_dict(), Quarters().state_dict()
    assert torch.allclose(new["layer.weight"] - old["layer.weight"], torch.full((8, 64), sum(expected) / 4), atol=0.02)
    assert torch.allclose(new["mean"], torch.full((8,), 2.0), atol=0.02)


@pytest.mark.parametrize(
    ("inner", "options", "found"),
    [
        (FedAvg, {"model": Net, "server_step": 2.5}, "server_step=2.5 is not usable: expected 1 or"),
        (FedAvg, {"server_step": "auto"}, "server_step='auto' is not usable: expected 1, or .* the argument model"),
        (FedAdam, {"model": Net, "server_step": "auto"}, "server_step='auto' is not usable: expected 1, or FedAvg"),
        (FedMedian, {"model": Net, "server_step": "auto"}, "server_step='auto' is not usable: expected 1, or FedAvg"),
        (lambda: tofu.Robust(FedAvg(), "median"), {"model": Net, "server_step": "auto"}, "server_step='auto' is not"),
    ],
)
def test_a_server_step_that_cannot_be_is_refused(inner: Any, options: dict[str, Any], found: str) -> None:
    with pytest.raises(SettingError, match=found):
        tofu.Compressed(inner(), input_shape=SHAPE if "model" in options else None, **options)


def test_an_automatic_step_needs_the_number_of_rounds() -> None:
    options: dict[str, Any] = {"model": Net, "input_shape": SHAPE, "compressor": "sparse", "ratio": 20}
    strategy = tofu.Compressed(strategy_of(), **options, server_step="auto")
    strategy.start = lambda grid, arrays, **_: strategy.aggregate_train(  # a loop of one's own
        1, grid.send_and_receive(strategy.configure_train(1, arrays, ConfigRecord({"lr": 0.1}), grid))
    )
    with pytest.raises(RunError, match=r'server_step="auto" needs start\(num_rounds='):
        federate(strategy, tofu.compress(**options), rounds=1)
