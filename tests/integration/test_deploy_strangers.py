"""Who has no right to take part is refused: no key, another CA, a key that is online, plain text, a wrong secret.

An unregistered key is refused in test_tls.py.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.certificates import make_certificates, make_node_key, make_superexec_secret
from deploy.control import Control
from deploy.processes import CONTROL_TOKEN, LocalCluster
from deploy.superlink import make_token
from deploy.topology import ENVIRONMENT
from tests.integration.deployed import wait_online
from tests.processes import NO_TOTAL_LIMIT, free_port, run
from tofu.errors import RunError

pytestmark = NO_TOTAL_LIMIT

_BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("federation"), nodes=1) as federation:
        wait_online(federation)
        yield federation


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
    keys = federation.folder / "keys"
    make_certificates(tmp_path / "other", ["127.0.0.1"])
    make_node_key(tmp_path / "keys", "registered")
    federation.control.register(tmp_path / "keys" / "registered.pub", "registered")
    registered = ("--auth-supernode-private-key", str(tmp_path / "keys" / "registered"))
    trusting = ("--root-certificates", str(keys / "ca.crt"))
    node = ("--superlink", federation.address, "--isolation", "process", "--max-retries", "1", "--insecure")
    secure = tuple(argument for argument in node if argument != "--insecure")
    strangers = {
        "no key": (*secure, *trusting),
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
    assert "Exit Code: 305" in said["a key that is online"]
    assert "Exit Code: 305" in said["no key"]
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
