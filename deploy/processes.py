"""A federation as plain processes on 127.0.0.1: SuperLink, SuperNodes and their SuperExecs, over TLS with node keys.

The topology is that of separate machines. Every process has its own folder for Flower's files; the logs are together.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy import pinned as pinned_app
from deploy import topology
from deploy.certificates import make_certificates, make_node_key, make_superexec_secret
from deploy.control import CompletedRun, Control, last_lines
from deploy.identities import LIST, make_identities
from deploy.patience import load_factor
from deploy.superlink import CONTROL_TOKEN, make_token
from deploy.topology import ENVIRONMENT, Member, Trust
from tofu.errors import RunError, SettingError
from tofu.log import FILE
from tofu.secagg.identities import read_known

_NAMES = "nodes.json"
_HOST = "127.0.0.1"
_BIN = Path(sys.executable).parent
_COMMANDS = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr")
_PRIVATE = 0o077
"""umask of the processes: only their user can read their files."""
_START_SECONDS = 90.0
_STOP_SECONDS = 10.0


def missing_commands() -> list[Path]:
    """Return the commands of Flower that are not beside this Python,
    as where a package of the environment was removed.
    """
    return [path for name in _COMMANDS if not (path := _BIN / name).is_file()]


class LocalCluster:
    """Starts on entering and stops on leaving a `with` block.

    Args:
        folder: for keys, logs, the database and the apps' output; the apps' working directory. Keys, nodes and runs of
            an earlier federation in it are kept.
        nodes: number of SuperNodes, named node-0 and so on, with partition ids in that order.
        app: folder of the Flower app that `run` runs.
        data: a folder whose subfolders node-0, node-1, ... hold the nodes' own data; None if the run's dataset is
            partitioned among them.
        warm: client apps are forked from a process that has imported the packages they need (deploy/prefork.py).
        pinned: the apps that the nodes accept, as in TOFU_PINNED_APP (deploy/pinned.py); "" accepts all.
        policy: every client's policy file (`tofu.flower.policy`); None for the default policy.
        identities: whether every client has an identity key for secure rounds, and the list of all public keys.
        environment: further environment variables of every process.

    Attributes:
        processes: name -> process, in the order they were started; each leads a process group of its own.
        address: host:port of the SuperLink.
        identities: the list of the clients' public keys, for the setting `secure-identities`; None without.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 2,
        app: Path = Path("."),
        data: Path | None = None,
        warm: bool = False,
        identities: bool = False,
        policy: Path | None = None,
        pinned: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.nodes, self.app = folder.resolve(), nodes, app.resolve()
        self._data = data.resolve() if data is not None else None
        self._pinned = {pinned_app.VARIABLE: pinned} if pinned else {}
        self._policy = policy.resolve() if policy is not None else None
        self._warm, self._environment = warm, {**ENVIRONMENT, **(environment or {})}
        self.identities = self.folder / "keys" / LIST if identities else None
        self.logs = self.folder / "logs"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._members: dict[str, Member] = {}
        self._port = free_port()
        self.address = f"{_HOST}:{self._port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Create missing keys and start all processes.

        Raises:
            RunError: the SuperLink did not start, or refused a node's key.
            SettingError: the folder has identities, but not for all nodes.
        """
        if self.identities is not None:
            self._make_identities(self.identities)
        if not (self._keys / "ca.crt").exists():
            make_certificates(self._keys, [_HOST, "localhost"])
            make_superexec_secret(self._keys / "superexec")
        if not self._token.exists():
            make_token(self._token)
        self.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = self.folder / "state.db"
        self._spawn("superlink", topology.superlink(self._trust, host=_HOST, port=self._port, database=database))
        self._spawn("superlink-exec", topology.superexec(self._trust, address=self.address))
        self._await_port("superlink", self._port)
        for partition in range(self.nodes):
            self.start_node(f"node-{partition}", partition=partition)

    def start_node(self, name: str, *, partition: int, superlink: str = "") -> subprocess.Popen[bytes]:
        """Start a SuperNode and its SuperExec; a missing node key is created.

        Args:
            superlink: host:port at which the node reaches the SuperLink; "" is the SuperLink's own address.

        Returns:
            The SuperNode's process, which may not be online yet.

        Raises:
            RunError: the key cannot be registered.
        """
        if not (self._keys / name).exists():
            make_node_key(self._keys, name)
        if identity := self.control.register(self._keys / f"{name}.pub", name):
            names = read_names(self.folder) | {identity: name}
            (self.folder / _NAMES).write_text(json.dumps(names, indent=1))
        port = free_port()
        journals = self.folder / "journals"
        journals.mkdir(mode=0o700, exist_ok=True)
        config: dict[str, int | str] = {
            "partition-id": partition, "num-partitions": self.nodes, "journal": str(journals / f"{name}.db")
        }  # fmt: skip
        if self._data is not None:
            config["data"] = str(self._data / name)
        if self._policy is not None:
            config["policy"] = str(self._policy)
        if self.identities is not None:
            config |= topology.identity_config(self._keys / f"{partition}.identity", self.identities)
        node = topology.supernode(
            self._trust,
            superlink=superlink or self.address,
            key=self._keys / name,
            config=config,
            host=_HOST,
            port=port,
        )
        process = self._spawn(name, node)
        self._spawn(f"{name}-exec", topology.superexec(self._trust, address=f"{_HOST}:{port}"))
        return process

    def run(self, run_config: Mapping[str, bool | float | int | str], *, timeout: float = 300) -> CompletedRun:
        """Run the app and wait for its end; see `Control.run`."""
        return self.control.run(self.app, run_config, timeout=timeout)

    def restart(self, name: str) -> subprocess.Popen[bytes]:
        """End a process, if it still runs, and start it again with the same command line."""
        self.end(name)
        return self._spawn(name, self._members[name])

    def end(self, *names: str) -> None:
        """End these processes and their children with SIGTERM, and after 10 s with SIGKILL."""
        ending = [self.processes.pop(name) for name in names if name in self.processes]
        # One that was waited for already is skipped: its pid may belong to another process by now.
        ending = [process for process in ending if process.returncode is None]
        for process in ending:
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        for process in ending:
            while exit_status(process) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            # Children may have outlived the leader of their group.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop(self) -> None:
        """End every process. Nodes go first, or the SuperLink's database would keep them as online."""
        servers = [name for name in self.processes if name.startswith("superlink")]
        self.end(*[name for name in self.processes if name not in servers])
        self.end(*servers)

    @property
    def control(self) -> Control:
        """A client of this federation's Control API."""
        return Control(self.folder / "homes", self.address, self._keys / "ca.crt", self._token)

    @property
    def _keys(self) -> Path:
        return self.folder / "keys"

    @property
    def _token(self) -> Path:
        return self._keys / CONTROL_TOKEN

    @property
    def _trust(self) -> Trust:
        return Trust(*(self._keys / name for name in ("ca.crt", "server.pem", "server.key", "superexec")))

    def _make_identities(self, listed: Path) -> None:
        names = [str(partition) for partition in range(self.nodes)]
        if not listed.exists():
            make_identities(self._keys, names)
        elif missing := [name for name in names if name not in read_known(listed)]:
            # All clients need the new list, over a channel that the server does not control.
            raise SettingError("nodes", self.nodes, f"as many as {listed} lists, where client {missing[0]} is not")

    def _spawn(self, name: str, member: Member) -> subprocess.Popen[bytes]:
        path = f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        home = str(self.folder / "homes" / name)
        client = member.command == "flower-superexec" and not name.startswith("superlink")
        before = [sys.executable, "-m", "deploy.prefork"] if client and (self._warm or self._pinned) else []
        if before and not self._warm:
            before.append("--cold")
        if member.command == "flower-supernode":
            before = [sys.executable, "-m", "deploy.supernode"]
        elif member.command == "flower-superlink":
            before = [sys.executable, "-m", "deploy.superlink", str(self._token)]
        # The apps log there as JSON (`tofu.log`), apart from Flower's lines and prints.
        logs = {FILE: str(self.logs / f"{name}.jsonl")} if member.command == "flower-superexec" else {}
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*before, str(_BIN / member.command), *member.arguments],
                cwd=self.folder,
                env=os.environ | self._environment | self._pinned | logs | {"FLWR_HOME": home, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=_PRIVATE,
            )
        self.processes[name], self._members[name] = process, member
        return process

    def _await_port(self, name: str, port: int) -> None:
        began = time.monotonic()
        while time.monotonic() - began < _START_SECONDS * load_factor() and self.processes[name].poll() is None:
            try:
                socket.create_connection((_HOST, port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        log = (self.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        raise RunError(f"{name} did not start: {last_lines(log)}")


def read_names(folder: Path) -> dict[str, str]:
    """Return a mapping: node id -> name of the nodes that were registered from a federation's folder."""
    file = folder / _NAMES
    return dict(json.loads(file.read_text())) if file.exists() else {}


def exit_status(process: subprocess.Popen[bytes]) -> int | None:
    """Return its exit status, or the signal that ended it; None while it runs.

    The process is not reaped, so that the id of its group stays valid and `end` can end the rest of the group.
    """
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    return ended.si_status if ended is not None else None


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens now.

    It lies below the ports from which systems choose for outgoing connections (32768 on Linux, 49152 elsewhere), so
    that none of these takes it before the caller does.
    """
    generator = random.SystemRandom()
    while True:
        port = generator.randrange(15000, 32768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((_HOST, port))
            return port
