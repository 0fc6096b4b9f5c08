"""The lines of a server app as `tofu deploy run` shows them."""

from pathlib import Path

import pytest

from deploy.background import name_nodes

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
