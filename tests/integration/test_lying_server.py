"""A server that isolates one client's update in a secure sum by giving the others something else."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import app as honest
from server.app import serve_in_process
from tofu.errors import RunError
from tofu.observers.base import Observer
from tofu.rounds.record import read_rounds
from tofu.settings import Settings

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
