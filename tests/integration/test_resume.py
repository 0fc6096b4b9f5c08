"""A run that is killed and goes on ends as if nothing had happened: the same weights and ledger, to the bit."""

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from client.app import app as client_app
from server.app import serve_in_process
from server.checkpoint import FOLDER
from tests import processes
from tofu.errors import SettingError
from tofu.files import lock_file
from tofu.observers.base import Observer
from tofu.reporting.run_settings import resumed_settings
from tofu.rounds.record import RoundRecord, read_rounds
from tofu.settings import Settings

Row = dict[str, Any]

TINY: Row = {
    "model": "mlp", "clients": 4, "rounds": 6, "max_evals": 5, "ratio": 50.0, "local_epochs": 1, "batch_size": 32,
    "lr": 0.05, "schedule": "switch", "switch_round": 4, "downlink": "topk", "server_optimizer": "momentum",
}  # fmt: skip
"""All that has a state: error feedback both ways, momentum, the running average, compressed and secure rounds."""
SAME = ("ledger.jsonl", "weights.safetensors")


class Killed(BaseException):
    """Nothing in the run catches it."""


class KillAfter(Observer):
    def __init__(self, round_: int) -> None:
        self._round = round_

    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == self._round:
            raise Killed


def run(folder: Path, observer: Observer | None = None, **settings: object) -> Row:
    return serve_in_process(client_app, Settings.of(TINY | {"run_folder": str(folder)} | settings), observer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    assert [path.name for path in (folder / FOLDER).iterdir()] == ["round-000006.checkpoint"]
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, ended after its fourth round, the first secure one."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(Killed):
        run(folder, KillAfter(4))
    return folder


@pytest.fixture
def broken(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


def rows(folder: Path, name: str = "metrics") -> list[Row]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def lasting(row: Row) -> Row:
    kept = {name: value for name, value in row.items() if not name.endswith("seconds")}
    return kept | ({"by_client": [lasting(entry) for entry in row["by_client"]]} if "by_client" in row else {})


def assert_same(one: Path, other: Path) -> None:
    for name in SAME:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert [lasting(row) for row in rows(one)] == [lasting(row) for row in rows(other)]
    ends = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for name in ("final_accuracy", "uplink_bytes", "downlink_bytes", "both_ratio", "payload_ratio", "weights_sha256"):
        assert ends[0][name] == ends[1][name]


def test_a_run_that_goes_on_ends_as_if_it_had_not_been_ended(whole: Path, broken: Path) -> None:
    run(broken, resume=str(broken))
    assert_same(whole, broken)
    assert (broken / "report.html").exists()
    whole_time = json.loads((broken / "summary.json").read_text())["seconds"]
    assert whole_time >= sum(row["seconds"] for row in rows(broken))  # of both processes
    assert [path.name for path in (broken / FOLDER).iterdir()] == ["round-000006.checkpoint"]


def test_half_written_lines_of_a_round_that_did_not_end_are_dropped(whole: Path, broken: Path) -> None:
    with (broken / "ledger.jsonl").open("ab") as file:
        file.write(b'{"round": 5, "kind": "secure", "client": "0", "bytes": 7}\n{"round": 5, "ki')
    with (broken / "metrics.jsonl").open("rb+") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 30)  # within the row of a round whose checkpoint is there
    run(broken, resume=str(broken))
    assert_same(whole, broken)


def test_a_damaged_checkpoint_costs_one_round_and_a_warning(whole: Path, broken: Path) -> None:
    class Notes(Observer):
        said: list[str]

        def on_note(self, text: str, **where: Any) -> None:
            self.said.append(text)

    (broken / FOLDER / "round-000004.checkpoint").write_bytes(b"TOFUCKPT, but not really")
    notes = Notes()
    notes.said = []
    run(broken, notes, resume=str(broken))
    assert_same(whole, broken)
    assert any("round-000004.checkpoint is skipped" in text for text in notes.said)
    assert any("resumes after round 3" in text for text in notes.said)


def test_a_run_that_had_not_come_to_a_checkpoint_begins_again(whole: Path, broken: Path) -> None:
    shutil.rmtree(broken / FOLDER)
    run(broken, resume=str(broken))
    assert_same(whole, broken)


def test_clients_without_their_state_are_sent_the_weights_and_begin_afresh(broken: Path) -> None:
    """As in a deployment, where a resumed run is a new one to the clients."""
    from server.checkpoint import Snapshot

    path = broken / FOLDER / "round-000004.checkpoint"
    snapshot = Snapshot.from_bytes(path.read_bytes())
    snapshot.blobs = {name: blob for name, blob in snapshot.blobs.items() if not name.startswith("client ")}
    path.write_bytes(snapshot.to_bytes())
    run(broken, resume=str(broken))
    after = rows(broken)[5:]
    assert [(row["round"], row["kind"], row["clients"], row["failures"]) for row in after] == [
        (5, "secure", 4, []),
        (6, "secure", 4, []),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.1}, "lr=0.1 is not usable: expected 0.05, as the run in"),
        ({"rounds": 5}, "rounds=5 is not usable: expected at least the 6 that the run in"),
        ({"resume": "/no/such/run"}, "resume='/no/such/run' is not usable: expected the folder of a run"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(broken: Path, changes: Row, words: str) -> None:
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    with pytest.raises(SettingError, match=words):
        run(broken, **{"resume": str(broken)} | changes)
    assert {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()} == before


def test_a_finished_run_is_not_gone_on_with(whole: Path) -> None:
    with pytest.raises(SettingError, match="a run that has not finished"):
        run(whole, resume=str(whole))


# The command line, killed with SIGKILL


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tofu.cli", "run", "--quiet", *arguments]


def options() -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


def killed(folder: Path, *, after: float, rounds: int) -> None:
    """Start a run, and kill it some seconds after it has come to a number of rounds."""
    errors, metrics = folder.parent / f"{folder.name}.err", folder / "metrics.jsonl"
    process = processes.WarmProcess(
        command(*options(), f"--run-folder={folder}"), stdout=Path(os.devnull), stderr=errors
    )
    stall = processes.Stall(lambda: processes.files(folder))
    try:
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > rounds):
            assert process.poll() is None, errors.read_text()
            stall.check()
            time.sleep(0.05)
        time.sleep(after)
    finally:
        process.kill()
        process.wait()


def test_a_command_that_was_killed_goes_on(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed(folder, after=0.1, rounds=3)
    assert not (folder / "summary.json").exists()
    done = processes.run(command("--resume", str(folder)), warm=True)
    assert (done.returncode, done.stdout) == (0, f"{folder}/report.html\n"), done.stderr
    assert_same(whole, folder)


def test_a_running_run_is_not_resumed_by_a_second_process(broken: Path) -> None:
    lock = lock_file(broken / "config.json")
    assert lock is not None
    with lock, pytest.raises(SettingError) as caught:
        run(broken, resume=str(broken))
    assert (caught.value.field, "another process" in caught.value.accepted) == ("resume", True)


@pytest.mark.slow
@processes.NO_TOTAL_LIMIT
def test_twenty_kills_at_random_moments(whole: Path, tmp_path: Path) -> None:
    generator = random.Random(5)
    for number in range(20):
        folder = tmp_path / f"run-{number}"
        killed(folder, after=generator.uniform(0, 1.5), rounds=generator.randrange(3))
        if not (folder / "summary.json").exists():
            processes.run(command("--resume", str(folder)), check=True, warm=True)
        assert_same(whole, folder)


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Compressed rounds were called proxy in the settings, in metrics.jsonl and in the ledger."""
    folder, straight = tmp_path / "run", tmp_path / "straight"
    settings: Row = {"schedule": "compressed", "rounds": 2, "switch_round": 0}
    run(straight, **settings)
    with pytest.raises(Killed):
        run(folder, KillAfter(1), **settings)
    for name in ("config.json", "metrics.jsonl", "ledger.jsonl"):
        text = (folder / name).read_text()
        assert '"compressed"' in text, name
        (folder / name).write_text(text.replace('"compressed"', '"proxy"'))
    serve_in_process(client_app, resumed_settings({"resume": str(folder)}))
    assert (folder / "weights.safetensors").read_bytes() == (straight / "weights.safetensors").read_bytes()
    assert [record.kind for record in read_rounds(folder / "metrics.jsonl")] == ["start", "compressed", "compressed"]
    assert "proxy round" not in (folder / "report.html").read_text()
