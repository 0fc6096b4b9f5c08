"""The lines of a server app as `tofu deploy run` shows them."""

from pathlib import Path

import pytest

from deploy.background import RunLines, name_nodes

NAMES = {"791073110307500877": "node-0", "42": "node-1"}
LOGS = Path("F/logs")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "note: node 791073110307500877 cannot take part: see its log",
            "note: node-0 (node 791073110307500877) cannot take part: see its log F/logs/node-0-exec.log",
        ),
        ("1 client connected (no data: see its log)", "1 client connected (no data: see its log in F/logs)"),
        (
            "round 1: client 1: the client app failed with KeyError: see its log",
            "round 1: client 1: the client app failed with KeyError: see its log F/logs/node-1-exec.log",
        ),
        ("round 1: client 42: no data: see its log", "round 1: client 42: no data: see its log F/logs/node-1-exec.log"),
        ("round 1: client 7: no data: see its log", "round 1: client 7: no data: see its log in F/logs"),
        (
            "round 1: no valid reply from 2 clients (KeyError: see its log)",
            "round 1: no valid reply from 2 clients (KeyError: see its log in F/logs)",
        ),
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


FLOWER = """Using SuperLink: tofu (127.0.0.1:18208)
Successfully started run 42
\x1b[92mINFO \x1b[0m:      Starting logstream for run_id `42`
INFO :      Start `flwr-serverapp` process
Successfully installed tofu-fl to F/homes/superlink-exec/apps/tofu-fl.
round 1/1  compressed
WARNING :   a node is slow
INFO :
error: no client
sent a reply
"""


def test_flowers_own_lines_are_left_out_and_an_error_comes_once() -> None:
    lines: list[str] = []
    view = RunLines(lines.append)
    for line in FLOWER.splitlines()[:-1]:
        view.add(line)
    shown = ["run 42 started", "round 1/1  compressed", "WARNING :   a node is slow"]
    assert lines == shown
    view.end("round 1: no client sent a reply")
    assert lines == shown
    view.end("")  # an error of a run that did not fail for it is shown
    assert lines == [*shown, "error: no client"]
