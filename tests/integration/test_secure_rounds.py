"""Secure rounds in whole federations: the sum is right whoever drops out when, and the server sees nothing else."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from scipy.stats import chisquare

from client import app as honest
from deploy.identities import make_identities
from server.app import app as server_app
from server.app import serve_in_process
from tofu.bytes_io import unpack
from tofu.data import FederatedData
from tofu.errors import RunError, SettingError
from tofu.flower.in_process import run_in_process
from tofu.models import build_model
from tofu.secagg.encoding import EncodingConfig, RingEncoder
from tofu.secagg.masks import centered
from tofu.secagg.messages import Masked
from tofu.settings import Settings
from tofu.weights import ParamSpec, Weights, fingerprint, layout_of, load_weights, weights_of
from tofu.wire import (
    FIELD,
    RECORD,
    SECURE,
    STAGES,
    WEIGHTS,
    Payload,
    SecureAnswer,
    SecurePart,
    SecureQuery,
    TrainRequest,
    float32_bytes,
)

Row = dict[str, Any]
Fault = Callable[[Message, Message, Context], Message]
"""From a request, the honest reply and the client's context, the reply that is sent."""

TINY: Row = {
    "model": "mlp", "clients": 5, "rounds": 3, "compressor": "topk", "ratio": 50.0, "local_epochs": 1, "batch_size": 32,
    "lr": 0.05, "ema_decay": 0.0, "schedule": "switch", "switch_round": 2, "secure_ratio": 1.2, "server_lr": 1.0,
}  # fmt: skip
"""A compressed round, then two secure rounds; so many bits that the sum is right to the last digits that are looked at.

Top-k's magnitudes show how large updates are, so that the first secure round clips nothing."""


def federate(folder: Path, app: ClientApp = honest.app, **settings: object) -> Row:
    return serve_in_process(app, Settings.of(TINY | settings | {"run_folder": str(folder)}))


def rows(folder: Path, name: str = "metrics") -> list[Row]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def failed(row: Row) -> list[tuple[str, str]]:
    """Who failed in a round, and why."""
    return [(failure["client"], failure["reason"]) for failure in row["failures"]]


def end_weights(folder: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(folder / "weights.safetensors")


def difference_of(one: Path, other: Path) -> float:
    a, b = end_weights(one), end_weights(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def stage_of(message: Message) -> str:
    """The stage that a request of a secure round is for, "mask" being that of the training."""
    if message.metadata.message_type != f"query.{SECURE}":
        return "mask"
    return SecureQuery.from_bytes(content(message)).stage


def content(message: Message) -> bytes:
    value = message.content.config_records[RECORD][FIELD]
    assert isinstance(value, bytes)
    return value


def saying(request: Message, data: bytes) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord({FIELD: data})}), reply_to=request)


def faulty(fault: Fault, stage: str, *, names: Iterable[str] = ("2",), rounds: Iterable[int] = (2,)) -> ClientApp:
    """The real client app, but what some clients reply at one stage of some rounds is a fault's."""
    app = ClientApp()
    app.query()(honest.hello)

    def wrong(message: Message, context: Context) -> bool:
        here = honest.client_name(context) in names and int(message.metadata.group_id) in rounds
        return here and stage_of(message) == stage

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = honest.train(message, context)
        return fault(message, reply, context) if wrong(message, context) else reply

    @app.query(SECURE)
    def secure(message: Message, context: Context) -> Message:
        reply = honest.secure(message, context)
        return fault(message, reply, context) if wrong(message, context) else reply

    return app


def gone(request: Message, reply: Message, context: Context) -> Message:
    return Message(Error(code=0, reason="the battery is empty"), reply_to=request)


def without(folder: Path, names: Iterable[str], **settings: object) -> None:
    """The same run with full rounds in place of secure ones, in which those clients send nothing in round 2."""
    federate(folder, faulty(gone, "mask", names=names), recovery="fedavg", **settings)


# What the rounds come to


def test_a_secure_round_is_a_full_round_with_less_to_see(tmp_path: Path) -> None:
    federate(tmp_path / "secure")
    federate(tmp_path / "full", recovery="fedavg")
    assert difference_of(tmp_path / "secure", tmp_path / "full") < 1e-5
    secure, full = rows(tmp_path / "secure"), rows(tmp_path / "full")
    assert [row["kind"] for row in secure] == ["start", "compressed", "secure", "secure"]
    for ours, theirs in zip(secure[2:], full[2:], strict=True):
        assert ours["clients"] == 5
        assert ours["abandoned"] == ""
        assert ours["failures"] == []
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-3)
        # Nothing that only a single client could have said.
        assert ours["explained_variance"] is ours["cosine"] is ours["train_seconds"] is None


def test_twelve_bits_a_parameter_are_enough_for_ten_clients(tmp_path: Path) -> None:
    settings: Row = {"clients": 10, "secure_ratio": 2.6, "rounds": 2}
    secure = federate(tmp_path / "secure", **settings)
    full = federate(tmp_path / "full", **settings, recovery="fedavg")
    assert abs(float(secure["final_accuracy"]) - float(full["final_accuracy"])) < 0.02
    payloads = [row["payload_bytes"] for row in rows(tmp_path / "secure", "ledger")
                if row["direction"] == "uplink" and row["kind"] == "secure" and "payload_bytes" in row]  # fmt: skip
    settings_ = Settings.of(TINY | settings)
    shape = FederatedData.of(settings_.data, settings_.run.seed).shape
    parameters = layout_of(build_model(settings_.model.model, shape)).parameter_count
    assert len(payloads) == 10
    assert max(payloads) <= 1.5 * parameters + 150


def test_the_same_run_gives_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    once = federate(tmp_path / "once", secure_ratio=6.0)
    again = federate(tmp_path / "again", secure_ratio=6.0, workers=1)
    assert once["weights_sha256"] == again["weights_sha256"]


def exchanges(folder: Path, round_: int) -> set[int]:
    """Messages that each client sent in a round, over all clients."""
    sent = [row["client"] for row in rows(folder, "ledger") if row["direction"] == "uplink" and row["round"] == round_]
    return {sent.count(name) for name in sent}


def test_keys_travel_with_earlier_replies(tmp_path: Path) -> None:
    """Three exchanges a round; a fourth where the run begins with a secure round and nobody was asked for keys."""
    federate(tmp_path / "run")
    assert [exchanges(tmp_path / "run", round_) for round_ in (2, 3)] == [{3}, {3}]
    federate(tmp_path / "first", schedule="secure", rounds=2)
    hello = 1
    assert [exchanges(tmp_path / "first", round_) for round_ in (1, 2)] == [{4 + hello}, {3}]


def test_secure_rounds_take_a_compressed_downlink(tmp_path: Path) -> None:
    settings: Row = {"downlink": "topk", "downlink_ratio": 10.0}
    federate(tmp_path / "secure", **settings)
    federate(tmp_path / "full", **settings, recovery="fedavg")
    asked = [row for row in rows(tmp_path / "secure", "ledger") if row["direction"] == "downlink" and row["round"] == 3]
    whole = 4 * layout_of(build_model("mlp", FederatedData.of(Settings.of(TINY).data, 0).shape)).parameter_count
    assert len(asked) == 15
    assert max(row["bytes"] for row in asked) < whole / 5
    assert [row["accuracy"] > 0.1 for row in rows(tmp_path / "secure")[2:]] == [True, True]


def test_some_of_many_clients_take_part(tmp_path: Path) -> None:
    federate(tmp_path / "run", clients=8, client_fraction=0.5)
    assert [row["clients"] for row in rows(tmp_path / "run")[1:]] == [4, 4, 4]
    # Who was not asked in the round before is asked for keys.
    assert exchanges(tmp_path / "run", 2) - {1} == {3, 4}


# Dropouts


@pytest.mark.parametrize(("stage", "counts"), [("share", False), ("mask", False), ("reveal", True)])
def test_a_client_may_drop_out_at_any_stage(stage: str, counts: bool, tmp_path: Path) -> None:
    """Its update is in the sum if its masked vector came, and it is welcome in the next round."""
    federate(tmp_path / "run", faulty(gone, stage), error_feedback=0.0)
    without(tmp_path / "plain", [] if counts else ["2"], error_feedback=0.0)
    assert difference_of(tmp_path / "run", tmp_path / "plain") < 1e-5
    second, third = rows(tmp_path / "run")[2:]
    assert (second["clients"], third["clients"]) == (5 if counts else 4, 5)
    assert second["abandoned"] == third["abandoned"] == ""
    assert failed(second) == [("2", "the battery is empty")]


@pytest.mark.parametrize("stage", ["share", "mask", "reveal"])
def test_below_the_threshold_a_round_is_abandoned_and_the_run_goes_on(stage: str, tmp_path: Path) -> None:
    federate(tmp_path / "run", faulty(gone, stage, names="123"))
    first, second, third = rows(tmp_path / "run")[1:]
    assert "too few for the threshold" in second["abandoned"]
    assert (second["clients"], second["train_loss"]) == (0, None)
    assert second["accuracy"] == first["accuracy"]
    assert (third["clients"], third["abandoned"]) == (5, "")
    assert third["accuracy"] != first["accuracy"]


def test_divergence_is_named_where_it_leaves_no_secure_round(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"too few for the threshold .local training diverged"):
        federate(tmp_path / "run", schedule="secure", lr=1e25, rounds=1)


def test_what_an_abandoned_round_should_have_delivered_is_delivered_later(tmp_path: Path) -> None:
    """Error feedback: the masked vectors that came to nothing return into what is sent next."""
    federate(tmp_path / "run", faulty(gone, "reveal", names="0123", rounds=(2,)))
    federate(tmp_path / "two", recovery="fedavg", rounds=2)
    federate(tmp_path / "three", recovery="fedavg")
    # Round 3 sends the updates of rounds 2 and 3, both from the weights after round 1: further than one of them.
    start, run = end_weights(tmp_path / "two"), end_weights(tmp_path / "run")
    assert rows(tmp_path / "run")[2]["abandoned"]
    assert max(float((run[name] - start[name]).abs().max()) for name in run) > 1e-3
    assert rows(tmp_path / "run")[3]["clients"] == 5


@pytest.mark.parametrize("stage", ["share", "mask", "reveal"])
@pytest.mark.parametrize("data", [b"", b"rubbish", bytes(300)], ids=["nothing", "rubbish", "zeros"])
def test_a_wrong_message_is_left_out_and_named(stage: str, data: bytes, tmp_path: Path) -> None:
    app = faulty(lambda request, reply, context: saying(request, data), stage)
    federate(tmp_path / "run", app)
    second, third = rows(tmp_path / "run")[2:]
    assert [failure["client"] for failure in second["failures"]] == ["2"]
    assert (second["clients"], third["clients"]) == (5 if stage == "reveal" else 4, 5)


def test_a_client_that_lost_its_state_is_left_out_and_comes_back(tmp_path: Path) -> None:
    """As a node that was started again: the keys that it sent ahead are gone."""

    def forgets(request: Message, reply: Message, context: Context) -> Message:
        for name in list(context.state):
            del context.state[name]
        return reply

    federate(tmp_path / "run", faulty(forgets, "mask", rounds=(1,)))
    second, third = rows(tmp_path / "run")[2:]
    assert [failure["client"] for failure in second["failures"]] == ["2"]
    assert "lost its state" in second["failures"][0]["reason"]
    assert (second["clients"], third["clients"]) == (4, 5)


def test_a_silent_client_holds_up_a_stage_only_so_long(tmp_path: Path) -> None:
    def silent(request: Message, reply: Message, context: Context) -> Message:
        time.sleep(4.5)
        return reply

    federate(tmp_path / "run", faulty(silent, "share"), secure_timeout=2.5)
    second, third = rows(tmp_path / "run")[2:]
    assert failed(second) == [("2", "no answer at stage share within 2.5 s")]
    assert (second["clients"], third["clients"]) == (4, 5)


def test_a_client_that_never_trains_does_not_hold_up_a_secure_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last round ends long before its timeout, which is longer than the limit of this test."""

    def never(request: Message, reply: Message, context: Context) -> Message:
        while True:
            time.sleep(0.02)

    monkeypatch.setattr("server.stragglers.MIN_SECONDS", 0.5)
    federate(tmp_path / "run", faulty(never, "mask", rounds=(4,)), rounds=4, straggler_factor=3.0)
    assert [row["clients"] for row in rows(tmp_path / "run")][1:] == [5, 5, 5, 4]
    assert [row["kind"] for row in rows(tmp_path / "run")][-1] == "secure"


# What the server sees


def test_a_transcript_of_the_server_gives_no_update_away(tmp_path: Path) -> None:
    """All that the server received, attacked as the server would; the sum itself is the control that must break."""
    seen: list[tuple[str, int, str, bytes, bytes]] = []
    app = ClientApp()
    app.query()(honest.hello)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request, reply = content(message), honest.train(message, context)
        seen.append((honest.client_name(context), int(message.metadata.group_id), "mask", request, content(reply)))
        return reply

    @app.query(SECURE)
    def secure(message: Message, context: Context) -> Message:
        request, reply = content(message), honest.secure(message, context)
        stage = stage_of(message)
        seen.append((honest.client_name(context), int(message.metadata.group_id), stage, request, content(reply)))
        return reply

    federate(tmp_path / "run", app, secure_ratio=2.6, rounds=2)
    # The true updates of round 2: the same run with full rounds, of which the server sees everything.
    true = updates_of_round_two(tmp_path)
    settings = Settings.of(TINY | {"secure_ratio": 2.6})
    layout = layout_of(
        build_model(
            settings.model.model, FederatedData.of(settings.data, settings.run.seed).shape, seed=settings.run.seed
        )
    )
    vectors: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
    for client, round_, stage, request, reply in seen:
        if (round_, stage) == (2, "mask"):
            terms = EncodingConfig.from_bytes(SecurePart.from_bytes(TrainRequest.from_bytes(request).secure).terms)
            code = RingEncoder(layout, terms)
            vectors[client] = unpack(Masked.from_bytes(reply).packed, code.length, terms.bits, "vector")
    count, bits = sum(shape.numel() for shape in layout.shapes.values()), terms.bits

    spread = np.repeat(terms.ranges, [s.numel() for s in layout.shapes.values()])

    def deviations(vector: Any, update: np.ndarray[Any, np.dtype[np.float64]]) -> float:
        """The cosine of vector and update over its standard deviation where the vector is uniform over the ring."""
        guess = centered(vector, bits)[:count] * spread
        deviation = np.linalg.norm(spread * update) / np.linalg.norm(spread)
        return float(abs(guess @ update) / np.linalg.norm(guess) / deviation)

    for client, vector in vectors.items():
        assert chisquare(np.bincount(vector >> np.uint64(bits - 4), minlength=16)).pvalue > 1e-6
        assert deviations(vector, true[client]) < 5
    names = sorted(vectors)
    assert len(names) == 5
    for size in range(2, 5):
        for some in itertools.combinations(names, size):
            both = np.sum([vectors[name] for name in some], axis=0, dtype=np.uint64) & np.uint64(2**bits - 1)
            assert deviations(both, np.sum([true[name] for name in some], axis=0)) < 5
    # Self-masks hide the sum of all too, until their seeds are revealed; then it is there, and only it.
    everything = np.sum(list(vectors.values()), axis=0, dtype=np.uint64) & np.uint64(2**bits - 1)
    assert deviations(everything, np.sum(list(true.values()), axis=0)) < 5
    moved = step_of_round_two(tmp_path, layout)
    data = FederatedData.of(settings.data, settings.run.seed)
    pooled = np.sum([len(data.client(int(name))) * update for name, update in true.items()], axis=0)
    assert moved @ pooled / np.linalg.norm(moved) / np.linalg.norm(pooled) > 0.9
    # Not one bare value of an update, its loss or its number of images in anything else that was received.
    for _, round_, stage, _, reply in seen:
        if round_ == 2 and stage != "mask":
            answer = SecureAnswer.from_bytes(reply)
            assert len(answer.message) < 1000
            assert stage in STAGES


def updates_of_round_two(folder: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """What each client sends in a full round in that place."""
    found: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}

    def look(request: Message, reply: Message, context: Context) -> Message:
        from tofu.wire import HEADER_BYTES, TrainReply

        body = TrainReply.from_bytes(content(reply)).payload[HEADER_BYTES:]
        found[honest.client_name(context)] = np.frombuffer(body, "<f4").astype(np.float64)
        return reply

    federate(folder / "full", faulty(look, "mask", names="01234"), recovery="fedavg", rounds=2)
    return found


def step_of_round_two(folder: Path, layout: ParamSpec) -> np.ndarray[Any, np.dtype[np.float64]]:
    federate(folder / "one", rounds=1, schedule="compressed", switch_round=0)
    before, after = end_weights(folder / "one"), end_weights(folder / "run")
    return np.concatenate([(after[name] - before[name]).double().flatten().numpy() for name in layout.shapes])


# Identities


def signed(folder: Path, app: ClientApp = honest.app, **config: object) -> Row:
    """The federation with an Ed25519 identity for each client."""
    keys = folder / "keys"
    make_identities(keys, [str(number) for number in range(5)])
    settings = Settings.of(
        TINY | {"run_folder": str(folder / "run"), "secure_identities": str(keys / "identities.json")}
    )

    def node(partition: int) -> dict[str, Any]:
        return {"identity": str(keys / f"{partition}.identity"), "identities": str(keys / "identities.json")} | config

    run_in_process(server_app, app, run_config=settings.to_config(), num_supernodes=5, node_config=node)
    return {}


def test_with_identities_there_is_one_exchange_more_and_the_same_sum(tmp_path: Path) -> None:
    signed(tmp_path)
    assert [exchanges(tmp_path / "run", round_) for round_ in (2, 3)] == [{4}, {4}]
    without(tmp_path / "plain", [])
    assert difference_of(tmp_path / "run", tmp_path / "plain") < 1e-5


def test_with_identities_a_client_may_drop_out_before_it_confirms(tmp_path: Path) -> None:
    signed(tmp_path, faulty(gone, "confirm"))
    assert [row["clients"] for row in rows(tmp_path / "run")[2:]] == [5, 5]
    assert failed(rows(tmp_path / "run")[2]) == [("2", "the battery is empty")]


def test_keys_of_a_stranger_are_refused_by_name(tmp_path: Path) -> None:
    """Client 2 signs with a key that is not in the list: the others never mask with it."""

    def node_app() -> ClientApp:
        def swapped(request: Message, reply: Message, context: Context) -> Message:
            make_identities(tmp_path / f"false-{time.monotonic_ns()}", ["2"])
            false = sorted(tmp_path.glob("false-*"))[-1]
            context.node_config |= {"identity": str(false / "2.identity"), "identities": str(false / "identities.json")}
            return reply

        return faulty(swapped, "mask", rounds=(1,))

    signed(tmp_path, node_app())
    third = rows(tmp_path / "run")[3]
    assert [failure["client"] for failure in third["failures"]] != []
    assert third["clients"] in (0, 4)


def test_a_client_insists_on_its_own_terms(tmp_path: Path) -> None:
    """Five clients have four neighbors each; all of these want ten, so no secure round comes about."""
    with pytest.raises(RunError, match=r"no secure round succeeded: .*too few for the threshold"):
        signed(tmp_path, **{"min-neighbors": 10})
    for row in rows(tmp_path / "run")[2:]:
        assert "too few for the threshold" in row["abandoned"]
        assert {failure["reason"] for failure in row["failures"]} == {
            "roster has 4 neighbors, expected 4, from 10 to 255"
        }


def test_weights_are_loaded(tmp_path: Path) -> None:
    """The saved weights of a run with secure rounds fit the model."""
    federate(tmp_path / "run", rounds=2)
    model = build_model("mlp", FederatedData.of(Settings.of(TINY).data, 0).shape)
    weights: Weights = end_weights(tmp_path / "run")
    load_weights(model, weights)
    assert all(torch.isfinite(value).all() for value in weights_of(model).values())


def wider(request: TrainRequest) -> TrainRequest:
    """Ranges at which a client's update is rounded to nothing."""
    part = SecurePart.from_bytes(request.secure)
    terms = EncodingConfig.from_bytes(part.terms)
    huge = dataclasses.replace(terms, ranges=tuple(1e6 * range_ for range_ in terms.ranges))
    return dataclasses.replace(request, secure=SecurePart(huge.to_bytes(), part.shares).to_bytes())


def other_weights(request: TrainRequest) -> TrainRequest:
    """Weights at which there is nothing to learn."""
    settings = Settings.of(TINY)
    model = build_model("mlp", FederatedData.of(settings.data, settings.run.seed).shape, seed=settings.run.seed)
    dead = {name: torch.zeros_like(value) for name, value in weights_of(model).items()}
    payload = Payload(WEIGHTS, 2, fingerprint(dead), float32_bytes(dead, layout_of(model)))
    return dataclasses.replace(request, payload=payload.to_bytes(), identity=payload.fingerprint)


@pytest.mark.parametrize("lie", [wider, other_weights])
def test_a_server_cannot_silence_all_clients_but_one(
    lie: Callable[[TrainRequest], TrainRequest], tmp_path: Path
) -> None:
    """Model inconsistency: who is told of other terms or weights than the roster was made for does not answer."""
    app = ClientApp()
    app.query()(honest.hello)
    app.query(SECURE)(honest.secure)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if honest.client_name(context) != "0" and message.metadata.group_id == "2":
            request = lie(TrainRequest.from_bytes(content(message)))
            message.content.config_records[RECORD][FIELD] = request.to_bytes()
        return honest.train(message, context)

    with pytest.raises(RunError, match="no secure round succeeded"):
        federate(tmp_path / "run", app, rounds=2)
    second = rows(tmp_path / "run")[2]
    assert second["abandoned"]
    reasons = {failure["client"]: failure["reason"] for failure in second["failures"]}
    assert reasons.keys() == set("1234")
    assert all("not those that all clients of this sum agreed on" in reason for reason in reasons.values())


# Cheaper rounds


def uplinks(folder: Path, round_: int) -> list[int]:
    return [
        row["payload_bytes"]
        for row in rows(folder, "ledger")
        if row["direction"] == "uplink" and row["round"] == round_ and "payload_bytes" in row
    ]


@pytest.mark.parametrize("ratio", [4.0, 16.0])
def test_a_secure_round_costs_as_much_less_as_it_is_asked_to(ratio: float, tmp_path: Path) -> None:
    federate(tmp_path / "run", clients=10, secure_ratio=ratio, rounds=3)
    whole = 4 * layout_of(build_model("mlp", FederatedData.of(Settings.of(TINY).data, 0).shape)).parameter_count
    assert max(uplinks(tmp_path / "run", 3)) <= whole / ratio + 150  # counts, losses and mean squares
    assert [row["failures"] for row in rows(tmp_path / "run")] == [[]] * 4


def test_what_does_not_travel_now_travels_later(tmp_path: Path) -> None:
    """At 16 times less a third of the entries has its turn, the first time others than the second."""
    options: Row = {"clients": 10, "secure_ratio": 16.0, "schedule": "secure", "rounds": 3, "lr": 0.1}
    steps = []
    for number in (1, 2, 3):
        federate(tmp_path / f"run-{number}", **options | {"rounds": number})
        steps.append(end_weights(tmp_path / f"run-{number}"))
    moved = [{name: new[name] != old[name] for name in new} for old, new in itertools.pairwise(steps)]
    for one in moved:
        share = sum(int(value.sum()) for value in one.values()) / sum(value.numel() for value in one.values())
        assert 0.005 < share < 0.34  # of a third, what is not rounded to nothing
    assert any(bool((moved[1][name] & ~moved[0][name]).any()) for name in moved[0])


def test_cheap_rounds_and_a_compressed_downlink_agree_on_the_places(tmp_path: Path) -> None:
    federate(tmp_path / "run", clients=4, secure_ratio=16.0, rounds=4, downlink="topk", downlink_ratio=10.0)
    assert [row["clients"] for row in rows(tmp_path / "run")[1:]] == [4] * 4
    assert [row["failures"] for row in rows(tmp_path / "run")] == [[]] * 5


# Differential privacy


PRIVATE: Row = {"clients": 10, "schedule": "secure", "secure_ratio": 2.0, "rounds": 3, "clip_norm": 0.5, "lr": 0.1}


def test_the_noise_of_the_sum_is_what_was_asked_for(tmp_path: Path) -> None:
    """Two runs of one seed differ by their noise alone, which is not the run's to repeat."""
    options = PRIVATE | {"rounds": 1, "noise_multiplier": 2.0}
    for name in ("one", "other"):
        federate(tmp_path / name, **options)
    one, other = end_weights(tmp_path / "one"), end_weights(tmp_path / "other")
    apart = torch.cat([(one[name] - other[name]).flatten() for name in one]).double()
    # Ten parts, each of deviation z C / sqrt(sharers), in a mean of ten; sharers is the threshold 6 less 1 colluder.
    expected = 2.0 * 0.5 * (10 / 5) ** 0.5 / 10 * 2**0.5
    assert 0.98 * expected < float(apart.std()) < 1.15 * expected  # a little more, for the rounding to the ring
    assert abs(float(apart.mean())) < 5 * expected / len(apart) ** 0.5


def test_epsilon_is_accounted_round_by_round_and_the_budget_stops_the_run(tmp_path: Path) -> None:
    from tofu.privacy import epsilon_of

    end = federate(tmp_path / "run", **PRIVATE, noise_multiplier=2.0, max_epsilon=2.9)
    said = [row["epsilon"] for row in rows(tmp_path / "run")[1:]]
    assert said == pytest.approx([epsilon_of(2.0 / number**0.5, 1e-5) for number in range(1, len(said) + 1)])
    assert len(said) == end["rounds"] < 3
    assert said[-1] == end["epsilon"] <= 2.9
    assert str(end["stopped"]).startswith("the privacy budget does not allow round")


@pytest.mark.parametrize("schedule", ["compressed", "secure"])
def test_the_clip_norm_grows_while_all_updates_are_clipped(schedule: str, tmp_path: Path) -> None:
    """All ten updates are longer than 0.01, and the count has little noise: a factor of exp(0.2 0.5) per round."""
    own = {"clip_norm": 0.01, "clip_quantile": 0.5, "noise_multiplier": 0.05, "schedule": schedule}
    federate(tmp_path / "run", **PRIVATE | own)
    norms = [row["clip_norm"] for row in rows(tmp_path / "run")[1:]]
    assert norms == pytest.approx([0.01 * math.exp(0.1 * number) for number in range(3)], rel=0.15)
    assert norms == sorted(set(norms))


@pytest.mark.parametrize("schedule", ["compressed", "secure"])
def test_with_privacy_nothing_leaves_a_client_without_noise(schedule: str, tmp_path: Path) -> None:
    seen: list[bytes] = []
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        reply = honest.hello(message, context)
        assert reply.content.config_records[RECORD]["examples"] == 1
        return reply

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = honest.train(message, context)
        seen.append(content(reply))
        return reply

    app.query(SECURE)(honest.secure)
    federate(tmp_path / "run", app, **PRIVATE | {"schedule": schedule, "noise_multiplier": 1.0, "clients": 5})
    assert len(seen) == 15
    for row in rows(tmp_path / "run")[1:]:
        assert row["train_loss"] is None
        assert row["failures"] == []
        assert row.get("clipped", 0) == 0
    if schedule == "compressed":
        from tofu.wire import TrainReply

        replies = [TrainReply.from_bytes(data) for data in seen]
        assert {(reply.examples, reply.train_loss) for reply in replies} == {(1, 0.0)}


def test_an_abandoned_round_counts_because_its_sum_could_be_opened(tmp_path: Path) -> None:
    options = PRIVATE | {"noise_multiplier": 2.0, "clients": 5}
    federate(tmp_path / "run", faulty(gone, "mask", names="123", rounds=(1,)), **options)
    said = [row["epsilon"] for row in rows(tmp_path / "run")[1:]]
    assert 0 < said[0] < said[1] < said[2]


def test_a_ring_too_small_for_the_noise_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"secure-ratio=4.0 is not usable: expected at most .* noise-multiplier 1"):
        federate(tmp_path / "run", **PRIVATE | {"noise_multiplier": 1.0, "secure_ratio": 4.0})
    assert list(tmp_path.iterdir()) == []
