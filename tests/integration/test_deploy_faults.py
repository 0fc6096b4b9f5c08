"""Three authenticated nodes with identities, over TLS: secure rounds, nodes that misbehave, and a server that dies."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.app import app as client_app
from deploy.app_folder import write_app
from deploy.control import CompletedRun
from deploy.processes import LocalCluster, read_names
from server.app import serve_in_process
from server.checkpoint import FOLDER
from tests.integration.deployed import (
    Background,
    assert_of_the_run,
    in_process,
    kill_server_app,
    log_lines,
    megabytes,
    misbehaving_app,
    rows,
    run_on,
    samples,
    server_app,
    set_faults,
    wait_online,
)
from tests.integration.misbehaving import HUGE_BYTES
from tests.processes import NO_TOTAL_LIMIT, run, wait_for
from tofu.settings import Settings

TINY: dict[str, Any] = {
    "clients": 3, "min-clients": 3, "model": "mlp", "local-epochs": 1, "batch-size": 32, "lr": 0.1, "ratio": 40.0,
    "max-evals": 5, "schedule": "switch", "round-timeout": 240.0,
}  # fmt: skip

pytestmark = [
    NO_TOTAL_LIMIT,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the kernel's list of processes"),
]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("deploy")
    app = misbehaving_app(folder / "app")
    hooks = str(Path(__file__).parent / "hooks")
    environment = {"PYTHONPATH": os.pathsep.join([hooks, *filter(None, [os.environ.get("PYTHONPATH")])])}
    federation = LocalCluster(
        folder / "federation", nodes=3, app=app, warm=True, identities=True, environment=environment
    )
    for member in ("node-0-exec", "node-1"):
        set_fates(federation, member)
    with federation:
        wait_online(federation)
        yield federation


def set_fates(federation: LocalCluster, member: str, *fates: str) -> None:
    """What happens to the next messages of a member; see hooks/sitecustomize.py."""
    home = federation.folder / "homes" / member
    home.mkdir(parents=True, exist_ok=True)
    (home / "fates.json").write_text(json.dumps(fates))


def settings_of(federation: LocalCluster, folder: Path, **more: object) -> Settings:
    own: dict[str, Any] = {"secure-identities": str(federation.identities), "run-folder": str(folder)}
    return Settings.of(TINY | own | {name.replace("_", "-"): value for name, value in more.items()})


def test_rounds_with_identities_equal_one_process(federation: LocalCluster, tmp_path: Path) -> None:
    """The same training, to the bit: open rounds with compressed uplink and downlink, then secure rounds."""
    settings = settings_of(
        federation, tmp_path / "remote", rounds=4, switch_round=3, downlink="proxy", downlink_ratio=20.0
    )
    run = run_on(federation, settings.to_config(), write_app(tmp_path / "app"))
    assert run.completed, run.log
    remote = rows(tmp_path / "remote")
    assert [(row["kind"], row["clients"], row["failures"]) for row in remote] == [
        ("start", 0, []), ("compressed", 3, []), ("compressed", 3, []), ("secure", 3, []), ("secure", 3, [])
    ]  # fmt: skip
    # One process has no identities: they sign the same masked vectors.
    own: dict[str, Any] = {"run-folder": str(tmp_path / "local"), "secure-identities": ""}
    serve_in_process(client_app, Settings.of(settings.to_config() | own))
    local = rows(tmp_path / "local")
    assert [row["accuracy"] for row in remote] == [row["accuracy"] for row in local]
    assert local[-1]["accuracy"] > 0.3
    ends = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("remote", "local")]
    assert ends[0] == ends[1]
    ledgers = [rows(tmp_path / name, "ledger") for name in ("remote", "local")]
    # The signatures were asked for: train, share, confirm and reveal.
    assert len([row for row in ledgers[0] if (row["round"], row["direction"]) == (4, "uplink")]) == 4 * 3
    sent = {
        round_: max(
            row.get("payload_bytes", 0)
            for row in ledgers[0]
            if (row["round"], row["direction"]) == (round_, "downlink") and row["kind"] != "hello"
        )
        for round_ in (1, 2, 3)
    }
    assert sent[1] == 0  # every node builds the initial model itself
    assert all(0 < sent[round_] <= len(ends[0]) / 20 for round_ in (2, 3))
    # In open rounds messages differ by ids and identities, the updates in them do not.
    payloads = [
        sorted(
            (row["round"], row["client"], row.get("payload_bytes", 0))
            for row in ledger
            if row["direction"] == "uplink" and row["round"] in (1, 2)
        )
        for ledger in ledgers
    ]
    assert payloads[0] == payloads[1]
    assert run.traffic_bytes >= sum(row["bytes"] for row in ledgers[0] if row["direction"] == "uplink")


@pytest.mark.slow
def test_nodes_that_misbehave_are_left_out_and_named(
    federation: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {
        (2, "1"): ("truncated", "checksum"),
        (2, "2"): ("replayed", "belongs to round 1, expected 2"),
        (3, "1"): ("huge", "reply "),
        (3, "2"): ("bomb", "bytes, expected"),
        (4, "1"): ("nan", "not finite"),
        (4, "2"): ("another model", "relative to weights 0000"),
        (5, "1"): ("wrong shapes", "float32 body has"),
    }

    def faults(instead: str = "") -> dict[str, dict[str, str]]:
        return {
            name: {f"{round_}:mask": instead or fault for (round_, who), (fault, _) in wrong.items() if who == name}
            for name in "12"
        }

    settings = settings_of(federation, tmp_path / "run", rounds=6, switch_round=4, recovery="fedavg", log="json")
    set_faults(federation.folder, faults())
    link = federation.processes["superlink"].pid
    before = megabytes(link)
    background = Background(federation, settings.to_config())
    background.wait_for_round(1)
    honest = megabytes(pid := server_app(federation), "VmHWM")
    highest = honest
    while (now := megabytes(pid, "VmHWM")) > 0 and background.alive:
        highest = max(highest, now)
        time.sleep(0.2)
    run = background.end()
    assert run.completed, run.log
    metrics = rows(tmp_path / "run")
    assert [row["clients"] for row in metrics] == [0, 3, 1, 1, 1, 2, 3]
    for (round_, name), (_, reason) in wrong.items():
        assert reason in {fault["client"]: fault["reason"] for fault in metrics[round_]["failures"]}[name]
    assert_logged(federation, run, tmp_path / "run", {(round_, name) for round_, name in wrong})
    # The huge one is received whole, with five or six copies of it; the bomb is 1 GB that nobody inflates.
    assert honest > 0
    assert highest - honest < 8 * HUGE_BYTES / 2**20, (honest, highest)
    assert megabytes(link) - before < 300
    alone = in_process(tmp_path / "alone", settings, faults("lost"), monkeypatch)
    assert metrics[-1]["accuracy"] == alone["final_accuracy"]
    ends = [folder / "weights.safetensors" for folder in (tmp_path / "run", tmp_path / "alone" / "run")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def assert_logged(federation: LocalCluster, run: CompletedRun, folder: Path, failed: set[tuple[int, str]]) -> None:
    """The logs of server and nodes tell of this run, and name those that failed; so do the metrics."""
    nodes = {name.removeprefix("node-"): identity for identity, name in read_names(federation.folder).items()}

    def log(member: str) -> list[dict[str, Any]]:
        said = log_lines((federation.logs / f"{member}-exec.jsonl").read_text())
        return [line for line in said if line["run"] == str(run.identity)]

    server = log("superlink")
    # Standard error has the same lines, among Flower's.
    assert [json.loads(line) for line in run.log.splitlines() if line.startswith('{"time"')] == server
    logged = [line for line in server if line["event"] == "client failed"]
    assert {(line["level"], line["round"], line["client"], line["node"]) for line in logged} == {
        ("warning", round_, name, nodes[name]) for round_, name in failed
    }
    assert len(logged) == len(failed)
    for name, identity in nodes.items():
        own = log(f"node-{name}")
        assert {line["node"] for line in own} == {identity}
        rounds = [row["round"] for row in rows(folder)[1:]]
        # One that misbehaves does not say so: in these tests the honest client app answers first.
        assert [line["round"] for line in own if line["what"] == "train" and line["event"] == "answered"] == rounds
    assert_of_the_run(samples((folder / "metrics.prom").read_text()), folder)


@pytest.mark.slow
def test_rubbish_in_a_secure_round_costs_the_round_and_names_its_sender(
    federation: LocalCluster, tmp_path: Path
) -> None:
    """Three clients bear no dropout, so that the round is abandoned; the next one goes on."""
    set_faults(federation.folder, {"2": {"2:share": "rubbish", "4:mask": "rubbish", "6:reveal": "rubbish"}})
    settings = settings_of(federation, tmp_path / "run", rounds=7, switch_round=2, ema_decay=0.0)
    run = run_on(federation, settings.to_config())
    assert run.completed, run.log
    metrics = rows(tmp_path / "run")
    assert [row["clients"] for row in metrics] == [0, 3, 0, 3, 0, 3, 0, 3]
    for row in metrics[2::2]:
        assert row["abandoned"]
        assert "2" in {failure["client"] for failure in row["failures"]}
        assert row["accuracy"] == metrics[row["round"] - 1]["accuracy"]


@pytest.mark.slow
def test_a_server_app_that_was_killed_goes_on_in_another_run(federation: LocalCluster, tmp_path: Path) -> None:
    set_faults(federation.folder, {})
    settings = settings_of(federation, tmp_path / "run", rounds=8, switch_round=3)
    background = Background(federation, settings.to_config())
    background.wait_for_round(4)
    kill_server_app(federation)
    run = background.end()
    assert run.status == "finished:failed"
    reported = rows(tmp_path / "run")
    assert 4 <= reported[-1]["round"] < 8
    assert not (tmp_path / "run" / "summary.json").exists()

    again = Settings.of(settings.to_config() | {"resume": str(tmp_path / "run")})
    run = run_on(federation, again.to_config())
    assert run.completed, run.log
    assert "resumes after round" in run.log
    metrics = rows(tmp_path / "run")
    assert [row["round"] for row in metrics] == list(range(9))
    assert metrics[: len(reported)] == reported
    assert [(row["clients"], row["failures"]) for row in metrics[1:]] == [(3, [])] * 8
    assert (tmp_path / "run" / "summary.json").exists()
    assert [path.name for path in (tmp_path / "run" / FOLDER).iterdir()] == ["round-000008.checkpoint"]


@pytest.mark.slow
def test_below_min_clients_a_run_waits_and_then_stops_in_one_line(federation: LocalCluster, tmp_path: Path) -> None:
    gone = ("node-1", "node-1-exec", "node-2", "node-2-exec")
    set_faults(federation.folder, {})
    members = {name: federation.processes[name] for name in gone}
    settings = settings_of(federation, tmp_path / "run", rounds=100, switch_round=0, round_timeout=20.0)
    background = Background(federation, settings.to_config())
    background.wait_for_round(2)
    federation.end(*gone)
    run = background.end()
    try:
        assert run.status == "finished:failed"
        [said] = {line for line in run.log.splitlines() if line.lstrip().startswith("error:")}
        assert "1 client connected after 20 s, min-clients is 3" in said
        reported = rows(tmp_path / "run")
        assert [row["round"] for row in reported] == list(range(len(reported)))
        assert len(reported) > 2
    finally:
        for name in members:
            federation.restart(name)
    wait_online(federation)
    # They are back, so that the run can go on; this time it waits for those that go.
    own = {"resume": str(tmp_path / "run"), "round-timeout": 300.0}
    background = Background(federation, settings.to_config() | own)
    background.wait_for_round(len(reported) + 1)
    federation.end(*gone)
    settled = len(rows(tmp_path / "run"))
    time.sleep(25)
    assert server_app(federation)
    assert len(rows(tmp_path / "run")) <= settled + 1
    for name in gone:
        federation.restart(name)
    background.wait_for_round(settled + 3)
    kill_server_app(federation)  # it has rounds enough
    background.end()
    wait_for(lambda: not server_app(federation))


@pytest.mark.slow
def test_a_slow_node_is_left_behind_and_welcome_again(federation: LocalCluster, tmp_path: Path) -> None:
    """What a node sends 20 s after it was asked is of a round that is over."""
    set_faults(federation.folder, {"1": {"2:mask": "late"}})
    settings = settings_of(
        federation, tmp_path / "run", rounds=14, switch_round=14, recovery="fedavg", round_timeout=15.0, min_clients=2
    )
    run = run_on(federation, settings.to_config())
    assert run.completed, run.log
    metrics = rows(tmp_path / "run")
    assert [failure["client"] for failure in metrics[2]["failures"]] == ["1"]
    assert metrics[2]["clients"] == 2
    assert 15 <= metrics[2]["seconds"] < 40
    assert metrics[-1]["clients"] == 3
    assert metrics[-1]["failures"] == []


def test_a_full_disk_ends_a_run_without_checkpoints_in_one_line_too(tmp_path: Path) -> None:
    """In one process: the weights, of 136 kB, cannot be written whole."""
    options = [f"--{name}={value}" for name, value in TINY.items() if name not in ("schedule", "round-timeout")]
    code = "import resource, tofu.cli; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); tofu.cli.main()"
    command = [sys.executable, "-c", code, "run", "--quiet", "--no-checkpoint", *options, "--rounds=2"]
    result = run([*command, f"--run-folder={tmp_path / 'run'}"], warm=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"round 1: the run folder {tmp_path / 'run'} cannot be written (File too large)" in result.stderr
    assert [row["round"] for row in rows(tmp_path / "run")] == [0, 1]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_later(federation: LocalCluster, tmp_path: Path) -> None:
    """As on a full disk, a checkpoint of this run can be begun and not be written whole."""
    set_faults(federation.folder, {})
    settings = settings_of(federation, tmp_path / "run", rounds=40, switch_round=0, recovery="fedavg")
    background = Background(federation, settings.to_config())
    background.wait_for_round(3)
    [size, *_] = sorted(file.stat().st_size for file in (tmp_path / "run" / FOLDER).glob("round-*.checkpoint"))
    resource.prlimit(server_app(federation), resource.RLIMIT_FSIZE, (size - 1000, size - 1000))
    run = background.end()
    assert run.status == "finished:failed"
    [said] = {line for line in run.log.splitlines() if line.lstrip().startswith("error:")}
    assert "its checkpoint cannot be written to" in said
    assert "File too large" in said
    reported = rows(tmp_path / "run")
    assert [row["round"] for row in reported] == list(range(len(reported)))
    assert 4 <= len(reported) < 40
    assert f"round {len(reported)}: " in said

    again = Settings.of(settings.to_config() | {"resume": str(tmp_path / "run")})
    background = Background(federation, again.to_config())
    background.wait_for_round(len(reported) + 1)
    assert rows(tmp_path / "run")[: len(reported)] == reported
    kill_server_app(federation)
    background.end()


@pytest.mark.slow
def test_rounds_do_not_wait_for_replies_that_will_not_come(federation: LocalCluster, tmp_path: Path) -> None:
    """The apps of one client end in the middle of rounds 1 to 3, and the SuperNode of another one hangs in round 4.

    Flower's own SuperNode would be silent from round 1 on, and Flower's SuperLink would let round 4 wait for the reply.
    """
    set_faults(federation.folder, {})
    greeting, seconds = "", 300
    set_fates(
        federation, "node-0-exec",
        greeting, "PullMessages signal 9", "PushObject signal 9", "ConfirmMessageReceived signal 15",
    )  # fmt: skip
    set_fates(federation, "node-1", greeting, "", "", "", f"PushObject sleep {seconds}")
    settings = settings_of(
        federation, tmp_path / "run", rounds=4, schedule="compressed", min_clients=2, straggler_factor=1.5
    )
    run = run_on(federation, settings.to_config())
    assert run.completed, run.log
    _, *rounds = rows(tmp_path / "run")
    assert [row["clients"] for row in rounds] == [2, 2, 2, 2]
    [first, second, third, fourth] = [failure for row in rounds for failure in row["failures"]]
    lost = "the client's app ended without a reply"
    for failure, ending in ((first, "ended by signal 9"), (second, "ended by signal 9"), (third, "")):
        assert failure["client"] == "0"
        assert f"{lost}: {ending}" in failure["reason"]
    assert fourth["client"] == "1"
    assert "no reply within" in fourth["reason"]
    assert max(row["seconds"] for row in rounds) < seconds
