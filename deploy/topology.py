"""The processes of a federation and their command lines, on one machine.

The SuperLink passes messages between the server app and the clients; a SuperNode connects a client to it. Each of them
has a SuperExec, which starts the apps: the server app next to the SuperLink, the client app next to a SuperNode.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from tofu.errors import SettingError

ENVIRONMENT: Mapping[str, str] = {
    # Without it every run calls `uv sync`, which needs the internet and may replace torch.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Interval in seconds at which a SuperExec polls for work: a delay of every message. Flower's default is 1.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}
"""Environment variables of every process."""


@dataclass(frozen=True)
class Member:
    """One process of a federation: a Flower command and its arguments."""

    command: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Trust:
    """Paths of the certificates and secrets of one process.

    Attributes:
        ca: certificate of the CA that signed every server's certificate.
        certificate, key: those with which it listens.
        superexec: the secret that a SuperExec shares with its SuperLink or SuperNode.
    """

    ca: PurePath
    certificate: PurePath
    key: PurePath
    superexec: PurePath


def superlink(trust: Trust, *, host: str, port: int, database: PurePath) -> Member:
    """Return a SuperLink that accepts only registered node keys and keeps its runs in a database."""
    arguments = ("--enable-supernode-auth", "--database", str(database), "--disable-runtime-dependency-installation")
    return Member("flower-superlink", (*arguments, *_listen(trust, host, port)))


def supernode(
    trust: Trust, *, superlink: str, key: PurePath, config: Mapping[str, int | str], host: str, port: int
) -> Member:
    """Return a SuperNode.

    Args:
        superlink: host:port of the SuperLink's Fleet API.
        key: the node's private key.
        config: its node config, as client/app.py reads it.
    """
    pairs = " ".join(f"{name}={_quoted(name, value)}" for name, value in config.items())
    arguments = (
        "--superlink",
        superlink,
        "--root-certificates",
        str(trust.ca),
        "--auth-supernode-private-key",
        str(key),
    )
    return Member("flower-supernode", (*arguments, "--node-config", pairs, *_listen(trust, host, port)))


def _quoted(name: str, value: int | str) -> str:
    """Return a value of a node config as Flower reads it: TOML, in which only single quotes keep a quotation mark.

    Raises:
        SettingError: a text has both kinds of quotes, or characters that cannot be printed.
    """
    if isinstance(value, int):
        return str(value)
    if not value.isprintable() or ("'" in value and ('"' in value or "\\" in value)):
        raise SettingError(
            name, value, "printable characters without a mix of apostrophes and quotation marks or backslashes"
        )
    return f"'{value}'" if '"' in value or "\\" in value else f'"{value}"'


def identity_config(identity: PurePath, identities: PurePath) -> dict[str, str]:
    """Return the node config for secure rounds with identities:
    the paths of the client's key and of the list of public keys.
    """
    return {"identity": str(identity), "identities": str(identities)}


def superexec(trust: Trust, *, address: str, health: str = "") -> Member:
    """Return the SuperExec of the SuperLink or SuperNode at `address`;
    `health` is where it answers gRPC health checks.
    """
    arguments = ("--runtime-api-address", address, "--root-certificates", str(trust.ca))
    secret = ("--superexec-auth-secret-file", str(trust.superexec))
    return Member("flower-superexec", (*arguments, *secret, *(("--health-server-address", health) if health else ())))


def _listen(trust: Trust, host: str, port: int) -> tuple[str, ...]:
    return (
        "--host", host, "--port", str(port), "--ssl-ca-certfile", str(trust.ca),
        "--ssl-certfile", str(trust.certificate), "--ssl-keyfile", str(trust.key),
        "--isolation", "process", "--superexec-auth-secret-file", str(trust.superexec),
    )  # fmt: skip
