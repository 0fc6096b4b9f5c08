"""Robust rules around the strategy of any Flower app: the run learns although clients lie."""

import statistics
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedTrimmedAvg, Strategy

import tofu
from tests.tofu.flower.quickstart import CLIENTS, Net, accuracy, federate, strategy_of, train
from tofu.errors import RunError, SettingError
from tofu.rounds import aggregators
from tofu.weights import ParamSpec


def hostile(message: Message, context: Context) -> Message:
    """The app, whose client 0 sends minus 30 times its update, and says that it has a billion examples."""
    reply = train(message, context)
    if int(context.node_config["partition-id"]) == 0:
        old, new = message.content["arrays"], reply.content["arrays"]
        for name in list(new):
            flipped = old[name].numpy() - 30 * (new[name].numpy() - old[name].numpy())
            new[name] = Array(flipped.astype(np.float32))
        reply.content["metrics"] = MetricRecord({"num-examples": 10**9, "loss": 1.0})
    else:
        reply.content["metrics"]["loss"] = 2.0
    return reply


def arrays(result: Any) -> dict[str, torch.Tensor]:
    return dict(result.arrays.to_torch_state_dict())


def test_a_rule_withstands_a_client_that_turns_the_mean() -> None:
    assert accuracy(federate(strategy_of(), rounds=3, handler=hostile).arrays) < 0.5
    result = federate(tofu.Robust(strategy_of(), "median"), rounds=3, handler=hostile)
    assert accuracy(result.arrays) > 0.6
    # Metrics are those of all clients, which the inner strategy weights as they say.
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("rule", "options"), [("trimmed-mean", {"malicious_fraction": 0.25}), ("norm-clip", {})])
def test_a_rule_is_that_of_our_own_rounds(rule: str, options: dict[str, float]) -> None:
    """One round, whose updates the test combines itself, with the examples capped at ten times the median."""
    start, sent = dict[str, torch.Tensor](), list[tuple[dict[str, torch.Tensor], int]]()

    def look(message: Message, context: Context) -> Message:
        reply = hostile(message, context)
        start.update(message.content["arrays"].to_torch_state_dict())
        new = reply.content["arrays"].to_torch_state_dict()
        sent.append(({name: new[name] - start[name] for name in start}, int(reply.content["metrics"]["num-examples"])))
        return reply

    found = arrays(federate(tofu.Robust(strategy_of(), rule, **options), rounds=1, handler=look))
    spec = ParamSpec({name: value.shape for name, value in start.items()}, {})
    ours = aggregators.get(rule)(spec, options.get("malicious_fraction", 0.2))
    cap = 10 * statistics.median(count for _, count in sent)
    for update, count in sent:
        ours.add(update, min(count, int(cap)))
    expected = ours.mean()
    assert all(torch.allclose(found[name], start[name] + expected[name], atol=1e-6) for name in start)


def test_a_rule_inside_of_compression_around_another_strategy() -> None:
    shape: dict[str, Any] = {"ratio": 4, "compressor": "topk"}
    inner = tofu.Robust(strategy_of(FedAdam, eta=0.01, tau=1e-3), "median")
    strategy, mod = tofu.Compressed(inner, Net, (1, 8, 8), **shape), tofu.compress(Net, (1, 8, 8), **shape)
    assert accuracy(federate(strategy, mod, rounds=3, handler=hostile).arrays) > 0.4


@pytest.mark.parametrize("rule", ["norm-clip", "median"])
def test_weights_that_are_fractions_count_as_whole_ones_in_proportion(rule: str) -> None:
    def weighted(factor: float) -> Any:
        def handler(message: Message, context: Context) -> Message:
            reply = train(message, context)
            reply.content["metrics"] = MetricRecord(
                {"num-examples": factor * 2 ** int(context.node_config["partition-id"])}
            )
            return reply

        return arrays(federate(tofu.Robust(strategy_of(), rule), rounds=1, handler=handler))

    whole, parts = weighted(8.0), weighted(1 / 64)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_a_reply_that_no_rule_can_use_fails_its_client_alone() -> None:
    def broken(message: Message, context: Context) -> Message:
        reply = train(message, context)
        if int(context.node_config["partition-id"]) == 0:
            arrays = reply.content["arrays"]
            reply.content["arrays"] = ArrayRecord(
                {name: Array(np.full_like(value.numpy(), np.nan)) for name, value in arrays.items()}
            )
        return reply

    result = federate(tofu.Robust(strategy_of(), "norm-clip"), rounds=1, handler=broken)
    assert all(bool(value.isfinite().all()) for value in arrays(result).values())

    def without(message: Message, context: Context) -> Message:
        reply = train(message, context)
        reply.content["metrics"] = MetricRecord({"num-examples": -1})
        return reply

    with pytest.raises(RunError, match=rf"no reply of {CLIENTS} clients can be used \(metric num-examples=-1 is not"):
        federate(tofu.Robust(strategy_of(), "median"), rounds=1, handler=without)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: tofu.SecureAggregation(tofu.Robust(FedAvg(), "median")),
        lambda: tofu.SecureAggregation(tofu.FirstReplies(tofu.Robust(FedAvg(), "median"), fraction=0.5)),
    ],
)
def test_a_secure_sum_refuses_a_rule_by_name(wrapped: Any) -> None:
    with pytest.raises(SettingError, match=r"strategy='Robust' is not usable: .* a secure sum contains no individual"):
        wrapped()


def test_what_cannot_be_wrapped_or_set_is_refused() -> None:
    inner: Strategy
    for inner, match in (
        (FedMedian(), "strategy='FedMedian'"), (FedTrimmedAvg(), "strategy='FedTrimmedAvg'"),
        (tofu.SecureAggregation(FedAvg()), "strategy='SecureAggregation' .* put Robust inside"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=match):
            tofu.Robust(inner, "median")
    with pytest.raises(SettingError, match="modus"):
        tofu.Robust(FedAvg(), "modus")
    for name, value in (("malicious_fraction", 0.5), ("max_norm", -1.0), ("max_example_ratio", float("nan"))):
        with pytest.raises(SettingError, match=name):
            tofu.Robust(FedAvg(), "median", **{name: value})
