"""deploy/compose.yaml on a real Docker engine: what is open, what is not, and runs in which services crash.

One deployment serves all tests, in this order. It needs an engine; tests/deploy/engine/start.sh starts one.
"""

import json
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.engine.deployment import OPERATOR, OWNER, ComposeDeployment, reason_to_skip

_REASON = reason_to_skip()
pytestmark = [pytest.mark.skipif(bool(_REASON), reason=_REASON), pytest.mark.timeout(1800)]

SERVICES = {"superlink", "superlink-exec", "proxy"} | {f"node-{n}{part}" for n in range(3) for part in ("", "-exec")}
RUN = ("clients=3", "min-clients=3", "dataset=/data", "local-epochs=1", "max-evals=10")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeDeployment]:
    with ComposeDeployment(tmp_path_factory.mktemp("compose")) as running:
        yield running


def summary(deployment: ComposeDeployment) -> dict[str, Any]:
    return dict(json.loads((deployment.results() / "summary.json").read_text()))


def records(deployment: ComposeDeployment) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (deployment.results() / "metrics.jsonl").read_text().splitlines()]


def status(deployment: ComposeDeployment, path: str) -> int:
    """HTTP status of a POST to the published port, the path sent as it is."""
    trust = ssl.create_default_context(cafile=str(deployment.deploy / "secrets" / "ca.crt"))
    try:
        request = urllib.request.Request(f"https://localhost:8443{path}", method="POST")
        return int(urllib.request.urlopen(request, context=trust, timeout=10).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_all_services_become_healthy(deployment: ComposeDeployment) -> None:
    assert deployment.wait_for_health() == dict.fromkeys(SERVICES, "healthy")


def test_only_the_proxys_port_is_published_and_on_the_loopback(deployment: ComposeDeployment) -> None:
    published = {
        (name, port["URL"], port["PublishedPort"])
        for name, service in deployment.services().items()
        for port in service["Publishers"] or ()
        if port["PublishedPort"]
    }
    assert published == {("proxy", "127.0.0.1", 8443)}


def test_the_proxy_passes_fleet_paths_alone(deployment: ComposeDeployment) -> None:
    assert status(deployment, "/v1/fleet/pull-messages") == 415  # the SuperLink's answer to a body that is none
    assert status(deployment, "/v1/control/list-runs") == 404
    assert status(deployment, "/v1/fleet/../control/list-runs") == 404


def test_nothing_is_writable_but_tmp_and_nobody_is_root(deployment: ComposeDeployment) -> None:
    # Every user may write /var/tmp where the container's file system is writable.
    script = """
        touch /tmp/x && ! touch /var/tmp/x && ! touch /data/x && id -u
        sed -n -E 's/^(CapBnd|NoNewPrivs):[[:space:]]*//p' /proc/self/status
    """
    for service in ("node-0", "node-0-exec", "superlink", "superlink-exec"):
        mounted = script if "exec" in service else script.replace("&& ! touch /data/x ", "")
        found = deployment.compose("exec", "-T", service, "sh", "-c", mounted)
        assert found.split() == [str(OWNER), "0" * 16, "1"], service


def test_a_client_reaches_the_proxy_and_its_own_node_alone(deployment: ComposeDeployment) -> None:
    (superlink,) = deployment.addresses("superlink")
    assert deployment.reaches("node-0", "proxy", 8443)
    assert not deployment.reaches("node-0", superlink, 8000)
    assert deployment.reaches("node-0-exec", "node-0", 9094)
    assert not deployment.reaches("node-0-exec", superlink, 8000)
    assert not any(deployment.reaches("node-0-exec", address, 8443) for address in deployment.addresses("proxy"))


def test_local_users_of_the_host_reach_no_service_and_no_service_reaches_the_host(
    deployment: ComposeDeployment,
) -> None:
    # The port of the operator and of the nodes' apps have no login, or one for apps.
    services = [("superlink", 8000), *((f"node-{node}", 9094) for node in range(3))]
    assert [name for name, port in services if deployment.reached_from_host(name, port)] == []
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        gateways = {name: deployment.gateways(name) for name in ("node-0", "node-0-exec", "superlink-exec")}
        assert all(gateways.values())
        assert [
            (name, gateway) for name, found in gateways.items() for gateway in found
            if deployment.reaches(name, gateway, port)
        ] == []  # fmt: skip


def test_whoever_commands_the_superlink_needs_the_operators_token(deployment: ComposeDeployment) -> None:
    def nodes(service: str, *command: str) -> str:
        return deployment.compose("exec", "-T", "-w", "/app", service, *command, "nodes", check=False)

    assert len(json.loads(nodes("superlink", *OPERATOR))) == 3
    assert nodes("superlink-exec", *OPERATOR[:3]) == ""


def test_nodes_need_an_admitted_key_and_a_superlink_of_their_ca(deployment: ComposeDeployment) -> None:
    """A refused node ends by itself, where an accepted one runs until `timeout` ends it with status 124."""
    make = ["python", "-m", "deploy.certificates", "/tmp/stranger", "--node", "key", "--host", "proxy"]
    deployment.compose("exec", "-T", "-w", "/app", "node-0", *make)
    node = (
        "timeout 120 python -m deploy.supernode flower-supernode --superlink proxy:8443 --port 9999 --isolation process"
    )
    for options, reason in (
        ("--root-certificates /run/secrets/ca.crt", "Exit Code: 305"),
        ("--root-certificates /run/secrets/ca.crt --auth-supernode-private-key /tmp/stranger/key", "Exit Code: 305"),
        ("--root-certificates /tmp/stranger/ca.crt --auth-supernode-private-key /run/secrets/node", "certificate"),
    ):
        script = f"{node} --max-retries 1 {options} 2>&1; echo status $?"
        said = deployment.compose("exec", "-T", "-w", "/app", "node-0", "sh", "-c", script)
        assert reason in said, said
        assert said.split()[-1] not in ("0", "124"), said


def test_a_client_from_another_network_joins(deployment: ComposeDeployment) -> None:
    # The address that the host has on the engine's default network stands for its address in the outer world.
    address = deployment.bridge_address()
    told = deployment.add_client("hospital-d", f"{address}:8443")
    assert "client 3 (hospital-d) is admitted" in told
    deployment.environment["TOFU_LISTEN"] = address
    deployment.compose("up", "--detach", "--no-build")
    deployment.compose("restart", "proxy")  # its certificate has a further name
    deployment.start_client("hospital-d", data="node-0")
    deployment.wait_for_online(4)


def test_rounds_go_on_while_services_crash(deployment: ComposeDeployment) -> None:
    """Open rounds, then secure ones with identities: a client's app, the SuperLink and a node end in them."""
    secure = ("schedule=switch", "switch-round=3", "secure-identities=/run/secrets/identities.json")
    run = deployment.start_run(*RUN, *secure, "clients=4", "rounds=5")
    run.wait_for("round 1/5")
    deployment.kill("node-2-exec")
    run.wait_for("round 2/5")
    deployment.kill("superlink")
    run.wait_for("round 3/5")
    deployment.kill("node-1")
    assert run.wait() == 0, run.output
    assert [record["kind"] for record in records(deployment)][1:] == ["proxy"] * 2 + ["secure"] * 3
    assert summary(deployment)["final_accuracy"] > 0.5
    assert records(deployment)[1]["clients"] == 4  # until the first crash
    assert all(record["clients"] >= 3 for record in records(deployment)[1:])
    assert 'state="done"} 1.0' in (deployment.results() / "metrics.prom").read_text()
    assert deployment.wait_for_health() == dict.fromkeys(SERVICES, "healthy")  # all of them are back
    # The operator sees each round once, those after the crash too.
    assert [run.output.count(f"round {number}/5") for number in range(1, 6)] == [1] * 5


def test_all_is_stopped_in_mid_run_and_started_again(deployment: ComposeDeployment) -> None:
    run = deployment.start_run(*RUN, "rounds=4")
    run.wait_for("round 1/4")
    deployment.compose("stop", "--timeout", "20")
    assert len(records(deployment)) < 5
    deployment.compose("up", "--detach", "--no-build")
    deployment.wait_for_health()
    deployment.wait_for_online(3)
    assert run.wait() == 2
    resumed = deployment.start_run(f"resume=runs/{deployment.results().name}")
    assert resumed.wait() == 0, resumed.output
    assert summary(deployment)["rounds"] == 4
    assert [record["round"] for record in records(deployment)] == list(range(5))


def test_services_end_on_their_own_accord_and_leave_nothing(deployment: ComposeDeployment) -> None:
    deployment.compose("stop", timeout=120)
    ended = {service: deployment.inspect(service, "{{.State.ExitCode}}") for service in SERVICES}
    assert ended == dict.fromkeys(SERVICES, "0")
    deployment.down()
    assert deployment.compose("ps", "--all", "--quiet") == ""
