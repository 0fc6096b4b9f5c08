"""What an operator sees of a run: JSON logs that name a failed client's node, and metrics, while it goes on.

The logs and metrics of real nodes: test_deploy_faults.py.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from server.app import serve_in_process
from tests import processes
from tests.integration import misbehaving
from tests.integration.deployed import assert_of_the_run, log_lines, rows, samples, set_faults
from tests.processes import free_port
from tofu.observers.base import Observer
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings

Row = dict[str, Any]
TINY: Row = {
    "model": "mlp", "rounds": 3, "max_evals": 5, "ratio": 40.0, "local_epochs": 1, "batch_size": 32, "lr": 0.1,
}  # fmt: skip


class Scraped(Observer):
    """Looks at the run from outside after each round, as an operator would."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        self.rounds: list[int] = []

    def on_round_end(self, record: RoundRecord) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as answer:
            served = answer.read().decode()
        assert served == (self._folder / "metrics.prom").read_text()
        assert_of_the_run(samples(served), self._folder)
        # All else in the folder can be read too.
        assert rows(self._folder)[-1]["round"] == record.round
        assert rows(self._folder, "ledger")[-1]["round"] == record.round
        assert json.loads((self._folder / "config.json").read_text())["rounds"] == 3
        assert (self._folder / "weights.safetensors").stat().st_size > 1000
        self.rounds.append(record.round)


def test_metrics_follow_a_run_and_a_failed_client_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_faults(tmp_path, {"2": {"2:mask": "lost"}})
    monkeypatch.chdir(tmp_path)
    folder, port = tmp_path / "run", free_port()
    scraped = Scraped(folder, port)
    own = {"clients": 4, "run_folder": str(folder), "metrics_port": port}
    serve_in_process(misbehaving.app, Settings.of(TINY | own), scraped)
    assert scraped.rounds == [1, 2, 3]
    found = samples((folder / "metrics.prom").read_text())
    assert_of_the_run(found, folder)
    assert found["tofu_client_failures_total", "2"] == 1
    assert [each["client"] for each in rows(folder)[2]["by_client"]] == ["0", "1", "3"]


def test_epsilon_is_watched_and_a_resumed_run_counts_on(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Kill(Observer):
        def on_round_end(self, record: RoundRecord) -> None:
            raise Killed

    folder = tmp_path / "run"
    own = {"clients": 3, "run_folder": str(folder), "noise_multiplier": 1.0, "schedule": "fedavg"}
    with pytest.raises(Killed):
        serve_in_process(misbehaving.honest.app, Settings.of(TINY | own), Kill())
    text = (folder / "metrics.prom").read_text()
    assert 'state="failed"} 1.0' in text
    assert samples(text)["tofu_rounds_total", ""] == 1
    serve_in_process(misbehaving.honest.app, Settings.of(TINY | own | {"resume": str(folder)}))
    text = (folder / "metrics.prom").read_text()
    assert 'state="done"} 1.0' in text
    found = samples(text)
    assert found["tofu_epsilon", ""] == rows(folder)[-1]["epsilon"] > 1
    assert_of_the_run(found, folder)


def command(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "tofu.cli", "run", *options, "--clients=3", *arguments]
    return processes.run(command, env=os.environ | environment, warm=True)


def test_a_command_logs_json_lines_of_server_and_clients(tmp_path: Path) -> None:
    done = command("--log=json", f"--run-folder={tmp_path / 'run'}", TOFU_LOG=str(tmp_path / "log"))
    assert (done.returncode, done.stdout) == (0, f"report: {tmp_path / 'run'}/report.html\n")
    said, kept = log_lines(done.stderr), log_lines((tmp_path / "log").read_text())
    assert sorted(map(str, said)) == sorted(map(str, kept))  # two clients' lines may come in another order
    assert len({line["run"] for line in said}) == 1
    server = [line for line in said if line["app"] == "server"]
    assert [line["event"] for line in server] == ["run begins", *["round done"] * 3, "run done"]
    assert [line["round"] for line in server] == [None, 1, 2, 3, None]
    assert server[2]["accuracy"] == rows(tmp_path / "run")[2]["accuracy"]
    clients = [line for line in said if line["app"] == "client"]
    assert sorted((line["round"], line["client"]) for line in clients if line["what"] == "train") == [
        (round_, str(client)) for round_ in (1, 2, 3) for client in range(3)
    ]
    assert len({line["node"] for line in clients}) == 3


def test_an_error_is_the_last_line_of_the_log_and_the_command_says_it_in_words(tmp_path: Path) -> None:
    done = command("--log=json", "--lr=1e20", f"--run-folder={tmp_path / 'run'}")
    assert done.returncode == 2
    *said, last = done.stderr.splitlines()
    log = log_lines("\n".join(said))
    assert log[-1]["event"] == "run failed"
    assert last == f"error: {log[-1]['reason']}"
    nodes = {line["node"] for line in log if line["app"] == "server" and line["event"] == "client failed"}
    assert nodes == {line["node"] for line in log if line["app"] == "client" and line["event"] == "failed"}
    assert len(nodes) == 3


def test_a_failed_reply_is_told_once(tmp_path: Path) -> None:
    done = command("--lr=1e20", f"--run-folder={tmp_path / 'run'}")
    said = [line for line in done.stderr.splitlines() if "client 1" in line]
    assert len(said) == 1
    assert said[0].startswith("note: round 1: client 1: local training diverged")
