"""`flwr run` on ray, in a network namespace with nothing but loopback: no other interface, and no network to need.

Each test starts and stops a SuperLink of its own, on free ports: the one that `flwr` would start has fixed ports,
and 15 s to start.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from client.app import app as client_app
from server.app import serve_in_process
from tests.processes import NO_TOTAL_LIMIT, free_port, run, wait_for
from tofu.settings import Settings, Value

pytestmark = NO_TOTAL_LIMIT

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
NODES = 3
SETTINGS: dict[str, Value] = {
    "model": "mlp",
    "clients": NODES,
    "rounds": 2,
    "max-evals": 4,
    "seed": 3,
    "downlink": "topk",
    "schedule": "switch",
}
"""A compressed round and a secure round."""

START = """
ip link set lo up
mkdir -p "$FLWR_HOME/local-superlink"
flower-superlink --insecure --simulation --isolation subprocess --host 127.0.0.1 \\
    --control-api-address "127.0.0.1:$FLWR_LOCAL_CONTROL_API_PORT" --port "$FLWR_LOCAL_SUPERLINK_HTTP_API_PORT" \\
    --database "$FLWR_HOME/local-superlink/state.db" >superlink.log 2>&1 &
until python -c "import socket; socket.create_connection(('127.0.0.1', $FLWR_LOCAL_SUPERLINK_HTTP_API_PORT))" \\
    2>/dev/null
do kill -0 $! || { cat superlink.log; exit 1; }; sleep 0.2
done
"""
"""What `flwr run` does itself unless a SuperLink is there."""

SCRIPT = """
flwr run "$APP" local --stream --federation-config "$FEDERATION" --run-config "$SETTINGS" || exit
flwr ls local --format json >ls.json
"""


def namespace() -> list[str]:
    """The command that gives another one a network of its own; skips the test where there is none."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("needs unshare and ip")
    for flags in ("-rn", "-n"):
        command = ["unshare", flags]
        trial = subprocess.run([*command, "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
        if trial.returncode == 0:
            return command
    pytest.skip("may not make a network namespace")


def in_one_line(settings: dict[str, Value]) -> str:
    """Settings as `flwr run --run-config` takes them."""
    return " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())


def processes_of(home: Path) -> list[int]:
    """The processes whose Flower home this is, which are ours alone: the folder is this test's."""
    wanted = f"FLWR_HOME={home}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it has ended, or is not ours
            continue
    return found


def stop(home: Path) -> None:
    """End the SuperLink and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes_of(home):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
        with suppress(AssertionError):
            wait_for(lambda: processes_of(home) == [], lambda: len(processes_of(home)), seconds=20)


@dataclass(frozen=True)
class FlowerRun:
    """What `flwr run` left: what it printed, the run folder, and the status that `flwr ls` tells."""

    log: str
    folder: Path
    status: str


def in_namespace(here: Path, script: str, watch: Path, **variables: str) -> str:
    """What a script prints that calls `flwr` in a network of its own, with a SuperLink of its own.

    Args:
        watch: a file or folder that grows while the script makes progress.
        variables: environment variables of the script.
    """
    home = here / "home"
    home.mkdir()
    (home / "config.toml").write_text('[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local:"\n')
    ports = ("FLWR_LOCAL_CONTROL_API_PORT", "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT")
    environment = QUIET | {"FLWR_HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment |= {name: str(free_port()) for name in ports} | variables
    try:
        # Ray's processes use CPU time when idle, too.
        ended = run(
            [*namespace(), "sh", "-c", START + script], cwd=here, env=os.environ | environment, cpu=False,
            watch=[watch, here / "superlink.log"],
        )  # fmt: skip
    finally:
        stop(home)
    assert processes_of(home) == []
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def flower(here: Path, **settings: Value) -> FlowerRun:
    """`flwr run --stream` of this repository's app, with a SuperLink of its own in a network of its own."""
    text = in_namespace(
        here, SCRIPT, here / "run", APP=str(ROOT),
        FEDERATION=f"num-supernodes={NODES} client-resources-num-cpus=1 init-args-num-cpus=2",
        SETTINGS=in_one_line(SETTINGS | settings | {"run-folder": str(here / "run")}),
    )  # fmt: skip
    (status,) = (run["status"] for run in json.loads((here / "ls.json").read_text())["runs"])
    return FlowerRun(text, here / "run", status)


def test_flwr_run_gives_the_weights_of_tofu_run(tmp_path: Path) -> None:
    ran = flower(tmp_path)
    assert ran.status == "finished:completed"
    assert "done: final accuracy" in ran.log
    on_ray = json.loads((ran.folder / "summary.json").read_text())
    here = serve_in_process(client_app, Settings.of(SETTINGS | {"run-folder": str(tmp_path / "here")}))
    assert on_ray["weights_sha256"] == here["weights_sha256"]
    assert on_ray["final_accuracy"] == here["final_accuracy"]
    rows = [json.loads(line) for line in (ran.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["clients"] for row in rows] == [0, NODES, NODES]
    assert not any(row["failures"] for row in rows)
    assert [row["kind"] for row in rows] == ["start", "compressed", "secure"]
    for name in ("uplink_bytes", "downlink_bytes"):
        assert on_ray[name] == pytest.approx(here[name], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plugins",
    [
        {"plugins": "ood,rank", "plugin-options": "rank.after=1 rank.max-norm=50"},
        {"plugins": "gpm", "tasks": "pixels", "task-count": 2, "schedule": "secure"},
        {
            "plugins": "crossbar,curvature,hierarchy",
            "plugin-options": "crossbar.percentile=0.5 hierarchy.tree=digits curvature.probes=1",
        },
        {
            "plugins": "trend",
            "plugin-options": "trend.members=fp,1 trend.images=20 trend.steps=2",
            "schedule": "compressed",
        },
    ],
    ids=lambda plugins: plugins["plugins"],
)
def test_plugins_give_the_weights_of_tofu_run(tmp_path: Path, plugins: dict[str, Value]) -> None:
    """What plugins keep, broadcast and hand over travels on ray as it does in one process, in both kinds of round."""
    ran = flower(tmp_path, **plugins)
    assert ran.status == "finished:completed", ran.log
    on_ray = json.loads((ran.folder / "summary.json").read_text())
    here = serve_in_process(client_app, Settings.of(SETTINGS | plugins | {"run-folder": str(tmp_path / "here")}))
    assert on_ray["weights_sha256"] == here["weights_sha256"]
    rows = [json.loads(line) for line in (ran.folder / "metrics.jsonl").read_text().splitlines()]
    assert not any(row["failures"] for row in rows)
    assert (ran.folder / "plugins.state").stat().st_size > 100


@pytest.mark.slow
def test_a_failed_run_is_not_called_completed(tmp_path: Path) -> None:
    ran = flower(tmp_path, ratio=1e6)
    assert "error: ratio=1000000.0 is not usable: expected at most " in ran.log
    assert "Traceback" not in ran.log
    assert not ran.folder.exists()
    assert ran.status == "finished:failed"
