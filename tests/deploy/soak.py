"""`python -m tests.deploy.soak FOLDER`: a long run in containers in which random services crash.

Four clients train on the digits, half of the rounds open and half of them secure with identities; a round ends with the
third reply. Every few rounds, at a random moment, one of the services below is killed as by a crash. When the run ends
with the app of the server, it is resumed as docs/deployment.md says. FOLDER keeps everything: an interrupted soak goes
on where it was. Needs an engine, as test_containers.py does.
"""

import json
import os
import random
import statistics
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from benchmarks.common import RESULTS, run_command, versions
from tests.deploy.engine.deployment import ComposeDeployment, OperatorRun, reason_to_skip
from tofu.errors import RunError

FOURTH = "hospital-d"
KILLED = (
    *(f"node-{node}{part}" for node in range(3) for part in ("", "-exec")),
    "superlink", "superlink-exec", "proxy",
)  # fmt: skip
IDLE = ("superlink", "superlink-exec", "node-1", "node-1-exec")
SETTINGS = (
    "clients=4", "min-clients=3", "dataset=/data", "local-epochs=1", "max-evals=20", "schedule=switch",
    "secure-identities=/run/secrets/identities.json", "over-sampling=1.34", "secagg-dropout-fraction=0.26",
)  # fmt: skip
_ROUNDS_BETWEEN_KILLS = (3, 8)
"""Rounds rather than seconds: on a busy machine rounds are slow, and kills would come faster than they end."""
_IDLE_SECONDS = 60.0
_MAX_RESUMED = 100


class Journal:
    """What happened, one JSON object a line with the seconds since the soak began, over all of its sessions."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._began = time.monotonic() - (self.entries[-1]["at"] if self.entries else 0.0)

    def note(self, event: str, **values: object) -> None:
        """Add an entry."""
        with self._lock:
            self.entries.append({"at": round(time.monotonic() - self._began), "event": event, **values})
            with self._path.open("a") as file:
                file.write(json.dumps(self.entries[-1]) + "\n")

    def of(self, event: str) -> list[dict[str, Any]]:
        """The entries of one kind."""
        return [entry for entry in self.entries if entry["event"] == event]


class Killer(threading.Thread):
    """Ends a random service at a random moment of every few rounds, and notes the memory of all just before."""

    def __init__(self, deployment: ComposeDeployment, journal: Journal, seed: int) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self._deployment, self._journal = deployment, journal
        self._random = random.Random(f"{seed} {len(journal.entries)}")

    def run(self) -> None:
        while self._wait_for_rounds(self._random.randint(*_ROUNDS_BETWEEN_KILLS)):
            service = self._random.choice(KILLED)
            try:
                self._journal.note("memory", mib=self._deployment.memory())
                self._deployment.kill(service)
            except (OSError, subprocess.CalledProcessError) as error:  # it has just ended, or the engine is late
                self._journal.note("not killed", service=service, reason=str(error))
            else:
                self._journal.note("kill", service=service)

    def _wait_for_rounds(self, count: int) -> bool:
        """Wait until so many rounds have ended and a part of the next has passed; False if the run has ended."""
        wanted = len(records(self._deployment)) + count
        while not self.done.wait(1.0):
            found = records(self._deployment)
            if len(found) >= wanted:
                median = statistics.median(record["seconds"] for record in found)
                return not self.done.wait(self._random.uniform(0.0, median))
        return False


def records(deployment: ComposeDeployment) -> list[dict[str, Any]]:
    """The run's rounds so far, without the evaluation before the first."""
    if not deployment.runs() or not (deployment.results() / "metrics.jsonl").exists():
        return []
    complete, _, _ = (deployment.results() / "metrics.jsonl").read_text().rpartition("\n")
    return [record for record in map(json.loads, complete.splitlines()) if record["round"]]


def start(deployment: ComposeDeployment, journal: Journal, rounds: int) -> OperatorRun:
    """Start the run, or go on with it."""
    if deployment.runs():
        journal.note("resumed", after=len(records(deployment)))
        return deployment.start_run(f"resume=runs/{deployment.results().name}")
    return deployment.start_run(*SETTINGS, f"switch-round={rounds // 2 + 1}", f"rounds={rounds}")


def measure_idle(deployment: ComposeDeployment, journal: Journal) -> None:
    """Note what each service costs while there is no run: percent of a core, and MiB."""
    before, began = {name: deployment.cpu_seconds(name) for name in IDLE}, time.monotonic()
    time.sleep(_IDLE_SECONDS)
    seconds, memory = time.monotonic() - began, deployment.memory()
    used = {name: deployment.cpu_seconds(name) - before[name] for name in IDLE}
    values = {name: {"cpu_percent": round(100 * used[name] / seconds, 2), "mib": memory[name]} for name in IDLE}
    journal.note("idle", seconds=round(seconds), services=values)


def soak(deployment: ComposeDeployment, journal: Journal, rounds: int, seed: int) -> None:
    """Run to the last round.

    Raises:
        RunError: it ended too often.
    """
    killer = Killer(deployment, journal, seed)
    killer.start()
    try:
        while len(journal.of("resumed")) < _MAX_RESUMED:
            run = start(deployment, journal, rounds)
            status = run.wait(timeout=36000)
            lines = run.output.strip().splitlines() or [""]
            journal.note("run ended", status=status, rounds=len(records(deployment)), last_line=lines[-1][-300:])
            if status == 0:
                return
            deployment.wait_for_health()
    finally:
        killer.done.set()
        killer.join()
    raise RunError(f"the run was resumed {_MAX_RESUMED} times: {lines[-1]}")


def memory_over_time(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Service -> median MiB in the first and in the last third of the samples, and the largest."""
    names = sorted({name for sample in samples for name in sample})
    third = max(1, len(samples) // 3)
    found = {}
    for name in names:
        first, last = ([s[name] for s in part if name in s] for part in (samples[:third], samples[-third:]))
        if first and last:
            largest = max(sample.get(name, 0.0) for sample in samples)
            values = {"first": statistics.median(first), "last": statistics.median(last), "largest": largest}
            found[name] = {key: round(value, 1) for key, value in values.items()}
    return found


def result(deployment: ComposeDeployment, journal: Journal, rounds: int, seed: int) -> dict[str, object]:
    """All figures, as they are written; missing rounds are those before the last one that was done."""
    found = records(deployment)
    numbers = [record["round"] for record in found]
    samples = [entry["mib"] for entry in journal.of("memory")]
    return versions("python -m tests.deploy.soak FOLDER") | {
        "settings": {"rounds": rounds, "seed": seed, "rounds_between_kills": _ROUNDS_BETWEEN_KILLS, "run": SETTINGS},
        "rounds_done": len(set(numbers)),
        "rounds_missing": sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers)),
        "rounds_abandoned": {record["round"]: record["abandoned"] for record in found if record.get("abandoned")},
        "replies_lost": sum(len(record["failures"]) for record in found),
        "clients_in_a_round": dict(sorted(Counter(record["clients"] for record in found).items())),
        "median_seconds": statistics.median(record["seconds"] for record in found),
        "largest_seconds": max(record["seconds"] for record in found),
        "idle": journal.of("idle"),
        "kills": dict(sorted(Counter(entry["service"] for entry in journal.of("kill")).items())),
        "final_accuracy": [record["accuracy"] for record in found if record["accuracy"] is not None][-1],
        "memory_mib": memory_over_time(samples),
        "events": [entry for entry in journal.entries if entry["event"] not in ("memory", "idle")],
        "memory": [{"at": entry["at"]} | entry["mib"] for entry in journal.of("memory")],
        "rows": [
            {key: record.get(key) for key in ("round", "kind", "clients", "seconds", "accuracy", "abandoned")}
            | {"failures": {failure["client"]: failure["reason"] for failure in record["failures"]}}
            for record in found
        ],
    }


def main(folder: Path, rounds: int = 200, seed: int = 0, output: Path = RESULTS / "soak.json") -> None:
    """Run the soak, or go on with it, and write its figures."""
    os.environ["TOFU_CONTAINERS"] = "1"
    if reason := reason_to_skip():
        raise typer.BadParameter(reason)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "events.jsonl")
    with ComposeDeployment(folder, project="tofu-soak", listen="127.0.0.2") as deployment:
        journal.note("started")
        deployment.add_client(FOURTH, "proxy:8443")
        deployment.start_client(FOURTH, data="node-0", network="fleet")
        deployment.wait_for_online(4)
        if not journal.of("idle"):
            measure_idle(deployment, journal)
        try:
            soak(deployment, journal, rounds, seed)
        finally:  # an interrupted soak has figures, too
            figures = result(deployment, journal, rounds, seed)
            output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({key: figures[key] for key in ("rounds_done", "rounds_missing", "kills", "memory_mib")}, indent=1))


if __name__ == "__main__":
    run_command(main)
