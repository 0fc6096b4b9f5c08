"""The processes of a federation and their command lines, on one machine and in containers.

The SuperLink passes messages between the server app and the clients; a SuperNode connects a client to it. Each of them
has a SuperExec, which starts the apps: the server app next to the SuperLink, the client app next to a SuperNode.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath

from tofu.errors import SettingError

RUNTIME_PORT = 9094
HEALTH_PORT = 9100
JOURNAL = "/journal/rounds.db"
"""The file in which a client in a container records its secure rounds (`tofu.flower.secure_session`)."""

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


def containers(nodes: int) -> dict[str, Member]:
    """Return the members as services of deploy/compose.yaml. SuperNodes see the SuperLink through the proxy only."""
    mounted = PurePosixPath("/run/secrets")
    trust = Trust(mounted / "ca.crt", mounted / "server.pem", mounted / "server.key", mounted / "superexec")
    health = f"127.0.0.1:{HEALTH_PORT}"
    members = {
        "superlink": superlink(trust, host="0.0.0.0", port=8000, database=PurePosixPath("/state/state.db")),
        "superlink-exec": superexec(trust, address="superlink:8000", health=health),
    }
    known = identity_config(mounted / "identity", mounted / "identities.json")
    for node in range(nodes):
        members[f"node-{node}"] = supernode(
            trust, superlink="proxy:8443", key=mounted / "node",
            config={"data": "/data", "partition-id": node, **known, "journal": JOURNAL},
            host="0.0.0.0", port=RUNTIME_PORT,
        )  # fmt: skip
        members[f"node-{node}-exec"] = superexec(trust, address=f"node-{node}:{RUNTIME_PORT}", health=health)
    return members


def _listen(trust: Trust, host: str, port: int) -> tuple[str, ...]:
    return (
        "--host", host, "--port", str(port), "--ssl-ca-certfile", str(trust.ca),
        "--ssl-certfile", str(trust.certificate), "--ssl-keyfile", str(trust.key),
        "--isolation", "process", "--superexec-auth-secret-file", str(trust.superexec),
    )  # fmt: skip
