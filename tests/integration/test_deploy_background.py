"""`tofu deploy`: a federation that outlives the command that starts it, a round on it, and an end of all of it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Hashable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from deploy import control
from deploy.processes import read_names
from deploy.state import Process, State
from tests.processes import NO_TOTAL_LIMIT, files, run, wait_for
from tofu.cli import main
from tofu.secagg.identities import read_known

pytestmark = NO_TOTAL_LIMIT

_ROOT = Path(__file__).parents[2]
_QUICK = ("--model=mlp", "--local-epochs=1", "--max-evals=4", "--ratio=40", "--lr=0.1")


def deploy(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command, as a user types it; all but `up`, which a federation must outlive, in this process."""
    if arguments[0] == "up":
        folders = [Path(given.partition("=")[2]) for given in arguments if given.startswith("--folder=")]
        command = [str(Path(sys.executable).parent / "tofu"), "deploy", *arguments]
        return run(command, cpu=False, watch=[folder / name for folder in folders for name in ("nodes.json", "runs")])
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["tofu", "deploy", *arguments]),
        redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended,
    ):  # fmt: skip
        main()
    return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), out.getvalue(), err.getvalue())


def asked(*arguments: str) -> Any:
    """What the command says as JSON."""
    result = deploy(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def node_status(folder: Path) -> dict[str, str]:
    """Node -> registered, online or offline."""
    return {node["name"]: node["status"] for node in asked("status", f"--folder={folder}")["nodes"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a federation of two runs; whatever is left of it at the end is ended."""
    folder = tmp_path_factory.mktemp("deploy") / "federation"
    up = asked("up", "--nodes=2", "--identities", f"--folder={folder}")
    assert up["phase"] == "running"
    yield folder
    deploy("down", f"--folder={folder}")


def test_up_says_what_runs(folder: Path) -> None:
    status = asked("status", f"--folder={folder}")
    assert [process["name"] for process in status["processes"]] == [
        "supervisor", "superlink", "superlink-exec", "node-0", "node-0-exec", "node-1", "node-1-exec"
    ]  # fmt: skip
    assert all(process["alive"] for process in status["processes"])
    names = read_names(folder)
    assert sorted(names.values()) == ["node-0", "node-1"]
    assert status["nodes"] == [
        {"name": name, "node": node, "status": "online"}
        for node, name in sorted(names.items(), key=lambda item: item[1])
    ]
    assert status["address"].startswith("127.0.0.1:")
    keys = {file.name: file.stat().st_mode & 0o777 for file in (folder / "keys").iterdir()}
    assert {name for name, mode in keys.items() if mode == 0o600} == {
        "ca.key", "server.key", "superexec", "node-0", "node-1", "0.identity", "1.identity", "control-token"
    }  # fmt: skip
    private = [*(folder / "logs").rglob("*.log"), *folder.rglob("state.db*")]  # by their own mode or their folder's
    assert {path.suffix for path in private} >= {".log", ".db"}
    assert [path for path in private if all(each.stat().st_mode & 0o077 for each in (path, path.parent))] == []


def test_a_second_up_is_refused(folder: Path) -> None:
    again = deploy("up", f"--folder={folder}")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "running federation" in again.stderr


def test_a_proxy_round_goes_round(folder: Path) -> None:
    unused = ("--partition=iid", "--alpha=0.7")
    result = deploy("run", f"--folder={folder}", "--rounds=1", "--min-clients=2", *_QUICK, *unused)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("note: alpha=0.7 has no effect: it needs partition=dirichlet") == 1
    assert not re.search(r"INFO|Successfully|Using SuperLink", result.stderr)
    assert "round 1/1  compressed" in result.stderr
    summary = json.loads((folder / "runs" / "run-1" / "summary.json").read_text())
    assert summary["final_accuracy"] > 0.15
    rows = [json.loads(line) for line in (folder / "runs" / "run-1" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["clients"], row["failures"]) for row in rows] == [("start", 0, []), ("compressed", 2, [])]
    assert [run["status"] for run in asked("status", f"--folder={folder}")["runs"]] == ["finished:completed"]
    # What `up` made, the server is told of by itself.
    config = json.loads((folder / "runs" / "run-1" / "config.json").read_text())
    assert config["secure-identities"] == str(folder / "keys" / "identities.json")
    assert sorted(read_known(folder / "keys" / "identities.json")) == ["0", "1"]


def test_a_model_that_its_module_lacks_is_refused_without_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_networks.py").write_text("def right(*, channels, height, width, classes): ...")
    monkeypatch.chdir(tmp_path)
    before = asked("status", f"--folder={folder}")["runs"]
    result = deploy("run", f"--folder={folder}", "--model=some_networks:wrong")
    assert result.returncode == 2
    assert result.stderr.startswith("error: model='some_networks:wrong' is not usable: ")
    assert result.stderr.count("\n") == 1
    assert asked("status", f"--folder={folder}")["runs"] == before


def test_a_dataset_that_is_nowhere_is_refused_without_a_run(folder: Path) -> None:
    before = asked("status", f"--folder={folder}")["runs"]
    result = deploy("run", f"--folder={folder}", "--dataset=nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith("error: dataset='nowhere' is not usable: expected 'digits', ")
    assert result.stderr.count("\n") == 1
    assert asked("status", f"--folder={folder}")["runs"] == before


def test_an_error_of_a_run_is_shown_once(folder: Path) -> None:
    result = deploy("run", f"--folder={folder}", "--initial-weights=nowhere.pt")
    assert result.returncode == 2
    assert result.stderr.count("initial-weights='nowhere.pt' is not usable") == 1


@pytest.mark.slow
def test_a_run_that_ended_is_not_gone_on_with(folder: Path) -> None:
    again = deploy("run", f"--folder={folder}", f"--resume={os.path.relpath(folder / 'runs' / 'run-1')}")
    assert again.returncode == 2
    assert "expected a run that has not finished" in again.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_containers_command_speaks_to_it_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = State.read(folder)
    assert state is not None
    token = f"--token={folder}/keys/control-token"
    common = [f"--address={state.address}", token, f"--ca={folder}/keys/ca.crt", f"--folder={tmp_path}"]
    for _ in range(2):  # a key that is admitted stays so
        assert control.main([*common, "register", str(folder / "keys" / "node-0.pub")]) == 0
    assert control.main([*common, "nodes"]) == 0
    assert [node["status"] for node in json.loads(capsys.readouterr().out)] == ["online", "online"]
    for refused, said in (
        ([*common, "run", "rounds=many"], "rounds='many'"),
        ([*common, "run", "--app=/nowhere"], "pyproject.toml"),
        ([*common, "register", str(folder / "keys" / "ca.crt")], "register failed"),
        (["--address=127.0.0.1:1", *common[1:], "nodes"], "unavailable"),
    ):
        assert control.main(refused) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error


def _living(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, pgrp, *_ = file.read_text().rpartition(")")[2].split()
            if int(pgrp) == group and state not in "ZX":
                found.append(int(file.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the kernel's list of processes")
def test_a_member_that_dies_is_started_again_and_leaves_nothing(folder: Path) -> None:
    def now() -> Process:
        state = State.read(folder)
        assert state is not None
        return state.members["node-1-exec"]

    before = now()
    os.kill(before.pid, signal.SIGKILL)
    wait_for(lambda: now().restarts == 1)
    assert now().alive
    wait_for(lambda: _living(before.pid) == [])
    assert _living(now().pid) != []


def test_down_ends_also_what_a_dead_supervisor_left(folder: Path) -> None:
    state = State.read(folder)
    assert state is not None
    os.kill(state.supervisor.pid, signal.SIGKILL)
    wait_for(lambda: not state.supervisor.alive)
    members = [name for name in state.alive if name != "supervisor"]
    assert members == list(state.members)
    assert asked("down", f"--folder={folder}")["ended"] == members
    assert not state.alive
    assert asked("status", f"--folder={folder}")["phase"] == "stopped"


@pytest.mark.slow
def test_a_run_survives_a_killed_node_and_a_killed_superlink(tmp_path: Path) -> None:
    """Round 1: all three. A node dies in a later round, which ends without it; the SuperLink dies after that."""
    folder = tmp_path / "federation"
    asked("up", "--nodes=3", f"--folder={folder}")
    try:
        command = [
            str(Path(sys.executable).parent / "tofu"), "deploy", "run", f"--folder={folder}", "--rounds=25",
            "--min-clients=2", "--round-timeout=180", *_QUICK,
        ]  # fmt: skip
        with (tmp_path / "log").open("wb") as log:
            running = subprocess.Popen(command, stdout=log, stderr=log)

        def rows() -> list[dict[str, Any]]:
            file = folder / "runs" / "run-1" / "metrics.jsonl"
            return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

        def progress() -> Hashable:
            return files(folder / "logs" / "node-1.log", folder / "runs", tmp_path / "log")

        wait_for(lambda: len(rows()) >= 2, progress)
        state = State.read(folder)
        assert state is not None
        os.kill(state.members["node-1"].pid, signal.SIGKILL)
        wait_for(lambda: any(row["failures"] for row in rows()), progress)
        [failed] = next(row["failures"] for row in rows() if row["failures"])
        assert failed["client"] == "1"
        # Its key counts as online for a while, so that it is refused and started again until it is admitted.
        wait_for(lambda: node_status(folder)["node-1"] == "online", progress)
        state = State.read(folder)
        assert state is not None
        assert state.members["node-1"].restarts >= 2
        assert "Exit Code: 305" in (folder / "logs" / "node-1.log").read_text()

        os.kill(state.members["superlink"].pid, signal.SIGKILL)
        before = rows()[-1]["round"]
        assert before < 24
        wait_for(lambda: running.poll() is not None, progress)
        assert running.returncode == 0, (tmp_path / "log").read_text()
        done = rows()
        assert [row["round"] for row in done] == list(range(26))
        assert done[-1]["clients"] == 3
        assert "client 1" in (tmp_path / "log").read_text()
        state = State.read(folder)
        assert state is not None
        assert state.members["superlink"].restarts == 1
        assert [run["status"] for run in asked("status", f"--folder={folder}")["runs"]] == ["finished:completed"]
    finally:
        deploy("down", f"--folder={folder}")
