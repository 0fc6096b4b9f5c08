"""Certificates: hosts are checked before they are written, and a server's certificate before it is waited for."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from deploy import certificates
from deploy.certificates import check_server, make_certificates
from deploy.control import Control
from deploy.supernode import main
from tofu.errors import RunError, SettingError


@pytest.mark.parametrize(
    "host",
    ["fl.example.org:8443", "https://fl.example.org", "[::1]", "[::1]:80", "a b", " a", "a\n", "", "300.1.2.3",
     "caf\u00e9", "fe80::1%eth0", "a..b", "-a", "x" * 64, "a/b", "*"],
)  # fmt: skip
def test_what_is_no_host_is_refused_and_nothing_is_written(host: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="expected an IP address or a DNS name alone"):
        make_certificates(tmp_path / "keys", ["localhost", host])
    assert not (tmp_path / "keys").exists()


def test_addresses_and_names_are_hosts(tmp_path: Path) -> None:
    make_certificates(
        tmp_path, ["::1", "127.0.0.1", "fl.example.org", "*.example.org", "node_0", "xn--caf-dma.fr", "a.b."]
    )


@contextmanager
def serving(keys: Path) -> Iterator[str]:
    """A TLS server with this certificate; its address."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(keys / "server.pem", keys / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            try:
                connection, _ = listener.accept()
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                return

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_a_valid_certificate_passes_and_an_absent_server_is_not_reported(tmp_path: Path) -> None:
    made = make_certificates(tmp_path, ["127.0.0.1"])
    with serving(tmp_path) as address:
        check_server(address, made.ca)
    check_server(address, made.ca)


def test_a_certificate_of_another_host_is_named_by_every_command(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "keys", ["fl.example.org"])
    with serving(tmp_path / "keys") as address, pytest.raises(RunError, match=r"IP address mismatch.*127\.0\.0\.1"):
        Control(tmp_path, address, made.ca).nodes()


def test_an_expired_certificate_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "_SERVER_DAYS", 0.01)  # it began an hour ago
    made = make_certificates(tmp_path, ["127.0.0.1"])
    with serving(tmp_path) as address, pytest.raises(RunError, match="is not valid: certificate has expired"):
        check_server(address, made.ca)


def test_a_certificate_of_tomorrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        certificates, "timedelta", lambda **given: timedelta(**given) if "days" in given else -timedelta(1)
    )
    made = make_certificates(tmp_path, ["127.0.0.1"])
    with serving(tmp_path) as address, pytest.raises(RunError, match="is not valid: certificate is not yet valid"):
        check_server(address, made.ca)


def test_a_server_without_tls_and_a_file_that_is_no_certificate_are_named(tmp_path: Path) -> None:
    made = make_certificates(tmp_path, ["127.0.0.1"])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1 << 16)

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RunError, match="does not speak TLS"):
            check_server(address, made.ca)
        thread.join()
    for file in (tmp_path / "absent.crt", made.ca_key):
        with pytest.raises(SettingError, match=r"root-certificates=.*expected the certificate of a CA"):
            check_server(address, file)


def test_a_supernode_refuses_a_certificate_at_once(tmp_path: Path) -> None:
    made = make_certificates(tmp_path, ["fl.example.org"])
    with serving(tmp_path) as address, pytest.raises(SystemExit, match=r"^error: .*IP address mismatch[^\n]*$"):
        main(["flower-supernode", "--superlink", address, "--root-certificates", str(made.ca), "--port", "9"])


def test_a_certificate_of_another_authority_is_named(tmp_path: Path) -> None:
    make_certificates(tmp_path / "one", ["127.0.0.1"])
    other = make_certificates(tmp_path / "other", ["127.0.0.1"])
    with serving(tmp_path / "one") as address, pytest.raises(RunError, match=r"is not valid: .*issuer certificate"):
        check_server(address, other.ca)
