"""`flwr run` on ray, in a network namespace with nothing but loopback: no other interface, and no network to need.

`flwr` starts a local SuperLink and leaves it running; each test stops its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from client.app import app as client_app
from server.app import serve_in_process
from tofu.settings import Settings, Value

pytestmark = pytest.mark.timeout(900)  # a safeguard against a hang only: a busy machine takes many times longer

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
"""A proxy round and a secure round."""

SCRIPT = """
ip link set lo up
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
    """End what `flwr` left running: the SuperLink and its children."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        for process in processes_of(home):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
        end = time.monotonic() + seconds
        while processes_of(home) and time.monotonic() < end:
            time.sleep(0.1)


@dataclass(frozen=True)
class FlowerRun:
    """What `flwr run` left: what it printed, the run folder, and the status that `flwr ls` tells."""

    log: str
    folder: Path
    status: str


def flower(here: Path, **settings: Value) -> FlowerRun:
    """`flwr run --stream` of this repository's app, with a SuperLink of its own in a network of its own."""
    home = here / "home"
    home.mkdir()
    (home / "config.toml").write_text('[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local:"\n')
    variables = QUIET | {
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "APP": str(ROOT),
        "FEDERATION": f"num-supernodes={NODES} client-resources-num-cpus=1 init-args-num-cpus=2",
        "SETTINGS": in_one_line(SETTINGS | settings | {"run-folder": str(here / "run")}),
    }
    command = [*namespace(), "sh", "-c", SCRIPT]
    with (here / "log").open("wb") as log:
        try:
            ended = subprocess.run(
                command, cwd=here, env=os.environ | variables, stdout=log, stderr=log, timeout=840, check=False
            )
        finally:
            stop(home)
    assert processes_of(home) == []
    text = (here / "log").read_text()
    assert ended.returncode == 0, text
    (status,) = (run["status"] for run in json.loads((here / "ls.json").read_text())["runs"])
    return FlowerRun(text, here / "run", status)


def test_flwr_run_gives_the_weights_of_tofu_run(tmp_path: Path) -> None:
    run = flower(tmp_path)
    assert run.status == "finished:completed"
    assert "done: final accuracy" in run.log
    on_ray = json.loads((run.folder / "summary.json").read_text())
    here = serve_in_process(client_app, Settings.of(SETTINGS | {"run-folder": str(tmp_path / "here")}))
    assert on_ray["weights_sha256"] == here["weights_sha256"]
    assert on_ray["final_accuracy"] == here["final_accuracy"]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["clients"] for row in rows] == [0, NODES, NODES]
    assert not any(row["failures"] for row in rows)
    assert [row["kind"] for row in rows] == ["start", "proxy", "secure"]
    for name in ("uplink_bytes", "downlink_bytes"):
        assert on_ray[name] == pytest.approx(here[name], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plugins",
    [
        {"plugins": "ood,rank", "plugin-options": "rank.after=1 rank.longest=50"},
        {"plugins": "gpm", "tasks": "pixels", "task-count": 2, "schedule": "secure"},
    ],
    ids=lambda plugins: plugins["plugins"],
)
def test_plugins_give_the_weights_of_tofu_run(tmp_path: Path, plugins: dict[str, Value]) -> None:
    """What plugins keep, broadcast and hand over travels on ray as it does in one process, in both kinds of round."""
    run = flower(tmp_path, **plugins)
    assert run.status == "finished:completed", run.log
    on_ray = json.loads((run.folder / "summary.json").read_text())
    here = serve_in_process(client_app, Settings.of(SETTINGS | plugins | {"run-folder": str(tmp_path / "here")}))
    assert on_ray["weights_sha256"] == here["weights_sha256"]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert not any(row["failures"] for row in rows)
    assert (run.folder / "plugins.state").stat().st_size > 100


@pytest.mark.slow
def test_a_failed_run_is_not_called_completed(tmp_path: Path) -> None:
    run = flower(tmp_path, ratio=1e6)
    assert "error: ratio=1000000.0 is not usable: expected at most " in run.log
    assert not run.folder.exists()
    assert run.status == "finished:failed"
