"""deploy/nginx.conf in front of a real SuperLink: the Fleet API passes and nothing else, and a node comes online."""

import http.client
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.processes import LocalCluster
from tests.integration.deployed import wait_online
from tests.processes import NO_TOTAL_LIMIT, STALL_SECONDS, free_port, wait_for

_NGINX = os.environ.get("TOFU_NGINX") or shutil.which("nginx")
_CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"

pytestmark = [
    NO_TOTAL_LIMIT,
    pytest.mark.skipif(_NGINX is None, reason="nginx is not installed (nor named by $TOFU_NGINX)"),
]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("federation"), nodes=0) as federation:
        yield federation


@pytest.fixture(scope="module")
def proxy(federation: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The proxy's port. Its configuration is the containers', with this machine's addresses and paths."""
    assert _NGINX is not None
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    text = _CONF.read_text()
    for old, new in (
        ("/tmp/", f"{folder}/"),
        ("/run/secrets/", f"{federation.folder}/keys/"),
        ("$superlink superlink:8000", f"$superlink {federation.address}"),
        ("proxy_ssl_name superlink", "proxy_ssl_name localhost"),
        ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("listen 127.0.0.1:8080", f"listen 127.0.0.1:{free_port()}"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    command = [_NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or _listens(port))
        assert process.poll() is None, (folder / "log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except OSError:
        return False
    return True


def _ask(federation: LocalCluster, port: int, path: str, method: str = "POST") -> int:
    context = ssl.create_default_context(cafile=federation.folder / "keys" / "ca.crt")
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=STALL_SECONDS)
    try:
        connection.request(method, path, headers={"Content-Type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_fleet_api_passes_and_asks_for_a_signature(federation: LocalCluster, proxy: int) -> None:
    direct = int(federation.address.rpartition(":")[2])
    asked = _ask(federation, direct, "/v1/fleet/pull-messages")
    assert asked == 401
    assert _ask(federation, proxy, "/v1/fleet/pull-messages") == asked


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


def test_only_post_passes_and_plain_text_does_not(federation: LocalCluster, proxy: int) -> None:
    assert _ask(federation, proxy, "/v1/fleet/pull-messages", "GET") == 404
    connection = http.client.HTTPConnection("127.0.0.1", proxy, timeout=STALL_SECONDS)
    connection.request("POST", "/v1/fleet/pull-messages", body=b"")
    assert connection.getresponse().status == 400
    connection.close()


def test_a_node_comes_online_through_the_proxy(federation: LocalCluster, proxy: int) -> None:
    federation.start_node("node-0", partition=0, superlink=f"127.0.0.1:{proxy}")
    wait_online(federation, nodes=1)
