"""A federation as plain processes on 127.0.0.1: SuperLink, SuperNodes and their SuperExecs, over TLS with node keys.

The same topology as on separate machines. Every member has a folder of its own for Flower's files; all logs are in one.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploy.certificates import make_certificates, make_node_key
from tofu.errors import RunError

_HOST = "127.0.0.1"
_CONNECTION = "processes"
_BIN = Path(sys.executable).parent
_START_SECONDS = 90.0
_STOP_SECONDS = 10.0
_QUIET = {
    # Without the first, every run calls `uv sync`, which needs the internet and may replace torch.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class CompletedRun:
    """A run that ended.

    Attributes:
        status: as Flower says it: finished:completed, finished:failed or finished:stopped.
        details: the reason of a failure.
        log: what the server app printed.
        traffic_bytes: between SuperLink and SuperNodes, both directions, as Flower counts it.
    """

    identity: int
    status: str
    details: str
    log: str
    traffic_bytes: int

    @property
    def completed(self) -> bool:
        """Whether the server app came to its end without an error."""
        return self.status == "finished:completed"


class Federation:
    """Starts on entering and stops on leaving a `with` block.

    Args:
        folder: where keys, logs, the database and what the apps write go; it is also the apps' working directory.
        nodes: number of SuperNodes, named node-0 and so on, with partition ids in that order.
        app: folder of the Flower app that `run` runs.

    Attributes:
        processes: name -> process, in the order they were started; each leads a process group of its own.
    """

    def __init__(self, folder: Path, *, nodes: int = 2, app: Path = Path(".")) -> None:
        self.folder, self.nodes, self.app = folder.resolve(), nodes, app.resolve()
        self.logs = self.folder / "logs"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port = _free_port()
        self._runs = 0

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_node(self, name: str, *, partition: int, register: bool = True) -> subprocess.Popen[bytes]:
        """Start a SuperNode and the SuperExec beside it; the node's key is made unless it is there.

        Returns:
            The SuperNode's process, which may not be online yet.

        Raises:
            RunError: the key cannot be registered.
        """
        keys = self.folder / "keys"
        if not (keys / name).exists():
            make_node_key(keys, name)
            if register:
                self._flwr("supernode", "register", str(keys / f"{name}.pub"), _CONNECTION, "--name", name)
        port = _free_port()
        node = self._spawn(
            name, "flower-supernode", "--superlink", f"{_HOST}:{self._port}",
            "--root-certificates", str(keys / "ca.crt"), "--auth-supernode-private-key", str(keys / name),
            "--node-config", f"partition-id={partition} num-partitions={self.nodes}", *self._listen(port),
        )  # fmt: skip
        self._spawn_superexec(f"{name}-exec", port)
        return node

    def run(self, run_config: Mapping[str, bool | float | int | str], *, timeout: float = 300) -> CompletedRun:
        """Run the app and wait for its end, whether it completes or fails.

        Args:
            run_config: overrides of keys in the app's `[tool.flwr.app.config]`.
            timeout: seconds, after which the run is stopped.

        Raises:
            RunError: the run could not be started, or had not ended in time.
        """
        self._runs += 1
        config = self.folder / f"run-{self._runs}.toml"
        lines = [f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}" for key, value in run_config.items()]
        config.write_text("\n".join(lines), encoding="utf-8")
        end = time.monotonic() + timeout
        name = f"run-{self._runs}"
        overrides = ["--run-config", str(config)] if run_config else []
        stream = self._spawn(name, "flwr", "run", str(self.app), _CONNECTION, "--stream", *overrides)
        with suppress(subprocess.TimeoutExpired):
            stream.wait(timeout)
        self.end(name)
        log = self._log(name)
        started = re.search(r"started run (\d+)", log)
        if started is None:
            raise RunError(f"the run did not start: {_last_lines(log)}")
        identity = int(started[1])
        while True:
            status = self._flwr("ls", _CONNECTION, "--run-id", str(identity), "--format", "json")["runs"][0]
            if status["status"].startswith("finished"):
                traffic = int(status["network-traffic"]["total-bytes"])
                return CompletedRun(identity, status["status"], status["status-details"], log, traffic)
            if time.monotonic() >= end:
                self._flwr("stop", str(identity), _CONNECTION, "--format", "json")
                raise RunError(f"run {identity} had not ended after {timeout:g} s: {_last_lines(log)}")
            time.sleep(0.5)

    def end(self, *names: str) -> None:
        """End these processes and the processes they started: politely, and after 10 s by force."""
        ending = [self.processes.pop(name) for name in names if name in self.processes]
        # One that was waited for already is left alone: its number may belong to another process by now.
        ending = [process for process in ending if process.returncode is None]
        for process in ending:
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        for process in ending:
            while not _exited(process) and time.monotonic() < deadline:
                time.sleep(0.05)
            # What the leader started may have outlived it.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop(self) -> None:
        """End every process. Nodes go first, or the SuperLink's database would keep them as online."""
        servers = [name for name in self.processes if name.startswith("superlink")]
        self.end(*[name for name in self.processes if name not in servers])
        self.end(*servers)

    def _start(self) -> None:
        keys = self.folder / "keys"
        make_certificates(keys, [_HOST, "localhost"])
        secret = os.open(keys / "superexec", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(secret, "wb") as file:
            file.write(secrets.token_bytes(32))
        self.logs.mkdir(exist_ok=True)
        home = self._home("flwr")
        home.mkdir(parents=True)
        address, ca = f"{_HOST}:{self._port}", str(keys / "ca.crt")
        (home / "config.toml").write_text(
            f"[superlink.{_CONNECTION}]\naddress = {json.dumps(address)}\nroot-certificates = {json.dumps(ca)}\n"
        )
        self._spawn(
            "superlink", "flower-superlink", "--enable-supernode-auth", "--database", str(self.folder / "state.db"),
            "--disable-runtime-dependency-installation", *self._listen(self._port),
        )  # fmt: skip
        self._spawn_superexec("superlink-exec", self._port)
        self._await_port("superlink", self._port)
        for partition in range(self.nodes):
            self.start_node(f"node-{partition}", partition=partition)

    def _listen(self, port: int) -> list[str]:
        keys = self.folder / "keys"
        return [
            "--host", _HOST, "--port", str(port), "--ssl-ca-certfile", str(keys / "ca.crt"),
            "--ssl-certfile", str(keys / "server.pem"), "--ssl-keyfile", str(keys / "server.key"),
            "--isolation", "process", "--superexec-auth-secret-file", str(keys / "superexec"),
        ]  # fmt: skip

    def _spawn_superexec(self, name: str, port: int) -> None:
        keys = self.folder / "keys"
        self._spawn(
            name, "flower-superexec", "--runtime-api-address", f"{_HOST}:{port}",
            "--root-certificates", str(keys / "ca.crt"), "--superexec-auth-secret-file", str(keys / "superexec"),
        )  # fmt: skip

    def _spawn(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(_BIN / command), *arguments],
                cwd=self.folder,
                env=self._environment("flwr" if command == "flwr" else name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def _flwr(self, *arguments: str) -> Any:
        """The answer of a `flwr` command, as the JSON it prints; None where it prints something else."""
        result = subprocess.run(
            [str(_BIN / "flwr"), *arguments],
            cwd=self.folder,
            env=self._environment("flwr"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
            check=False,
        )
        if result.returncode != 0:
            raise RunError(f"flwr {' '.join(arguments[:2])} failed: {_last_lines(result.stdout + result.stderr)}")
        return json.loads(result.stdout) if result.stdout.lstrip().startswith("{") else None

    def _home(self, name: str) -> Path:
        return self.folder / "homes" / name

    def _environment(self, name: str) -> dict[str, str]:
        path = f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        return os.environ | _QUIET | {"FLWR_HOME": str(self._home(name)), "PATH": path}

    def _await_port(self, name: str, port: int) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self.processes[name].poll() is None:
            try:
                socket.create_connection((_HOST, port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RunError(f"{name} did not start: {_last_lines(self._log(name))}")

    def _log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether it ended, without waiting for it, so that its process group keeps its number."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _last_lines(text: str) -> str:
    return " | ".join(text.split("\n")[-6:]).strip(" |")
