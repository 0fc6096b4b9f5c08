"""deploy/nginx.conf in a real nginx on this machine, for tests."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import free_port, wait_for

_NGINX = os.environ.get("TOFU_NGINX") or shutil.which("nginx")
_CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"
needs_nginx = pytest.mark.skipif(_NGINX is None, reason="nginx is not installed (nor named by $TOFU_NGINX)")


@contextmanager
def running_proxy(folder: Path, keys: Path, superlink: str, without: str = "") -> Iterator[int]:
    """Run it with this machine's addresses and paths; yields its port.

    Args:
        folder: for its files, temporary ones too, and `log`, what it prints.
        keys: with ca.crt, server.pem and server.key, also of the SuperLink, as "localhost".
        superlink: host:port.
        without: a directive that is left out.
    """
    assert _NGINX is not None
    port, text = free_port(), _CONF.read_text()
    for old, new in (
        (without, ""),
        ("/tmp/", f"{folder}/"),
        ("/run/secrets/", f"{keys}/"),
        ("$superlink superlink:8000", f"$superlink {superlink}"),
        ("proxy_ssl_name superlink", "proxy_ssl_name localhost"),
        ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("listen 127.0.0.1:8080", f"listen 127.0.0.1:{free_port()}"),
    ):
        assert old in text
        text = text.replace(old, new) if old else text
    (folder / "nginx.conf").write_text(text)
    # As root, nginx works as another user, who could not write in the folder.
    own = "daemon off;" if os.getuid() else "daemon off; user root;"
    command = [_NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", own]
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
