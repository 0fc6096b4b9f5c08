"""Compressed rounds that secure rounds follow: when the switch comes, and what the error feedback carries over it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian
from torch import nn

import tofu
from tests.tofu.flower.quickstart import CLIENTS, SHAPE, accuracy, federate, strategy_of, train
from tests.tofu.flower.test_secure import with_identities
from tofu.errors import RunError, SettingError
from tofu.flower.secure_mod import RECORD as SECURE_RECORD
from tofu.flower.update_codec import RECORD
from tofu.flower.wrapper import with_record

OPTIONS: dict[str, Any] = {"compressor": "sparse", "ratio": 100}


def kinds(result: Any) -> list[str]:
    """The kind of each round, as its metrics show it."""
    rounds = result.train_metrics_clientapp
    return ["compressed" if "tofu-ratio" in rounds[n] else "secure" for n in sorted(rounds)]


def test_it_switches_at_the_given_round_and_recovers_what_compression_lost(caplog: pytest.LogCaptureFixture) -> None:
    options = OPTIONS | {"ratio": 800}
    hybrid = federate(tofu.Hybrid(strategy_of(), switch_round=5, **options), tofu.hybrid(**options), rounds=6)
    assert [line for line in caplog.messages if "secure rounds" in line] == ["round 5: secure rounds from here on"]
    assert kinds(hybrid) == ["compressed"] * 4 + ["secure"] * 2
    assert hybrid.train_metrics_clientapp[5]["tofu-clients"] == CLIENTS
    small = federate(tofu.Compressed(strategy_of(), **options), tofu.compress(**options), rounds=6)
    assert accuracy(hybrid.arrays) > accuracy(small.arrays) + 0.03


def test_the_secure_round_sends_all_that_error_feedback_holds() -> None:
    """After it, the weights are those of a run that never compressed, if clients train as much as they did."""

    def constant(message: Message, context: Context) -> Message:
        reply = train(message, context)
        state = message.content["arrays"].to_torch_state_dict()
        step = 1e-3 * (1 + int(context.node_config["partition-id"]))
        reply.content["arrays"] = ArrayRecord({name: value + step for name, value in state.items()})
        return reply

    hybrid = federate(
        tofu.Hybrid(strategy_of(), switch_round=3, **OPTIONS), tofu.hybrid(**OPTIONS), rounds=3, handler=constant
    )  # fmt: skip
    plain = federate(strategy_of(), rounds=3, handler=constant)
    for name, value in hybrid.arrays.to_torch_state_dict().items():
        torch.testing.assert_close(value, plain.arrays.to_torch_state_dict()[name], atol=1e-6, rtol=0)


def test_it_switches_when_a_metric_stalls() -> None:
    def handler(message: Message, context: Context) -> Message:
        reply = train(message, context)
        round_ = int(message.content["config"]["server-round"])
        reply.content["metrics"] = MetricRecord({"num-examples": 10, "loss": max(1.0 - 0.2 * round_, 0.5)})
        return reply

    strategy = tofu.Hybrid(strategy_of(), plateau="-loss", patience=2, gain=0.01, **OPTIONS)
    result = federate(strategy, tofu.hybrid(**OPTIONS), rounds=6, handler=handler)
    # The loss falls in rounds 1 to 3; rounds 4 and 5 bring no gain.
    assert kinds(result) == ["compressed"] * 5 + ["secure"]


def test_the_metric_may_be_that_of_the_server() -> None:
    strategy = tofu.Hybrid(strategy_of(), plateau="accuracy", patience=1, gain=0.0, **OPTIONS)
    scores = iter([0.1, 0.2, 0.3, 0.25, 0.4, 0.5])
    result = federate(
        strategy, tofu.hybrid(**OPTIONS), rounds=5, evaluate_fn=lambda *_: MetricRecord({"accuracy": next(scores)})
    )
    assert kinds(result) == ["compressed"] * 3 + ["secure"] * 2


def test_buffers_that_are_not_in_the_order_of_the_state_dict_keep_their_error_feedback() -> None:
    """The codec sorts parameters before buffers; both kinds of round must mean the same entries."""

    def normed() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))

    def handler(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        new = {
            name: value + (k + 1) * (1 if value.dtype == torch.int64 else 1e-3)
            for k, (name, value) in enumerate(state.items())
        }
        content = RecordDict({"arrays": ArrayRecord(new), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    arguments: Any = (normed, SHAPE)
    options: dict[str, Any] = {"compressor": "sparse", "ratio": 10}
    hybrid = federate(
        tofu.Hybrid(strategy_of(), *arguments, switch_round=3, **options), tofu.hybrid(*arguments, **options),
        rounds=3, handler=handler, model=normed,
    )  # fmt: skip
    plain = federate(strategy_of(), rounds=3, handler=handler, model=normed)
    for name, value in hybrid.arrays.to_torch_state_dict().items():
        torch.testing.assert_close(value.float(), plain.arrays.to_torch_state_dict()[name].float(), atol=1e-3, rtol=0)


def test_misuse_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    for options in ({}, {"switch_round": 3, "plateau": "loss"}):
        with pytest.raises(SettingError, match=r"^switch_round=. is not usable: expected a round, or 0"):
            tofu.Hybrid(FedAvg(), ratio=20, **options)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="strategy='FedMedian'"):
        tofu.Hybrid(FedMedian(), ratio=20, switch_round=3)
    with pytest.raises(RunError, match="plateau='loss' names none of the metrics tofu-"):
        federate(tofu.Hybrid(strategy_of(), plateau="loss", **OPTIONS), tofu.hybrid(**OPTIONS), rounds=2)
    secure = {"bits": 16}
    with pytest.raises(RunError, match="different options"):
        federate(
            tofu.Hybrid(strategy_of(), switch_round=1, secure=secure, **OPTIONS), tofu.hybrid(**OPTIONS), rounds=1
        )  # fmt: skip
    with pytest.raises(RunError, match=r"add tofu\.hybrid"):
        federate(tofu.Hybrid(strategy_of(), switch_round=2, **OPTIONS), rounds=1)
    with caplog.at_level("INFO", logger="flwr"):
        federate(strategy_of(), tofu.hybrid(**OPTIONS), rounds=1)
    assert "the server's strategy is not tofu.Hybrid" in caplog.text


@pytest.mark.parametrize(
    ("known", "node", "reason"),
    [
        (False, "identity", r"this client has an identity: pass identities= to tofu\.Hybrid"),
        (True, "", r"this client has no identity, which tofu\.Hybrid\(identities=\.\.\.\) needs"),
        (False, "policy", r"a secure round is refused by this client's policy: rule allowed-rounds accepts compressed"),
    ],
)
def test_what_keeps_clients_from_the_secure_rounds_is_told_in_the_first_round(
    known: bool, node: str, reason: str, tmp_path: Path
) -> None:
    listed, entries = with_identities(tmp_path)
    configs: dict[str, Any] = {"identity": entries, "policy": lambda number: {"allowed-rounds": "compressed"}}
    strategy = tofu.Hybrid(strategy_of(), switch_round=9, identities=str(listed) if known else None, **OPTIONS)
    with pytest.raises(RunError, match=rf"^round 1: no reply of 4 clients can be used \({reason}"):
        federate(strategy, tofu.hybrid(**OPTIONS), rounds=2, node_config=configs.get(node))


def test_clients_with_identities_switch(tmp_path: Path) -> None:
    listed, entries = with_identities(tmp_path)
    strategy = tofu.Hybrid(strategy_of(), switch_round=2, identities=str(listed), **OPTIONS)
    result = federate(strategy, tofu.hybrid(**OPTIONS), rounds=3, node_config=entries)
    assert kinds(result) == ["compressed", "secure", "secure"]


class SendsOwnConfigs(FedAvg):
    """Sends each client other values."""

    def configure_train(self, *arguments: Any) -> Iterable[Message]:
        for number, message in enumerate(super().configure_train(*arguments)):
            yield with_record(message, "own", ConfigRecord({"number": number}))


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (SendsOwnConfigs(fraction_evaluate=0.0), "^SendsOwnConfigs sends clients different messages"),
        (FedAvg(fraction_train=0.5, fraction_evaluate=0.0), "^FedAvg asks 2 clients, a secure round takes at least 3"),
    ],
    ids=["messages differ", "two clients"],
)
def test_a_strategy_whose_messages_could_not_be_summed_is_refused_in_the_first_round(
    inner: FedAvg, reason: str
) -> None:
    trained = list[int]()

    def handler(message: Message, context: Context) -> Message:
        trained.append(context.node_id)
        return train(message, context)

    with pytest.raises(RunError, match=reason):
        federate(
            tofu.Hybrid(inner, switch_round=9, **OPTIONS), tofu.hybrid(**OPTIONS), rounds=9, handler=handler
        )  # fmt: skip
    assert not trained


def test_a_run_whose_secure_rounds_are_all_abandoned_is_an_error() -> None:
    mod = tofu.hybrid(**OPTIONS)

    def leaving(message: Message, context: Context, call_next: Any) -> Message:
        if RECORD not in message.content and context.node_config["partition-id"] != 0:
            raise OSError("this client is gone")
        return mod(message, context, call_next)

    with pytest.raises(RunError, match="no round could be summed: 1 clients sent keys"):
        federate(tofu.Hybrid(strategy_of(), switch_round=2, **OPTIONS), leaving, rounds=3)


def test_no_round_sends_both_kinds_of_record() -> None:
    mod, seen = tofu.hybrid(**OPTIONS), list[set[str]]()

    def watching(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = mod(message, context, call_next)
        seen.append({RECORD, SECURE_RECORD, "arrays"} & set(reply.content))
        return reply

    federate(tofu.Hybrid(strategy_of(), switch_round=2, **OPTIONS), watching, rounds=2)
    assert {frozenset(names) for names in seen} == {frozenset(), frozenset({RECORD}), frozenset({SECURE_RECORD})}
