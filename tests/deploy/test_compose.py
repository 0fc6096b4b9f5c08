"""compose.yaml: the Compose Specification's own schema, the command lines of the topology, and what hardening promises.

compose-spec.json beside this file is the schema of the Compose Specification (Apache-2.0), as check-jsonschema 0.39.0
ships it.
"""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.common.config import parse_config_args
from jsonschema import Draft202012Validator

from deploy.certificates import main as make_certificates
from deploy.topology import ENVIRONMENT
from tests.deploy.services import containers
from tofu.secagg.identities import read_identity, read_known

DEPLOY = Path(__file__).parents[2] / "deploy"
NODES = 3
BRIEF = ("operator", "keys")
"""Services that the operator runs for one command."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file as a plain tree, merges done."""
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert isinstance(document, dict)
    return document


def test_it_follows_the_compose_specification(compose: dict[str, Any]) -> None:
    validator = Draft202012Validator(json.loads((Path(__file__).parent / "compose-spec.json").read_text()))
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(compose)] == []
    broken = compose | {"services": compose["services"] | {"superlink": {"comand": []}}}
    assert not validator.is_valid(broken)


def test_its_command_lines_are_those_of_the_processes(compose: dict[str, Any]) -> None:
    for name, member in containers(NODES).items():
        service = compose["services"][name]
        assert service["command"] == list(member.arguments), name
        assert service["image"] == "tofu-fl/app:0.1.0", name
        # The images' own entry points are the commands.
        assert service.get("entrypoint", [member.command])[-1] == member.command, name
        assert ENVIRONMENT.items() <= service["environment"].items(), name
    others = {"proxy", "register", *BRIEF}
    assert compose["services"].keys() == containers(NODES).keys() | others
    assert "flwr==1.41.0" in (DEPLOY.parent / "constraints.txt").read_text()


def test_every_service_is_locked_down(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"] not in ("", "0", "root"), name
        assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"}, name
        assert ":" in service["image"], name
        assert not service["image"].endswith(":latest"), name
    long_lived = compose["services"].keys() - {"register", *BRIEF}
    for name in long_lived:
        assert compose["services"][name]["restart"] == "unless-stopped", name
        assert compose["services"][name]["healthcheck"]["test"][0] == "CMD", name


def test_one_service_builds_the_image_of_all_apps_with_a_cpu_build_of_torch(compose: dict[str, Any]) -> None:
    """With a `build` in each, or a `pull_policy`, every command builds anew and leaves images without a name."""
    services = compose["services"]
    assert [name for name, service in services.items() if "build" in service] == ["superlink-exec"]
    assert not any("pull_policy" in service for service in services.values())
    assert {service["image"] for name, service in services.items() if name != "proxy"} == {
        services["superlink-exec"]["image"]
    }
    index = services["superlink-exec"]["build"]["args"]["TORCH_INDEX"]
    assert index == "${TORCH_INDEX-https://download.pytorch.org/whl/cpu}"  # set to nothing, it stays nothing


def test_only_the_proxy_can_be_reached_from_outside(compose: dict[str, Any]) -> None:
    services, networks = compose["services"], compose["networks"]
    assert [name for name, service in services.items() if "ports" in service] == ["proxy"]
    open_networks = {name for name, network in networks.items() if not network.get("internal")}
    # Without it every user of the host reaches the Control API, and the containers reach the host.
    option = "com.docker.network.bridge.inhibit_ipv4"
    assert all(networks[name]["driver_opts"] == {option: "true"} for name in networks.keys() - open_networks)
    assert [name for name, service in services.items() if open_networks & set(service["networks"])] == ["proxy"]
    # Whoever shares a network with the SuperLink reaches its Control API.
    beside = {name for name, service in services.items() if "server" in service["networks"]}
    assert beside == {"superlink", "superlink-exec", "proxy", "register", *BRIEF}
    for node in range(NODES):
        own = {name for name, service in services.items() if f"node-{node}" in service["networks"]}
        assert own == {f"node-{node}", f"node-{node}-exec"}


def test_only_the_client_app_sees_a_nodes_data_and_cannot_write_it(compose: dict[str, Any]) -> None:
    for node in range(NODES):
        source = f"${{TOFU_DATA:-./data}}/node-{node}"
        mounts = [
            (name, volume)
            for name, service in compose["services"].items()
            for volume in service.get("volumes", [])
            if volume["source"] == source
        ]
        assert [name for name, _ in mounts] == [f"node-{node}-exec"]
        assert mounts[0][1]["read_only"]
        assert mounts[0][1]["target"] == "/data"


def test_what_the_node_config_names_is_mounted_where_the_client_app_runs(compose: dict[str, Any]) -> None:
    for node in range(NODES):
        arguments = compose["services"][f"node-{node}"]["command"]
        config = parse_config_args([arguments[arguments.index("--node-config") + 1]])
        assert config["partition-id"] == node
        own = compose["services"][f"node-{node}-exec"]
        targets = {f"/run/secrets/{secret['target']}" for secret in own["secrets"]}
        assert {config["identity"], config["identities"]} <= targets
        assert config["data"] in {volume["target"] for volume in own["volumes"]}
        journal = next(volume for volume in own["volumes"] if volume["target"] == str(Path(config["journal"]).parent))
        assert journal["source"] == f"./journal/node-{node}"
        assert not journal.get("read_only")
        assert own["environment"]["TOFU_PINNED_APP"] == "${TOFU_PINNED_APP:-installed}"
        assert own["entrypoint"][:3] == ["python", "-m", "deploy.prefork"]  # which refuses other apps
    # The server's setting secure-identities names the same list.
    assert "identities.json" in {secret["target"] for secret in compose["services"]["superlink-exec"]["secrets"]}
    assert "secure-identities=/run/secrets/identities.json" in (DEPLOY / "compose.yaml").read_text()


def test_a_client_on_another_machine_is_a_node_of_the_federation(compose: dict[str, Any]) -> None:
    validator = Draft202012Validator(json.loads((Path(__file__).parent / "compose-spec.json").read_text()))
    alone = yaml.safe_load((DEPLOY / "compose.client.yaml").read_text())
    assert [error.message for error in validator.iter_errors(alone)] == []
    own = {"proxy:8443": "${TOFU_SUPERLINK}", "partition-id=0": "partition-id=${TOFU_PARTITION}", "node-0:": "node:"}
    for part in ("", "-exec"):
        service, node = alone["services"][f"node{part}"], compose["services"][f"node-0{part}"]
        text = "\n".join(node["command"])
        for here, there in own.items():
            text = text.replace(here, there)
        assert "\n".join(service["command"]) == text
        different = {"command", "secrets", "networks", "volumes", "depends_on", "build"}
        assert {name: value for name, value in service.items() if name not in different} == {
            name: value for name, value in node.items() if name not in different
        }
        assert "ports" not in service
        assert [s["target"] for s in service["secrets"]] == [s["target"] for s in node["secrets"]]
    assert alone["services"]["node-exec"]["networks"] == ["inner"]
    assert alone["networks"]["inner"] == compose["networks"]["node-0"]


def test_every_secret_is_made_and_only_its_owner_mounts_it(compose: dict[str, Any], tmp_path: Path) -> None:
    names = [f"node-{node}" for node in range(NODES)]
    tmp_path = tmp_path / "secrets"
    arguments = [str(tmp_path), "--compose", *(f"--node={name}" for name in names)]
    assert make_certificates(arguments) == 0
    users: dict[str, set[str]] = {name: set() for name in compose["secrets"]}
    for name, service in compose["services"].items():
        for secret in service.get("secrets", []):
            users[secret["source"]].add(name.removesuffix("-exec"))
    # What an app reads, only the service that starts apps sees.
    for name in names:
        for service, options in compose["services"].items():
            seen = {secret["source"] for secret in options.get("secrets", [])}
            assert (f"{name}-identity" in seen) == (service == f"{name}-exec")
    assert users["identities"] == {"superlink", *names}
    token = {"source": "control-token", "target": "control-token"}
    trusted = {name for name, options in compose["services"].items() if token in options.get("secrets", [])}
    assert trusted == {"superlink", "register", "operator"}
    for name, secret in compose["secrets"].items():
        file = tmp_path / Path(secret["file"]).relative_to("secrets")
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode == 0o600 and name != "control-token":
            assert users[name] == {file.parent.name}
        else:
            assert mode == (0o600 if name == "control-token" else 0o644)
            assert users[name]
    mounted = {Path(secret["file"]).relative_to("secrets") for secret in compose["secrets"].values()}
    made = {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()}
    assert made - mounted == {Path("ca.key")}  # which stays offline
    known = read_known(tmp_path / "identities.json")
    assert known == {
        str(node): read_identity(tmp_path / f"node-{node}" / "identity", str(node)).public for node in range(NODES)
    }
