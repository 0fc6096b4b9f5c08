"""The round runner and both collectors, with an in-memory transport and the real client app."""

import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from torch import Tensor, nn

from client.state import load_state
from deploy.identities import make_identities
from server.checkpoint import Snapshot
from server.ledger import Ledger
from server.runner import RoundRunner, largest_fraction
from tests.server.memory import FIRST_NODE, MemoryTransport
from tofu.compression.error_feedback import ErrorFeedback
from tofu.data import FederatedData
from tofu.errors import RunError
from tofu.flower.internals import task_identity, unavailable_reply
from tofu.models import initial_model
from tofu.observers.base import Observer
from tofu.plugins import Plugin, PluginState, RoundContext, keep_channels, keep_entries
from tofu.reference_model import ReferenceModel
from tofu.secagg.messages import Masked
from tofu.settings import Settings
from tofu.weights import weights_of
from tofu.wire import FIELD, RECORD, TrainReply

TINY: dict[str, Any] = {
    "model": "mlp", "clients": 3, "rounds": 4, "local_epochs": 1, "batch_size": 64, "max_evals": 5, "ratio": 50.0,
    "train_images": 120,
}  # fmt: skip


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


def make(transport: MemoryTransport | None = None, **changes: object) -> tuple[RoundRunner, MemoryTransport]:
    settings = Settings.of(TINY | changes)
    data = FederatedData.of(settings.data, settings.run.seed)
    model = initial_model(settings.model, data.shape, settings.run.seed)
    transport = transport or MemoryTransport(settings)
    reference = ReferenceModel(model.eval(), data.shape)
    return RoundRunner(transport, reference, data.test(), settings, Ledger(), Observer()), transport


def test_secret_samples_do_not_follow_from_the_seed_and_are_accounted() -> None:
    shape = {"clients": 24, "client_fraction": 0.25, "noise_multiplier": 4.0}
    runner, _ = make(**shape, secret_sampling=True)
    names = list(range(24))
    drawn = {tuple(runner._sample(names, 1, secure=False)[0]) for _ in range(5)}  # type: ignore[arg-type]
    assert len(drawn) > 1  # one of 134,596 samples five times: never
    assert all(len(set(sample)) == 6 and set(sample) <= set(names) for sample in drawn)
    open_, _ = make(**shape)
    assert len({tuple(open_._sample(names, 1, secure=False)[0]) for _ in range(5)}) == 1  # type: ignore[arg-type]
    rounds(runner, 1)
    assert runner.account is not None
    assert runner.account.to_dict()["spent"] == [["compressed", 4.0, 1, 6, 24]]


def test_the_account_is_that_of_the_group_with_the_largest_fraction() -> None:
    """Of two clients one is drawn, however many there are in other groups: the fraction of all would promise more."""
    assert largest_fraction([1, 10, 0], [2, 100, 5]) == (1, 2)


def rounds(runner: RoundRunner, *numbers: int) -> list[Any]:
    results = []
    for number in numbers:
        if not runner.accuracies:
            runner.evaluate()
        results.append(runner.run_round(number))
        runner.evaluate()
    return results


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def on_train(reply: Callable[[Message, Callable[[], Message]], Message | None]) -> Any:
    """A behavior that changes replies to train requests only."""

    def behave(message: Message, answer: Callable[[], Message]) -> Message | None:
        return reply(message, answer) if message.metadata.message_type == "train" else answer()

    return behave


def test_a_full_round_steps_to_the_mean_of_the_clients_weights() -> None:
    runner, transport = make(schedule="fedavg", ema_decay=0.0)
    before = runner.weights
    [result] = rounds(runner, 1)
    assert [client.name for client, _ in result.replies] == transport.trained() == ["0", "1", "2"]
    assert result.failures == {}
    assert sum(reply.examples for _, reply in result.replies) == result.examples == 120
    assert not same(before, runner.weights)


def test_the_automatic_step_multiplies_the_mean_of_compressed_updates() -> None:
    common: dict[str, Any] = {"ema_decay": 0.0, "compressor": "topk", "alpha": 0.1}
    runner, _ = make(**common)
    plain, _ = make(**common, server_lr=1.0)
    before = runner.weights
    results = [rounds(made, 1)[0] for made in (runner, plain)]
    step = results[0].server_step
    assert 1 < step <= 3
    assert results[1].server_step == 1
    for name, start in before.items():
        torch.testing.assert_close(
            runner.weights[name] - start, step * (plain.weights[name] - start), rtol=1e-3, atol=1e-6
        )
    assert [result.server_step for result in rounds(runner, 2, 3, 4)][-1] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "fedavg"},
        {"schedule": "secure"},
        {"server_optimizer": "momentum"},
        {"server_optimizer": "ef21", "step_ahead": 0.0},
        {"codec_mode": "paper", "ratio": 4.0},
        {"noise_multiplier": 1.0, "norm": "group"},
        {"aggregator": "median"},
    ],
)
def test_the_automatic_step_is_one_elsewhere(changes: dict[str, object]) -> None:
    runner, _ = make(**changes, alpha=0.1)
    assert rounds(runner, 1)[0].server_step == 1


def test_a_late_client_and_an_error_reply_are_failures_and_the_round_goes_on() -> None:
    runner, transport = make(schedule="fedavg")
    transport.behaviors = {
        "0": on_train(lambda message, answer: None),
        "2": on_train(lambda message, answer: Message(Error(code=0, reason="out of\nmemory"), reply_to=message)),
    }
    [result] = rounds(runner, 1)
    assert [client.name for client, _ in result.replies] == ["1"]
    assert result.failures.keys() == {"0", "2"}
    assert "no reply within" in result.failures["0"]
    assert result.failures["2"] == "out of memory"
    transport.behaviors["1"] = transport.behaviors["2"]
    with pytest.raises(RunError, match="no valid reply from 3 clients"):
        rounds(runner, 2)


def test_a_reply_with_too_many_examples_is_refused() -> None:
    def lying(message: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        body = reply.content.config_records["t"]["b"]
        parsed = TrainReply.from_bytes(body)
        reply.content.config_records["t"]["b"] = TrainReply(
            10_000, 0.0, 0.0, 0.0, 0.0, 0.0, parsed.payload, exported=parsed.exported
        ).to_bytes()
        return reply

    runner, transport = make(schedule="fedavg")
    transport.behaviors = {"1": on_train(lying)}
    [result] = rounds(runner, 1)
    assert "10000 examples" in result.failures["1"]


def test_a_client_without_the_weights_is_sent_them_and_takes_part() -> None:
    runner, transport = make(downlink="topk")
    rounds(runner, 1, 2)
    context = next(iter(transport.contexts.values()))
    context.state = RecordDict()
    [result] = rounds(runner, 3)
    assert len(result.replies) == 3
    assert transport.trained() == ["0", "1", "2"] * 3 + ["0"]


def test_a_secure_round_gives_the_update_of_a_full_one() -> None:
    secure, _ = make(schedule="secure", secure_ratio=1.0, ema_decay=0.0)
    full, _ = make(schedule="fedavg", ema_decay=0.0)
    [result] = rounds(secure, 1)
    rounds(full, 1)
    assert set(result.survivors) == {"0", "1", "2"}
    assert result.secure.examples == 120
    for name, value in full.weights.items():
        assert torch.allclose(secure.weights[name], value, atol=1e-3)


def test_a_random_masked_vector_abandons_the_round_and_not_the_run() -> None:
    """The sum is random, and a plugin checks its part of it."""

    def lie(message: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        masked = Masked.from_bytes(reply.content.config_records[RECORD][FIELD])
        random = replace(masked, packed=os.urandom(len(masked.packed))).to_bytes()
        return Message(RecordDict({RECORD: ConfigRecord({FIELD: random})}), reply_to=message)

    runner, transport = make(schedule="secure", clients=4, plugins="ood")
    before, transport.behaviors = runner.weights, {"2": on_train(lie)}
    [first] = rounds(runner, 1)
    assert "one of them sent an impossible vector" in first.abandoned
    assert same(before, runner.weights)
    transport.behaviors = {}
    [second] = rounds(runner, 2)
    assert sorted(second.survivors) == ["0", "1", "2", "3"]


def test_a_secure_sum_of_more_examples_than_its_clients_claim_is_abandoned() -> None:
    """The count is in the masked vector, where nobody sees whose it is."""

    def fewer(message: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        if message.metadata.message_type == "query":
            reply.content.config_records[RECORD]["examples"] = 1
        return reply

    runner, transport = make(schedule="secure", partition="iid")
    before, transport.behaviors = runner.weights, {"2": fewer}
    [result] = rounds(runner, 1)
    assert result.abandoned == "the sum holds 120 examples, its clients have 81"
    assert same(before, runner.weights)


def test_a_secure_round_without_enough_survivors_is_abandoned_and_changes_nothing() -> None:
    runner, transport = make(schedule="secure")
    before = runner.weights
    transport.behaviors = {name: on_train(lambda message, answer: None) for name in ("0", "1")}
    [result] = rounds(runner, 1)
    assert result.abandoned
    assert result.secure is None
    assert same(before, runner.weights)
    transport.behaviors = {}
    [result] = rounds(runner, 2)
    assert set(result.survivors) == {"0", "1", "2"}


@dataclass
class Halves(Plugin):
    """Even and odd clients train models of their own; the server keeps the first bias at zero."""

    @property
    def groups(self) -> int:
        return 2

    def group_of(self, client: str) -> int:
        return int(client) % 2

    def on_aggregate(self, model: nn.Module, context: RoundContext) -> None:
        next(p for name, p in model.named_parameters() if name.endswith("bias")).zero_()
        state: PluginState = dict(self.broadcast)
        state[f"round of group {context.group}"] = context.round
        self.broadcast = state


GROUPS: dict[str, object] = {"plugins": "tests.server.test_runner:Halves", "schedule": "fedavg", "ema_decay": 0.0}


def test_each_group_trains_a_model_of_its_own() -> None:
    runner, _ = make(**GROUPS, clients=4)
    alone, transport = make(**GROUPS, clients=4)
    transport.absent = {"1", "3"}
    [result] = rounds(runner, 1)
    rounds(alone, 1)
    assert len(result.replies) == 4
    first, second = (weights_of(model.averaged) for model in runner.models)
    assert not same(first, second)
    assert same(first, weights_of(alone.models[0].averaged))
    assert not next(value for name, value in first.items() if name.endswith("bias")).any()
    assert runner.plugins[0].broadcast == {"round of group 0": 1, "round of group 1": 1}
    assert len(runner.group_accuracies[-1]) == 2


def test_secure_groups_need_three_clients_each() -> None:
    runner, transport = make(**GROUPS | {"schedule": "secure"}, clients=6)
    [result] = rounds(runner, 1)
    assert set(result.survivors) == set("012345")
    assert result.secure.examples == 120
    transport.absent = {"5"}
    before = [weights_of(model.reference.model) for model in runner.models]
    [result] = rounds(runner, 2)
    assert set(result.survivors) == {"0", "2", "4"}
    assert result.abandoned
    assert not same(before[0], weights_of(runner.models[0].reference.model))
    for name, value in weights_of(runner.models[1].reference.model).items():
        assert torch.equal(value, before[1][name])


RANK: dict[str, object] = {"plugins": "rank", "schedule": "fedavg", "model": "cnn", "rounds": 4}


@pytest.mark.parametrize(
    "changes", [RANK, GROUPS | {"clients": 4}, {"server_optimizer": "momentum", "downlink": "topk"}]
)
def test_a_restored_runner_continues_to_the_same_weights(changes: dict[str, object]) -> None:
    runner, transport = make(**changes)
    rounds(runner, 1, 2)
    snapshot = Snapshot()
    runner.save(snapshot)
    data = snapshot.to_bytes()
    resumed, _ = make(transport, **changes)
    resumed.restore(Snapshot.from_bytes(data), clients_kept=True)
    assert same(runner.weights, resumed.weights)
    assert resumed.accuracies == runner.accuracies
    rounds(resumed, 3)
    assert len(resumed.accuracies) == 4


def test_a_client_that_was_absent_when_the_shape_changed_takes_part_again() -> None:
    runner, transport = make(**RANK)
    shapes = [runner.models[0].reference.param_spec.shapes]
    for round_ in (1, 2, 3, 4):
        transport.absent = {"1"} if round_ in (2, 3) else set()
        [result] = rounds(runner, round_)
        assert len(result.replies) == (2 if transport.absent else 3), result.failures
        shapes.append(runner.models[0].reference.param_spec.shapes)
    assert shapes[0] != shapes[-1]


@dataclass
class Narrow(Plugin):
    """Every other channel of a layer from round 2 on, and in round 3 as many others: shapes that stay the same."""

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        if context.round > 1:
            keep_channels(model, {"conv1": torch.arange(0, 32, 2)})
            mask = torch.arange(10 * 128).view(10, 128) % 2 == context.round % 2
            keep_entries(model, {"fc2.weight": mask})
        return model


NARROW: dict[str, object] = {
    "plugins": "tests.server.test_runner:Narrow", "model": "cnn", "norm": "none", "server_optimizer": "momentum",
    "min_clients": 2, "clients": 4, "train_images": 160,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{}, {"downlink": "topk"}, {"schedule": "fedavg"}, {"schedule": "secure"}],
    ids=["proxy", "topk", "fedavg", "secure"],
)
def test_architectures_change_in_every_kind_of_round_and_the_run_resumes(changes: dict[str, object]) -> None:
    """An absent client takes part again; a run restored after the changes continues to the same weights."""
    changes = NARROW | changes
    runner, transport = make(**changes)
    architectures = [runner.models[0].reference.architecture]
    for round_ in (1, 2, 3):
        transport.absent = {"1"} if round_ == 2 else set()
        [result] = rounds(runner, round_)
        assert result.failures == {}
        assert not result.abandoned
        architectures.append(runner.models[0].reference.architecture)
    assert all(old != new for old, new in itertools.pairwise(architectures))
    weights = runner.weights
    assert weights["conv1.weight"].shape[0] == weights["conv2.weight"].shape[1] == 16
    snapshot = Snapshot()
    runner.save(snapshot)
    stored = {node: pickle.dumps(context) for node, context in transport.contexts.items()}
    rounds(runner, 4)
    transport.contexts = {node: pickle.loads(context) for node, context in stored.items()}
    resumed, _ = make(transport, **changes)
    resumed.restore(Snapshot.from_bytes(snapshot.to_bytes()), clients_kept=True)
    rounds(resumed, 4)
    assert same(runner.weights, resumed.weights)


def test_a_change_drops_residuals_and_sends_full_weights() -> None:
    """In round 3 the mask has as many entries at other places: a residual of round 2 would be added to those."""
    runner, transport = make(**NARROW | {"downlink": "topk"})
    for round_ in (1, 2, 3):
        rounds(runner, round_)
        # Steps alone reach a client that has the architecture; here each round has another one.
        assert all(runner.models[0].downlink.parts(name).payload or round_ == 1 for name in "0123")
    context = next(iter(transport.contexts.values()))
    of_round_3 = context.state.config_records["tofu"]["architecture"]
    assert load_state(context, runner.models[0].reference).feedback == ErrorFeedback()
    assert of_round_3 != runner.models[0].reference.architecture


def test_a_checkpoint_of_another_architecture_is_refused() -> None:
    runner, _ = make(**NARROW)
    rounds(runner, 1)
    snapshot = Snapshot()
    runner.save(snapshot)
    other, _ = make(**{name: value for name, value in NARROW.items() if name != "plugins"})
    snapshot.blobs["plugins"] = b""
    with pytest.raises(RunError, match=r"the checkpoint of round 1 has architecture .*, the plugins made"):
        other.restore(snapshot, clients_kept=True)


def lost_once() -> Any:
    """A behavior whose first train request expires on the way, as all do if the SuperLink's clock is set forward."""
    lost: list[str] = []

    def behave(message: Message, answer: Callable[[], Message]) -> Message:
        if not lost:
            lost.append(message.metadata.message_id)
            return unavailable_reply(message.metadata.message_id, FIRST_NODE)
        return answer()

    return on_train(behave)


def test_a_round_all_of_whose_messages_expired_is_asked_for_again() -> None:
    runner, transport = make(schedule="fedavg")
    transport.behaviors = {name: lost_once() for name in ("0", "1", "2")}
    [result] = rounds(runner, 1)
    assert [client.name for client, _ in result.replies] == ["0", "1", "2"]
    assert transport.trained() == ["0", "1", "2"] * 2


def test_with_noise_a_lost_answer_is_not_asked_for_again() -> None:
    runner, transport = make(schedule="fedavg", noise_multiplier=1.0, norm="none")
    transport.behaviors = {name: lost_once() for name in ("0", "1")}
    [result] = rounds(runner, 1)
    assert [client.name for client, _ in result.replies] == ["2"]
    assert transport.trained() == ["0", "1", "2"]


def named(name: str) -> Any:
    """A behavior that introduces itself as another client."""

    def behave(message: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        if message.metadata.message_type == "query" and not reply.has_error():
            reply.content.config_records["t"]["client"] = name
        return reply

    return behave


def test_a_node_that_takes_anothers_name_does_not_displace_it() -> None:
    """Also if Flower lists it first, and while the owner of the name is away."""
    runner, transport = make(schedule="fedavg")
    transport.absent = {"0"}
    transport.behaviors = {"0": named("1")}
    [first] = rounds(runner, 1)
    transport.absent = set()
    [second] = rounds(runner, 2)
    assert first.nodes == second.nodes == {"1": FIRST_NODE + 1, "2": FIRST_NODE + 2}
    transport.absent = {"1"}
    [third] = rounds(runner, 3)
    assert third.nodes == {"2": FIRST_NODE + 2}


def test_of_nodes_that_take_a_name_at_once_the_lowest_has_it_in_every_run() -> None:
    """Whichever reply arrives first: a run with a liar is repeatable, too."""
    for late in (set[str](), {"0"}):
        runner, transport = make(schedule="fedavg")
        transport.late, transport.behaviors = late, {"2": named("0")}
        [result] = rounds(runner, 1)
        assert result.nodes == {"0": FIRST_NODE, "1": FIRST_NODE + 1}


def test_a_name_that_is_taken_before_its_owner_connects_is_lost_to_the_owner() -> None:
    """An attack that succeeds without identities (docs/threats.md)."""
    runner, transport = make(schedule="fedavg")
    transport.absent, transport.behaviors = {"1"}, {"0": named("1")}
    rounds(runner, 1)
    transport.absent = set()
    [second] = rounds(runner, 2)
    assert second.nodes == {"1": FIRST_NODE, "2": FIRST_NODE + 2}


def test_a_claim_below_the_cap_counts_as_it_is_made() -> None:
    """An attack that succeeds (docs/threats.md): with five times its images, an update has five times the weight."""

    def claim(message: Message, answer: Callable[[], Message]) -> Message:
        record = (reply := answer()).content.config_records["t"]
        if message.metadata.message_type == "train":
            trained = TrainReply.from_bytes(record["b"])
            record["b"] = replace(trained, examples=5 * trained.examples).to_bytes()
        else:
            record["examples"] = 5 * record["examples"]
        return reply

    gone = on_train(lambda message, answer: None)
    changes = []
    for behaviors in ({}, {"0": claim}, {"1": gone, "2": gone}):
        runner, transport = make(schedule="fedavg", ema_decay=0.0, partition="iid")
        start = {name: value.clone() for name, value in runner.weights.items()}
        transport.behaviors = behaviors
        rounds(runner, 1)
        changes.append({name: value - start[name] for name, value in runner.weights.items()})
    honest, lying, alone = changes
    for name, value in lying.items():
        assert torch.allclose(value, (3 * honest[name] + 4 * alone[name]) / 7, atol=1e-6)


def test_with_identities_a_name_takes_its_owners_signature(tmp_path: Path) -> None:
    """The impostor, node 0, comes first; it has the key of client 0 and says that it is client 1."""
    make_identities(tmp_path, ["0", "1", "2"])
    known = str(tmp_path / "identities.json")
    settings = Settings.of(TINY | {"schedule": "fedavg", "secure_identities": known})
    transport = MemoryTransport(settings, {"0": named("1")})
    for number, context in enumerate(transport.contexts.values()):
        context.node_config |= {"identity": str(tmp_path / f"{number}.identity"), "identities": known}
    runner, _ = make(transport, schedule="fedavg", secure_identities=known)
    [result] = rounds(runner, 1)
    assert {name: node for name, node in result.nodes.items() if name not in result.failures} == {
        "1": FIRST_NODE + 1, "2": FIRST_NODE + 2
    }  # fmt: skip
    assert list(result.failures.values()) == ["1 did not sign this name: the signature is invalid"]
