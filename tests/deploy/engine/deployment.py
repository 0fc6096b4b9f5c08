"""A copy of the working tree whose deploy/compose.yaml runs on the Docker engine that `docker` reaches."""

import functools
import http.server
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[3]
OWNER = os.getuid() or 1000
OPERATOR = ("python", "-m", "deploy.control", "--token", "/run/secrets/control-token")
_TORCH = "2.13.0"
_INDEX_PORT = 8099
"""Always the same, as the layers of the image that are kept depend on the index's address."""


def reason_to_skip() -> str:
    """Why no deployment can be run here, or ""."""
    if not os.environ.get("TOFU_CONTAINERS"):
        return "tests in containers take minutes: `make test-containers` runs them"
    if shutil.which("docker") is None:
        return "docker is not installed"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if result.returncode:
            return f"{' '.join(command)}: {(result.stderr.strip() or 'failed').splitlines()[-1]}"
    return ""


def write_digits(folder: Path, names: Sequence[str]) -> None:
    """Deal the digits to folders of these names, as an image each in a folder of its class."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = folder / names[number % len(names)] / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * (255 / 16)).astype("uint8")).save(file)


class ComposeDeployment:
    """Starts all services on entering and ends them on leaving a `with` block. Images are kept.

    Args:
        folder: for the copy of the working tree, its keys, its data and its results. One that has them is used on.
        project: Compose's name of it; several may run at once.
        listen: the address of its port.
        services: those that are started; by default, all.
        patience: seconds until services have to be healthy, and nodes online.
    """

    def __init__(
        self,
        folder: Path,
        project: str = "tofu-test",
        listen: str = "127.0.0.1",
        services: Sequence[str] = (),
        patience: float = 600.0,
    ) -> None:
        self.folder, self._project, self._services = folder / "clone", project, tuple(services)
        self._patience = patience
        self._clients: list[Path] = []
        index = {"TORCH_INDEX": f"http://127.0.0.1:{_INDEX_PORT}/"}
        self.environment = {**index, **os.environ, "TOFU_LISTEN": listen}
        self._options = ["--progress", "quiet", "-p", project, "-f", "deploy/compose.yaml", "-f", "override.yaml"]

    def __enter__(self) -> Self:
        self.copy()
        index = self._serve_torch()
        try:
            self._override()
            self.down()
            self.up("--build", timeout=1500)
        finally:
            index.shutdown()
        self.wait_for_health()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.compose("ps", "--all"), self.compose("logs", "--tail", "15"), sep="\n")
        self.down()

    @property
    def deploy(self) -> Path:
        """The copy's deploy/."""
        return self.folder / "deploy"

    def copy(self) -> None:
        """Make the copy with its keys and data, unless there is one."""
        if self.folder.exists():
            return
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(command, cwd=ROOT, text=True).rstrip("\0").split("\0"):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        environment = Path(sys.executable).parents[1]
        subprocess.run(
            ["make", "--silent", "certs", f"VENV={environment}", "-o", f"{environment}/.ready"],
            cwd=self.folder, check=True, capture_output=True,
        )  # fmt: skip
        write_digits(self.deploy / "data", ["server", "node-0", "node-1", "node-2"])

    def compose(self, *arguments: str, timeout: float = 300, check: bool = True) -> str:
        """Standard output of `docker compose`.

        Raises:
            AssertionError: it failed.
        """
        command = ["docker", "compose", *self._options, *arguments]
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False,
            timeout=timeout,
        )  # fmt: skip
        assert not check or result.returncode == 0, (
            f"{' '.join(arguments)}: {result.stdout[-800:]}{result.stderr[-1500:]}"
        )
        return result.stdout

    def up(self, *options: str, timeout: float = 300) -> None:
        """Start what does not run."""
        self.compose("up", "--detach", *options, *self._services, timeout=timeout)

    def down(self) -> None:
        """End and remove all containers and networks of the project."""
        for place in self._clients:
            self._client_compose(place, "down", "--timeout", "5")
        self._clients.clear()
        self.compose("down", "--timeout", "20", "--remove-orphans")

    def services(self) -> dict[str, dict[str, Any]]:
        """Service -> what `docker compose ps` tells about it, of the containers that run."""
        lines = self.compose("ps", "--format", "json").splitlines()
        return {service["Service"]: service for service in map(json.loads, lines)}

    def wait_for_health(self) -> dict[str, str]:
        """Service -> health, as soon as all that have a health check are healthy, or after `patience`."""
        end = time.monotonic() + self._patience
        expected = set(self._services or self.compose("config", "--services").split())
        expected -= {"register", "operator", "keys"}
        while True:
            health = {name: service["Health"] for name, service in self.services().items() if name in expected}
            if (health.keys() == expected and set(health.values()) == {"healthy"}) or time.monotonic() > end:
                return health
            time.sleep(1)

    def containers(self) -> list[str]:
        """The names of all containers of the project, also of those that have ended."""
        label = f"label=com.docker.compose.project={self._project}"
        command = ["docker", "ps", "--all", "--filter", label, "--format", "{{.Names}}"]
        return subprocess.check_output(command, text=True).split()

    def inspect(self, service: str, template: str) -> str:
        """A field of a service's container, by a Go template."""
        container = f"{self._project}-{service}-1"
        return subprocess.check_output(["docker", "inspect", "-f", template, container], text=True).strip()

    def image_bytes(self, service: str) -> int:
        """The size of the image of a service's container, unpacked."""
        command = ["docker", "image", "inspect", "-f", "{{.Size}}", self.inspect(service, "{{.Image}}")]
        return int(subprocess.check_output(command))

    def addresses(self, service: str) -> list[str]:
        """The IP addresses of a service's container, one for each of its networks."""
        return [network["IPAddress"] for network in self._networks(service)]

    def gateways(self, service: str) -> list[str]:
        """The addresses that the host has, or would have, on the networks of a service."""
        return [self._gateway(network) for network in self._networks(service)]

    def reached_from_host(self, service: str, port: int) -> bool:
        """Whether a program on the host connects to a service's container.

        Without a route over a bridge of Docker's the address may belong to anyone, so nothing is sent to it.
        """
        for network in self._networks(service):
            route = subprocess.run(
                ["ip", "-o", "route", "get", network["IPAddress"]], capture_output=True, text=True, check=False
            )
            if f" dev br-{network['NetworkID'][:12]} " in route.stdout:
                try:
                    socket.create_connection((network["IPAddress"], port), 3).close()
                except OSError:
                    continue
                return True
        return False

    def _networks(self, service: str) -> list[dict[str, Any]]:
        return list(json.loads(self.inspect(service, "{{json .NetworkSettings.Networks}}")).values())

    def _gateway(self, network: dict[str, Any]) -> str:
        config = self._network(network)["IPAM"]["Config"][0]
        # Not named before an engine's second start for its own network, nor for networks without a host's address.
        return str(config.get("Gateway") or ipaddress.ip_network(config["Subnet"])[1])

    def _network(self, network: dict[str, Any]) -> dict[str, Any]:
        command = ["docker", "network", "inspect", network["NetworkID"]]
        return dict(json.loads(subprocess.check_output(command))[0])

    def reaches(self, service: str, host: str, port: int) -> bool:
        """Whether a service's container can connect to an address."""
        code = f"import socket; socket.create_connection(({host!r}, {port}), 3); print('yes')"
        return self.compose("exec", "-T", service, "python", "-c", code, check=False).strip() == "yes"

    def bridge_address(self) -> str:
        """The host's address on the engine's default network."""
        return self._gateway({"NetworkID": "bridge"})

    def add_client(self, name: str, superlink: str) -> str:
        """Make a client's files and admit it, unless that has been done; returns what the command prints."""
        if (self.deploy / "secrets" / name).exists():
            return ""
        return self.compose("run", "--rm", "-T", "keys", "add-client", name, "--superlink", superlink)

    def start_client(self, name: str, data: str, network: str = "") -> None:
        """Start deploy/compose.client.yaml as on a machine of its own, with the files that the operator sent there.

        Args:
            network: of compose.yaml that it is on; by default, one of its own.
        """
        place = self.folder.parent / name / "deploy"
        if not place.exists():
            shutil.copytree(self.deploy / "secrets" / name, place / "client")
            shutil.copytree(self.deploy / "data" / data, place / "client" / "data")
            shutil.copy(self.deploy / "compose.client.yaml", place)
            outward = {"external": True, "name": f"{self._project}_{network}"} if network else {}
            (place / "network.yaml").write_text(json.dumps({"networks": {"outward": outward}}))
            with (place / "client" / "client.env").open("a") as file:
                file.write(f"TOFU_UID={OWNER}\nTOFU_GID={OWNER}\n")
            if not os.getuid():
                subprocess.run(["chown", "-R", f"{OWNER}:{OWNER}", place], check=True)
        self._client_compose(place, "up", "--detach", "--no-build")
        self._clients.append(place)

    def _client_compose(self, place: Path, *arguments: str) -> None:
        files = ["-f", "compose.client.yaml", "-f", "network.yaml", "--env-file", "client/client.env"]
        options = ["-p", f"{self._project}-client", *files]
        subprocess.run(["docker", "compose", "--progress", "quiet", *options, *arguments], cwd=place, check=True)

    def wait_for_online(self, count: int) -> None:
        """Wait until so many nodes are online.

        Raises:
            AssertionError: they are not, in time.
        """
        end = time.monotonic() + self._patience
        command = ["exec", "-T", "superlink", *OPERATOR, "nodes"]
        while True:
            # It answers late, or not at all, on a machine that is busy.
            nodes = json.loads(self.compose(*command, check=False) or "[]")
            if sum(node["status"] == "online" for node in nodes) >= count:
                return
            assert time.monotonic() < end, nodes
            time.sleep(1)

    def kill(self, service: str) -> None:
        """End the process of a service as a crash does."""
        os.kill(int(self.inspect(service, "{{.State.Pid}}")), 9)

    def start_run(self, *settings: str) -> "OperatorRun":
        """Start `run` of the operator with these settings."""
        command = ["docker", "compose", *self._options, "run", "--rm", "-T", "operator", "run", *settings]
        return OperatorRun(command, self.folder, self.environment)

    def cpu_seconds(self, service: str) -> float:
        """CPU time that a service's container has used, health checks included."""
        script = """
            nanoseconds=$(cat /sys/fs/cgroup/cpuacct/cpuacct.usage 2>/dev/null) ||
                nanoseconds=$(sed -n 's/^usage_usec //p' /sys/fs/cgroup/cpu.stat)000
            echo $nanoseconds
        """
        return float(self.compose("exec", "-T", service, "sh", "-c", script)) / 1e9

    def memory(self) -> dict[str, float]:
        """Service -> MiB that its processes use, of the containers that run."""
        command = ["docker", "stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}"]
        found = {}
        for name, used, *_ in map(str.split, subprocess.check_output(command, text=True).splitlines()):
            if name.startswith(f"{self._project}-") and name.endswith("-1"):
                number, unit = float(used.rstrip("KMGiB")), used[-3:]
                found[name[len(self._project) + 1 : -2]] = number * {"GiB": 1024, "KiB": 1 / 1024}.get(unit, 1)
        return found

    def runs(self) -> list[Path]:
        """The folders of all runs, the latest last."""
        return sorted((self.deploy / "results").glob("runs/*"), key=lambda folder: folder.stat().st_mtime)

    def results(self) -> Path:
        """The folder of the latest run."""
        return self.runs()[-1]

    def _serve_torch(self) -> http.server.ThreadingHTTPServer:
        """Serve the build of torch that this machine's pip finds as the index that deploy/Dockerfile asks."""
        wheels = Path.home() / ".cache" / "tofu-fl" / "index" / "torch"
        if not list(wheels.glob("*.whl")):
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*pip, "-d", wheels, f"torch=={_TORCH}"], check=True, capture_output=True)

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        handler = functools.partial(Quiet, directory=str(wheels.parent))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", _INDEX_PORT), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def _override(self) -> None:
        override = {"services": {"superlink-exec": {"build": {"network": "host"}}}}
        (self.folder / "override.yaml").write_text(json.dumps(override))


class OperatorRun:
    """A run that the operator follows; `output` is what it has printed so far."""

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._log = (folder / "operator.log").open("wb")
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        self._path = folder / "operator.log"

    @property
    def output(self) -> str:
        """Everything that it printed so far."""
        return self._path.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 900) -> None:
        """Wait until it has printed a text.

        Raises:
            AssertionError: it ended before, or did not print it in time.
        """
        end = time.monotonic() + timeout
        while text not in self.output:
            assert self._process.poll() is None, f"ended without {text!r}: {self.output[-2000:]}"
            assert time.monotonic() < end, f"no {text!r} after {timeout} s: {self.output[-2000:]}"
            time.sleep(0.5)

    def wait(self, timeout: float = 900) -> int:
        """Its exit status."""
        try:
            return self._process.wait(timeout)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._log.close()
