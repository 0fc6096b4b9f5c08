"""deploy/compose.yaml on a real Docker engine: what is open, what is not, and runs in which services crash.

One deployment serves all tests, in this order. It needs an engine; tests/deploy/engine/start.sh starts one.
"""

import json
import socket
import ssl
import time
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


def answer(deployment: ComposeDeployment, path: str) -> tuple[int, bool]:
    """HTTP status of a POST to the published port, the path sent as it is, and whether the proxy itself answered."""
    trust = ssl.create_default_context(cafile=str(deployment.deploy / "secrets" / "ca.crt"))
    try:
        request = urllib.request.Request(f"https://localhost:8443{path}", method="POST")
        with urllib.request.urlopen(request, context=trust, timeout=10) as response:
            return response.status, False
    except urllib.error.HTTPError as error:
        return error.code, b"<center>nginx" in error.read()


def wait_for_app(deployment: ComposeDeployment, node: str) -> None:
    """Wait until a client's app runs."""
    running = deployment.deploy / "journal" / node / "apps.json"
    while not running.exists() or running.read_text() in ("", "[]"):
        time.sleep(0.02)


def test_all_services_become_healthy(deployment: ComposeDeployment) -> None:
    health = deployment.wait_for_health()
    assert health == dict.fromkeys(SERVICES, "healthy")


def test_the_image_has_what_its_apps_need_and_little_else(deployment: ComposeDeployment) -> None:
    """pandas, matplotlib and seaborn are there because flwr-datasets imports them."""
    code = "from importlib.metadata import distributions as d; print(*(one.name for one in d()))"
    installed = set(
        deployment.compose("exec", "-T", "superlink", "python", "-c", code).lower().replace("_", "-").split()
    )
    assert {"torch", "pyarrow", "dp-accounting"} <= installed
    needless = installed & {"ray", "tensorboard", "mlflow-skinny", "pytest", "ruff", "transformers", "lightning"}
    if deployment.environment["TORCH_INDEX"]:
        needless |= {name for name in installed if name.startswith("nvidia-") or name == "triton"}
    assert needless == set()
    size = deployment.image_bytes("superlink")
    assert size < (1.74e9 if deployment.environment["TORCH_INDEX"] else 5.9e9)


def test_only_the_proxys_port_is_published_and_on_the_loopback(deployment: ComposeDeployment) -> None:
    published = {
        (name, port["URL"], port["PublishedPort"])
        for name, service in deployment.services().items()
        for port in service["Publishers"] or ()
        if port["PublishedPort"]
    }
    assert published == {("proxy", "127.0.0.1", 8443)}


def test_the_proxy_passes_fleet_paths_alone(deployment: ComposeDeployment) -> None:
    assert answer(deployment, "/v1/fleet/pull-messages") == (415, False)  # the SuperLink's to a body that is none
    assert answer(deployment, "/v1/control/list-runs") == (404, True)
    assert answer(deployment, "/v1/fleet/../control/list-runs") == (404, True)


def test_nothing_is_writable_but_tmp_and_nobody_is_root(deployment: ComposeDeployment) -> None:
    # Every user may write /var/tmp where the container's file system is writable.
    script = """
        touch /tmp/x && ! touch /var/tmp/x && ! touch /data/x && id -u
        sed -n -E 's/^(CapBnd|NoNewPrivs):[[:space:]]*//p' /proc/self/status
    """
    for service in ("superlink", "superlink-exec", "node-0", "node-0-exec", "proxy"):
        mounted = script if "exec" in service else script.replace("&& ! touch /data/x ", "")
        found = deployment.compose("exec", "-T", service, "sh", "-c", mounted)
        assert found.split() == [str(OWNER), "0" * 16, "1"], service


def test_a_client_reaches_the_proxy_and_its_own_node_alone(deployment: ComposeDeployment) -> None:
    assert deployment.reaches("node-0", "proxy", 8443)
    assert deployment.reaches("node-0-exec", "node-0", 9094)
    closed = [("node-0", "superlink", 8000), ("node-0-exec", "superlink", 8000), ("node-0-exec", "proxy", 8443)]
    open_ways = [
        (client, service) for client, service, port in closed for address in deployment.addresses(service)
        if deployment.reaches(client, address, port)
    ]  # fmt: skip
    assert open_ways == []


def test_local_users_of_the_host_reach_no_service_and_no_service_reaches_the_host(
    deployment: ComposeDeployment,
) -> None:
    # The port of the operator and of the nodes' apps have no login, or one for apps.
    services = [("superlink", 8000), *((f"node-{node}", 9094) for node in range(3))]
    reached = [name for name, port in services if deployment.reached_from_host(name, port)]
    assert reached == []
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        gateways = {name: deployment.gateways(name) for name in ("node-0", "node-0-exec", "superlink-exec")}
        assert all(gateways.values())
        reaches_host = [
            name for name, found in gateways.items() if any(deployment.reaches(name, host, port) for host in found)
        ]
    assert reaches_host == []


def test_whoever_commands_the_superlink_needs_the_operators_token(deployment: ComposeDeployment) -> None:
    def nodes(service: str, *command: str) -> str:
        return deployment.compose("exec", "-T", "-w", "/app", service, *command, "nodes", check=False)

    known = json.loads(nodes("superlink", *OPERATOR))
    assert len(known) == 3
    printed = nodes("superlink-exec", *OPERATOR[:3])
    assert printed == ""


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
    printed = deployment.add_client("hospital-d", f"{address}:8443")
    assert "client 3 (hospital-d) is admitted" in printed
    deployment.environment["TOFU_LISTEN"] = address
    deployment.up("--no-build")
    deployment.compose("restart", "proxy")  # its certificate has a further name
    deployment.start_client("hospital-d", data="node-0")
    deployment.wait_for_online(4)


def test_rounds_go_on_while_services_crash(deployment: ComposeDeployment) -> None:
    """Open rounds, then secure ones with identities: a client's app, the SuperLink and a node end in them."""
    secure = ("schedule=switch", "switch-round=3", "secure-identities=/run/secrets/identities.json")
    run = deployment.start_run(*RUN, *secure, "clients=4", "rounds=5")
    run.wait_for("round 1/5")
    wait_for_app(deployment, "node-2")
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
    # It is reported when its service is back, and not when its token has expired.
    lost = {failure["client"]: failure["reason"] for failure in records(deployment)[2]["failures"]}
    assert "it ended with its service" in lost["2"]
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
    assert "finished:failed" in run.output  # the SuperLink has not forgotten it
    resumed = deployment.start_run(f"resume=runs/{deployment.results().name}")
    assert resumed.wait() == 0, resumed.output
    assert summary(deployment)["rounds"] == 4
    assert [record["round"] for record in records(deployment)] == list(range(5))


def test_services_end_on_their_own_accord_and_leave_nothing(deployment: ComposeDeployment) -> None:
    services = deployment.services()
    deployment.compose("run", "--rm", "-T", "operator")
    trust = ssl.create_default_context(cafile=str(deployment.deploy / "secrets" / "ca.crt"))
    address = deployment.environment["TOFU_LISTEN"], 8443
    with trust.wrap_socket(socket.create_connection(address, 10), server_hostname="localhost") as client:
        # As a client on another machine, which does not end and is in the middle of a request.
        client.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\n")
        deployment.compose("stop", timeout=120)
    ended = {service: deployment.inspect(service, "{{.State.ExitCode}}") for service in services}
    assert ended == dict.fromkeys(services, "0")
    deployment.compose("down")
    left = deployment.containers()
    assert left == []
