"""Mods in an app that does much differently: a dataclass as its model, two optimizers, a loop of its own instead of
`Strategy.start`, several array records in a message, shared parameters, a random forward pass, and whole numbers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedXgbBagging,
    FedXgbCyclic,
)
from torch import Tensor, nn

import tofu
from tests.tofu.flower.quickstart import CLIENTS, DATA, SHAPE, Net, federate, strategy_of
from tofu.data import to_float
from tofu.errors import PayloadError, RunError, SettingError
from tofu.flower.in_process import run_in_process
from tofu.flower.update_codec import ArrayNames, UpdateCodec

FIRST = 2**20 + 1


@dataclass(eq=False)
class Coder(nn.Module):
    """One layer under two names, noise, and buffers that count and that never change."""

    width: int = 16
    tied: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(64, self.width)
        self.again = self.encode if self.tied else nn.Linear(64, self.width)
        self.head = nn.Linear(self.width, 10)
        self.register_buffer("seen", torch.tensor([FIRST]))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("key", torch.tensor([2**40 + 1]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.encode(x.flatten(1)) + self.again(x.flatten(1)))
        scores: Tensor = self.head(hidden + 0.05 * torch.randn_like(hidden))
        return scores


class TwoRecords(FedAvg):
    """Sends and expects, beside the weights, an array record that the clients count in."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        for message in super().configure_train(server_round, arrays, config, grid):
            own = RecordDict({**message.content, "counts": ArrayRecord({"n": torch.zeros(3)})})
            yield Message(own, message.metadata.dst_node_id, "train.weights")

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        plain = list(replies)
        self.counts = [float(r.content.array_records["counts"]["n"].numpy()[0]) for r in plain if not r.has_error()]
        for reply in plain:
            if not reply.has_error():
                del reply.content["counts"]
        return super().aggregate_train(server_round, plain)


def trained(message: Message, context: Context) -> Message:
    """Two optimizers, and a call of its own state."""
    model, partition = Coder(), int(context.node_config["partition-id"])
    model.load_state_dict(message.content.array_records["model"].to_torch_state_dict())
    data = DATA.client(partition)
    body, head = torch.optim.Adam(model.encode.parameters(), lr=3e-3), torch.optim.SGD(model.head.parameters(), lr=0.3)
    for rows in torch.randperm(len(data), generator=torch.Generator().manual_seed(partition)).split(32):
        for optimizer in (body, head):
            optimizer.zero_grad()
        F.cross_entropy(model(to_float(data.images[rows])), data.labels[rows]).backward()
        for optimizer in (body, head):
            optimizer.step()
    model.seen += 2
    calls = int(context.state.config_records.get("own", ConfigRecord({"calls": 0}))["calls"])  # type: ignore[arg-type]
    context.state["own"] = ConfigRecord({"calls": calls + 1})
    content = {
        "counts": ArrayRecord({"n": torch.full((3,), calls + 1.0)}),
        "model": ArrayRecord(model.state_dict()),
        "numbers": MetricRecord({"rows": len(data)}),
    }
    return Message(RecordDict(content), reply_to=message)


def run_own_loop(wrap: Callable[[FedAvg], Any], mods: list[Any], rounds: int = 6) -> tuple[Any, ArrayRecord]:
    """Start with a message without arrays, then call the strategy's methods directly."""
    client, server, out = ClientApp(mods=mods), ServerApp(), []
    client.train("weights")(trained)

    @client.train("setup")
    def setup(message: Message, context: Context) -> Message:
        return Message(RecordDict({"ready": MetricRecord({"n": 1})}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        arrays = ArrayRecord(Coder().state_dict())
        strategy = wrap(
            TwoRecords(fraction_evaluate=0.0, arrayrecord_key="model", configrecord_key="job", weighted_by_key="rows")
        )
        asked = [Message(RecordDict(), node, "train.setup") for node in grid.get_node_ids()]
        assert all(not reply.has_error() for reply in grid.send_and_receive(asked))
        for round_ in range(1, rounds + 1):
            replies = grid.send_and_receive(strategy.configure_train(round_, arrays, ConfigRecord(), grid))
            new, _ = strategy.aggregate_train(round_, replies)
            arrays = new if new is not None else arrays
        out.append((strategy, arrays))

    run_in_process(server, client, run_config={}, num_supernodes=CLIENTS)
    strategy, arrays = out[0]
    return strategy, arrays


def score(arrays: ArrayRecord) -> float:
    model = Coder()
    model.load_state_dict(arrays.to_torch_state_dict())
    test = DATA.test()
    with torch.no_grad():
        return float((model(to_float(test.images)).argmax(1) == test.labels).float().mean())


@pytest.mark.parametrize("options", [{}, {"downlink": 4.0}], ids=["uplink", "both"])
def test_an_app_in_another_style_learns_as_without_the_mod(options: dict[str, Any]) -> None:
    plain, arrays = run_own_loop(lambda inner: inner, [])
    arguments: dict[str, Any] = {"ratio": 10, **options}
    strategy, small = run_own_loop(
        lambda inner: tofu.Compressed(inner, Coder, SHAPE, **arguments), [tofu.compress(Coder, SHAPE, **arguments)]
    )
    assert strategy.counts == plain.counts == [6.0] * CLIENTS
    state = small.to_torch_state_dict()
    assert torch.equal(state["encode.weight"], state["again.weight"])
    assert int(state["seen"]) == int(arrays.to_torch_state_dict()["seen"]) == FIRST + 12
    assert bool(state["mask"][0])
    assert int(state["key"]) == 2**40 + 1
    assert score(arrays) > 0.8
    assert score(small) > score(arrays) - 0.06


def test_both_ends_compute_the_same_of_a_random_model() -> None:
    torch.manual_seed(0)
    model = Coder()
    del model.mask, model.key  # `encode` takes what training changes
    update = {name: 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}
    message = tofu.encode(model, update, input_shape=SHAPE, ratio=4)
    torch.manual_seed(1)
    once = tofu.decode(model, message)
    again = tofu.decode(model, message)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert any(bool(value.any()) for value in once.values())


def test_whole_numbers_and_doubles_that_float32_cannot_hold_arrive() -> None:
    base = {"count": torch.tensor([2**40 + 1]), "mean": torch.tensor([1e9], dtype=torch.float64)}
    names = ArrayNames.of(base)
    update = names.update(base, {"count": base["count"] + 3, "mean": base["mean"] + 0.25})
    assert float(update["count"]) == 3
    assert float(update["mean"]) == 0.25
    assert names.add(base, update) == {"count": torch.tensor([2**40 + 4]), "mean": base["mean"] + 0.25}


def head(model: nn.Module, x: Tensor) -> Any:
    return model(x * 0.5)


def test_functions_of_one_name_that_differ_are_found() -> None:
    def digest(forward: Any) -> bytes:
        return UpdateCodec(Net, SHAPE, forward=forward).digest

    assert digest(lambda m, x: m(x)) == digest(lambda m, x: m(x))
    assert digest(lambda m, x: m(x)) != digest(lambda m, x: m.fc2(m.fc1(x.flatten(1))))
    assert digest(lambda m, x: m(0.5 * x)) != digest(lambda m, x: m(0.25 * x))
    assert digest(head) == digest(head)


@pytest.mark.parametrize(
    ("mods", "named"),
    [
        (lambda: [tofu.compress(ratio=20), tofu.compress(ratio=20)], "tofu.compress is in the list of mods twice"),
        (lambda: [tofu.keep_local("fc2*"), tofu.compress(ratio=20)], "put tofu.keep_local last"),
        (lambda: [tofu.compress(ratio=20), tofu.secure()], "use tofu.hybrid instead"),
        (lambda: [tofu.secure()], "the server's strategy is not tofu.SecureAggregation"),
        (lambda: [tofu.hybrid(ratio=20)], r"arguments \(secure: .*at this client, not given at the server\)"),
    ],
)
def test_mods_that_cannot_work_together_are_named(mods: Callable[[], list[Any]], named: str) -> None:
    with pytest.raises(RunError, match=named) as caught:
        federate(tofu.Compressed(strategy_of(), ratio=20), *mods(), rounds=1)
    assert "\n" not in str(caught.value)


def test_compression_alone_is_refused_before_the_secure_rounds_of_a_hybrid() -> None:
    with pytest.raises(RunError, match=r"round 1: .*tofu\.hybrid and tofu\.Hybrid"):
        federate(tofu.Hybrid(strategy_of(), ratio=20, switch_round=3), tofu.compress(ratio=20), rounds=1)


@pytest.mark.parametrize("kind", [FedXgbBagging, FedXgbCyclic])
def test_strategies_of_trees_are_refused(kind: Any) -> None:
    with pytest.raises(SettingError, match=f"strategy='{kind.__name__}' is not usable"):
        tofu.Compressed(kind(), ratio=20)
    with pytest.raises(SettingError, match=f"strategy='{kind.__name__}' is not usable"):
        tofu.SecureAggregation(kind())


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "Compressed": tofu.Compressed,
    "FirstReplies": lambda inner: tofu.FirstReplies(inner, fraction=0.5),
    "Hybrid": lambda inner: tofu.Hybrid(inner, switch_round=2),
    "Robust": lambda inner: tofu.Robust(inner, "median"),
    "SecureAggregation": tofu.SecureAggregation,
    "record": lambda inner: tofu.record(inner, "recordings", input_shape=(1, 8, 8), batch_size=1, epochs=1),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("inner", "found"),
    [
        (LegacyFedAvg, r"flwr\.server\.strategy\.fedavg\.FedAvg"),  # Flower's older API
        (lambda: FedAvg, r"flwr\.serverapp\.strategy\.fedavg\.FedAvg \(a class\)"),
        (lambda: None, "builtins.NoneType"),
    ],
)
def test_what_is_no_strategy_of_the_message_api_is_refused(wrapper: str, inner: Any, found: str) -> None:
    with pytest.raises(SettingError, match=f"^strategy='{found}' is not usable: expected an object of a strategy"):
        WRAPPERS[wrapper](inner())


ENDS: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "compressed": (lambda inner: tofu.Compressed(inner, ratio=20), lambda: tofu.compress(ratio=20)),
    "secure": (tofu.SecureAggregation, tofu.secure),
    "hybrid": (lambda inner: tofu.Hybrid(inner, ratio=20, switch_round=2), lambda: tofu.hybrid(ratio=20)),
}


def test_flowers_local_privacy_comes_after_compression() -> None:
    """Before it, it got a reply without arrays and made a message that is none."""
    local = LocalDpMod(1.0, 0.1, 1.0, 0.1)
    with pytest.raises(
        RunError, match=r"LocalDpMod comes before tofu\.compress in the list of mods: put tofu\.compress"
    ):
        federate(tofu.Compressed(strategy_of(), ratio=20), local, tofu.compress(ratio=20), rounds=1)
    federate(tofu.Compressed(strategy_of(), ratio=20), tofu.compress(ratio=20), local, rounds=1)


class Named(nn.Module):
    """Parameters of any name, and complex ones."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        super().__init__()
        self.arrays = arrays

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return dict(self.arrays)


def shifted(message: Message, context: Context) -> Message:
    """Add the same to every array, more at later clients."""
    shift = 0.01 * (1 + int(context.node_config["partition-id"]))
    arrays = ArrayRecord(
        {name: value + shift for name, value in message.content["arrays"].to_torch_state_dict().items()}
    )
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


@pytest.mark.parametrize("names", [("type", "float"), ("a", "a.b"), ("", "x"), ("a..b", ".c"), ("a/b", "c d")])
@pytest.mark.parametrize("downlink", [0.0, 2.0])
def test_arrays_of_any_name_are_compressed(names: tuple[str, str], downlink: float) -> None:
    arrays = {name: torch.ones(40, 20) for name in names}
    options: dict[str, Any] = {"compressor": "sparse", "ratio": 10, "downlink": downlink}
    found = federate(
        tofu.Compressed(strategy_of(), **options), tofu.compress(**options), handler=shifted, rounds=3,
        model=lambda: Named(arrays),
    ).arrays.to_torch_state_dict()  # fmt: skip
    assert list(found) == list(names)
    assert all(float(value.mean()) > 1.01 for value in found.values())


@pytest.mark.parametrize("ends", ENDS)
def test_complex_arrays_are_refused_by_their_type(ends: str) -> None:
    wrap, mod = ENDS[ends]
    with pytest.raises(PayloadError, match=r"^arrays cannot be read: their type complex64 is not usable, expected "):
        federate(
            wrap(strategy_of()), mod(), handler=shifted,
            model=lambda: Named({"w": torch.ones(200), "c": torch.ones(20, dtype=torch.complex64)}),
        )  # fmt: skip


class OlderClient(NumPyClient):
    """A client of Flower's older API."""

    def fit(self, parameters: Any, config: Any) -> Any:
        return parameters, 10, {}


def older_client(mods: list[Any]) -> ClientApp:
    return ClientApp(client_fn=lambda context: OlderClient().to_client(), mods=mods)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("with_mod", [True, False])
def test_a_client_of_flowers_older_api_is_named(ends: str, with_mod: bool, caplog: pytest.LogCaptureFixture) -> None:
    wrap, mod = ENDS[ends]
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        wrap(strategy_of()).start(grid, ArrayRecord(Net().state_dict()), num_rounds=1)

    with pytest.raises(
        RunError, match=r"the ClientApp is of Flower's older API \(client_fn\).*@app\.train\(\)"
    ) as caught:
        run_in_process(server, older_client([mod()] if with_mod else []), run_config={}, num_supernodes=CLIENTS)
    assert "KeyError" not in str(caught.value)
    assert "failed in train" in caplog.text  # one line for each client
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("wrap", "mods", "reason"),
    [
        (tofu.SecureAggregation, [lambda: tofu.compress(ratio=20)], r"the server's strategy is not tofu\.Compressed"),
        (tofu.SecureAggregation, [], r"no client sent keys: add tofu\.secure"),
        (lambda inner: tofu.Compressed(inner, ratio=20), [tofu.secure], r"is not tofu\.SecureAggregation"),
    ],
)
def test_a_mod_and_a_strategy_that_do_not_fit_leave_no_traceback(
    wrap: Any, mods: list[Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RunError, match=reason):
        federate(wrap(strategy_of()), *(mod() for mod in mods), rounds=1)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("ends", ENDS)
def test_a_server_of_flowers_older_api_is_named_by_the_clients(ends: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its strategies count error replies and do not show them."""

    def server(context: Context) -> ServerAppComponents:
        arrays = ndarrays_to_parameters([value.numpy() for value in Net().state_dict().values()])
        strategy = LegacyFedAvg(initial_parameters=arrays, fraction_evaluate=0.0)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))

    client = older_client([ENDS[ends][1]()])
    with caplog.at_level("ERROR", logger="tofu.flower"):
        run_in_process(ServerApp(server_fn=server), client, run_config={}, num_supernodes=CLIENTS)
    assert {record.message.split(": the ")[1] for record in caplog.records if record.name == "tofu.flower"} == {
        "server's strategy is of Flower's older API (flwr.server.strategy), which no mod of tofu works with: use one "
        "of flwr.serverapp.strategy"
    }


class Trees(nn.Module):
    """An app of boosted trees sends their bytes as an array."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("0", torch.frombuffer(bytearray(b"trees"), dtype=torch.uint8))


@pytest.mark.parametrize(("model", "found"), [(nn.Module, "none"), (Trees, "torch.uint8")])
def test_messages_without_floating_point_arrays_are_refused_in_one_line(model: type[nn.Module], found: str) -> None:
    with pytest.raises(SettingError, match=f"^arrays='{found}' is not usable: expected floating-point numbers"):
        federate(tofu.Compressed(strategy_of(), ratio=20), tofu.compress(ratio=20), model=model)


def test_a_secure_sum_of_no_arrays_is_refused_in_one_line() -> None:
    with pytest.raises(SettingError, match=r"^arrays='none' is not usable: expected at least one"):
        federate(tofu.SecureAggregation(strategy_of()), tofu.secure(), model=nn.Module)


def test_a_model_smaller_than_its_payload_is_refused_without_a_ratio_below_one() -> None:
    with pytest.raises(SettingError, match=r"^ratio=50 is not usable: expected a model larger than its payload"):
        federate(tofu.Compressed(strategy_of()), tofu.compress(), model=lambda: nn.Linear(1, 1))


def test_train_messages_without_arrays_are_passed_on_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Apps of boosted trees send them as bytes in a config record."""
    client, server, trees = ClientApp(mods=[tofu.compress()]), ServerApp(), list[object]()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"trees": ConfigRecord({"json": b"{}"})}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(2):
            messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
            trees.extend(reply.content["trees"] for reply in grid.send_and_receive(messages))

    with caplog.at_level("WARNING", logger="tofu.flower"):
        run_in_process(server, client, run_config={}, num_supernodes=2)
    assert trees == [ConfigRecord({"json": b"{}"})] * 4
    assert [record.message for record in caplog.records if "without arrays was passed on" in record.message][1:] == []
    assert "without arrays was passed on" in caplog.text


PRIVATE = {"noise_multiplier": 0.1, "num_sampled_clients": CLIENTS}
BY_SERVER = (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyServerSideAdaptiveClipping)
BY_CLIENTS = (DifferentialPrivacyClientSideFixedClipping, DifferentialPrivacyClientSideAdaptiveClipping)


def private(kind: Any, inner: Any) -> Any:
    return kind(inner, **PRIVATE, **({"clipping_norm": 1.0} if "Fixed" in kind.__name__ else {}))


@pytest.mark.parametrize(
    ("wrapper", "kinds"),
    [
        ("Compressed", (*BY_SERVER, *BY_CLIENTS)),
        ("Hybrid", (*BY_SERVER, *BY_CLIENTS)),
        ("SecureAggregation", BY_SERVER),
    ],
)
def test_differential_privacy_around_replies_without_arrays_is_refused(wrapper: str, kinds: Any) -> None:
    """It would clip nothing, and still add noise and count epsilon for its clip norm."""
    for kind in kinds:
        outer = private(kind, tofu.FirstReplies(WRAPPERS[wrapper](strategy_of()), fraction=1.0))
        with pytest.raises(SettingError, match=f"'{kind.__name__}' is not usable: .* around tofu.{wrapper}: it would "):
            federate(outer, rounds=1)


@pytest.mark.parametrize("kind", BY_CLIENTS)
def test_clipping_by_clients_is_refused_inside_of_compression(kind: Any) -> None:
    with pytest.raises(SettingError, match=f"'{kind.__name__}' is not usable: expected its server-side counterpart"):
        tofu.Compressed(private(kind, strategy_of()))


def test_decoded_updates_are_clipped_by_the_server() -> None:
    strategy = DifferentialPrivacyServerSideFixedClipping(strategy_of(), 0.0, 1e-6, CLIENTS)
    options: dict[str, Any] = {"compressor": "sparse", "ratio": 20}
    result = federate(tofu.Compressed(strategy, **options), tofu.compress(**options), rounds=1)
    torch.manual_seed(0)
    initial = Net().state_dict()
    moved = [value - initial[name] for name, value in result.arrays.to_torch_state_dict().items()]
    assert torch.cat([value.flatten() for value in moved]).norm() < 1e-5


def test_wrapped_twice_is_refused() -> None:
    with pytest.raises(SettingError, match="plain replies"):
        tofu.Compressed(tofu.Compressed(strategy_of(), ratio=20), ratio=20)
    with pytest.raises(SettingError, match="not wrapped in it already"):
        tofu.SecureAggregation(tofu.SecureAggregation(strategy_of()))
