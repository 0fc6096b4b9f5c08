"""Apps that return a part of the arrays, or differences, compute in other types, send parts of a model, or train more
than once: each ends where it ends without the mod."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.utils.checkpoint import checkpoint

import tofu
from tests.tofu.flower.quickstart import CLIENTS, DATA, SHAPE, Net, accuracy, federate, strategy_of, train
from tofu.data import to_float
from tofu.errors import ModelError, RunError, SettingError
from tofu.flower.in_process import run_in_process
from tofu.flower.update_codec import UpdateCodec

Ends = Callable[[], tuple[Callable[[FedAvg], Any], list[Any]]]
"""Returns a function that wraps a strategy, and the client's mods."""

SPARSE: dict[str, Any] = {"compressor": "sparse", "ratio": 50}


def sparse(**more: Any) -> Ends:
    options = {**SPARSE, **more}
    return lambda: (lambda inner: tofu.Compressed(inner, **options), [tofu.compress(**options)])


def secure() -> tuple[Callable[[FedAvg], Any], list[Any]]:
    return tofu.SecureAggregation, [tofu.secure()]


def hybrid() -> tuple[Callable[[FedAvg], Any], list[Any]]:
    return lambda inner: tofu.Hybrid(inner, **SPARSE, switch_round=3), [tofu.hybrid(**SPARSE)]


class Ordered(FedAvg):
    """Adds replies in the order of the nodes, so that sums do not depend on which came first."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        return super().aggregate_train(server_round, sorted(replies, key=lambda reply: reply.metadata.src_node_id))


class Merging(FedAvg):
    """Puts the average of what the clients return in the place of these arrays, or adds it to them."""

    add = False

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.current = arrays.to_torch_state_dict()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        self.names = {tuple(reply.content["arrays"]) for reply in replies if not reply.has_error()}
        mean, metrics = super().aggregate_train(server_round, replies)
        assert mean is not None
        new = mean.to_torch_state_dict()
        if self.add:
            new = {name: self.current[name] + value for name, value in new.items()}
        return ArrayRecord({**self.current, **new}), metrics


def last_layer(message: Message, context: Context) -> Message:
    """The train function of an app that fine-tunes the last layer and returns this layer alone."""
    received = message.content["arrays"].to_torch_state_dict()
    reply = train(message, context)
    new = reply.content["arrays"].to_torch_state_dict()
    reply.content["arrays"] = ArrayRecord({name: new[name] for name in received if name.startswith("fc2")})
    return reply


@pytest.mark.parametrize("ends", [sparse(), secure], ids=["sparse", "secure"])
def test_an_app_that_returns_a_part_of_the_arrays(ends: Ends) -> None:
    wrap, mods = ends()
    plain, strategy = Merging(fraction_evaluate=0.0), Merging(fraction_evaluate=0.0)
    expected = federate(plain, handler=last_layer, rounds=5).arrays
    found = federate(wrap(strategy), *mods, handler=last_layer, rounds=5).arrays
    assert strategy.names == plain.names or ends is secure  # a sum has all arrays
    torch.manual_seed(0)
    assert torch.equal(found.to_torch_state_dict()["fc1.weight"], Net().state_dict()["fc1.weight"])
    assert accuracy(found) > accuracy(expected) - 0.03 > 0.5


def test_a_reply_that_names_other_arrays_is_not_usable() -> None:
    mod = tofu.compress(**SPARSE)

    def lying(message: Message, context: Context, call_next: Any) -> Message:
        reply = mod(message, context, call_next)
        reply.content["tofu"]["names"] = ["fc1.weight", "other"]
        return reply

    with pytest.raises(RunError, match="it names arrays that it was not sent"):
        federate(tofu.Compressed(strategy_of(), **SPARSE), lying, rounds=1)


class OnlyTrained(FedAvg):
    """Averages the replies of those clients that trained, as their config records say."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        usable = [reply for reply in replies if not reply.has_error()]
        self.trained = [reply for reply in usable if next(iter(reply.content.config_records.values()))["trained"]]
        return super().aggregate_train(server_round, self.trained)


def one_in_four_trains(message: Message, context: Context) -> Message:
    """The train function of an app in which clients with little data return what they received, without metrics."""
    trained, arrays = context.node_config["partition-id"] == 2, message.content["arrays"]
    reply = train(message, context)
    if not trained:
        reply.content["arrays"], reply.content["metrics"] = arrays, MetricRecord()
    reply.content["about"] = ConfigRecord({"trained": trained})
    return reply


def test_a_strategy_chooses_among_replies_of_which_most_have_no_metrics() -> None:
    plain, strategy = OnlyTrained(fraction_evaluate=0.0), OnlyTrained(fraction_evaluate=0.0)
    expected = federate(plain, handler=one_in_four_trains, rounds=5).arrays
    wrap, mods = sparse()()
    found = federate(wrap(strategy), *mods, handler=one_in_four_trains, rounds=5)
    assert [len(one.trained) for one in (plain, strategy)] == [1, 1]
    assert found.train_metrics_clientapp[5]["tofu-ratio"] > 40
    assert accuracy(found.arrays) > accuracy(expected) - 0.05 > 0.5


def difference(message: Message, context: Context) -> Message:
    """The train function of an app that returns what training changed."""
    old = message.content["arrays"].to_torch_state_dict()
    reply = train(message, context)
    new = reply.content["arrays"].to_torch_state_dict()
    reply.content["arrays"] = ArrayRecord({name: new[name] - old[name] for name in old})
    return reply


class Adding(Merging):
    add = True


def test_an_app_that_returns_differences() -> None:
    expected = accuracy(federate(Adding(fraction_evaluate=0.0), handler=difference).arrays)
    with pytest.raises(RunError, match=r"\(the app returned .* of the norm .* pass differences=True to both[^;]*\)$"):
        federate(tofu.Compressed(Adding(fraction_evaluate=0.0), **SPARSE), tofu.compress(**SPARSE), handler=difference)
    for options in (SPARSE, {"model": Net, "input_shape": SHAPE, "ratio": 50, "downlink": 4.0}):
        strategy = tofu.Compressed(Adding(fraction_evaluate=0.0), **options, differences=True)
        result = federate(strategy, tofu.compress(**options, differences=True), handler=difference)
        assert accuracy(result.arrays) > expected - 0.05 > 0.6


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_proxies_of_a_model_in_another_type(kind: torch.dtype) -> None:
    """Arrays travel in the app's type (Flower has no bfloat16: such apps send float32); proxies are searched in 32
    bits."""

    def build() -> nn.Module:
        return Net().to(kind)

    sent = torch.float32 if kind == torch.bfloat16 else kind

    def handler(message: Message, context: Context) -> Message:
        received = message.content["arrays"].to_torch_state_dict()
        assert {value.dtype for value in received.values()} == {sent}
        message.content["arrays"] = ArrayRecord({name: value.float() for name, value in received.items()})
        reply = train(message, context)
        new = reply.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({name: value.to(sent) for name, value in new.items()})
        return reply

    def model() -> nn.Module:
        return Net().to(sent)

    options: dict[str, Any] = {"model": build, "input_shape": SHAPE, "ratio": 50}
    expected = federate(strategy_of(), handler=handler, model=model, rounds=4).arrays
    found = federate(
        tofu.Compressed(strategy_of(), **options), tofu.compress(**options), handler=handler, model=model, rounds=4
    ).arrays
    assert {value.dtype for value in found.to_torch_state_dict().values()} == {sent}
    assert accuracy(found) > accuracy(expected) - 0.05 > 0.6


class Halves(FedAvg):
    """HeteroFL (Diao et al., ICLR 2021): every second client trains half of the hidden units."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.current = arrays.to_torch_state_dict()
        for at, message in enumerate(super().configure_train(server_round, arrays, config, grid)):
            units = 64 if at % 2 else 128
            part = {
                "fc1.weight": self.current["fc1.weight"][:units], "fc1.bias": self.current["fc1.bias"][:units],
                "fc2.weight": self.current["fc2.weight"][:, :units].contiguous(), "fc2.bias": self.current["fc2.bias"],
            }  # fmt: skip
            yield Message(
                RecordDict({**message.content, "arrays": ArrayRecord(part)}), message.metadata.dst_node_id, "train"
            )

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        total = {name: torch.zeros_like(value) for name, value in self.current.items()}
        count = {name: torch.zeros_like(value) for name, value in self.current.items()}
        parts = [reply.content["arrays"].to_torch_state_dict() for reply in replies if not reply.has_error()]
        self.parts = len(parts)
        for part in parts:
            for name, value in part.items():
                where = tuple(slice(0, side) for side in value.shape)
                total[name][where] += value
                count[name][where] += 1
        return ArrayRecord({name: total[name] / count[name] for name in total}), MetricRecord()


def part_of_the_model(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"].to_torch_state_dict()
    units = len(arrays["fc1.bias"])
    full = Net().state_dict()
    full |= {"fc1.weight": torch.zeros(128, 64), "fc1.bias": torch.zeros(128), "fc2.weight": torch.zeros(10, 128)}
    full["fc1.weight"][:units], full["fc1.bias"][:units] = arrays["fc1.weight"], arrays["fc1.bias"]
    full["fc2.weight"][:, :units], full["fc2.bias"] = arrays["fc2.weight"], arrays["fc2.bias"]
    message.content["arrays"] = ArrayRecord(full)
    reply = train(message, context)
    new = reply.content["arrays"].to_torch_state_dict()
    new["fc1.weight"], new["fc1.bias"] = new["fc1.weight"][:units], new["fc1.bias"][:units]
    new["fc2.weight"] = new["fc2.weight"][:, :units].contiguous()
    reply.content["arrays"] = ArrayRecord(new)
    return reply


def test_a_strategy_that_sends_parts_of_a_model() -> None:
    expected = federate(Halves(fraction_evaluate=0.0), handler=part_of_the_model, rounds=5).arrays
    inner = Halves(fraction_evaluate=0.0)
    found = federate(
        tofu.Compressed(inner, **SPARSE), tofu.compress(**SPARSE), handler=part_of_the_model, rounds=5
    ).arrays
    assert inner.parts == CLIENTS
    assert accuracy(found) > accuracy(expected) - 0.03 > 0.6


@pytest.mark.parametrize("ends", [sparse(), sparse(downlink=4.0), secure, hybrid], ids=["up", "both", "sum", "hybrid"])
@pytest.mark.parametrize("anew", [True, False], ids=["new strategies", "one strategy"])
def test_trainings_of_one_app_do_not_touch_each_other(ends: Ends, *, anew: bool) -> None:
    """As in a search for a learning rate. The second ended elsewhere, with the first one's error feedback; secure
    sums were refused."""
    wrap, mods = ends()
    client, server, found = ClientApp(mods=mods), ServerApp(), list[dict[str, torch.Tensor]]()
    client.train()(train)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = wrap(Ordered(fraction_evaluate=0.0))
        for _ in range(2):
            torch.manual_seed(0)
            arrays = ArrayRecord(Net().state_dict())
            strategy = wrap(Ordered(fraction_evaluate=0.0)) if anew else strategy
            result = strategy.start(grid, arrays, num_rounds=4, train_config=ConfigRecord({"lr": 0.1}))
            found.append(result.arrays.to_torch_state_dict())

    run_in_process(server, client, run_config={}, num_supernodes=CLIENTS)
    first, second = (nn.utils.parameters_to_vector(values.values()) for values in found)
    assert float((first - second).norm() / first.norm()) < 1e-5  # sums are rounded with the seed of their round


@pytest.mark.parametrize("ends", [sparse(), sparse(downlink=4.0), secure, hybrid], ids=["up", "both", "sum", "hybrid"])
def test_strategies_that_take_turns_do_not_touch_each_other(ends: Ends) -> None:
    """As for the two networks of a GAN. Clients kept the state of one training, and the keys of one secure round."""
    wrap, mods = ends()
    client, server, found = ClientApp(mods=mods), ServerApp(), list[dict[str, torch.Tensor]]()
    client.train()(train)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for sizes in ((128, 64), (128,)):
            torch.manual_seed(0)
            turns = [[wrap(Ordered(fraction_evaluate=0.0)), ArrayRecord(Net(size).state_dict())] for size in sizes]
            for round_ in range(1, 5):
                for turn in turns:
                    messages = turn[0].configure_train(round_, turn[1], ConfigRecord({"lr": 0.1}), grid)
                    turn[1], _ = turn[0].aggregate_train(round_, grid.send_and_receive(messages))
            found.append(turns[0][1].to_torch_state_dict())

    run_in_process(server, client, run_config={}, num_supernodes=CLIENTS)
    first, second = (nn.utils.parameters_to_vector(values.values()) for values in found)
    assert float((first - second).norm() / first.norm()) < 1e-5


class Faint(nn.Module):
    """BatchNorm of inputs whose variance is far below 1, its first value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.relu(self.norm(self.first(0.01 * x.flatten(1)))))
        return out


def test_no_variance_of_batch_norm_becomes_negative() -> None:
    """What a lossy step leaves of it is less than its error."""

    def handler(message: Message, context: Context) -> Message:
        network = Faint()
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data = DATA.client(int(context.node_config["partition-id"]))
        for rows in torch.arange(len(data)).split(32):
            network(to_float(data.images[rows]))
        arrays, metrics = ArrayRecord(network.state_dict()), MetricRecord({"num-examples": len(data)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    options = {**SPARSE, "ratio": 20, "downlink": 5.0}
    strategy = tofu.Compressed(strategy_of(), **options)
    result = federate(strategy, tofu.compress(**options), handler=handler, model=Faint, rounds=6)
    held = strategy.sent_to(next(iter(strategy.acknowledged))).held
    for arrays in (held, result.arrays.to_torch_state_dict()):
        assert float(arrays["norm.running_var"].min()) >= 0


def test_lazy_layers_of_a_model() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

    arrays = {"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}
    model = UpdateCodec(build, SHAPE, compressor="sparse").reference(arrays)
    assert dict(model.param_spec.shapes) == {name: value.shape for name, value in arrays.items()}
    with pytest.raises(SettingError, match="lazy layers without weights"):
        UpdateCodec(build, compressor="sparse").reference(arrays)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_named(reentrant: bool) -> None:
    """Proxies are found by derivatives of derivatives, which torch does not take of recomputed layers."""

    class Recomputing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = checkpoint(super().forward, x, use_reentrant=reentrant)
            return out

    update = {name: 0.01 * torch.randn_like(value) for name, value in Recomputing().named_parameters()}
    with pytest.raises(ModelError, match="no activation checkpointing in evaluation mode, or compressor=sparse"):
        tofu.encode(Recomputing(), update, input_shape=SHAPE, ratio=20)


def test_a_secure_round_without_any_change_is_followed_by_others() -> None:
    """A learning rate that starts at 0: ranges of nothing would clip the rounds that follow."""

    def warming(message: Message, context: Context) -> Message:
        config = message.content["config"]
        config["lr"] = 0.0 if config["server-round"] == 1 else config["lr"]
        return train(message, context)

    expected = federate(strategy_of(), handler=warming, rounds=4).arrays.to_torch_state_dict()
    found = federate(tofu.SecureAggregation(strategy_of()), tofu.secure(), handler=warming, rounds=4)
    clipped = [metrics["tofu-clipped"] for metrics in found.train_metrics_clientapp.values()]
    assert clipped == [0, 0, 0, 0]
    state = found.arrays.to_torch_state_dict()
    assert all(torch.allclose(state[name], expected[name], atol=1e-4) for name in expected)
