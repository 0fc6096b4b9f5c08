"""`python -m tests.deploy.broken [NAME ...]`: what the checks in containers say of deployments that are broken.

Each fault below is made in a copy of deploy/, on a real engine, and the check of test_containers.py that is to fail
then is called. A fault that its check does not notice, or takes for another, ends the command with status 1. All take
about an hour.
"""

import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import run_command
from deploy.certificates import make_certificates
from tests.deploy import test_containers as checks
from tests.deploy.engine.deployment import OWNER, ComposeDeployment, reason_to_skip


@dataclass(frozen=True)
class Fault:
    """A text in a file of deploy/ that is replaced.

    Attributes:
        check: the check that must fail then.
        says: a part of the assertion that must fail, or of its message.
        services: the services that the check needs; by default all of them.
    """

    file: str
    old: str
    new: str
    check: Callable[[ComposeDeployment], None]
    says: str
    services: tuple[str, ...] = ()


def rounds(deployment: ComposeDeployment) -> None:
    """The check of runs in which services crash, with the fourth client that it needs."""
    deployment.add_client("hospital-d", "proxy:8443")
    deployment.start_client("hospital-d", data="node-0", network="fleet")
    deployment.wait_for_online(4)
    checks.test_rounds_go_on_while_services_crash(deployment)


def left(deployment: ComposeDeployment) -> None:
    """The check of the end, after a command without the `--rm` of all commands in the documentation."""
    deployment.compose("run", "-T", "operator")
    checks.test_services_end_on_their_own_accord_and_leave_nothing(deployment)


HEALTH = checks.test_all_services_become_healthy
IMAGE = checks.test_the_image_has_what_its_apps_need_and_little_else
PORTS = checks.test_only_the_proxys_port_is_published_and_on_the_loopback
PATHS = checks.test_the_proxy_passes_fleet_paths_alone
LOCKED = checks.test_nothing_is_writable_but_tmp_and_nobody_is_root
NETWORKS = checks.test_a_client_reaches_the_proxy_and_its_own_node_alone
HOST = checks.test_local_users_of_the_host_reach_no_service_and_no_service_reaches_the_host
TOKEN = checks.test_whoever_commands_the_superlink_needs_the_operators_token
KEYS = checks.test_nodes_need_an_admitted_key_and_a_superlink_of_their_ca
FOURTH = checks.test_a_client_from_another_network_joins
STOPPED = checks.test_all_is_stopped_in_mid_run_and_started_again
END = checks.test_services_end_on_their_own_accord_and_leave_nothing

DOOR = ("superlink", "proxy")
SERVER = ("superlink", "superlink-exec", "register")
ONE_NODE = ("superlink", "proxy", "register", "node-0", "node-0-exec")
NODES = ("superlink", "proxy", "register", "node-0", "node-1", "node-2")
BUILT = (*NODES, "superlink-exec")
BEFORE_HEALTH = "    networks: [server]\n    healthcheck:"

FAULTS = {
    "a service is not healthy": Fault(
        "compose.yaml", "create_connection(('127.0.0.1', 9100)", "create_connection(('127.0.0.1', 9101)", HEALTH,
        "'superlink-exec': 'unhealthy'", SERVER[:2],
    ),
    "a service does not run": Fault(
        "compose.yaml", "  node-1:\n", "  node-1:\n    scale: 0\n", HEALTH, "'node-0': 'healthy'"
    ),
    "the image has packages that nobody needs": Fault(
        "Dockerfile", "COPY tofu ./tofu\n", "RUN pip install --no-cache-dir ruff\nCOPY tofu ./tofu\n", IMAGE,
        "'needless': {'ruff'}", SERVER[:2],
    ),
    "the image grows": Fault(
        "Dockerfile", "COPY tofu ./tofu\n", "RUN head -c 300M /dev/urandom > /app/more\nCOPY tofu ./tofu\n", IMAGE,
        "assert size <", SERVER[:2],
    ),
    "the port is open to all": Fault(
        "compose.yaml", "${TOFU_LISTEN:-127.0.0.1}:8443", "0.0.0.0:8443", PORTS, "('proxy', '0.0.0.0', 8443)", DOOR
    ),
    "the operator's port is published": Fault(
        "compose.yaml", f"{BEFORE_HEALTH}\n      <<: *listens\n      test:\n",
        "    networks: [server, edge]\n    ports: [\"127.0.0.1:8000:8000\"]\n    healthcheck:\n"
        "      <<: *listens\n      test:\n",
        PORTS, "('superlink', '127.0.0.1', 8000)", DOOR,
    ),
    "the proxy speaks no TLS": Fault(
        "nginx.conf", "listen 8443 ssl;", "listen 8443;", PATHS, "WRONG_VERSION_NUMBER", DOOR
    ),
    "the proxy's certificate is of another CA": Fault(
        "compose.yaml", "./secrets/proxy/server.", "./secrets/other/server.", PATHS, "CERTIFICATE_VERIFY_FAILED", DOOR
    ),
    "the proxy passes all paths": Fault(
        "nginx.conf", "POST /v1/fleet/[a-z-]+$", "POST /v1/", PATHS, "/v1/control/list-runs\") ==", DOOR
    ),
    "the proxy passes paths that lead elsewhere": Fault(
        "nginx.conf", "POST /v1/fleet/[a-z-]+$", "POST /v1/fleet/", PATHS, "/v1/fleet/../control/list-runs\") ==", DOOR
    ),
    "file systems are writable": Fault(
        "compose.yaml", "  read_only: true\n  cap_drop", "  cap_drop", LOCKED, "'found': '0000000000000000",
        ("superlink",),
    ),
    "the server's data are writable": Fault(
        "compose.yaml", "/server\", target: /data, read_only: true,", "/server\", target: /data,", LOCKED,
        "'service': 'superlink-exec'", SERVER[:2],
    ),
    "services are root": Fault(
        "compose.yaml", '  user: "${TOFU_UID:-1000}:${TOFU_GID:-1000}"\n  read_only: true\n  cap_drop: [ALL]\n',
        '  user: "0:0"\n  read_only: true\n', LOCKED, "'found': '0\\n00", ("superlink",),
    ),
    "services keep capabilities": Fault(
        "compose.yaml", "  cap_drop: [ALL]\n", "", LOCKED, "\\n00000000a80425fb\\n1", ("superlink",)
    ),
    "services may gain privileges": Fault(
        "compose.yaml", '  security_opt: ["no-new-privileges:true"]\n', "", LOCKED, "000\\n0\\n'", ("superlink",)
    ),
    "a node is on the server's network": Fault(
        "compose.yaml", "networks: [fleet, node-0]", "networks: [fleet, node-0, server]", NETWORKS,
        "('node-0', 'superlink')", ONE_NODE,
    ),
    "the superlink is on the clients' network": Fault(
        "compose.yaml", f"{BEFORE_HEALTH}\n      <<: *listens\n      test:\n",
        "    networks: [server, fleet]\n    healthcheck:\n      <<: *listens\n      test:\n", NETWORKS,
        "('node-0', 'superlink')", ONE_NODE,
    ),
    "a client's app is on the clients' network": Fault(
        "compose.yaml", "    networks: [node-0]", "    networks: [node-0, fleet]", NETWORKS,
        "('node-0-exec', 'proxy')", ONE_NODE,
    ),
    "a client's app is not on its node's network": Fault(
        "compose.yaml", "    networks: [node-0]", "    networks: [node-1]", NETWORKS,
        'assert deployment.reaches("node-0-exec", "node-0", 9094)', ONE_NODE[:-1],
    ),
    "the host has an address on the networks": Fault(
        "compose.yaml", 'inhibit_ipv4: "true"', 'inhibit_ipv4: "false"', HOST, "'reached': ['superlink', 'node-0'",
        (*ONE_NODE, "superlink-exec", "node-1", "node-2"),
    ),
    "the server's app reaches the host": Fault(
        "compose.yaml", f"{BEFORE_HEALTH} *superexec-healthy", "    networks: [server, edge]\n"
        "    healthcheck: *superexec-healthy", HOST, "'reaches_host': ['superlink-exec']",
        (*ONE_NODE, "superlink-exec", "node-1", "node-2"),
    ),
    "a node's key is not admitted": Fault(
        "compose.yaml", ", /run/secrets/node-2.pub]", "]", TOKEN, "assert len(known) == 3", SERVER
    ),
    "the superlink has no login": Fault(
        "superlink.py", "    guard(module, Path(command[0]).read_text().strip())\n", "", TOKEN,
        "assert told ==", SERVER,
    ),
    "nodes without a key are admitted": Fault(
        "compose.yaml", "      - --enable-supernode-auth\n", "", KEYS, "Exit Code", ONE_NODE[:-1]
    ),
    "the port is not where it is to be": Fault(
        "compose.yaml", "${TOFU_LISTEN:-127.0.0.1}:8443", "127.0.0.1:8443", FOURTH,
        "assert time.monotonic() < end", NODES,
    ),
    "the proxy's certificate lacks the name that clients use": Fault(
        "clients.py", "if host in found:", "if found:", FOURTH, "assert time.monotonic() < end",
        BUILT
    ),
    "a further client's key is not admitted": Fault(
        "clients.py", "        register(key.public, name)\n", "        pass\n", FOURTH, "assert time.monotonic() < end",
        BUILT
    ),
    "a further client has no way out": Fault(
        "compose.client.yaml", "networks: [outward, inner]", "networks: [inner]", FOURTH,
        "assert time.monotonic() < end", NODES,
    ),
    "a client has the identity of another": Fault(
        "compose.yaml", "{source: node-1-identity,", "{source: node-0-identity,", rounds, "run.wait() == 0"
    ),
    "nothing is started again": Fault("compose.yaml", "restart: unless-stopped", 'restart: "no"', rounds, "ended"),
    "a node is not started again": Fault(
        "compose.yaml", "  node-1:\n    <<: *supernode\n", '  node-1:\n    <<: *supernode\n    restart: "no"\n', rounds,
        "wait_for_health",
    ),
    "an app that ends with its service is not reported": Fault(
        "prefork.py", "for app in _read_running():", "for app in []:", rounds, 'assert "it ended with its service"'
    ),
    "the superlink forgets its runs in a crash": Fault(
        "compose.yaml", "- /state/state.db", "- /tmp/state.db", rounds, "ended without"
    ),
    "the operator reads the log twice after a crash": Fault(
        "control.py", 'Counter(self.text.split("\\n"))', "Counter()", rounds, "run.output.count"
    ),
    "the superlink forgets its runs when it is stopped": Fault(
        "compose.yaml", "- /state/state.db", "- /tmp/state.db", STOPPED, 'assert "finished:failed" in run.output'
    ),
    "the operator does not see the results": Fault(
        "compose.yaml", "source: ./results, target: /results, read_only: true", "source: ./data, target: /results",
        STOPPED, "resumed.wait() == 0",
    ),
    "results are not in their folder": Fault(
        "compose.yaml", "{type: bind, source: ./results, target: /results, bind: {create_host_path: false}}",
        "{type: bind, source: ./state, target: /results}", STOPPED, "records(deployment)",
    ),
    "the proxy waits for connections": Fault(
        "compose.yaml", "    stop_signal: SIGTERM\n", "", END, "'proxy': '137'", DOOR
    ),
    "services have a second to end": Fault(
        "compose.yaml", "stop_grace_period: 30s", "stop_grace_period: 1s", END, "'137'", BUILT
    ),
    "the operator's container is left": Fault("compose.yaml", "", "", left, "'left': ['tofu-broken-operator-", DOOR),
}  # fmt: skip


def make(fault: Fault, deployment: ComposeDeployment) -> None:
    """Make the fault in the copy; code with a fault gets an image of its own."""
    changes = [(fault.file, fault.old, fault.new)]
    if fault.file.endswith((".py", "Dockerfile")):
        changes += [
            (name, "image: tofu-fl/app:", "image: tofu-fl/broken:") for name in ("compose.yaml", "compose.client.yaml")
        ]
    for name, old, new in changes:
        path = deployment.deploy / name
        right = path.read_text()
        assert old in right, f"{name} has no {old!r}"
        path.write_text(right.replace(old, new))


def said_by(error: Exception) -> str:
    """The lines of the check and of its helpers that were not passed, its variables, and the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    lines = [
        frame.line or "" for frame in traceback.extract_tb(error.__traceback__) if "tests/deploy" in frame.filename
    ]
    known = [frame.f_locals for frame in frames if frame.f_code.co_filename == checks.__file__]
    variables = {name: value for name, value in (known or [{}])[-1].items() if name != "deployment"}
    return " ".join(f"{' > '.join(lines[1:])}: {type(error).__name__} {error} {variables}".split())


def noticed(folder: Path, fault: Fault) -> str:
    """What the check says of a deployment with the fault; "" if it passes."""
    deployment = ComposeDeployment(folder, project="tofu-broken", services=fault.services, patience=120)
    deployment.copy()
    make_certificates(deployment.deploy / "secrets" / "other", ["localhost", "proxy"])
    if not os.getuid():
        for file in (deployment.deploy / "secrets" / "other").iterdir():
            os.chown(file, OWNER, OWNER)
    make(fault, deployment)
    try:
        deployment.__enter__()
        fault.check(deployment)
    except Exception as error:
        return said_by(error)
    finally:
        deployment.down()
    return ""


def main(names: Annotated[list[str] | None, typer.Argument(help="faults; all by default")] = None) -> None:
    """Make each fault, and print what is said of it."""
    os.environ["TOFU_CONTAINERS"] = "1"
    if reason := reason_to_skip():
        raise typer.BadParameter(reason)
    missed = 0
    for name in names or FAULTS:
        with tempfile.TemporaryDirectory(prefix="tofu-broken-") as folder:
            said = noticed(Path(folder), FAULTS[name])
        right = FAULTS[name].says in said
        missed += not right
        print(f"{name}: {said[:300]}" if right else f"{name}: NOT NOTICED {said[:3000]}", flush=True)
    raise typer.Exit(int(missed > 0))


if __name__ == "__main__":
    run_command(main)
