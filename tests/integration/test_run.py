"""Whole federations in one process: what a run leaves behind, that it repeats and learns, and what faults do to it."""

import dataclasses
import json
import re
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client import app as honest
from server.app import app as server_app
from server.app import serve_in_process
from tests import processes
from tofu.cli import main
from tofu.codec.options import ProxySettings
from tofu.codec.proxies import ProxyCode, ProxyData
from tofu.data import FederatedData
from tofu.errors import RunError
from tofu.evaluation import evaluate
from tofu.flower.in_process import run_in_process
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, layout_of, load_weights, weights_of, weights_sha256
from tofu.wire import FIELD, HEADER_BYTES, RECORD, Payload, TrainReply, read_payload

Row = dict[str, Any]
Fault = Callable[[Message, Message], Message]
"""From a request and the honest reply to it, the reply that is sent."""

TINY: Row = {
    "model": "mlp", "clients": 4, "rounds": 3, "max_evals": 3, "ratio": 50.0, "bits": 8,
    "local_epochs": 1, "batch_size": 32, "lr": 0.05, "ema_decay": 0.0,
}  # fmt: skip
QUICK: Row = {"model": "mlp", "clients": 3, "lr": 0.1, "local_epochs": 2, "batch_size": 16}
FILES = ("config.json", "metrics.jsonl", "ledger.jsonl", "summary.json", "weights.safetensors", "report.html")


def settings_of(folder: Path, **settings: object) -> Settings:
    return Settings.of(TINY | settings | {"run_folder": str(folder)})


def federate(folder: Path, app: ClientApp = honest.app, **settings: object) -> Row:
    """Run a federation into a folder; the summary."""
    return serve_in_process(app, settings_of(folder, **settings))


def rows(folder: Path, name: str = "metrics") -> list[Row]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def saved_weights(folder: Path, model: torch.nn.Module) -> Weights:
    """The weights that a run left, in the model's order."""
    saved = safetensors.torch.load_file(folder / "weights.safetensors")
    assert saved.keys() == weights_of(model).keys()
    return {name: saved[name] for name in weights_of(model)}


def fresh_model(settings: Settings) -> torch.nn.Module:
    return build_model(
        settings.model.model,
        FederatedData.of(settings.data, settings.run.seed).shape,
        norm=settings.model.norm,
        seed=settings.run.seed,
    )


@dataclasses.dataclass(frozen=True)
class CommandRun:
    """A run of the command line in a process of its own."""

    folder: Path
    process: "subprocess.CompletedProcess[str]"

    @property
    def summary(self) -> Row:
        return json.loads(self.process.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def command_run(tmp_path_factory: pytest.TempPathFactory) -> CommandRun:
    """`tofu run --json` with the settings of `TINY`."""
    here = tmp_path_factory.mktemp("command")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "tofu.cli", "run", "--json", *options, f"--run-folder={here / 'run'}"]
    process = processes.run(command, cwd=here)
    assert process.returncode == 0, process.stderr
    return CommandRun(here / "run", process)


# What a run leaves behind


def test_json_prints_one_object_and_nothing_else(command_run: CommandRun) -> None:
    summary = command_run.summary
    assert command_run.process.stdout.count("\n") == 1
    assert command_run.process.stderr == ""
    assert summary["run"] == str(command_run.folder)
    assert summary["rounds"] == 3
    assert 0 <= summary["final_accuracy"] <= 1
    assert re.fullmatch("[0-9a-f]{64}", summary["weights_sha256"])
    for name in ("uplink_bytes", "downlink_bytes", "fedavg_uplink_bytes"):
        assert type(summary[name]) is int
        assert summary[name] > 0
    assert summary["uplink_ratio"] == pytest.approx(summary["fedavg_uplink_bytes"] / summary["uplink_bytes"])
    assert json.loads((command_run.folder / "summary.json").read_text()) == summary


def test_the_folder_holds_the_documented_files(command_run: CommandRun) -> None:
    found = {path.name for path in command_run.folder.iterdir()}
    assert set(FILES) <= found
    assert {name for name in found if name.startswith(".")} == {".config.json.lock"}  # nothing half-written
    config = json.loads((command_run.folder / "config.json").read_text())
    assert Settings.of(config) == settings_of(command_run.folder)
    assert "mlp" in (command_run.folder / "report.html").read_text()


def test_the_ledger_adds_up_to_the_totals(command_run: CommandRun) -> None:
    summary, ledger, metrics = command_run.summary, rows(command_run.folder, "ledger"), rows(command_run.folder)
    assert [row["round"] for row in metrics] == [0, 1, 2, 3]
    for direction in ("uplink", "downlink"):
        sizes = [row["bytes"] for row in ledger if row["direction"] == direction]
        assert sum(sizes) == summary[f"{direction}_bytes"] == sum(row[f"{direction}_bytes"] for row in metrics)
        names = Counter((row["round"], row["kind"], row["client"]) for row in ledger if row["direction"] == direction)
        hello = {(1, "hello", name): 1 for name in "0123"}
        assert names == hello | {(round_, "compressed", name): 1 for round_ in (1, 2, 3) for name in "0123"}
    assert summary["fedavg_uplink_bytes"] == sum(row["fedavg_uplink_bytes"] for row in metrics)
    payloads = [row["payload_bytes"] for row in ledger if row["direction"] == "uplink" and row["kind"] == "compressed"]
    assert summary["payload_ratio"] == pytest.approx(
        12 * layout_of(fresh_model(settings_of(command_run.folder))).float32_bytes / sum(payloads)
    )
    assert summary["payload_ratio"] >= TINY["ratio"]


def test_the_fedavg_figure_is_what_fedavg_really_sends(command_run: CommandRun, tmp_path: Path) -> None:
    fedavg = federate(tmp_path / "full", schedule="fedavg")
    assert fedavg["uplink_bytes"] == fedavg["fedavg_uplink_bytes"] == command_run.summary["fedavg_uplink_bytes"]
    assert fedavg["uplink_ratio"] == 1
    assert fedavg["downlink_bytes"] == command_run.summary["downlink_bytes"]


def test_the_saved_weights_are_those_of_the_summary(command_run: CommandRun) -> None:
    settings = settings_of(command_run.folder)
    model = fresh_model(settings)
    saved = saved_weights(command_run.folder, model)
    assert weights_sha256(saved) == command_run.summary["weights_sha256"]
    assert weights_sha256(weights_of(model)) != command_run.summary["weights_sha256"]
    load_weights(model, saved)
    accuracy = evaluate(model, FederatedData.of(settings.data, settings.run.seed).test()).accuracy
    assert accuracy == command_run.summary["final_accuracy"] == rows(command_run.folder)[-1]["accuracy"]


# Determinism


@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_run_gives_the_same_weights_to_the_bit(command_run: CommandRun, tmp_path: Path, workers: int) -> None:
    again = federate(tmp_path / "run", workers=workers)
    assert again["weights_sha256"] == command_run.summary["weights_sha256"]
    assert {name: again[name] for name in again if name not in ("run", "seconds")} == {
        name: value for name, value in command_run.summary.items() if name not in ("run", "seconds")
    }


def test_another_seed_gives_another_run(command_run: CommandRun, tmp_path: Path) -> None:
    other = federate(tmp_path / "run", seed=1)
    assert other["weights_sha256"] != command_run.summary["weights_sha256"]
    assert rows(tmp_path / "run")[0]["loss"] != rows(command_run.folder)[0]["loss"]


# Learning


def test_fedavg_rounds_learn(tmp_path: Path) -> None:
    summary = federate(tmp_path / "run", **QUICK, schedule="fedavg", rounds=3)
    assert summary["final_accuracy"] > 0.7  # ten classes: chance is 0.1
    assert rows(tmp_path / "run")[0]["accuracy"] < 0.3


def test_proxy_rounds_learn(tmp_path: Path) -> None:
    summary = federate(tmp_path / "run", **QUICK, rounds=5, max_evals=Settings().codec.max_evals)
    assert summary["final_accuracy"] > 0.5
    assert summary["uplink_bytes"] * 20 < summary["fedavg_uplink_bytes"]
    assert all(row["explained_variance"] > 0 for row in rows(tmp_path / "run")[1:])


@pytest.mark.parametrize(("below", "with_proxies"), [(1.0, 3), (0.0, 0)])
def test_where_the_correction_explains_enough_no_update_has_proxies(
    tmp_path: Path, below: float, with_proxies: int
) -> None:
    """An update of a first round resembles a gradient, which proxies explain best."""
    federate(tmp_path / "run", **QUICK | {"ratio": 300.0}, rounds=1, max_evals=30, proxies_below=below)
    assert [row["with_proxies"] for row in rows(tmp_path / "run")] == [None, with_proxies]
    federate(tmp_path / "rival", **QUICK, rounds=1, compressor="topk")
    assert [row["with_proxies"] for row in rows(tmp_path / "rival")] == [None, None]


def plain_loop(settings: Settings, lost: tuple[int, int] | None) -> Weights:
    """Federated averaging without any framework: train each client from the same weights, average by images.

    The reply of a (round, client) that is lost is not averaged; the client adds what it held to its next update.
    """
    data, model = FederatedData.of(settings.data, settings.run.seed), fresh_model(settings)
    weights = weights_of(model)
    owed: dict[int, Weights] = {}
    for round_ in range(1, settings.training.rounds + 1):
        total: Weights = {name: torch.zeros(()) for name in weights}
        images = 0
        for client in range(settings.data.clients):
            load_weights(model, weights)
            own = data.client(client)
            generator = derive_generator(settings.run.seed, round_, str(client), "train")
            train_locally(model, own, LocalTrainingConfig(1, 32, settings.training.lr), generator=generator)
            before = owed.pop(client, {})
            update = {name: new - weights[name] + before.get(name, 0) for name, new in weights_of(model).items()}
            if (round_, client) == lost:
                owed[client] = update
            else:
                total = {name: total[name] + len(own) * value for name, value in update.items()}
                images += len(own)
        weights = {name: value + total[name] / images for name, value in weights.items()}
    return weights


@pytest.mark.parametrize("lost", [None, (2, 1)])
def test_fedavg_rounds_are_federated_averaging(tmp_path: Path, lost: tuple[int, int] | None) -> None:
    settings = settings_of(tmp_path / "run", schedule="fedavg", clients=3, step_ahead=0.0)  # a lost reply is a residual
    app = faulty(error, names=str(lost[1]), rounds=(lost[0],)) if lost else honest.app
    serve_in_process(app, settings)
    expected = plain_loop(settings, lost)
    for name, value in saved_weights(tmp_path / "run", fresh_model(settings)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


# Schedules


def kinds(folder: Path) -> list[str]:
    return [row["kind"] for row in rows(folder)[1:]]


def test_switch_changes_the_kind_of_the_messages(tmp_path: Path) -> None:
    federate(tmp_path / "run", schedule="switch", recovery="fedavg", switch_round=2, clients=2)
    assert kinds(tmp_path / "run") == ["compressed", "fedavg", "fedavg"]
    full = HEADER_BYTES + layout_of(fresh_model(settings_of(tmp_path / "run"))).float32_bytes
    for row in rows(tmp_path / "run", "ledger"):
        if row["direction"] == "uplink" and row["kind"] != "hello":
            assert row["kind"] == ("compressed" if row["round"] == 1 else "fedavg")
            assert (row["payload_bytes"] == full) == (row["round"] > 1)
    assert [row["explained_variance"] is None for row in rows(tmp_path / "run")[1:]] == [False, True, True]


def test_switch_by_default_makes_the_last_tenth_full(tmp_path: Path) -> None:
    federate(tmp_path / "run", schedule="switch", recovery="fedavg", clients=2, rounds=2)
    assert kinds(tmp_path / "run") == ["compressed", "fedavg"]


@pytest.mark.parametrize(
    ("patience", "expected"),
    [(1, ["compressed", "fedavg", "fedavg"]), (2, ["compressed", "compressed", "fedavg"]), (3, ["compressed"] * 3)],
)
def test_plateau_switches_after_its_patience(tmp_path: Path, patience: int, expected: list[str]) -> None:
    """No round gains what is asked for, so each one counts against the patience."""
    plateau: Row = {"schedule": "plateau", "recovery": "fedavg", "plateau_patience": patience, "plateau_gain": 0.99}
    federate(tmp_path / "run", clients=2, **plateau)
    assert kinds(tmp_path / "run") == expected


def test_plateau_does_not_switch_while_accuracy_gains(tmp_path: Path) -> None:
    """Float32 updates in rounds that may be compressed rounds: they learn in every round."""
    settings = QUICK | {"compressor": "none", "partition": "iid", "lr": 0.02, "local_epochs": 1}
    federate(tmp_path / "run", **settings, schedule="plateau", plateau_patience=1, plateau_gain=0.01)
    assert kinds(tmp_path / "run") == ["compressed", "compressed", "compressed"]


# The server


def step_of(folder: Path, **settings: object) -> Weights:
    """What full rounds with these settings add to the initial weights."""
    given: Row = {"schedule": "fedavg", "clients": 2, "rounds": 1} | settings
    federate(folder, **given)
    model = fresh_model(settings_of(folder, **given))
    start = weights_of(model)
    return {name: value - start[name] for name, value in saved_weights(folder, model).items()}


def test_what_the_server_does_with_the_average_follows_its_formula(tmp_path: Path) -> None:
    plain, twice = step_of(tmp_path / "plain"), step_of(tmp_path / "twice", rounds=2)
    half = step_of(tmp_path / "half", server_lr=0.5)
    adam = step_of(tmp_path / "adam", server_optimizer="adam", server_lr=0.01)
    momentum = step_of(tmp_path / "momentum", server_optimizer="momentum", server_momentum=0.75, rounds=2)
    average = step_of(tmp_path / "average", ema_decay=0.75, rounds=2)
    for name, step in plain.items():
        for found, expected in (
            (half[name], step / 2),
            (adam[name], 0.01 * step / (step.abs() + 1e-3)),
            # The second round starts from the same weights in both, so it differs by the momentum alone.
            (momentum[name], twice[name] + 0.75 * step),
            (average[name], (step + twice[name]) / 2),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("optimizer", [{"server_optimizer": "momentum", "server_momentum": 0.5},
                                       {"server_optimizer": "adam", "server_lr": 0.01}])  # fmt: skip
def test_server_optimizers_learn(tmp_path: Path, optimizer: Row) -> None:
    summary = federate(tmp_path / "run", **QUICK, **optimizer, schedule="fedavg", rounds=3)
    assert summary["final_accuracy"] > 0.5


def test_a_fraction_of_the_clients_is_asked(tmp_path: Path) -> None:
    first, again = (
        federate(tmp_path / name, client_fraction=0.5, rounds=4, schedule="fedavg")["weights_sha256"]
        for name in ("first", "again")
    )
    assert first == again
    asked = [
        {row["client"] for row in rows(tmp_path / "first", "ledger") if (row["round"], row["kind"]) == (n, "fedavg")}
        for n in (1, 2, 3, 4)
    ]
    assert [len(names) for names in asked] == [2, 2, 2, 2]
    assert len({frozenset(names) for names in asked}) > 1
    assert [row["clients"] for row in rows(tmp_path / "first")] == [0, 2, 2, 2, 2]
    assert (
        len({json.loads((tmp_path / n / "summary.json").read_text())["weights_sha256"] for n in ("first", "again")})
        == 1
    )


def test_min_clients_outweighs_the_fraction(tmp_path: Path) -> None:
    federate(tmp_path / "run", client_fraction=0.1, min_clients=3, rounds=1, schedule="fedavg")
    assert rows(tmp_path / "run")[1]["clients"] == 3


# Faults: client 2 of four goes wrong in round 2 of three


def faulty(fault: Fault, *, names: Iterable[str] = ("2",), rounds: Iterable[int] = (2,)) -> ClientApp:
    """The real client app, but what some clients reply in some rounds is a fault's."""
    app = ClientApp()
    app.query()(honest.hello)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = honest.train(message, context)
        wrong = honest.client_name(context) in names and int(message.metadata.group_id) in rounds
        return fault(message, reply) if wrong else reply

    return app


def content(message: Message) -> bytes:
    value = message.content.config_records[RECORD][FIELD]
    assert isinstance(value, bytes)
    return value


def saying(request: Message, data: bytes) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord({FIELD: data})}), reply_to=request)


def raising(request: Message, reply: Message) -> Message:
    raise ZeroDivisionError("nothing to divide by")


def error(request: Message, reply: Message) -> Message:
    return Message(Error(code=0, reason="the disk is full\nand the printer burns"), reply_to=request)


def nothing(request: Message, reply: Message) -> Message:
    return Message(RecordDict(), reply_to=request)


def text(request: Message, reply: Message) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord({FIELD: "a payload"})}), reply_to=request)


def no_message(request: Message, reply: Message) -> Message:
    return "not even a message"  # type: ignore[return-value]


def garbage(data: bytes) -> Fault:
    return lambda request, reply: saying(request, data)


def with_reply(**changes: Any) -> Fault:
    return lambda request, reply: saying(
        request, dataclasses.replace(TrainReply.from_bytes(content(reply)), **changes).to_bytes()
    )


def with_payload(change: Callable[[bytes], bytes]) -> Fault:
    """The honest reply with another payload."""

    def fault(request: Message, reply: Message) -> Message:
        return with_reply(payload=change(TrainReply.from_bytes(content(reply)).payload))(request, reply)

    return fault


def with_header(**changes: Any) -> Fault:
    """The honest reply with other fields in its payload's header, the checksum fitting."""

    def change(data: bytes) -> bytes:
        codec = data[5]
        payload = read_payload(data, codec=codec, round_=2, fingerprint=None, max_bytes=len(data))
        return dataclasses.replace(payload, **changes).to_bytes()

    return with_payload(change)


def with_body(change: Callable[[bytes], bytes]) -> Fault:
    """The honest reply with another body in its payload, the checksum fitting."""

    def patched(data: bytes) -> bytes:
        body = change(data[HEADER_BYTES:])
        return data[: HEADER_BYTES - 4] + struct.pack("<I", zlib.crc32(body)) + body

    return with_payload(patched)


def floats(value: float) -> Fault:
    return with_body(lambda body: struct.pack("<f", value) * (len(body) // 4))


FAULTS: dict[str, tuple[str, Fault, str]] = {
    "exception": ("fedavg", raising, "ZeroDivisionError.*nothing to divide by"),
    "error": ("fedavg", error, "the disk is full and the printer burns"),
    "no message": ("fedavg", no_message, "not a Message"),
    "no record": ("fedavg", nothing, "reply is NoneType, expected bytes"),
    "text": ("fedavg", text, "reply is str, expected bytes"),
    "empty": ("fedavg", garbage(b""), "reply has 0 bytes"),
    "ones": ("fedavg", garbage(b"\xff" * 99), "expected finite ones"),
    "words": ("fedavg", garbage(b"no reply at all, " * 9), "expected finite ones"),
    "head only": ("fedavg", with_reply(payload=b""), "payload has 0 bytes"),
    "truncated": ("fedavg", with_payload(lambda data: data[:-7]), "checksum"),
    "too long": ("fedavg", with_payload(lambda data: data + b"!"), "payload has [0-9]+ bytes, expected"),
    "flipped bit": ("fedavg", with_payload(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "checksum"),
    "short body": ("fedavg", with_body(lambda body: body[:-4]), "float32 body has [0-9]+ bytes"),
    "nan": ("fedavg", floats(float("nan")), "not finite"),
    "infinity": ("fedavg", floats(float("-inf")), "not finite"),
    "huge": ("fedavg", floats(3e38), "more than can be added"),
    "other weights": ("fedavg", with_header(fingerprint=b"\x07" * 8), "relative to weights 0707"),
    "other codec": ("fedavg", with_header(codec=2), "codec 2, expected 1"),
    "old round": ("fedavg", with_header(round=1), "belongs to round 1, expected 2"),
    "more images": ("fedavg", with_reply(examples=10_000), "reply has 10000 examples, expected at most [0-9]+"),
    "no images": ("fedavg", with_reply(examples=0), "0 images"),
    "nan metric": ("fedavg", with_reply(train_loss=float("nan")), "expected finite ones"),
    "exception in a compressed round": ("compressed", raising, "nothing to divide by"),
    "truncated proxies": ("compressed", with_payload(lambda data: data[:-7]), "checksum"),
    "short proxies": ("compressed", with_body(lambda body: body[:-7]), "bytes|end early|end after"),
    "other proxies": ("compressed", with_body(lambda body: bytes([body[0] ^ 1]) + body[1:]), "flags"),
    "full in a compressed round": ("compressed", with_header(codec=1), "codec 1, expected 2"),
}


@pytest.fixture(scope="module")
def without_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By schedule, the weights (SHA-256) of a run in which client 2's reply of round 2 is lost."""
    folder = tmp_path_factory.mktemp("lost")
    return {
        schedule: federate(folder / schedule, faulty(error), schedule=schedule)["weights_sha256"]
        for schedule in ("fedavg", "compressed")
    }


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_reply_is_left_out_and_named(name: str, tmp_path: Path, without_two: dict[str, str]) -> None:
    schedule, fault, reason = FAULTS[name]
    summary = federate(tmp_path / "run", faulty(fault), schedule=schedule)
    metrics = rows(tmp_path / "run")
    assert [row["clients"] for row in metrics] == [0, 4, 3, 4]
    assert [len(row["failures"]) for row in metrics] == [0, 0, 1, 0]
    (failure,) = metrics[2]["failures"]
    assert failure["client"] == "2"
    assert re.search(reason, failure["reason"])
    assert "\n" not in failure["reason"]
    # Nothing of the reply got into the model: the weights are those of a run that lost it.
    assert summary["weights_sha256"] == without_two[schedule]
    assert (tmp_path / "run" / "report.html").exists()


def test_a_lost_reply_matters(without_two: dict[str, str], command_run: CommandRun) -> None:
    """Otherwise the comparison of the weights above would say nothing."""
    assert without_two["compressed"] != command_run.summary["weights_sha256"]


@pytest.mark.parametrize(
    ("renumbered", "reason"), [(False, "belongs to round 1, expected 2"), (True, "relative to weights")]
)
def test_a_replayed_payload_is_refused(tmp_path: Path, renumbered: bool, reason: str) -> None:
    """Client 2 sends its payload of round 1 again in round 2, as it is or with the number of round 2."""
    first: list[TrainReply] = []

    def replay(request: Message, reply: Message) -> Message:
        if request.metadata.group_id == "1":
            first.append(TrainReply.from_bytes(content(reply)))
            return reply
        old = first[0].payload
        if renumbered:
            payload = read_payload(old, codec=old[5], round_=1, fingerprint=None, max_bytes=len(old))
            old = Payload(payload.codec, 2, payload.fingerprint, payload.body).to_bytes()
        return saying(request, dataclasses.replace(first[0], payload=old).to_bytes())

    federate(tmp_path / "run", faulty(replay, rounds=(1, 2)), rounds=2)
    metrics = rows(tmp_path / "run")
    assert [row["clients"] for row in metrics] == [0, 4, 3]
    (failure,) = metrics[2]["failures"]
    assert failure["client"] == "2"
    assert reason in failure["reason"]


def test_proxies_that_decode_to_nan_are_refused(tmp_path: Path) -> None:
    """Every number sent is finite, but two labels add up to infinity, which a scale of 0 turns into NaN."""
    given: Row = {"schedule": "compressed", "bits": 32, "proxies": 2, "correction": 0.0, "rounds": 2}
    settings = settings_of(tmp_path / "run", **given)
    shape = FederatedData.of(settings.data, settings.run.seed).shape
    network = ReferenceModel(fresh_model(settings).eval(), shape)
    code = ProxyCode.of(network, ProxySettings.of(settings.codec, settings.run.device), 2)
    labels = torch.zeros(2, shape.classes)
    labels[:, 0] = 3e38
    images, scales = torch.zeros(2, *code.shape), torch.zeros(code.tensors)
    evil = with_body(lambda body: body[:6] + code.write(ProxyData((images,), labels, None, scales)))
    federate(tmp_path / "run", faulty(evil), **given)
    assert [row["clients"] for row in rows(tmp_path / "run")] == [0, 4, 3]
    assert "2" in rows(tmp_path / "run")[2]["failures"][0]["client"]


def test_a_round_does_not_wait_for_ever(tmp_path: Path, without_two: dict[str, str]) -> None:
    """A reply that comes after the timeout does not count, and its client takes part again in the next round."""

    def late(request: Message, reply: Message) -> Message:
        end = time.monotonic() + 4.5
        while time.monotonic() < end:  # in steps, so that the thread can be interrupted
            time.sleep(0.02)
        return reply

    summary = federate(tmp_path / "run", faulty(late), schedule="fedavg", round_timeout=4.0)
    metrics = rows(tmp_path / "run")
    assert [row["clients"] for row in metrics] == [0, 4, 3, 4]
    assert [failure["client"] for failure in metrics[2]["failures"]] == ["2"]
    assert metrics[2]["failures"][0]["reason"]
    assert metrics[2]["seconds"] >= 4
    assert summary["weights_sha256"] == without_two["fedavg"]


def test_a_silent_client_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """It still sleeps when the last round is over, and is interrupted."""

    def never(request: Message, reply: Message) -> Message:
        while True:
            time.sleep(0.02)

    federate(tmp_path / "run", faulty(never, rounds=(1,)), schedule="fedavg", rounds=1, round_timeout=3.0)
    assert [row["clients"] for row in rows(tmp_path / "run")] == [0, 3]


def test_a_silent_client_does_not_hold_up_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third round ends long before its timeout, which is longer than the limit of this test."""

    def never(request: Message, reply: Message) -> Message:
        while True:
            time.sleep(0.02)

    monkeypatch.setattr("server.stragglers.MIN_SECONDS", 0.5)
    federate(tmp_path / "run", faulty(never, rounds=(3,)), schedule="fedavg", rounds=3, straggler_factor=3.0)
    assert [row["clients"] for row in rows(tmp_path / "run")] == [0, 4, 4, 3]


def test_a_busy_machine_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes ten times as long as a round before is waited for."""
    slow = faulty(lambda request, reply: time.sleep(3) or reply, rounds=(3,))
    monkeypatch.setattr("server.stragglers.MIN_SECONDS", 0.1)
    late = federate(tmp_path / "late", slow, schedule="fedavg", rounds=3)
    assert late["weights_sha256"] == federate(tmp_path / "run", schedule="fedavg", rounds=3)["weights_sha256"]
    assert [row["clients"] for row in rows(tmp_path / "late")] == [0, 4, 4, 4]


def test_the_client_whose_proxies_are_shown_may_fail(tmp_path: Path) -> None:
    federate(tmp_path / "run", faulty(garbage(b"?"), names=("0",), rounds=(1,)), rounds=2)
    assert [row["clients"] for row in rows(tmp_path / "run")] == [0, 3, 4]
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("fault", [raising, garbage(b"?")])
def test_a_round_that_all_clients_fail_stops_the_run(tmp_path: Path, fault: Fault) -> None:
    with pytest.raises(RunError, match=r"^round 2: no valid reply from 4 clients"):
        federate(tmp_path / "run", faulty(fault, names="0123"), schedule="fedavg")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()
    assert [row["round"] for row in rows(tmp_path / "run")] == [0, 1]
    # What the first round gave is kept.
    federate(tmp_path / "one", schedule="fedavg", rounds=1, lr_final_factor=1.0)
    model = fresh_model(settings_of(tmp_path / "one"))
    assert weights_sha256(saved_weights(tmp_path / "run", model)) == weights_sha256(
        saved_weights(tmp_path / "one", model)
    )


def test_the_command_line_fails_where_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every client's training diverges."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")
    monkeypatch.setattr(
        sys,
        "argv",
        ["tofu", "run", "--json", "--model", "mlp", "--clients", "2", "--lr", "1e30", "--run-folder", "run"],
    )
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.startswith("error: round 1: no valid reply from 2 clients (local training diverged")
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_that_noise_ruins_names_the_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--model mlp --clients 2 --rounds 1 --schedule fedavg --noise-multiplier 9 --clip-norm 9 --max-evals 2"
    monkeypatch.setattr(sys, "argv", ["tofu", "run", *options.split(), "--run-folder", "run"])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == 0
    assert re.search(r"diverges: .*; the noise \(clip-norm 9, noise-multiplier 9\) is .*: more clients in a round", err)
    assert "smaller lr" not in err


def test_flower_sees_a_failed_run_fail(tmp_path: Path) -> None:
    """Its simulation catches `Exception` alone: what is none leaves the run "completed"."""
    config = settings_of(tmp_path / "run").to_config() | {"ratio": 1e6}
    with pytest.raises(BaseException, match="ratio") as caught:
        run_in_process(server_app, honest.app, run_config=config, num_supernodes=4)
    assert isinstance(caught.value, Exception)


# Faults in the introduction, before the first round


def introducing(client: str, introduce: Callable[[Message, Message], Message]) -> ClientApp:
    """The real client app, but one client introduces itself otherwise."""
    app = ClientApp()
    app.train()(honest.train)

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        reply = honest.hello(message, context)
        return introduce(message, reply) if honest.client_name(context) == client else reply

    return app


def called(name: object, examples: object = 10) -> Fault:
    def introduce(request: Message, reply: Message) -> Message:
        record = ConfigRecord({"client": name, "examples": examples})  # type: ignore[dict-item]
        return Message(RecordDict({RECORD: record}), reply_to=request)

    return introduce


@pytest.mark.parametrize(
    "introduce",
    [raising, error, nothing, called(7), called(""), called("x" * 1000), called("2", 0), called("2", "many"),
     called("0")],
    ids=["exception", "error", "nothing", "number", "nameless", "endless", "no images", "words", "of another"],
)  # fmt: skip
def test_a_client_that_cannot_introduce_itself_takes_no_part(tmp_path: Path, introduce: Fault) -> None:
    federate(tmp_path / "run", introducing("2", introduce), schedule="fedavg", rounds=2)
    assert [row["clients"] for row in rows(tmp_path / "run")] == [0, 3, 3]
    senders = {row["client"] for row in rows(tmp_path / "run", "ledger") if row["kind"] == "fedavg"}
    assert senders == {"0", "1", "3"}


@pytest.mark.parametrize(
    "name",
    ["hospital", "\x1b[31mred", "<b>", "../up", "0x1",
     "²"],
)  # fmt: skip
def test_a_client_may_have_any_name(tmp_path: Path, name: str) -> None:
    federate(tmp_path / "run", introducing("2", called(name, 10_000)), schedule="fedavg", rounds=1)
    assert [row["clients"] for row in rows(tmp_path / "run")] == [0, 4]
    assert name in {row["client"] for row in rows(tmp_path / "run", "ledger")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_no_client_at_all_stops_the_run(tmp_path: Path) -> None:
    app = introducing("0", error)
    with pytest.raises(RunError, match="0 clients connected"):
        federate(tmp_path / "run", app, clients=1, rounds=1, round_timeout=0.5)
    assert not (tmp_path / "run" / "summary.json").exists()


# The compressed downlink


DOWN: Row = {"downlink": "proxy", "downlink_ratio": 20.0, "rounds": 5}


def downlinks(folder: Path) -> dict[tuple[int, str], list[int]]:
    """(round, client) -> payload bytes of the requests that it was sent."""
    sent: dict[tuple[int, str], list[int]] = {}
    for row in rows(folder, "ledger"):
        if row["direction"] == "downlink" and "payload_bytes" in row:
            sent.setdefault((row["round"], row["client"]), []).append(row["payload_bytes"])
    return sent


def test_a_compressed_downlink_learns_and_sends_less(tmp_path: Path) -> None:
    settings: Row = QUICK | {"rounds": 6, "max_evals": 30, "ratio": 30.0, "ema_decay": 0.5}
    plain = federate(tmp_path / "plain", **settings)
    both = federate(tmp_path / "both", **settings, downlink="proxy", downlink_ratio=20.0)
    assert plain["both_ratio"] < 2
    assert both["both_ratio"] > 10
    assert both["fedavg_downlink_bytes"] == plain["downlink_bytes"] == plain["fedavg_downlink_bytes"]
    assert both["uplink_bytes"] == pytest.approx(plain["uplink_bytes"], rel=0.01)
    assert both["final_accuracy"] > plain["final_accuracy"] - 0.05
    assert both["final_accuracy"] > 0.8


def test_a_client_that_lost_its_state_is_sent_the_weights(tmp_path: Path) -> None:
    def forget(message: Message, context: Context, next_: Any) -> Message:
        if message.metadata.group_id == "3" and context.node_config["partition-id"] == 1:
            context.state = RecordDict()
        return next_(message, context)  # type: ignore[no-any-return]

    app = ClientApp(mods=[forget])
    app.query()(lambda message, context: honest.app(message, context))
    app.train()(lambda message, context: honest.app(message, context))
    federate(tmp_path / "run", app, **DOWN)
    sent = downlinks(tmp_path / "run")
    model = fresh_model(settings_of(tmp_path, **DOWN))
    whole = HEADER_BYTES + layout_of(model).float32_bytes
    for (round_, client), sizes in sent.items():
        step = sent[round_, "0"][0]
        assert step <= whole / 20
        assert (step == 0) == (round_ == 1)
        assert sizes == [step] + ([whole] if (round_, client) == (3, "1") else [])
    assert all(row["clients"] == 4 and not row["failures"] for row in rows(tmp_path / "run")[1:])
    errors = [row for row in rows(tmp_path / "run", "ledger") if row["direction"] == "uplink" and row["round"] == 3]
    assert len([row for row in errors if row["client"] == "1"]) == 2  # the call for weights, and the reply


def test_clients_that_sat_out_are_sent_the_steps_they_lack(tmp_path: Path) -> None:
    federate(tmp_path / "run", **DOWN | {"rounds": 8, "client_fraction": 0.5, "downlink_ratio": 30.0})
    sent = downlinks(tmp_path / "run")
    last: dict[str, int] = {}
    missed: dict[tuple[int, str], tuple[int, int]] = {}  # -> number of steps, and their bytes
    for (round_, client), (size,) in sorted(sent.items()):
        missed[round_, client] = round_ - last.get(client, 1), size
        last[client] = round_
    steps = [size for count, size in missed.values() if count == 1]  # one step may hold proxies, another none
    assert all(count * min(steps) * 0.95 <= size <= count * max(steps) * 1.05 for count, size in missed.values())
    assert len({count for count, _ in missed.values()}) > 1


def test_fedavg_rounds_send_whole_weights_and_the_next_steps_start_there(tmp_path: Path) -> None:
    federate(tmp_path / "run", **DOWN | {"schedule": "switch", "recovery": "fedavg", "switch_round": 5})
    sent = downlinks(tmp_path / "run")
    whole = HEADER_BYTES + layout_of(fresh_model(settings_of(tmp_path, **DOWN))).float32_bytes
    assert {sizes[0] for (round_, _), sizes in sent.items() if round_ == 5} == {whole}


def test_a_run_with_a_compressed_downlink_repeats(tmp_path: Path) -> None:
    one, two = (federate(tmp_path / name, **DOWN, workers=n)["weights_sha256"] for name, n in (("a", 1), ("b", 3)))
    assert one == two
