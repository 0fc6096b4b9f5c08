"""The whole topology as processes on loopback: TLS, authenticated nodes, runs that complete and runs that fail."""

import json
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import certificates
from deploy.processes import LocalCluster, exit_status
from tests.integration.deployed import progress, run_on
from tests.processes import NO_TOTAL_LIMIT, wait_for

pytestmark = NO_TOTAL_LIMIT

_PYPROJECT = """
[project]
name = "throwaway"
version = "0.1.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41.0"]

[tool.flwr.app]
publisher = "tofu"

[tool.flwr.app.components]
serverapp = "throwaway.server:app"
clientapp = "throwaway.client:app"

[tool.flwr.app.config]
fail = false
"""

_CLIENT = """
from flwr.app import ConfigRecord, RecordDict, Message
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message, context):
    record = ConfigRecord({"partition": context.node_config["partition-id"]})
    return Message(RecordDict({"r": record}), reply_to=message)
"""

_SERVER = """
import json
import time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    if context.run_config["fail"]:
        raise ValueError("told to fail")
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    nodes = list(grid.get_node_ids())
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes])
    found = sorted(reply.content["r"]["partition"] for reply in replies)
    Path("result.json").write_text(json.dumps({"partitions": found}))
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the Flower app that is run."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "throwaway").mkdir()
    (folder / "pyproject.toml").write_text(_PYPROJECT)
    for name, text in (("__init__", ""), ("client", _CLIENT), ("server", _SERVER)):
        (folder / "throwaway" / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def federation(app: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("federation"), nodes=2, app=app) as federation:
        yield federation
        leaders = list(federation.processes.values())
    assert all(process.poll() is not None for process in leaders)


def test_a_query_goes_round_and_the_run_is_reported_complete(federation: LocalCluster) -> None:
    run = run_on(federation, {})
    assert run.completed, run.log
    assert run.traffic_bytes > 0
    assert json.loads((federation.folder / "result.json").read_text())["partitions"] == [0, 1]


def test_a_run_that_fails_is_reported_failed(federation: LocalCluster) -> None:
    run = run_on(federation, {"fail": True})
    assert not run.completed
    assert run.status == "finished:failed"
    assert "told to fail" in run.log + run.details


def test_a_node_with_an_unregistered_key_is_refused(federation: LocalCluster) -> None:
    stranger = federation.start_node("stranger", partition=2, register=False)
    wait_for(lambda: exit_status(stranger) is not None, lambda: progress(federation))
    assert exit_status(stranger) != 0
    federation.end("stranger", "stranger-exec")
    assert "Exit Code: 305" in (federation.logs / "stranger.log").read_text()


def _listening(groups: set[int]) -> list[str]:
    """Hexadecimal addresses on which processes of these groups listen, as the kernel lists them."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    by_socket = {f"socket:[{row[9]}]": row[1].partition(":")[0] for row in rows if row[3] == "0A"}
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if os.getpgid(int(folder.parent.name)) in groups:
                found += [by_socket[link] for fd in folder.iterdir() if (link := os.readlink(fd)) in by_socket]
        except OSError:
            continue  # ended while we looked
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads the kernel's list of sockets")
def test_everything_listens_on_loopback_only(federation: LocalCluster) -> None:
    assert _listening({leader.pid for leader in federation.processes.values()}) == ["0100007F"] * 3


def test_the_server_proves_who_it_is_to_those_who_have_the_ca(federation: LocalCluster) -> None:
    keys = federation.folder / "keys"
    [address] = {line for line in (federation.folder / "homes/flwr/config.toml").read_text().split('"') if ":" in line}
    host, _, port = address.partition(":")
    for trust, accepted in ((keys / "ca.crt", True), (None, False)):
        context = ssl.create_default_context(cafile=trust)
        with socket.create_connection((host, int(port))) as plain:
            try:
                context.wrap_socket(plain, server_hostname=host).close()
                assert accepted
            except ssl.SSLCertVerificationError:
                assert not accepted


def test_keys_are_private_and_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--host", "127.0.0.1", "--host", "fl.example.org", "--node", "a", "--node", "b"]
    assert certificates.main(arguments) == 0
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {"ca.key", "server.key", "a", "b"}
    assert {name for name, mode in modes.items() if mode == 0o644} == {"ca.crt", "server.pem", "a.pub", "b.pub"}
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    capsys.readouterr()
    for again in (arguments, [str(tmp_path), "--node", "a"], [str(tmp_path), "--node", "../c"]):
        assert certificates.main(again) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
