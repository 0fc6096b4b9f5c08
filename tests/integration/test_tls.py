"""The whole topology as processes on loopback: TLS, runs that complete and runs that fail, and who is refused.

One federation serves all tests, in this order. Its app is a small one, which does not import torch. A second node comes
in through deploy/nginx.conf, which passes the Fleet API and nothing else.
"""

import http.client
import json
import os
import socket
import ssl
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy import certificates
from deploy.certificates import make_certificates, make_node_key, make_superexec_secret
from deploy.control import Control
from deploy.processes import LocalCluster
from deploy.superlink import CONTROL_TOKEN, make_token
from deploy.topology import ENVIRONMENT
from tests.deploy.nginx_proxy import needs_nginx, running_proxy
from tests.integration.deployed import run_on, wait_online
from tests.processes import NO_TOTAL_LIMIT, STALL_SECONDS, free_port, run
from tofu.errors import RunError

pytestmark = NO_TOTAL_LIMIT

_BIN = Path(sys.executable).parent

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
    while not list(grid.get_node_ids()):
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
    with LocalCluster(tmp_path_factory.mktemp("federation"), nodes=1, app=app) as federation:
        yield federation
        leaders = list(federation.processes.values())
    assert all(process.poll() is not None for process in leaders)


def test_a_query_goes_round_and_the_run_is_reported_complete(federation: LocalCluster) -> None:
    done = run_on(federation, {})
    assert done.completed, done.log
    assert done.traffic_bytes > 0
    assert json.loads((federation.folder / "result.json").read_text())["partitions"] == [0]


def test_a_run_that_fails_is_reported_failed(federation: LocalCluster) -> None:
    done = run_on(federation, {"fail": True})
    assert not done.completed
    assert done.status == "finished:failed"
    assert "told to fail" in done.log + done.details


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
    assert _listening({leader.pid for leader in federation.processes.values()}) == ["0100007F"] * 2


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


# Strangers


def _ended(folder: Path, command: str, *arguments: str) -> tuple[int, str]:
    """The exit status and the output of a process that has no right to take part, and therefore ends by itself."""
    folder.mkdir()
    environment = {**ENVIRONMENT, "FLWR_HOME": str(folder), "PATH": str(_BIN)}
    done = run([_BIN / command, *arguments], cwd=folder, env=environment, cpu=False)
    return done.returncode, done.stdout + done.stderr


def _refused(folder: Path, command: str, *arguments: str) -> str:
    """The output of such a process, which ends with an error."""
    status, said = _ended(folder, command, *arguments)
    assert status != 0, said
    return said


def test_strangers_are_refused(federation: LocalCluster, tmp_path: Path) -> None:
    wait_online(federation)
    keys = federation.folder / "keys"
    make_certificates(tmp_path / "other", ["127.0.0.1"])
    for name in ("registered", "unregistered"):
        make_node_key(tmp_path / "keys", name)
    federation.control.register(tmp_path / "keys" / "registered.pub", "registered")
    registered = ("--auth-supernode-private-key", str(tmp_path / "keys" / "registered"))
    trusting = ("--root-certificates", str(keys / "ca.crt"))
    node = ("--superlink", federation.address, "--isolation", "process", "--max-retries", "1", "--insecure")
    secure = tuple(argument for argument in node if argument != "--insecure")
    strangers = {
        "no key": (*secure, *trusting),
        "an unregistered key": (
            *secure,
            *trusting,
            "--auth-supernode-private-key",
            str(tmp_path / "keys" / "unregistered"),
        ),
        "another CA": (*secure, *registered, "--root-certificates", str(tmp_path / "other" / "ca.crt")),
        "a key that is online": (*secure, *trusting, "--auth-supernode-private-key", str(keys / "node-0")),
        "plain text": node,
        "plain text with a key": (*node, *registered),
    }
    with ThreadPoolExecutor(len(strangers)) as pool:
        running = {
            name: pool.submit(_refused, tmp_path / name, "flower-supernode", *arguments, "--port", str(free_port()))
            for name, arguments in strangers.items()
        }
        said = {name: process.result() for name, process in running.items()}
    for name in ("no key", "an unregistered key", "a key that is online"):
        assert "Exit Code: 305" in said[name], name
    assert "certificate" in said["another CA"].lower()
    assert not any("usage:" in text for text in said.values())
    statuses = sorted(node["status"] for node in federation.control.nodes())
    assert statuses == ["online", "registered"]  # the one that belongs here, and the key that nobody came in with


def test_a_superexec_with_another_secret_gets_no_work(federation: LocalCluster, tmp_path: Path) -> None:
    make_superexec_secret(tmp_path / "secret")
    # One with the right secret runs until it is told to end; one that is refused ends by itself.
    _, said = _ended(
        tmp_path / "rogue", "flower-superexec", "--runtime-api-address", federation.address,
        "--root-certificates", str(federation.folder / "keys" / "ca.crt"),
        "--superexec-auth-secret-file", str(tmp_path / "secret"),
    )  # fmt: skip
    assert "terminated" in said
    assert federation.processes["superlink-exec"].poll() is None


def test_the_control_api_wants_the_operators_token(federation: LocalCluster, tmp_path: Path) -> None:
    """A local user reaches the port, and the CA's certificate is public; the token is a file of the operator's."""
    ca = federation.folder / "keys" / "ca.crt"
    make_token(tmp_path / "token")
    for name, token in (("nobody", None), ("other", tmp_path / "token")):
        stranger = Control(tmp_path / name, federation.address, ca, token)
        with pytest.raises(RunError, match=r"flwr supernode list failed: .*[Aa]uthenticat"):
            stranger.nodes()
    assert federation.control.nodes()
    own = [federation.folder / "keys" / CONTROL_TOKEN, federation.folder / "homes" / "flwr" / "credentials.yaml"]
    assert [file.stat().st_mode & 0o777 for file in own] == [0o600, 0o600]


# nginx in front of the SuperLink


@pytest.fixture(scope="module")
def proxy(federation: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The proxy's port."""
    folder = tmp_path_factory.mktemp("nginx")
    with running_proxy(folder, federation.folder / "keys", federation.address) as port:
        yield port


def _ask(federation: LocalCluster, port: int, path: str, method: str = "POST") -> int:
    context = ssl.create_default_context(cafile=federation.folder / "keys" / "ca.crt")
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=STALL_SECONDS)
    try:
        connection.request(method, path, headers={"Content-Type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()


@needs_nginx
def test_the_fleet_api_passes_and_asks_for_a_signature(federation: LocalCluster, proxy: int) -> None:
    direct = int(federation.address.rpartition(":")[2])
    asked = _ask(federation, direct, "/v1/fleet/pull-messages")
    assert asked == 401
    assert _ask(federation, proxy, "/v1/fleet/pull-messages") == asked


@needs_nginx
@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/control/../fleet/pull-messages",
        "//v1/control/start-run",
        "/v1/fleet/pull-messages?x=/v1/control",
        "/V1/FLEET/pull-messages",
        "/",
    ],
)
def test_nothing_else_passes(federation: LocalCluster, proxy: int, path: str) -> None:
    assert _ask(federation, proxy, path) == 404
    assert _ask(federation, proxy, path, "GET") == 404


def test_the_paths_that_are_kept_inside_exist_inside(federation: LocalCluster) -> None:
    direct = int(federation.address.rpartition(":")[2])
    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task"):
        assert _ask(federation, direct, path) != 404


@needs_nginx
def test_only_post_passes_and_plain_text_does_not(federation: LocalCluster, proxy: int) -> None:
    assert _ask(federation, proxy, "/v1/fleet/pull-messages", "GET") == 404
    connection = http.client.HTTPConnection("127.0.0.1", proxy, timeout=STALL_SECONDS)
    connection.request("POST", "/v1/fleet/pull-messages", body=b"")
    assert connection.getresponse().status == 400
    connection.close()


@needs_nginx
def test_a_node_comes_online_through_the_proxy(federation: LocalCluster, proxy: int) -> None:
    federation.start_node("behind-the-proxy", partition=1, superlink=f"127.0.0.1:{proxy}")
    wait_online(federation, nodes=2)
