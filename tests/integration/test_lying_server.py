"""A server that isolates one client's update in a secure sum by giving the others something else."""

import contextlib
import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

import tofu.settings
from client import app as honest
from deploy.identities import make_identities
from server.app import app as server_app
from server.app import serve_in_process
from tofu.errors import RunError
from tofu.flower.in_process import run_in_process
from tofu.imports import code_digest
from tofu.observers.base import Observer
from tofu.rounds.record import read_rounds
from tofu.settings import Settings
from tofu.wire import FIELD, RECORD, TrainRequest

SECURE: dict[str, Any] = {
    "clients": 4, "rounds": 1, "local_epochs": 1, "train_images": 200, "schedule": "secure", "checkpoint": False,
}  # fmt: skip


def app_with_settings_for_others(name: str, value: object) -> ClientApp:
    """The real client app; all clients but client 0 receive another value of one setting, as a server could send it."""
    app = ClientApp()

    def changed(context: Context) -> Context:
        if honest.client_name(context) != "0":
            context.run_config[name] = value  # type: ignore[assignment]
        return context

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        return honest.hello(message, changed(context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return honest.train(message, changed(context))

    @app.query("secure")
    def secure(message: Message, context: Context) -> Message:
        return honest.secure(message, changed(context))

    return app


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 1e-30),
        ("local-epochs", 2),
        ("weight-decay", 1e3),
        ("batch-size", 7),
        ("seed", 5),
        ("error-feedback", 0.5),
    ],
)
def test_clients_with_other_settings_are_not_summed(name: str, value: object, tmp_path: Path) -> None:
    app = app_with_settings_for_others(name, value)
    with pytest.raises(RunError, match="no round succeeded, so the model is untrained"):
        serve_in_process(app, Settings.of(SECURE | {"run_folder": str(tmp_path / "run")}), Observer())
    record = read_rounds(tmp_path / "run" / "metrics.jsonl")[-1]
    assert record.abandoned
    assert {failure.client for failure in record.failures} >= {"1", "2", "3"}


def test_clients_with_the_same_settings_are_summed(tmp_path: Path) -> None:
    app = app_with_settings_for_others("lr", Settings().training.lr)
    serve_in_process(app, Settings.of(SECURE | {"run_folder": str(tmp_path / "run")}), Observer())
    assert not read_rounds(tmp_path / "run" / "metrics.jsonl")[-1].abandoned


def test_clients_with_another_version_of_the_app_are_not_summed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threading.local()
    monkeypatch.setattr(tofu.settings, "code_digest", lambda *names: getattr(here, "other", code_digest(*names)))
    app = ClientApp()
    app.query()(honest.hello)
    app.query("secure")(honest.secure)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if honest.client_name(context) == "0":
            return honest.train(message, context)
        here.other = bytes(32)
        try:
            return honest.train(message, context)
        finally:
            del here.other

    with pytest.raises(RunError, match="no round succeeded, so the model is untrained"):
        serve_in_process(app, Settings.of(SECURE | {"run_folder": str(tmp_path / "run")}), Observer())
    failures = read_rounds(tmp_path / "run" / "metrics.jsonl")[-1].failures
    assert {failure.client for failure in failures} == {"1", "2", "3"}
    assert all("app or encoding are not those" in failure.reason for failure in failures)


def app_told_that_nothing_arrived() -> ClientApp:
    """The real client app; client 0 is always told that the server did not add its last reply."""
    app = ClientApp()
    app.query()(honest.hello)
    app.query("secure")(honest.secure)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if honest.client_name(context) == "0":
            request = TrainRequest.from_bytes(message.content.config_records[RECORD][FIELD])
            changed = dataclasses.replace(request, acknowledged=-1).to_bytes()
            message.content[RECORD] = ConfigRecord({FIELD: changed})
        return honest.train(message, context)

    return app


@pytest.mark.parametrize("identities", [True, False])
def test_a_masked_vector_is_not_sent_again_beside_others_that_are_zero(identities: bool, tmp_path: Path) -> None:
    """Without an identity the server is trusted, and a client believes what it says about lost replies."""
    make_identities(tmp_path / "keys", ["0", "1", "2", "3"])
    known = str(tmp_path / "keys" / "identities.json")

    def node(partition: int) -> dict[str, Any]:
        own = {"identity": str(tmp_path / "keys" / f"{partition}.identity"), "identities": known}
        return own if identities else {}

    weights = []
    for name, app in (("honest", honest.app), ("lied", app_told_that_nothing_arrived())):
        settings = Settings.of(
            SECURE | {"rounds": 2, "run_folder": str(tmp_path / name), "secure_identities": known if identities else ""}
        )
        run_in_process(server_app, app, run_config=settings.to_config(), num_supernodes=4, node_config=node)
        weights.append(json.loads((tmp_path / name / "summary.json").read_text())["weights_sha256"])
    assert (weights[0] == weights[1]) is identities


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"min-noise-multiplier": 1.0}, "a secure sum of which 0.707 of noise-multiplier=1 is sure is refused"),
        ({"allowed-rounds": "secure", "policy": ""}, "a secure round without identities is refused"),
    ],
)
def test_a_client_without_identity_refuses_what_impersonated_clients_would_not_protect(
    node: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """The server could be all the other members of the sum."""
    settings = Settings.of(
        SECURE | {"noise_multiplier": 1.0, "norm": "none", "secure_ratio": 1.5, "run_folder": str(tmp_path / "run")}
    )
    with pytest.raises(RunError, match=r"no round succeeded|no secure round succeeded"):
        run_in_process(
            server_app, honest.app, run_config=settings.to_config(), num_supernodes=4, node_config=lambda _: node
        )
    failures = read_rounds(tmp_path / "run" / "metrics.jsonl")[-1].failures
    assert len(failures) == 4
    assert all(reason in failure.reason for failure in failures)


def test_a_client_with_a_minimum_of_noise_does_not_say_how_many_images_it_has(tmp_path: Path) -> None:
    counts = []
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        reply = honest.hello(message, context)
        counts.append(None if reply.has_error() else dict(reply.content.config_records[RECORD]))
        return reply

    app.train()(honest.train)
    for noise, adds in ((0.0, "none"), (1.0, "independent"), (1.0, "none")):  # the server's noise is none for them
        settings = Settings.of(
            SECURE | {"schedule": "fedavg", "noise_multiplier": noise, "norm": "none", "round_timeout": 1.0,
                      "server_noise": adds, "run_folder": str(tmp_path / f"{noise} {adds}")}
        )  # fmt: skip
        with contextlib.suppress(RunError):
            run_in_process(
                server_app, app, run_config=settings.to_config(), num_supernodes=4,
                node_config=lambda _: {"min-noise-multiplier": 1.0},
            )  # fmt: skip
    refused, private = counts[:-4], counts[-4:]
    assert refused == [None] * len(refused)
    assert len(refused) >= 8
    assert [set(record) for record in private] == [{"client", "examples"}] * 4
    assert [record["examples"] for record in private] == [1] * 4
