"""`python -m tests.deploy.broken [NAME ...]`: what the checks in containers say of deployments that are broken.

Each fault below is made in a copy of deploy/, on a real engine, and the check of test_containers.py that is to fail
then is called. A fault that its check does not notice ends the command with status 1. All take about half an hour.
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
    """A text in a file of deploy/ that is replaced, the check that is to fail then, and the services that it needs."""

    file: str
    old: str
    new: str
    check: Callable[[ComposeDeployment], None]
    services: tuple[str, ...] = ()


def rounds(deployment: ComposeDeployment) -> None:
    """The check of runs in which services crash, with the fourth client that it needs."""
    deployment.add_client("hospital-d", "proxy:8443")
    deployment.start_client("hospital-d", data="node-0", network="fleet")
    deployment.wait_for_online(4)
    checks.test_rounds_go_on_while_services_crash(deployment)


FAULTS = {
    "the proxy speaks no TLS": Fault(
        "nginx.conf", "listen 8443 ssl;", "listen 8443;", checks.test_the_proxy_passes_fleet_paths_alone,
        ("superlink", "proxy"),
    ),
    "the proxy's certificate is of another CA": Fault(
        "compose.yaml", "./secrets/proxy/server.", "./secrets/other/server.",
        checks.test_the_proxy_passes_fleet_paths_alone, ("superlink", "proxy"),
    ),
    "nodes without a key are admitted": Fault(
        "compose.yaml", "      - --enable-supernode-auth\n", "",
        checks.test_nodes_need_an_admitted_key_and_a_superlink_of_their_ca,
        ("superlink", "proxy", "register", "node-0"),
    ),
    "a node's key is not admitted": Fault(
        "compose.yaml", ", /run/secrets/node-2.pub]", "]",
        checks.test_whoever_commands_the_superlink_needs_the_operators_token,
        ("superlink", "superlink-exec", "register"),
    ),
    "a client has the identity of another": Fault(
        "compose.yaml", "{source: node-1-identity,", "{source: node-0-identity,", rounds
    ),
    "nothing is started again": Fault("compose.yaml", "restart: unless-stopped", 'restart: "no"', rounds),
}  # fmt: skip


def noticed(folder: Path, fault: Fault) -> str:
    """What the check says of a deployment with the fault; "" if it passes."""
    deployment = ComposeDeployment(folder, project="tofu-broken", services=fault.services)
    deployment.copy()
    make_certificates(deployment.deploy / "secrets" / "other", ["localhost", "proxy"])
    if not os.getuid():
        for file in (deployment.deploy / "secrets" / "other").iterdir():
            os.chown(file, OWNER, OWNER)
    path = deployment.deploy / fault.file
    right = path.read_text()
    assert fault.old in right
    path.write_text(right.replace(fault.old, fault.new))
    with deployment:
        try:
            fault.check(deployment)
        except (AssertionError, OSError) as error:
            line = traceback.extract_tb(error.__traceback__)[-1].line
            return " ".join(f"{line}: {type(error).__name__} {error}".split())
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
        missed += not said
        print(f"{name}: {said[:300] or 'NOT NOTICED'}", flush=True)
    raise typer.Exit(int(missed > 0))


if __name__ == "__main__":
    run_command(main)
