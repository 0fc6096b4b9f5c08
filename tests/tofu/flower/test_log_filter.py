"""Errors of TOFU are one line in Flower's log, also those of a user's own app."""

import logging
from collections.abc import Iterator

import pytest
from flwr.serverapp.strategy import FedAvg

import tofu
from tests.tofu.flower.quickstart import federate, strategy_of
from tofu.errors import RunError, TofuError
from tofu.flower.log_filter import OneLineErrors

FLOWER = logging.getLogger("flwr")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    tofu.Compressed(FedAvg(), ratio=20)
    with caplog.at_level("ERROR", logger="flwr"):
        yield caplog


def as_flower_does(error: Exception) -> None:
    """Log an error of a ServerApp and its exit code as `flwr-serverapp` does."""
    try:
        raise error
    except Exception as caught:
        FLOWER.error("ServerApp raised an exception", exc_info=caught)
    FLOWER.error("Exit Code: 201\nAn unhandled exception occurred in the ServerApp.")


def test_an_error_is_one_line_without_traceback_or_exit_code(log: pytest.LogCaptureFixture) -> None:
    as_flower_does(RunError("round 1: no client answered"))
    assert [record.getMessage() for record in log.records] == ["error: round 1: no client answered"]
    assert "Traceback" not in log.text


def test_one_that_was_printed_is_not_repeated(log: pytest.LogCaptureFixture) -> None:
    error = RunError("round 1: no client answered")
    error.shown = True
    as_flower_does(error)
    assert not log.records


def test_other_errors_keep_their_traceback(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FLOWER, "filters", [OneLineErrors()])
    as_flower_does(RunError("an earlier run of this process"))
    log.clear()
    as_flower_does(KeyError("bug"))
    assert "Traceback" in log.text
    assert "Exit Code: 201" in log.text


def test_the_traceback_that_ray_logs_as_text_is_dropped(log: pytest.LogCaptureFixture) -> None:
    try:
        raise RunError("round 1: no client answered")
    except RunError as error:
        FLOWER.error("An exception occurred: %s", error)
        FLOWER.error("Traceback (most recent call last):")
    assert [record.getMessage() for record in log.records] == ["An exception occurred: round 1: no client answered"]


def test_misuse_of_an_app_of_ones_own_is_one_line(log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TofuError) as caught:
        federate(tofu.Compressed(strategy_of(), ratio=20), rounds=1)
    as_flower_does(caught.value)
    (line,) = [record.getMessage() for record in log.records if record.levelname == "ERROR"]
    assert line.startswith("error: round 1: no reply of 4 clients can be used")
    assert "add tofu.compress(...) to the mods" in line
