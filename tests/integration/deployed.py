"""What the tests of federations of real processes share: apps that misbehave, waiting, and looking at processes."""

import json
import os
import signal
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from deploy.processes import LocalCluster
from deploy.supervisor import supervise
from server.app import serve_in_process
from tests.integration import misbehaving
from tests.processes import files, wait_for
from tofu.settings import Settings, Value

Row = dict[str, Any]
Faults = Mapping[str, Mapping[str, str]]
"""Client name -> "round:stage" -> fault (`misbehaving`)."""

WHERE = ("time", "level", "app", "event", "run", "round", "node")
"""What every line of a structured log begins with."""

REPOSITORY = Path(__file__).parents[2]


def misbehaving_app(folder: Path) -> Path:
    """A Flower app like this repository's, whose client app misbehaves where `faults.json` says so."""
    folder.mkdir()
    project = (REPOSITORY / "pyproject.toml").read_text()
    own = 'clientapp = "client.app:app"'
    assert own in project
    (folder / "pyproject.toml").write_text(project.replace(own, 'clientapp = "misbehaving:app"'))
    (folder / "README.md").write_text("A node that misbehaves.")
    (folder / "misbehaving.py").write_text((REPOSITORY / "tests" / "integration" / "misbehaving.py").read_text())
    return folder


def set_faults(folder: Path, faults: Faults) -> None:
    """From now on."""
    part = folder / "faults.part"
    part.write_text(json.dumps(faults))
    part.replace(folder / misbehaving.FAULTS_FILE)


def in_process(folder: Path, settings: Settings, faults: Faults, monkeypatch: Any) -> Row:
    """The same run in this process, without identities, where clients misbehave likewise; its summary."""
    folder.mkdir()
    set_faults(folder, faults)
    monkeypatch.chdir(folder)
    own = settings.to_config() | {"run-folder": str(folder / "run"), "secure-identities": ""}
    return serve_in_process(misbehaving.app, Settings.of(own))


def rows(folder: Path, name: str = "metrics") -> list[Row]:
    """The whole lines of a run's file so far."""
    file = folder / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines(True) if line[-1] == "\n"] if file.exists() else []


def log_lines(text: str) -> list[Row]:
    """A structured log."""
    found = [json.loads(line) for line in text.splitlines()]
    for line in found:
        assert tuple(line)[: len(WHERE)] == WHERE
    return found


def samples(text: str) -> dict[tuple[str, str], float]:
    """(name, client) -> value, added up over all other labels."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, sample.labels.get("client", "")
            found[key] = found.get(key, 0) + sample.value
    return found


def assert_of_the_run(found: Mapping[tuple[str, str], float], folder: Path) -> None:
    """The metrics are those of metrics.jsonl."""
    records = rows(folder)
    assert found["tofu_rounds_total", ""] == records[-1]["round"]
    for name in ("uplink_bytes", "downlink_bytes"):
        assert found[f"tofu_{name}_total", ""] == sum(row[name] for row in records)
    assert found["tofu_accuracy", ""] == records[-1]["accuracy"]
    assert found["tofu_round_seconds", ""] == records[-1]["seconds"]
    failures = [failure["client"] for row in records for failure in row["failures"]]
    for client in failures:
        assert found["tofu_client_failures_total", client] == failures.count(client)
    assert {client for name, client in found if name == "tofu_client_failures_total"} == set(failures)
    by_client = [each for row in records for each in row.get("by_client", ()) if each["explained_variance"] is not None]
    explained = {each["client"]: each["explained_variance"] for each in by_client}
    assert explained == {client: value for (name, client), value in found.items() if name == "tofu_explained_variance"}
    assert all(0 < value < 1 for value in explained.values())


def progress(federation: LocalCluster, *paths: Path) -> Hashable:
    """What grows while a federation makes progress, for `Stall`: the nodes' and the apps' logs and these files.

    The SuperLink logs every poll and a SuperExec every attempt to connect; those do not count.
    """
    polling = ("superlink.log", "-exec.log")
    return files(*paths, *(log for log in federation.logs.glob("*") if not log.name.endswith(polling)))


def wait_online(federation: LocalCluster, nodes: int | None = None) -> None:
    """Wait until so many nodes of a federation are online, by default all that it started with."""

    def online() -> bool:
        return sum(node["status"] == "online" for node in federation.control.nodes()) == (nodes or federation.nodes)

    wait_for(online, lambda: progress(federation))


@contextmanager
def supervised(federation: LocalCluster) -> Iterator[None]:
    """Start a federation, start again what ends of it, and stop it at the end."""
    stopping = threading.Event()
    thread = threading.Thread(target=supervise, args=(federation, stopping))
    federation.folder.mkdir(parents=True, exist_ok=True)
    thread.start()
    try:
        wait_for(
            lambda: not thread.is_alive() or len(federation.processes) == 2 + 2 * federation.nodes,
            lambda: (files(federation.folder), len(federation.processes)),
        )
        assert thread.is_alive()
        yield
    finally:
        stopping.set()
        thread.join()


class Background:
    """A run that goes on while the test does something else; `end` waits for it.

    The run fails when neither its folder, nor its log, nor a log of a node grows any more.
    """

    def __init__(self, federation: LocalCluster, config: Mapping[str, Value], app: Path | None = None) -> None:
        self.run: Any = None
        self.folder = Path(str(config.get("run-folder", federation.folder / "no-run-folder")))
        self._federation = federation
        self._error: BaseException | None = None

        def work() -> None:
            try:
                self.run = federation.control.run(app or federation.app, config)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def progress(self) -> Hashable:
        """What grows while the run goes on, for `Stall`."""
        return progress(self._federation, self.folder, self._federation.folder / "homes" / "run.log")

    def wait_for_round(self, number: int) -> None:
        """Until a round is in metrics.jsonl."""
        wait_for(lambda: not self.alive or len(rows(self.folder)) > number, self.progress)
        assert len(rows(self.folder)) > number, self.run or self._error

    def end(self) -> Any:
        """The run once it ended."""
        try:
            wait_for(lambda: not self.alive, self.progress)
        except AssertionError:
            self._federation.stop()  # which ends the thread
            raise
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.run


def run_on(federation: LocalCluster, config: Mapping[str, Value], app: Path | None = None) -> Any:
    """The run of a federation's app, or of another one, once it ended."""
    return Background(federation, config, app).end()


def server_app(federation: LocalCluster) -> int:
    """Number of the process of the server app that runs now, or 0."""
    executor = federation.processes["superlink-exec"].pid
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            command = file.read_bytes().split(b"\0")
            if any(part.endswith(b"/flwr-serverapp") for part in command[:2]) and executor in _ancestors(file.parent):
                return int(file.parent.name)
    return 0


def kill_server_app(federation: LocalCluster) -> None:
    """With SIGKILL."""
    pid = server_app(federation)
    assert pid
    os.kill(pid, signal.SIGKILL)


def _ancestors(process: Path) -> Iterator[int]:
    while process.name not in ("0", "1"):
        process = Path("/proc") / (process / "stat").read_text().rpartition(")")[2].split()[1]
        yield int(process.name)


def megabytes(pid: int, what: str = "VmRSS") -> float:
    """Memory of a process: VmRSS now, or VmHWM at its highest. 0 where it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) / 1024
    return 0.0
