"""Creates a CA, the server's certificate, and a key pair for every node.

    python -m deploy.certificates FOLDER --host fl.example.org --node hospital-a --node hospital-b

With `--compose`, every service of deploy/compose.yaml gets a folder with its own certificate and secrets.
"""

import ipaddress
import re
import secrets
import socket
import ssl
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.files import make_deployment, refuse_to_overwrite, run_command, write_new
from deploy.identities import LIST, make_identities
from deploy.superlink import CONTROL_TOKEN, make_token
from tofu.errors import RunError, SettingError

_CA_DAYS = 3650
_CHECK_SECONDS = 5.0
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME = re.compile(rf"(\*\.)?({_LABEL}\.)*(?!\d+$){_LABEL}\.?")
_SERVER_DAYS = 825  # more is refused by some TLS clients


@dataclass(frozen=True)
class Certificates:
    """Files of the server's TLS: `ca` goes to everyone, `server` and `server_key` stay with the server.

    `ca_key` signs further server certificates: keep it offline.
    """

    ca: Path
    ca_key: Path
    server: Path
    server_key: Path


@dataclass(frozen=True)
class NodeKey:
    """Files of a node's key pair: `private` stays with the node, `public` is registered with the server."""

    private: Path
    public: Path


def make_certificates(folder: Path, hosts: Sequence[str]) -> Certificates:
    """Create a CA and, signed by it, a server certificate for `hosts` in `folder`.

    Args:
        hosts: every IP address and DNS name by which nodes and SuperExecs reach the server.

    Raises:
        SettingError: there are no hosts, a file exists already, or the folder cannot be written.
    """
    if not hosts:
        raise SettingError("host", list(hosts), "at least one IP address or DNS name")
    for host in hosts:
        _name(host)
    files = Certificates(folder / "ca.crt", folder / "ca.key", folder / "server.pem", folder / "server.key")
    refuse_to_overwrite(files.ca, files.ca_key, files.server, files.server_key)
    key, name = _private_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tofu-fl CA")])
    ca = (
        _builder(name, name, key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_new(files.ca_key, _pem(key), 0o600)
    write_new(files.ca, ca.public_bytes(Encoding.PEM), 0o644)
    make_server_certificate(folder, hosts, ca=files.ca, ca_key=files.ca_key)
    return files


def make_server_certificate(folder: Path, hosts: Sequence[str], *, ca: Path, ca_key: Path) -> None:
    """Create a key and a certificate for `hosts`, signed by the CA: `folder`/server.key and `folder`/server.pem.

    Raises:
        SettingError: as `make_certificates`, a host that is neither an IP address nor a DNS name, or a CA that cannot
            be read.
    """
    files = folder / "server.pem", folder / "server.key"
    names = [_name(host) for host in hosts]
    refuse_to_overwrite(*files)
    try:
        authority = x509.load_pem_x509_certificate(ca.read_bytes())
        authority_key = load_pem_private_key(ca_key.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise SettingError("ca", str(ca), f"a CA's certificate and, at {ca_key}, its key ({error})") from error
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise SettingError("ca", str(ca), "a CA with an elliptic-curve key")
    key, name = _private_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tofu-fl server")])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    certificate = (
        _builder(name, authority.subject, key, _SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    write_new(files[1], _pem(key), 0o600)
    write_new(files[0], certificate.public_bytes(Encoding.PEM), 0o644)


def make_superexec_secret(file: Path) -> None:
    """Create a secret that a SuperLink or SuperNode shares with its SuperExec.

    Raises:
        SettingError: the file exists or cannot be written.
    """
    refuse_to_overwrite(file)
    write_new(file, secrets.token_bytes(32), 0o600)


def make_compose_secrets(folder: Path, hosts: Sequence[str], nodes: Sequence[str]) -> None:
    """Create what deploy/compose.yaml mounts: a CA in `folder`, and in a subfolder for each service its own secrets.

    Args:
        hosts: names and addresses by which SuperNodes on other machines reach the proxy.
        nodes: names of the nodes with the partition ids 0, 1, ..., which are their names in secure rounds.

    Raises:
        SettingError: as `make_certificates`, `make_node_key` and `make_identities`.
    """
    for host in hosts:
        _name(host)
    local = ["localhost", "127.0.0.1"]
    ca, ca_key = folder / "ca.crt", folder / "ca.key"
    refuse_to_overwrite(ca, ca_key, folder / LIST, folder / CONTROL_TOKEN)
    made = make_certificates(folder / "superlink", ["superlink", *local])
    made.ca.rename(ca)
    made.ca_key.rename(ca_key)
    make_superexec_secret(folder / "superlink" / "superexec")
    make_token(folder / CONTROL_TOKEN)
    make_server_certificate(folder / "proxy", ["proxy", *local, *hosts], ca=ca, ca_key=ca_key)
    for node in nodes:
        make_node_key(folder / node, node)
        make_superexec_secret(folder / node / "superexec")
        make_server_certificate(folder / node, [node, *local], ca=ca, ca_key=ca_key)
    if nodes:
        make_identities(folder, [str(number) for number in range(len(nodes))])
    for number, node in enumerate(nodes):
        (folder / f"{number}.identity").rename(folder / node / "identity")


def make_node_key(folder: Path, name: str) -> NodeKey:
    """Create a P-384 key pair in OpenSSH form, `folder`/`name` and `folder`/`name`.pub, as SuperNodes read it.

    Raises:
        SettingError: the name is no plain file name, a file exists already, or the folder cannot be written.
    """
    if not name or name != Path(name).name or name.startswith("."):
        raise SettingError("node", name, "a plain file name")
    files = NodeKey(folder / name, folder / f"{name}.pub")
    refuse_to_overwrite(files.private, files.public)
    key = _private_key()
    write_new(files.private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_new(files.public, public + f" {name}\n".encode(), 0o644)
    return files


def _private_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    # An hour back, for machines whose clocks are slow.
    start = datetime.now(UTC) - timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(host: str) -> x509.GeneralName:
    """Return a host in the form of a certificate. Raises SettingError if it is neither an IP address nor a DNS name."""
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address("%" if "%" in host else host))  # no zones, such as fe80::1%eth0
    if len(host) > 253 or not _DNS_NAME.fullmatch(host):
        accepted = "an IP address or a DNS name alone, without scheme, port, brackets or spaces"
        raise SettingError("host", host, accepted)
    return x509.DNSName(host)


def check_server(address: str, ca: Path | None) -> None:
    """Check the TLS certificate of a server.

    A server that cannot be reached is no error: it may be about to start.

    Args:
        address: host:port of the server.
        ca: certificate of the CA that must have signed it; None for the CAs of the system.

    Raises:
        RunError: the certificate has expired or is not valid yet, is for other hosts, or is not signed by the CA; or
            the server does not speak TLS.
        SettingError: the CA's certificate cannot be read.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise SettingError("root-certificates", str(ca), f"the certificate of a CA ({error.strerror})") from error
    try:
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, int(port)), timeout=_CHECK_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            pass
    except ssl.SSLCertVerificationError as error:
        raise RunError(
            f"the certificate of {address} is not valid: {error.verify_message}; "
            "`tofu deploy certificates` makes a new one"
        ) from error
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            raise RunError(f"{address} does not speak TLS: it is another server or one without certificates") from error
    except (OSError, ValueError):
        return


def make_files(folder: Path, hosts: Sequence[str], nodes: Sequence[str], *, compose: bool) -> list[Path]:
    """Create the files that the command asks for, and return their paths. Raises SettingError as these do."""
    if not hosts and not nodes:
        raise SettingError("host", list(hosts), "at least one --host or --node")
    if compose:
        make_compose_secrets(folder, hosts, nodes)
        make_deployment(folder, nodes)
        return sorted(file for file in folder.rglob("*") if file.is_file())
    made: list[Path] = [*vars(make_certificates(folder, hosts)).values()] if hosts else []
    for name in nodes:
        made += vars(make_node_key(folder, name)).values()
    return made


def command(
    folder: Annotated[Path, typer.Argument(help="where the files go")],
    host: Annotated[list[str] | None, typer.Option(help="address of the server; creates CA and certificate")] = None,
    node: Annotated[list[str] | None, typer.Option(help="name of a node; creates its key pair")] = None,
    compose: Annotated[bool, typer.Option("--compose", help="a folder per service of deploy/compose.yaml")] = False,
) -> None:
    """Create a CA, the server's certificate and a key pair for every node."""
    for file in make_files(folder, host or (), node or (), compose=compose):
        print(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """`tofu deploy certificates` for a Python that has the packages cryptography and typer only."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return run_command(app, arguments, "python -m deploy.certificates")


if __name__ == "__main__":
    sys.exit(main())
