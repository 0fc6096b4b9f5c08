"""Add a client on another machine to the federation of deploy/compose.yaml.

    docker compose -f deploy/compose.yaml run --rm keys add-client hospital-d --superlink fl.example.org:8443

creates deploy/secrets/hospital-d with all files that deploy/compose.client.yaml needs on the client's machine, and
registers the client's key with the SuperLink. `tofu deploy add-client` runs this command.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509

from deploy.certificates import make_node_key, make_server_certificate, make_superexec_secret
from deploy.files import run_command, write_new
from deploy.identities import LIST, add_to_list, make_identity, read_list
from deploy.superlink import CONTROL_TOKEN
from tofu.errors import SettingError

NODE = "node"
"""The SuperNode service of deploy/compose.client.yaml, and the name of the client's key file."""


@dataclass(frozen=True)
class AddedClient:
    """A client that was added.

    Attributes:
        name: of its folder and in the list of nodes.
        partition: its name in the run: the next free partition id.
        folder: to copy to the client's machine.
        renewed: whether the proxy has a new certificate and must be restarted.
    """

    name: str
    partition: int
    folder: Path
    renewed: bool


def add_client(secrets: Path, name: str, superlink: str, register: Callable[[Path, str], object]) -> AddedClient:
    """Register a client with a federation in containers, and create its keys, certificate and identity.

    Args:
        secrets: the folder that `make certs` created.
        superlink: host:port at which the client reaches the proxy; a host that the proxy's certificate lacks is added.
        register: registers a public key under a name.

    Raises:
        SettingError: a name or address is not usable, the client exists, or the folder has no CA.
        RunError: the SuperLink cannot be reached or refuses the key; no files are left behind.
    """
    host, _, port = superlink.rpartition(":")
    if not host or not port.isdigit() or any(character.isspace() for character in host):
        raise SettingError("superlink", superlink, "host:port at which the client reaches the proxy")
    ca, ca_key, listed = secrets / "ca.crt", secrets / "ca.key", secrets / LIST
    known = read_list(listed)
    partition = 1 + max((int(client) for client in known if client.isdigit()), default=-1)
    folder = secrets / name
    if not name or name != Path(name).name or name.startswith("."):
        raise SettingError("name", name, "a plain file name")
    if folder.exists():
        raise SettingError("name", name, f"a name without the folder {folder}")
    key = make_node_key(folder, NODE)
    try:
        register(key.public, name)
    except BaseException:
        shutil.rmtree(folder)
        raise
    make_server_certificate(folder, [NODE, "localhost", "127.0.0.1"], ca=ca, ca_key=ca_key)
    make_superexec_secret(folder / "superexec")
    add_to_list(listed, str(partition), make_identity(folder / "identity"))
    write_new(folder / "ca.crt", ca.read_bytes(), 0o644)
    write_new(folder / LIST, listed.read_bytes(), 0o644)
    (folder / "journal").mkdir(mode=0o700)
    write_new(folder / "client.env", f"TOFU_SUPERLINK={superlink}\nTOFU_PARTITION={partition}\n".encode(), 0o644)
    return AddedClient(name, partition, folder, _renew(secrets / "proxy", host, ca=ca, ca_key=ca_key))


def _renew(proxy: Path, host: str, *, ca: Path, ca_key: Path) -> bool:
    """Replace the proxy's certificate if it does not name the host; return whether it was replaced."""
    files = proxy / "server.pem", proxy / "server.key"
    try:
        certificate = x509.load_pem_x509_certificate(files[0].read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise SettingError("secrets", str(files[0]), "the proxy's certificate") from error
    found = [str(name.value) for name in names]
    if host in found:
        return False
    fresh = proxy / "fresh"
    make_server_certificate(fresh, [*found, host], ca=ca, ca_key=ca_key)
    for file in files:
        file.write_bytes((fresh / file.name).read_bytes())  # in place, as it is mounted
        (fresh / file.name).unlink()
    fresh.rmdir()
    return True


def instructions(added: AddedClient, shown: str) -> str:
    """Return the user's next steps as text. `shown`: path of the secrets' folder on the user's machine."""
    lines = [
        f"client {added.partition} ({added.name}) is admitted.",
        "",
        "On this machine:",
        "  TOFU_LISTEN in deploy/.env is an address that the client reaches (the default is 127.0.0.1), and",
        "  docker compose -f deploy/compose.yaml up --detach",
    ]
    if added.renewed:
        lines.append("  docker compose -f deploy/compose.yaml restart proxy      # its certificate has a further name")
    lines += [
        f"  {LIST} is new: in secure rounds with identities every client needs it, by another way than this machine.",
        "",
        f"To the client's machine, over a channel that keeps keys secret: {shown}/{added.name}, as deploy/client in a",
        "checkout of this project. There, with its data in deploy/client/data:",
        '  printf "TOFU_UID=%s\\nTOFU_GID=%s\\n" "$(id -u)" "$(id -g)" >> deploy/client/client.env',
        "  docker compose -f deploy/compose.client.yaml --env-file deploy/client/client.env up --detach",
        "",
        f"Then delete {shown}/{added.name} here.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, register: Callable[[Path, str], object] | None = None) -> int:
    """Run the command; return 0, or 2 with one line on standard error when something was refused.

    Args:
        register: registers a public key under a name; by default over the SuperLink's Control API.
    """
    app = typer.Typer(
        add_completion=False, help="Keys of the federation of deploy/compose.yaml.", pretty_exceptions_enable=False
    )
    secrets = Path("/secrets")

    @app.callback()
    def options(
        folder: Annotated[Path, typer.Option(help="the folder that `make certs` made")] = secrets,
    ) -> None:
        nonlocal secrets
        secrets = folder

    @app.command("add-client")
    def add(
        name: Annotated[str, typer.Argument(help="name of the client, such as hospital-d")],
        superlink: Annotated[str, typer.Option(help="host:port at which the client reaches this machine")],
    ) -> None:
        """Create a client's keys and register it."""
        print(instructions(add_client(secrets, name, superlink, register or _control(secrets)), "deploy/secrets"))

    return run_command(app, arguments, "keys")


def _control(secrets: Path) -> Callable[[Path, str], object]:
    from deploy.control import Control

    return Control(Path("/tmp/control"), "superlink:8000", secrets / "ca.crt", secrets / CONTROL_TOKEN).register


if __name__ == "__main__":
    sys.exit(main())
