"""The proxy of deploy/nginx.conf writes no object to a file on the way, in either direction."""

import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.certificates import make_certificates
from tests.deploy.nginx_proxy import needs_nginx, running_proxy
from tests.processes import STALL_SECONDS, wait_for

pytestmark = needs_nginx

_PIECE = 1 << 16
_BYTES = 32 << 20  # more than the buffers of all sockets hold
_PUSHED = 12 << 20
_WARNING = "buffered to a temporary file"


class Backend:
    """A SuperLink that answers every request with a large object, and counts the bytes of both directions."""

    def __init__(self, keys: Path) -> None:
        self.sent = self.received = 0
        backend = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                left = int(self.headers["Content-Length"])
                while left and (piece := self.rfile.read1(min(left, _PIECE))):
                    left -= len(piece)
                    backend.received += len(piece)
                if left:
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(_BYTES))
                self.end_headers()
                for _ in range(_BYTES // _PIECE):
                    self.wfile.write(bytes(_PIECE))
                    backend.sent += _PIECE

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(keys / "server.pem", keys / "server.key")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "keys", ["127.0.0.1", "localhost"])
    return tmp_path / "keys"


@pytest.fixture
def backend(keys: Path) -> Iterator[Backend]:
    backend = Backend(keys)
    yield backend
    backend.server.shutdown()
    backend.server.server_close()


def _ask(port: int, keys: Path, length: int) -> ssl.SSLSocket:
    """Begin a request whose body has this length."""
    context = ssl.create_default_context(cafile=keys / "ca.crt")
    plain = socket.create_connection(("127.0.0.1", port), STALL_SECONDS)
    client = context.wrap_socket(plain, server_hostname="localhost")
    client.sendall(f"POST /v1/fleet/pull-object HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
    return client


@pytest.mark.parametrize("directive", ["", "proxy_max_temp_file_size 0;"])
def test_a_slow_node_slows_the_superlink_and_fills_no_file(
    tmp_path: Path, keys: Path, backend: Backend, directive: str
) -> None:
    """Without the directive nginx reads the whole object and keeps on disk what the node has not read."""
    with (
        running_proxy(tmp_path, keys, f"127.0.0.1:{backend.server.server_port}", without=directive) as port,
        _ask(port, keys, 0) as client,
    ):
        assert client.recv(1)
        if directive:
            wait_for(lambda: backend.sent == _BYTES)
            assert _WARNING in (tmp_path / "log").read_text()
            return
        before = -1
        while backend.sent > before:  # until it is held up
            before = backend.sent
            time.sleep(2)
        assert backend.sent < _BYTES
        while backend.sent < _BYTES:
            assert client.recv(_PIECE)
        assert _WARNING not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("directive", ["", "proxy_request_buffering off;"])
def test_an_object_reaches_the_superlink_while_the_node_sends_it(
    tmp_path: Path, keys: Path, backend: Backend, directive: str
) -> None:
    """Without the directive nginx keeps the object on disk until it has all of it."""
    with (
        running_proxy(tmp_path, keys, f"127.0.0.1:{backend.server.server_port}", without=directive) as port,
        _ask(port, keys, _PUSHED) as client,
    ):
        client.sendall(bytes(_PUSHED // 2))
        if directive:
            wait_for(lambda: _WARNING in (tmp_path / "log").read_text())
            assert backend.received == 0
        else:
            wait_for(lambda: backend.received == _PUSHED // 2)
            assert _WARNING not in (tmp_path / "log").read_text()
