"""One registered client that lies: it may fail by itself, but it may not end the run or take over the model."""

import dataclasses
import itertools
import json
import math
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client import app as honest
from server.app import serve_in_process
from tofu.errors import RunError
from tofu.observers.base import Observer
from tofu.plugins import Export, export_to_bytes
from tofu.privacy import Accountant
from tofu.reporting.folder import fresh_folder
from tofu.rounds.aggregation import example_cap
from tofu.rounds.record import read_rounds
from tofu.settings import Settings
from tofu.wire import FIELD, HEADER_BYTES, RECORD, SECURE, Payload, TrainReply

TINY: dict[str, Any] = {
    "clients": 4, "rounds": 2, "local_epochs": 2, "train_images": 400, "schedule": "fedavg", "lr": 0.2,
    "checkpoint": False, "ema_decay": 0.0,
}  # fmt: skip

Lie = Callable[[TrainReply], TrainReply]

METRIC = export_to_bytes(Export({}, {"loud/metric": 1.0}))


def app_with(lie: Lie | None = None, examples: int | None = None) -> ClientApp:
    """The real client app, whose client 3 changes its replies or claims another number of examples."""
    app = ClientApp()
    app.query(SECURE)(honest.secure)

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        reply = honest.hello(message, context)
        if examples is not None and honest.client_name(context) == "3":
            reply.content.config_records[RECORD]["examples"] = examples
        return reply

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = honest.train(message, context)
        if lie is None or honest.client_name(context) != "3" or reply.has_error():
            return reply
        body = reply.content.config_records[RECORD][FIELD]
        changed = lie(TrainReply.from_bytes(body)).to_bytes()
        return Message(RecordDict({RECORD: ConfigRecord({FIELD: changed})}), reply_to=message)

    return app


def scaled(factor: float) -> Lie:
    """The update times a factor, in an uncompressed reply."""

    def lie(reply: TrainReply) -> TrainReply:
        body = reply.payload[HEADER_BYTES:]
        values = [factor * value for value in struct.unpack(f"<{len(body) // 4}f", body)]
        head = struct.unpack_from("<4sBBI8sI", reply.payload)
        payload = Payload(head[2], head[3], head[4], struct.pack(f"<{len(values)}f", *values)).to_bytes()
        return dataclasses.replace(reply, payload=payload)

    return lie


class Killed(BaseException):
    """A process that dies in the middle of a round."""


class DieInRound(Observer):
    """Dies when the first reply of a round has arrived: the server has seen a noised update."""

    def __init__(self, round_: int) -> None:
        self._round = round_

    def on_phase(self, round_: int, kind: str, phase: str, done: int, total: int) -> None:
        if (round_, phase, done) == (self._round, "train", 1):
            raise Killed


def run(folder: Path, app: ClientApp, **settings: Any) -> dict[str, Any]:
    return serve_in_process(app, Settings.of(TINY | settings | {"run_folder": str(folder)}), Observer())


@pytest.mark.parametrize("value", [3e38, math.nan, -math.inf])
@pytest.mark.parametrize("field", ["train_loss", "cosine", "train_seconds", "explained_variance", "of a plugin"])
def test_a_huge_metric_fails_its_client_only(field: str, value: float, tmp_path: Path) -> None:
    def lie(reply: TrainReply) -> TrainReply:
        if field == "of a plugin":
            return dataclasses.replace(reply, exported=METRIC.replace(struct.pack("<d", 1.0), struct.pack("<d", value)))
        return dataclasses.replace(reply, **{field: value})

    run(tmp_path / "run", app_with(lie))
    for record in read_rounds(tmp_path / "run" / "metrics.jsonl")[1:]:
        assert [failure.client for failure in record.failures] == ["3"]
        assert "metric" in record.failures[0].reason


@pytest.mark.parametrize("schedule", ["fedavg", "secure"])
def test_a_client_that_claims_2_to_the_62_examples_is_not_registered(schedule: str, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", app_with(examples=2**62), schedule=schedule)
    assert summary["final_accuracy"] > 0.3
    assert all(record.clients == 3 for record in read_rounds(tmp_path / "run" / "metrics.jsonl")[1:])


def test_a_client_that_claims_many_examples_counts_at_most_ten_times_the_median(tmp_path: Path) -> None:
    lie: Lie = lambda reply: dataclasses.replace(scaled(-1.0)(reply), examples=10**8)  # noqa: E731
    capped = run(tmp_path / "capped", app_with(lie, examples=10**8))
    free = run(tmp_path / "free", app_with(lie, examples=10**8), max_example_ratio=0.0)
    assert capped["weights_sha256"] != free["weights_sha256"]
    assert example_cap([100, 120, 80, 10**8], 10.0) == 1100
    assert example_cap([100, 120, 80, 10**8], 0.0) == 10**8


@pytest.mark.parametrize(("noise", "named"), [("none", ["3"]), ("independent", [])])
def test_a_client_whose_update_stands_out_is_named_unless_only_the_noised_mean_may_be_known(
    noise: str, named: list[str], tmp_path: Path
) -> None:
    notes: list[str] = []

    class Notes(Observer):
        def on_note(self, text: str, **fields: Any) -> None:
            notes.append(text)

    own: dict[str, Any] = {"rounds": 1, "norm": "none", "run_folder": str(tmp_path / "run")}
    private = {"server_noise": noise, "noise_multiplier": 1.0} if noise != "none" else {}
    serve_in_process(app_with(scaled(-30.0)), Settings.of(TINY | own | private), Notes())
    found = [note for note in notes if "times as long" in note]
    assert [note.split("client ")[1].split()[0] for note in found] == named


def test_a_sign_flip_ruins_the_mean_and_not_the_robust_rules(tmp_path: Path) -> None:
    attack = app_with(scaled(-30.0))
    chosen: dict[str, Any] = {"malicious_fraction": 0.25, "partition": "iid"}
    with pytest.raises(RunError, match="training diverges"):
        run(tmp_path / "mean", attack, aggregator="mean", **chosen)
    ruined = read_rounds(tmp_path / "mean" / "metrics.jsonl")[-1].accuracy
    assert ruined is not None
    assert ruined < 0.3
    for rule in ("median", "trimmed-mean", "multi-krum", "norm-clip", "centered-clip"):
        assert run(tmp_path / rule, attack, aggregator=rule, **chosen)["final_accuracy"] > ruined + 0.2, rule


@pytest.mark.parametrize("round_", [1, 2])  # round 1 is before the first checkpoint
def test_a_round_that_a_crash_interrupted_counts_in_the_privacy_account(round_: int, tmp_path: Path) -> None:
    private = TINY | {
        "noise_multiplier": 4.0, "rounds": 3, "norm": "none", "checkpoint": True, "ema_decay": 0.5, "lr": 0.001,
    }  # fmt: skip
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    serve_in_process(honest.app, Settings.of(private | {"run_folder": str(whole)}), Observer())
    for observer, own in (
        (DieInRound(round_), {"run_folder": str(folder)}),
        (DieInRound(round_), {"resume": str(folder)}),
    ):
        with pytest.raises(Killed):
            serve_in_process(honest.app, Settings.of(private | own), observer)
    serve_in_process(honest.app, Settings.of(private | {"resume": str(folder)}), Observer())
    account = Accountant(Settings.of(private).privacy.privacy_delta)
    for _ in range(5):  # rounds 1 to 3, and the one that was interrupted twice more
        account.spend(4.0, "fedavg")
    assert read_rounds(folder / "metrics.jsonl")[-1].epsilon == pytest.approx(account.epsilon)
    three = read_rounds(whole / "metrics.jsonl")[-1].epsilon
    assert three is not None
    assert three < account.epsilon


def test_a_round_of_server_noise_that_a_crash_interrupted_counts_as_one_of_its_clients(tmp_path: Path) -> None:
    private = TINY | {
        "noise_multiplier": 4.0, "rounds": 5, "norm": "none", "checkpoint": True, "server_noise": "correlated",
        "min_separation": 2, "client_fraction": 0.5, "lr": 0.001,
    }  # fmt: skip
    folder = tmp_path / "killed"
    for observer, own in ((DieInRound(2), {"run_folder": str(folder)}), (DieInRound(2), {"resume": str(folder)})):
        with pytest.raises(Killed):
            serve_in_process(honest.app, Settings.of(private | own), observer)
        before = json.loads((folder / "privacy.json").read_text())["participation"]
    assert (before["rows"], sorted(before["last"].values())) == (3, [3, 3])
    serve_in_process(honest.app, Settings.of(private | {"resume": str(folder)}), Observer())
    rounds = read_rounds(folder / "metrics.jsonl")
    asked = [{client.client for client in record.by_client} for record in rounds[1:]]
    assert not asked[1] & before["last"].keys()  # round 2 was row 4, after the two rows that were lost
    assert all(not early & late for early, late in itertools.pairwise(asked))
    account = Accountant(1e-5)
    for _ in range(4):  # rows 1, 3, 5 and 7 of 7
        account.spend(4.0, "fedavg")
    assert rounds[-1].epsilon == math.inf
    assert rounds[-1].model_epsilon == account.epsilon
    assert json.loads((folder / "privacy.json").read_text())["participation"]["rows"] == 7


@pytest.mark.parametrize(("kind", "noise"), [("fedavg", "none"), ("compressed", "none"), ("fedavg", "independent")])
def test_under_differential_privacy_no_message_tells_time_loss_or_number_of_images(
    kind: str, noise: str, tmp_path: Path
) -> None:
    seen: list[object] = []

    def look(reply: TrainReply) -> TrainReply:
        seen.append((reply.train_seconds, reply.train_loss, reply.examples))
        return reply

    looking, app = app_with(look), ClientApp()
    app.train()(lambda message, context: looking(message, context))

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        reply = honest.hello(message, context)
        seen.append(dict(reply.content.config_records[RECORD]))
        return reply

    run(
        tmp_path / "run", app, noise_multiplier=1.0, norm="none", schedule=kind, ratio=10.0, max_evals=5,
        server_noise=noise,
    )  # fmt: skip
    assert seen[4:] == [(0.0, 0.0, 1)] * 2
    assert sorted(map(str, seen[:4])) == [str({"client": str(number), "examples": 1}) for number in range(4)]


def test_each_of_two_runs_of_the_same_second_has_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(fresh_folder, [Settings()] * 40))
    assert len(set(folders)) == 40
