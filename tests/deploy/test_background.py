"""The lines of a server app as `tofu deploy run` shows them."""

import logging
from pathlib import Path

import pytest

from deploy.background import name_nodes
from server.app import _is_no_repetition
from tofu.errors import RunError

NAMES = {"791073110307500877": "node-0", "42": "node-1"}
LOGS = Path("F/logs")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "note: node 791073110307500877 cannot take part: see its log",
            "note: node-0 (node 791073110307500877) cannot take part: see its log F/logs/node-0-exec.log",
        ),
        ("1 client connected (no data: see its log)", "1 client connected (no data: see its log F/logs/NODE-exec.log)"),
        (
            "node 42 has the name of client 0, as node 791073110307500877 does",
            "node-1 (node 42) has the name of client 0, as node-0 (node 791073110307500877) does",
        ),
        ("node 7 is not registered here", "node 7 is not registered here"),
        ("round 42/50  compressed  accuracy 42.00%", "round 42/50  compressed  accuracy 42.00%"),
    ],
)
def test_nodes_have_names_and_logs_a_place(text: str, shown: str) -> None:
    assert name_nodes(NAMES, LOGS, text) == shown


def test_flower_does_not_repeat_an_error_that_was_shown() -> None:
    def kept(text: str, error: Exception | None = None) -> bool:
        exc_info = (type(error), error, None) if error else None
        return _is_no_repetition(logging.LogRecord("flwr", logging.ERROR, "", 0, text, (), exc_info))

    assert not kept("ServerApp raised an exception", RunError("round 1: 0 clients connected"))
    assert not kept("Exit Code: 201\nAn unhandled exception occurred in the ServerApp.")
    assert kept("ServerApp raised an exception", KeyError("bug"))
    assert kept("the connection was lost")
