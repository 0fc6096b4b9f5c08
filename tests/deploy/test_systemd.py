"""The systemd units: what systemd says of them, the command lines of the topology, and a client under systemd."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from deploy.pinned import INSTALLED
from deploy.topology import ENVIRONMENT, Trust, identity_config, superexec, supernode
from tests.deploy.engine.deployment import reason_to_skip, write_digits

DEPLOY = Path(__file__).parents[2] / "deploy"
OWN = {"identity", "identities.json"}
"""What the client app reads of its own accord, where the node config says so."""
UNITS = ("tofu-node.service", "tofu-node-exec.service")
OURS = r"/opt/tofu-fl/\.venv/bin/python -m deploy\.(supernode|prefork --cold) "
"""Before Flower's own command: refuse a certificate that is not valid, and other apps than the pinned one."""
_SYSTEMD = shutil.which("systemd-analyze")


def _settings(unit: str) -> dict[str, list[str]]:
    """Key -> its values in order, of all sections, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / unit).read_text())
    settings: dict[str, list[str]] = {}
    for line in text.splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            settings.setdefault(key, []).append(value)
    return settings


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the units as they would be installed on this machine."""
    binaries = Path(sys.executable).parent
    for unit in UNITS:
        text = (DEPLOY / unit).read_text()
        assert re.search(f"ExecStart={OURS}", text)
        (tmp_path / unit).write_text(text.replace("/opt/tofu-fl/.venv/bin", str(binaries)))
    return tmp_path


@pytest.mark.skipif(_SYSTEMD is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_them_and_finds_them_locked_down(installed: Path) -> None:
    assert _SYSTEMD is not None
    files = [str(installed / unit) for unit in UNITS]
    checked = subprocess.run([_SYSTEMD, "verify", "--man=no", *files], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    # Exposure from 0 to 10; the threshold is in tenths of a percent of that.
    command = [_SYSTEMD, "security", "--offline=true", "--threshold=20", *files]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_their_command_lines_are_those_of_the_topology() -> None:
    credentials = PurePosixPath("${CREDENTIALS_DIRECTORY}")
    trust = Trust(*(credentials / name for name in ("ca.crt", "server.pem", "server.key", "superexec")))
    node = supernode(
        trust, superlink="${SUPERLINK}", key=credentials / "node", config={}, host="127.0.0.1", port=9094
    )  # fmt: skip
    # What listens on a client's machine has a CA of that machine's own.
    expected = {
        "tofu-node.service": (node, {"--ssl-ca-certfile": "local-ca.crt"}),
        "tofu-node-exec.service": (superexec(trust, address="127.0.0.1:9094"), {"--root-certificates": "local-ca.crt"}),
    }
    for unit, (member, own) in expected.items():
        command, *arguments = shlex.split(re.sub(OURS, "", _settings(unit)["ExecStart"][0]))
        assert command == f"/opt/tofu-fl/.venv/bin/{member.command}"
        wanted = _options(member.arguments) | {name: str(credentials / file) for name, file in own.items()}
        if "--node-config" in wanted:
            wanted["--node-config"] = "${NODE_CONFIG}"
        assert _options(arguments) == wanted
    environment = " ".join(_settings("tofu-node-exec.service")["Environment"]).split()
    assert f"TOFU_PINNED_APP={INSTALLED}" in environment
    missing = {f"{name}={value}" for name, value in ENVIRONMENT.items()} - set(environment)
    assert missing == {"RAY_USAGE_STATS_ENABLED=0"}  # there is no ray on a client


def test_every_credential_that_is_used_is_loaded_and_the_node_never_gives_up() -> None:
    for unit in UNITS:
        settings = _settings(unit)
        used = set(re.findall(r"\$\{CREDENTIALS_DIRECTORY\}/([\w.-]+)", settings["ExecStart"][0]))
        loaded = {credential.partition(":")[0] for credential in settings["LoadCredential"]}
        # Those of the node config, which need not be there.
        others = {credential.partition(":")[0] for credential in settings.get("SetCredential", [])}
        assert loaded - used == others == (OWN if unit == "tofu-node-exec.service" else set())
        assert used <= loaded
        assert settings["Restart"] == ["always"]
        assert settings["StartLimitIntervalSec"] == ["0"]
        assert settings["DynamicUser"] == ["yes"]


def test_the_node_config_that_is_documented_names_the_credentials_of_the_unit_that_has_them() -> None:
    folder = PurePosixPath("/run/credentials/tofu-node-exec.service")
    text = " ".join(line.lstrip("# ") for line in (DEPLOY / "tofu-node.service").read_text().splitlines())
    for name, value in identity_config(*(folder / name for name in ("identity", "identities.json"))).items():
        assert f'{name}="{value}"' in text


@pytest.fixture
def machine() -> Iterator[str]:
    """Name of a container in which systemd runs, with the units."""
    name, engine = "tofu-test-systemd", DEPLOY.parent / "tests" / "deploy" / "engine"
    if not subprocess.check_output(["docker", "images", "-q", "tofu-fl/app:0.1.0"]):
        pytest.skip("there is no image of the app: test_containers.py makes it")
    docker("build", "-q", "--network", "host", "-t", name, "-f", str(engine / "systemd.Dockerfile"), str(engine))
    # Not --privileged: an engine that is in a sandbox itself lacks some capabilities.
    allowed = [f"--cap-add={capability}" for capability in ("SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE")]
    allowed += ["--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined", "--cgroupns=private"]
    mounts = [
        "-v",
        "/sys/fs/cgroup/systemd:/sys/fs/cgroup/systemd",
        *(f"--tmpfs={path}" for path in ("/run", "/tmp:exec")),
    ]
    docker("run", "--detach", "--name", name, *allowed, *mounts, name)
    try:
        for file in (*(DEPLOY / unit for unit in UNITS), engine / "systemd.sh"):
            docker("cp", str(file), f"{name}:/etc/systemd/system/")
        yield name
    finally:
        docker("rm", "--force", name)


def docker(*arguments: str) -> str:
    result = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())
@pytest.mark.timeout(1800)
def test_a_client_under_systemd_takes_part_and_ends_when_it_is_told(machine: str, tmp_path: Path) -> None:
    write_digits(tmp_path, ["tofu-data"])
    docker("cp", str(tmp_path / "tofu-data"), f"{machine}:/srv/")
    lines = docker("exec", machine, "bash", "/etc/systemd/system/systemd.sh").splitlines()
    assert lines.count("active") == 2
    assert lines.count("Result=success") == lines.count("ExecMainStatus=0") == 2
    rounds = [json.loads(line) for line in lines if line.startswith('{"round"')]
    assert [record["clients"] for record in rounds] == [0, 3, 3]


def _options(arguments: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Option -> value."""
    return dict(zip(arguments[::2], arguments[1::2], strict=True))
