"""Secure sums of a Flower app: equal to its plain run, and nothing of a single client at the server."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedXgbBagging,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)
from torch import nn

import tofu
from deploy.identities import make_identities
from tests.tofu.flower.quickstart import CLIENTS, DATA, Net, accuracy, federate, strategy_of, train
from tofu.bytes_io import unpack
from tofu.data import to_float
from tofu.errors import MissingExtraError, RunError, SettingError
from tofu.flower.secure_mod import RECORD
from tofu.flower.secure_options import SecureOptions
from tofu.privacy import epsilon_of
from tofu.secagg.messages import Masked
from tofu.wire import FIELD, SecureAnswer, SecureQuery
from tofu.wire import RECORD as STAGE

OPTIONS: dict[type[Strategy], dict[str, Any]] = {
    FedAdam: {"eta": 0.01, "tau": 1e-3}, FedAdagrad: {"eta": 0.01, "tau": 1e-3}, FedYogi: {"eta": 0.01, "tau": 1e-3},
    FedAvgM: {"server_momentum": 0.5}, FedProx: {"proximal_mu": 0.1},
}  # fmt: skip


def uneven(message: Message, context: Context) -> Message:
    """The app with weights, metrics and lists of metrics that differ between clients."""
    reply = train(message, context)
    partition = int(context.node_config["partition-id"])
    weight = 50 + 37 * partition
    reply.content["metrics"] = MetricRecord(
        {"num-examples": weight, "loss": 1.0 / (1 + partition), "steps": partition, "pair": [partition + 0.25, -1e-3]}
    )
    return reply


def assert_equal(found: ArrayRecord, expected: ArrayRecord, tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.to_torch_state_dict().items():
        torch.testing.assert_close(value, expected.to_torch_state_dict()[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedAdam, FedAdagrad, FedYogi, FedProx])
def test_the_run_is_that_of_the_plain_app(kind: type[Strategy]) -> None:
    options = OPTIONS.get(kind, {})
    plain = federate(strategy_of(kind, **options), rounds=3, handler=uneven)
    summed = federate(
        tofu.SecureAggregation(strategy_of(kind, **options)), tofu.secure(), rounds=3, handler=uneven
    )  # fmt: skip
    # Adaptive strategies divide by the root of small second moments.
    assert_equal(summed.arrays, plain.arrays, 2e-6 if kind in (FedAvg, FedAvgM, FedProx) else 2e-4)
    assert accuracy(summed.arrays) == pytest.approx(accuracy(plain.arrays), abs=0.003)
    for round_ in (1, 2, 3):
        found, expected = summed.train_metrics_clientapp[round_], plain.train_metrics_clientapp[round_]
        for name in ("loss", "steps", "pair"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6), name
        assert found["tofu-clients"] == CLIENTS
        assert found["tofu-clipped"] == 0


def fractional(message: Message, context: Context) -> Message:
    """The app with weights in (0, 1], such as fractions of all examples."""
    reply = uneven(message, context)
    reply.content["metrics"]["num-examples"] = (1 + int(context.node_config["partition-id"])) / 7
    return reply


def test_weights_that_are_fractions_are_summed_in_small_steps() -> None:
    plain = federate(strategy_of(), rounds=2, handler=fractional)
    strategy = tofu.SecureAggregation(strategy_of(), weight_step=1e-6)
    summed = federate(strategy, tofu.secure(weight_step=1e-6), rounds=2, handler=fractional)
    assert_equal(summed.arrays, plain.arrays, 5e-6)
    metrics = summed.train_metrics_clientapp[2]
    assert metrics["loss"] == pytest.approx(plain.train_metrics_clientapp[2]["loss"], rel=1e-5)
    assert metrics["tofu-clipped"] == 0


def test_a_weight_above_the_largest_number_of_steps_is_named() -> None:
    def heavy(message: Message, context: Context) -> Message:
        reply = train(message, context)
        reply.content["metrics"] = MetricRecord({"num-examples": 5000})
        return reply

    named = r"num-examples=5000 is not usable: expected a number from weight_step=1e-06 to 4294\.97"
    with pytest.raises(RunError, match=named):
        federate(
            tofu.SecureAggregation(strategy_of(), weight_step=1e-6), tofu.secure(weight_step=1e-6), rounds=1,
            handler=heavy,
        )  # fmt: skip


def test_few_bits_and_error_feedback_learn_as_well() -> None:
    options = {"bits": 8, "error_feedback": 1.0}
    result = federate(tofu.SecureAggregation(strategy_of(), **options), tofu.secure(**options), rounds=8)
    plain = federate(strategy_of(), rounds=8)
    assert accuracy(result.arrays) > accuracy(plain.arrays) - 0.03
    assert result.train_metrics_clientapp[8]["tofu-payload-bytes"] < 1.1 * 9610


class Eavesdropper:
    """Outermost mod: keeps what a client receives and sends, as the server sees it."""

    def __init__(self, mod: Any) -> None:
        self.mod, self.replies = mod, list[tuple[int, Message]]()
        self.updates = dict[int, np.ndarray[Any, Any]]()

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        partition = int(context.node_config["partition-id"])

        def app(message: Message, context: Context) -> Message:
            base = message.content["arrays"].to_torch_state_dict()
            reply: Message = call_next(message, context)
            new = reply.content["arrays"].to_torch_state_dict()
            self.updates[partition] = np.concatenate([(new[n] - base[n]).numpy().ravel() for n in base])
            return reply

        reply: Message = self.mod(message, context, app)
        self.replies.append((partition, reply))
        return reply


def test_the_server_receives_no_update_no_weight_and_no_metric_of_one_client() -> None:
    spy = Eavesdropper(tofu.secure())
    federate(tofu.SecureAggregation(strategy_of()), spy, rounds=2, handler=uneven)
    vectors = {}
    for partition, reply in spy.replies:
        assert set(reply.content) <= {STAGE, RECORD}
        if RECORD not in reply.content:
            continue
        record = reply.content.config_records[RECORD]
        assert set(record) == {"masked", "metrics"}
        assert json.loads(str(record["metrics"])) == [["loss", -1], ["pair", 2], ["steps", -1]]  # names, no values
        packed = Masked.from_bytes(record["masked"]).packed
        bits = 32 if partition in vectors else 48
        length = len(packed) * 8 // bits
        vectors[partition] = unpack(packed, length, bits, "vector").astype(np.float64) / 2**bits
    for partition, vector in vectors.items():
        assert abs(vector.mean() - 0.5) < 0.02  # uniform, as a one-time pad is
        assert abs(vector.std() - 12**-0.5) < 0.02
        update = spy.updates[partition]
        assert abs(np.corrcoef(vector[: update.size], update)[0, 1]) < 0.06
    entropy = [np.histogram(vector, 16, (0, 1))[0].min() / vector.size for vector in vectors.values()]
    assert min(entropy) > 0.05


def dropping(when: Callable[[Message, int, int], bool]) -> Any:
    """A mod whose client answers some messages with an error."""
    mod = tofu.secure()

    def outer(message: Message, context: Context, call_next: Any) -> Message:
        if when(message, int(context.node_config["partition-id"]), int(message.metadata.group_id or 0)):
            return Message(Error(code=0, reason="lost"), reply_to=message)
        reply: Message = mod(message, context, call_next)
        return reply

    return outer


def stage_of(message: Message) -> str:
    record = message.content.config_records.get(STAGE)
    if record is None:
        return "train" if RECORD in message.content else ""
    return SecureQuery.from_bytes(record[FIELD]).stage


@pytest.mark.parametrize("stage", ["advert", "share", "train", "reveal"])
def test_the_sum_is_of_the_clients_whose_vectors_arrived(stage: str) -> None:
    """A client that drops out at its second message of a stage; the first round is complete."""
    calls = dict[tuple[int, str], int]()
    times = 1 if stage == "advert" else 2  # keys travel with the reveal of the round before

    def second(message: Message, partition: int, _: int) -> bool:
        key = partition, stage_of(message)
        calls[key] = calls.get(key, 0) + 1
        return key == (1, stage) and calls[key] == times

    summed = federate(tofu.SecureAggregation(strategy_of()), dropping(second), rounds=3, handler=uneven)
    counts = [summed.train_metrics_clientapp[round_]["tofu-clients"] for round_ in (1, 2, 3)]
    missing = {"advert": [3, 4, 4], "share": [4, 3, 4], "train": [4, 3, 4], "reveal": [4, 4, 4]}
    assert counts == missing[stage]

    def plain(message: Message, context: Context) -> Message:
        round_ = int(message.content["config"]["server-round"])
        if context.node_config["partition-id"] == 1 and counts[round_ - 1] == 3:
            raise RuntimeError("lost")
        return uneven(message, context)

    assert_equal(summed.arrays, federate(strategy_of(), rounds=3, handler=plain).arrays)


def test_a_round_with_too_few_clients_is_abandoned_and_the_next_goes_on() -> None:
    def half(message: Message, partition: int, _: int) -> bool:
        record = message.content.config_records.get(RECORD)
        return record is not None and record["round"] == 1 and partition < 3

    result = federate(tofu.SecureAggregation(strategy_of()), dropping(half), rounds=3)
    assert sorted(result.train_metrics_clientapp) == [2, 3]
    assert accuracy(result.arrays) > 0.5


def test_a_run_in_which_every_round_is_abandoned_is_an_error() -> None:
    def most(message: Message, partition: int, _: int) -> bool:
        return RECORD in message.content and partition < 3

    with pytest.raises(RunError, match="no round could be summed"):
        federate(tofu.SecureAggregation(strategy_of()), dropping(most), rounds=2)


@pytest.mark.parametrize(
    "strategy",
    [
        FedMedian(), FedTrimmedAvg(), Krum(), MultiKrum(), Bulyan(), FedXgbBagging(),
        QFedAvg(client_learning_rate=0.1),
        DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 4),
        tofu.Compressed(FedAvg(), ratio=20),
    ],
)  # fmt: skip
def test_strategies_that_need_individual_updates_are_refused_by_name(strategy: Strategy) -> None:
    with pytest.raises(SettingError, match=f"strategy='{type(strategy).__name__}'.*no individual"):
        tofu.SecureAggregation(strategy)


def test_two_wrappers_that_change_replies_are_refused() -> None:
    for inner in (tofu.SecureAggregation(FedAvg()), tofu.Compressed(FedAvg(), ratio=20)):
        with pytest.raises(SettingError, match=r"strategy='.*' is not usable: .*tofu\.Hybrid"):
            tofu.Compressed(inner, ratio=20)


class Personal(FedAvg):
    """A strategy that gives each client a learning rate of its own."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        for number, message in enumerate(super().configure_train(server_round, arrays, config, grid)):
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, "lr": 0.01 * number})})
            yield Message(content, message.metadata.dst_node_id, "train")


def test_misuse_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunError, match=r"round 1: no client sent keys: add tofu\.secure") as caught:
        federate(tofu.SecureAggregation(strategy_of()))
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match=r"round 1: no reply of 4 clients can be used .*different options"):
        federate(tofu.SecureAggregation(strategy_of()), tofu.secure(noise_multiplier=1.0))
    named = r"Personal sends clients different messages \('lr' of record 'config' is 0\.0 and 0\.01\), whose updates"
    with pytest.raises(RunError, match=named):
        federate(tofu.SecureAggregation(strategy_of(Personal)), tofu.secure())
    with pytest.raises(SettingError, match="bits=3 is not usable: expected"):
        tofu.secure(bits=3)
    with caplog.at_level("INFO", logger="flwr"):
        federate(strategy_of(), tofu.secure(), rounds=1)
    assert "the server's strategy is not tofu.SecureAggregation" in caplog.text


def test_a_client_whose_app_returns_other_arrays_is_left_out() -> None:
    def odd(message: Message, context: Context) -> Message:
        reply = uneven(message, context)
        if context.node_config["partition-id"] == 2:
            reply.content["arrays"] = ArrayRecord(Net(64).state_dict())
        return reply

    result = federate(tofu.SecureAggregation(strategy_of()), tofu.secure(), rounds=2, handler=odd)
    assert result.train_metrics_clientapp[2]["tofu-clients"] == CLIENTS - 1


@pytest.mark.parametrize("change", ["arrays", "config", "clip norm", "options"])
def test_a_client_refuses_other_weights_or_settings_than_all_agreed_on(change: str) -> None:
    """Else a server could make all clients but one send nothing (Pasquini et al., CCS 2022)."""
    options: dict[str, Any] = {"noise_multiplier": 1.0, "clip_quantile": 0.5} if change == "clip norm" else {}
    mod, refused, other = tofu.secure(**options), list[str](), {"dropout": 0.1}

    def lied_to(message: Message, context: Context, call_next: Any) -> Message:
        if RECORD in message.content and context.node_config["partition-id"] == 0:
            if change == "arrays":
                state = message.content["arrays"].to_torch_state_dict()
                message.content["arrays"] = ArrayRecord({name: 0 * value for name, value in state.items()})
            elif change == "config":
                message.content["config"]["lr"] = 0.0
            elif change == "options":
                message.content[RECORD]["digest"] = SecureOptions(**other).digest
            else:
                message.content[RECORD]["clip-norm"] = 1e-9
        own = tofu.secure(**other) if change == "options" and context.node_config["partition-id"] == 0 else mod
        reply: Message = own(message, context, call_next)
        refused.extend([reply.error.reason or ""] if reply.has_error() else [])
        return reply

    result = federate(tofu.SecureAggregation(strategy_of(), **options), lied_to, rounds=1)
    assert refused
    assert all("was sent other arrays, records or ranges" in reason for reason in refused)
    assert result.train_metrics_clientapp[1]["tofu-clients"] == CLIENTS - 1


def test_a_model_with_batch_norm_is_averaged_as_in_the_plain_run() -> None:
    def normed() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

    def handler(message: Message, context: Context) -> Message:
        model = normed()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        partition = int(context.node_config["partition-id"])
        data = DATA.client(partition)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for rows in torch.arange(len(data)).split(32 + partition):
            optimizer.zero_grad()
            F.cross_entropy(model(100 * to_float(data.images[rows])), data.labels[rows]).backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(data)})
        return Message(
            RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message
        )  # fmt: skip

    runs = [
        federate(strategy, *mods, rounds=3, handler=handler, model=normed)
        for strategy, mods in ((strategy_of(), ()), (tofu.SecureAggregation(strategy_of()), (tofu.secure(),)))
    ]
    counters = [run.arrays["2.num_batches_tracked"].numpy() for run in runs]
    assert counters[1] == pytest.approx(counters[0], abs=1e-3)
    for name, value in runs[1].arrays.to_torch_state_dict().items():
        expected = runs[0].arrays.to_torch_state_dict()[name]
        scale = max(1.0, float(expected.abs().max()))  # running variances of unscaled inputs are in the thousands
        torch.testing.assert_close(value, expected, atol=1e-5 * scale, rtol=0)


def test_metrics_that_clients_do_not_have_in_common_stay_with_them(caplog: pytest.LogCaptureFixture) -> None:
    def odd(message: Message, context: Context) -> Message:
        reply = uneven(message, context)
        if context.node_config["partition-id"] == 2:
            reply.content["metrics"]["loss"] = float("nan")
        return reply

    result = federate(tofu.SecureAggregation(strategy_of()), tofu.secure(), rounds=1, handler=odd)
    assert "loss" not in result.train_metrics_clientapp[1]
    assert result.train_metrics_clientapp[1]["tofu-clients"] == CLIENTS
    assert "metrics were not summed" in caplog.text


@pytest.mark.parametrize("weight", [0, -3, 2.5, [4]])
def test_a_weight_that_cannot_be_summed_is_named(weight: Any) -> None:
    def odd(message: Message, context: Context) -> Message:
        reply = train(message, context)
        reply.content["metrics"] = MetricRecord({"num-examples": weight})
        return reply

    with pytest.raises(
        RunError, match=r"num-examples=.* is not usable: expected a whole number from 1 to .*, or weight"
    ):
        federate(tofu.SecureAggregation(strategy_of()), tofu.secure(), rounds=1, handler=odd)


def test_noise_is_added_by_the_clients_and_accounted_for() -> None:
    options: dict[str, Any] = {"noise_multiplier": 0.5, "clip_norm": 0.1}
    result = federate(
        tofu.SecureAggregation(strategy_of(), **options), tofu.secure(**options), rounds=2, handler=still
    )  # fmt: skip
    start = federate(strategy_of(), rounds=1, handler=still)
    new, old = result.arrays.to_torch_state_dict(), start.arrays.to_torch_state_dict()
    change = torch.cat([(new[name] - old[name]).flatten() for name in new])
    # z C on the sum of 4 clients at least, of whom only the threshold need be honest; twice, in two rounds.
    assert 0.5 * 0.1 / CLIENTS * 2**0.5 * 0.95 < float(change.std()) < 4 * 0.5 * 0.1 / CLIENTS * 2**0.5
    metrics = result.train_metrics_clientapp
    assert 0 < metrics[1]["tofu-epsilon"] < metrics[2]["tofu-epsilon"]
    assert "loss" not in metrics[2]


@pytest.mark.parametrize(("clipped", "factor"), [(False, math.exp(-0.1)), (True, math.exp(0.1))])
def test_the_clip_norm_follows_a_quantile(clipped: bool, factor: float) -> None:
    """All clients or none are clipped, so the norm moves by 0.2 times a half; epsilon is that without a quantile."""

    def moved(message: Message, context: Context) -> Message:
        reply = still(message, context)
        state = message.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({name: value + clipped for name, value in state.items()})
        return reply

    options: dict[str, Any] = {"noise_multiplier": 0.02, "clip_norm": 0.5, "clip_quantile": 0.5}
    strategy = tofu.SecureAggregation(strategy_of(), **options)
    metrics = federate(strategy, tofu.secure(**options), rounds=3, handler=moved).train_metrics_clientapp
    norms = [metrics[round_]["tofu-clip-norm"] for round_ in (1, 2, 3)]
    assert norms == pytest.approx([0.5, 0.5 * factor, 0.5 * factor**2], rel=0.03)
    assert metrics[2]["tofu-epsilon"] == pytest.approx(epsilon_of(0.02 / 2**0.5, 1e-5))


def test_a_fixed_clip_norm_is_not_the_servers_to_choose() -> None:
    mod = tofu.secure(noise_multiplier=1.0)

    def lied_to(message: Message, context: Context, call_next: Any) -> Message:
        if RECORD in message.content:
            message.content[RECORD]["clip-norm"] = 1e9
        reply: Message = mod(message, context, call_next)
        return reply

    with pytest.raises(RunError, match=r"clip norm is 1000000000\.0, expected 1"):
        federate(tofu.SecureAggregation(strategy_of(), noise_multiplier=1.0), lied_to, rounds=1)


def test_only_noise_needs_the_library_that_accounts_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    tofu.SecureAggregation(strategy_of())
    with pytest.raises(SettingError, match="delta=2"):
        tofu.SecureAggregation(strategy_of(), delta=2)
    with pytest.raises(MissingExtraError, match=r"pip install 'tofu-fl\[privacy\]'"):
        tofu.SecureAggregation(strategy_of(), noise_multiplier=1.0, clip_norm=1.0)


def test_an_abandoned_round_counts_in_epsilon() -> None:
    def failing(message: Message, context: Context) -> Message:
        if message.content["config"]["server-round"] == 1 and int(context.node_config["partition-id"]) < 2:
            raise ValueError("no data")
        return still(message, context)

    strategy = tofu.SecureAggregation(strategy_of(), noise_multiplier=2.0)
    result = federate(strategy, tofu.secure(noise_multiplier=2.0), rounds=2, handler=failing)
    metrics = result.train_metrics_clientapp
    assert "tofu-epsilon" not in metrics.get(1, {})
    assert metrics[2]["tofu-epsilon"] == pytest.approx(epsilon_of(2.0 / 2**0.5, 1e-5))


def still(message: Message, context: Context) -> Message:
    """An app that learns nothing, so that a change is noise."""
    reply = uneven(message, context)
    reply.content["arrays"] = message.content["arrays"]
    return reply


def test_a_node_config_refuses_rounds_without_noise() -> None:
    with pytest.raises(RunError, match=r"noise_multiplier=0 .*rule min-noise-multiplier accepts 1 or more"):
        federate(
            tofu.SecureAggregation(strategy_of()), tofu.secure(), rounds=1,
            node_config=lambda _: {"min-noise-multiplier": 1.0},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("minimum", "identified", "refused"), [(1.0, False, True), (0.7, False, False), (1.0, True, False)]
)
def test_a_minimum_of_noise_is_that_of_a_sum_whose_other_members_may_add_none(
    minimum: float, identified: bool, refused: bool, tmp_path: Path
) -> None:
    """Two of four clients share the noise, so that each adds 1 / sqrt(2) of it."""
    listed, entries = with_identities(tmp_path)
    strategy = tofu.SecureAggregation(strategy_of(), identities=listed if identified else None, noise_multiplier=1.0)

    def run() -> Any:
        return federate(
            strategy, tofu.secure(noise_multiplier=1.0), rounds=1,
            node_config=lambda n: {"min-noise-multiplier": minimum} | (entries(n) if identified else {}),
        )  # fmt: skip

    if refused:
        with pytest.raises(RunError, match=r"a secure sum of which 0\.707 of noise_multiplier=1 is sure is refused"):
            run()
    else:
        assert run().train_metrics_clientapp[1]["tofu-clients"] == CLIENTS


@pytest.mark.parametrize(("node", "refused"), [({}, True), ({"identity": True}, False), ({"trust": True}, False)])
def test_a_client_of_secure_rounds_only_wants_an_identity_or_a_server_that_it_trusts(
    node: dict[str, bool], refused: bool, tmp_path: Path
) -> None:
    listed, entries = with_identities(tmp_path)
    (tmp_path / "policy.toml").write_text(
        f'allowed-rounds = ["secure"]\ntrust-server = {str(node.get("trust", False)).lower()}\n'
    )

    def node_config(number: int) -> dict[str, Any]:
        return {"policy": str(tmp_path / "policy.toml")} | (entries(number) if node.get("identity") else {})

    strategy = tofu.SecureAggregation(strategy_of(), identities=listed if node.get("identity") else None)
    if refused:
        with pytest.raises(RunError, match="a secure round without identities is refused by this client's policy"):
            federate(strategy, tofu.secure(), rounds=1, node_config=node_config)
    else:
        federate(strategy, tofu.secure(), rounds=1, node_config=node_config)
        assert set(strategy.acknowledged.values()) == {1}


def with_identities(folder: Path) -> tuple[Path, Callable[[int], dict[str, Any]]]:
    """The list of the clients' public keys, and the entries of each one's node config."""
    make_identities(folder, [str(number) for number in range(CLIENTS)])
    listed = folder / "identities.json"
    return listed, lambda number: {"identity": str(folder / f"{number}.identity"), "identities": str(listed)}


def test_identities_sign_keys_and_survivors(tmp_path: Path) -> None:
    listed, entries = with_identities(tmp_path)
    summed = federate(
        tofu.SecureAggregation(strategy_of(), identities=listed), tofu.secure(), rounds=2, handler=uneven,
        node_config=entries,
    )  # fmt: skip
    assert_equal(summed.arrays, federate(strategy_of(), rounds=2, handler=uneven).arrays)
    with pytest.raises(RunError, match=r"it has an identity .*: pass identities= to SecureAggregation"):
        federate(tofu.SecureAggregation(strategy_of()), tofu.secure(), rounds=1, node_config=entries)


def test_another_clients_old_keys_do_not_take_its_place(tmp_path: Path) -> None:
    """Client 0, which is asked first, sends keys that client 1 signed for the round before."""
    listed, entries = with_identities(tmp_path)
    mod, signed = tofu.secure(), list[bytes]()

    def replaying(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = mod(message, context, call_next)
        if STAGE not in reply.content:
            return reply
        answer = SecureAnswer.from_bytes(reply.content.config_records[STAGE][FIELD])
        if answer.advert and context.node_config["partition-id"] == 1:
            signed.append(answer.advert)
        if answer.advert and context.node_config["partition-id"] == 0 and answer.message:
            stolen = SecureAnswer(answer.message, signed[0]).to_bytes()
            reply.content[STAGE] = ConfigRecord({FIELD: stolen})
        return reply

    strategy = tofu.SecureAggregation(strategy_of(), identities=listed)
    federate(strategy, replaying, rounds=2, node_config=entries)
    assert sorted(strategy.acknowledged.values()) == [1, 2, 2, 2]


@pytest.mark.parametrize("masked", [b"", b"\xff" * 300, 7])
def test_a_hostile_vector_costs_that_client_alone(masked: Any) -> None:
    mod = tofu.secure()

    def lying(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = mod(message, context, call_next)
        if context.node_config["partition-id"] == 0 and not reply.has_error() and RECORD in reply.content:
            reply.content[RECORD] = ConfigRecord({"masked": masked, "metrics": "[]"})
        return reply

    result = federate(tofu.SecureAggregation(strategy_of()), lying, rounds=2)
    assert result.train_metrics_clientapp[2]["tofu-clients"] == CLIENTS - 1


@pytest.mark.parametrize("names", ["nonsense", '[["a", 99]]', '[["a", -1, 3]]', 5])
def test_hostile_names_of_metrics_cost_the_metrics_alone(names: Any) -> None:
    mod = tofu.secure()

    def lying(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = mod(message, context, call_next)
        if not reply.has_error() and RECORD in reply.content:
            reply.content[RECORD]["metrics"] = names
        return reply

    result = federate(tofu.SecureAggregation(strategy_of()), lying, rounds=1)
    assert set(result.train_metrics_clientapp[1]) == {"tofu-clients", "tofu-clipped", "tofu-payload-bytes"}


def test_answers_are_those_of_the_protocol() -> None:
    """A stage's answer holds a message of tofu.secagg and nothing else."""
    spy = Eavesdropper(tofu.secure())
    federate(tofu.SecureAggregation(strategy_of()), spy, rounds=1)
    stages = [reply.content[STAGE] for _, reply in spy.replies if STAGE in reply.content]
    assert len(stages) == 3 * CLIENTS  # advert, share, reveal
    for record in stages:
        assert set(record) == {FIELD}
        SecureAnswer.from_bytes(record[FIELD])
