"""kubernetes.yaml: Kubernetes' own schemas, the command lines of the topology, and what hardening promises."""

import copy
import re
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.certificates import main as make_certificates
from deploy.pinned import INSTALLED
from deploy.topology import ENVIRONMENT, Trust, identity_config, superexec, supernode
from tests.deploy.services import JOURNAL, RUNTIME_PORT

FILE = Path(__file__).parents[2] / "deploy" / "kubernetes.yaml"
COMPOSE = FILE.parent / "compose.yaml"
SECRETS = PurePosixPath("/run/secrets")


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(FILE.read_text()))


@pytest.fixture(scope="module")
def containers(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in documents[0]["spec"]["template"]["spec"]["containers"]}


def test_it_follows_kubernetes_schemas(documents: list[dict[str, Any]]) -> None:
    version = kubernetes_validate.latest_version()
    assert [document["kind"] for document in documents] == ["StatefulSet", "NetworkPolicy"]
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    broken = copy.deepcopy(documents[0])
    broken["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_its_command_lines_are_those_of_the_topology(containers: dict[str, dict[str, Any]]) -> None:
    trust = Trust(*(SECRETS / name for name in ("ca.crt", "server.pem", "server.key", "superexec")))
    config: dict[str, int | str] = {"data": "/data", "partition-id": 0}
    node = supernode(
        trust, superlink="fl.example.org:8443", key=SECRETS / "node", host="127.0.0.1", port=RUNTIME_PORT,
        config=config | identity_config(SECRETS / "identity", SECRETS / "identities.json") | {"journal": JOURNAL},
    )  # fmt: skip
    assert containers["node"]["args"] == list(node.arguments)
    assert containers["exec"]["args"] == list(superexec(trust, address=f"127.0.0.1:{RUNTIME_PORT}").arguments)
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for name, service in (("node", services["node-0"]), ("exec", services["node-0-exec"])):
        assert containers[name]["image"] == service["image"]
        environment = {entry["name"]: entry["value"] for entry in containers[name]["env"]}
        assert environment == service["environment"] | ({"TOFU_PINNED_APP": INSTALLED} if name == "exec" else {})
        assert ENVIRONMENT.items() <= environment.items()
        assert containers[name]["command"] == service["entrypoint"]
    assert containers["node"]["livenessProbe"]["exec"]["command"] == services["node-0"]["healthcheck"]["test"][1:]


def test_it_is_locked_down(documents: list[dict[str, Any]], containers: dict[str, dict[str, Any]]) -> None:
    pod = documents[0]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    for container in containers.values():
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert "ports" not in container
    policy = documents[1]["spec"]
    assert policy["ingress"] == []
    assert policy["podSelector"]["matchLabels"].items() <= documents[0]["spec"]["selector"]["matchLabels"].items()


def test_each_container_sees_its_own_files_and_make_certs_makes_them(
    documents: list[dict[str, Any]], containers: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    volumes = {volume["name"]: volume for volume in documents[0]["spec"]["template"]["spec"]["volumes"]}

    def mounted(container: str) -> dict[str, str]:
        return {mount["mountPath"]: mount["name"] for mount in containers[container]["volumeMounts"]}

    seen = {}
    for name in containers:
        secret = volumes[mounted(name)["/run/secrets"]]["secret"]
        assert secret["defaultMode"] == 0o440
        assert all(item["key"] == item["path"] for item in secret["items"])
        seen[name] = {item["key"] for item in secret["items"]}
    # What the command lines name is there; the node's key is the SuperNode's, the identity the client app's.
    for name in containers:
        named = {arg.removeprefix(f"{SECRETS}/") for arg in containers[name]["args"] if arg.startswith(f"{SECRETS}/")}
        assert named <= seen[name]
    assert seen["node"] - seen["exec"] == {"node", "server.pem", "server.key"}
    assert seen["exec"] - seen["node"] == {"identity", "identities.json"}
    assert "/data" in mounted("exec")
    assert "/data" not in mounted("node")

    files = dict(re.findall(r"--from-file=(\S+)=(\S+)", FILE.read_text()))
    assert files.keys() == seen["node"] | seen["exec"]
    tmp_path = tmp_path / "secrets"
    assert make_certificates([str(tmp_path), "--compose", "--node=node-0"]) == 0
    for path in files.values():
        assert Path(path.replace("$N", f"{tmp_path}/node-0").replace("$S", str(tmp_path))).is_file()
