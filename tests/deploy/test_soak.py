"""A long run in containers in which services crash at random: no round is lost, and memory stays flat.

TOFU_SOAK_ROUNDS=200 TOFU_SOAK_RESULT=soak.json pytest -m slow tests/deploy/test_soak.py
"""

import json
import os
import random
import statistics
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.deploy.engine.deployment import ComposeDeployment, reason_to_skip
from tests.deploy.test_containers import RUN, records

_REASON = reason_to_skip()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_REASON), reason=_REASON),
    pytest.mark.timeout(36000),
]

ROUNDS = int(os.environ.get("TOFU_SOAK_ROUNDS", "20"))
KILLED = ("node-0", "node-1", "node-2", "node-0-exec", "node-1-exec", "node-2-exec", "superlink")
"""A crash of superlink-exec ends the run, which is resumed by hand: it is not among them."""


class Killer(threading.Thread):
    """Ends a random service from time to time, and notes the memory of all.

    Attributes:
        kills: (seconds since the start, service).
        memory: by service, MiB at regular times.
    """

    def __init__(self, deployment: ComposeDeployment, seed: int) -> None:
        super().__init__(daemon=True)
        self.kills: list[tuple[float, str]] = []
        self.memory: dict[str, list[float]] = {}
        self.done = threading.Event()
        self._deployment, self._random, self._began = deployment, random.Random(seed), time.monotonic()

    def run(self) -> None:
        while not self.done.wait(self._random.uniform(40, 120)):
            self._note_memory()
            service = self._random.choice(KILLED)
            try:
                self._deployment.kill(service)
            except (OSError, subprocess.CalledProcessError):  # it has just ended
                continue
            self.kills.append((round(time.monotonic() - self._began), service))

    def _note_memory(self) -> None:
        command = ["docker", "stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}"]
        for line in subprocess.check_output(command, text=True).splitlines():
            name, used, *_ = line.split()
            number, unit = float(used.rstrip("KMGiB")), used[-3:]
            self.memory.setdefault(name, []).append(number * {"GiB": 1024, "MiB": 1, "KiB": 1 / 1024}.get(unit, 0))


def test_no_round_is_lost_and_memory_stays_flat(tmp_path: Path) -> None:
    with ComposeDeployment(tmp_path) as deployment:
        killer = Killer(deployment, seed=0)
        run = deployment.start_run(*RUN, "min-clients=2", f"rounds={ROUNDS}", "max-evals=1000")
        run.wait_for("round 1/")
        killer.start()
        status = run.wait(timeout=35000)
        killer.done.set()
        killer.join()
        found = [record for record in records(deployment) if record["round"]]
        seconds = sorted(record["seconds"] for record in found)
        result = {
            "rounds": len(found), "kills": killer.kills, "memory_mib": killer.memory,
            "clients": [record["clients"] for record in found], "seconds": [record["seconds"] for record in found],
            "median_seconds": statistics.median(seconds), "final_accuracy": found[-1]["accuracy"],
        }  # fmt: skip
        if path := os.environ.get("TOFU_SOAK_RESULT"):
            Path(path).write_text(json.dumps(result, indent=1))
    assert status == 0, run.output[-3000:]
    assert [record["round"] for record in found] == list(range(1, ROUNDS + 1))
    for name, values in killer.memory.items():
        half = len(values) // 2
        if half >= 4:
            assert statistics.median(values[half:]) < 1.3 * statistics.median(values[:half]) + 20, name
