"""Structured logs: every line is one JSON object that says when, who and where, and nobody else hears of them."""

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.processes import run
from tofu.errors import TofuError
from tofu.log import FILE, about, start_logging

LOG = logging.getLogger("tofu.server")
BIG = 2**64 - 1


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(FILE, raising=False)
    yield
    monkeypatch.delenv(FILE, raising=False)
    start_logging("text")


def test_a_line_says_when_who_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging("json")
    start_logging("json")  # to be called again changes nothing
    before = datetime.now(UTC)
    LOG.warning("client failed", extra=about(run=BIG, round=3, node=BIG - 1, reason="a\nb \x1b[2J\u202e"))
    LOG.info("plain %s", "words")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.isascii()  # nothing hostile reaches a terminal
    first, second = map(json.loads, err.splitlines())
    assert abs((datetime.fromisoformat(first.pop("time")) - before).total_seconds()) < 60
    assert first == {
        "level": "warning", "app": "server", "event": "client failed", "run": str(BIG), "round": 3,
        "node": str(BIG - 1), "reason": "a\nb \x1b[2J\u202e",
    }  # fmt: skip
    assert (second["event"], second["run"], second["round"], second["node"]) == ("plain words", None, None, None)


def test_an_unforeseen_error_brings_its_traceback_on_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging("json")
    try:
        raise ValueError("what now")
    except ValueError:
        LOG.exception("failed", extra=about(run=1))
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: what now" in json.loads(line)["traceback"]


def test_text_logs_nothing_of_its_own() -> None:
    """In a process of its own: pytest listens to all logs."""
    code = """
import logging
from tofu.log import about, start_logging
start_logging("text")
logging.getLogger("tofu.client").warning("client failed", extra=about(run=1))
"""
    done = run([sys.executable, "-c", code], check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_environment_names_a_file_whatever_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "app.jsonl"
    monkeypatch.setenv(FILE, str(file))
    start_logging("text")
    LOG.info("one", extra=about(run=1))
    file.rename(tmp_path / "app.jsonl.1")  # as logrotate does
    LOG.info("two", extra=about(run=1))
    assert json.loads((tmp_path / "app.jsonl.1").read_text())["event"] == "one"
    assert json.loads(file.read_text())["event"] == "two"
    monkeypatch.delenv(FILE)
    start_logging("text")
    LOG.info("three")
    assert file.read_text().count("\n") == 1


def test_a_file_that_cannot_be_written_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE, str(tmp_path / "no" / "such" / "folder"))
    with pytest.raises(TofuError, match=r"^TOFU_LOG='.*' is not usable: expected a file that can be written"):
        start_logging("text")
