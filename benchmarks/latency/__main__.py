"""`python -m benchmarks.latency`: what a round and an idle node cost, with real processes over TLS, and where it goes.

Two nodes train the small network on the digits for next to nothing, so that nearly all of a round is Flower's: polls,
process starts, imports. Each setting is run `--repeats` times, in turns, on a machine that may have other work: CPU
seconds are the steadier measure.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, run_command, spread, write_results
from deploy.processes import LocalCluster

_NODES = 2
_ROUNDS = 4
TRIVIAL: Mapping[str, bool | float | int | str] = {
    "clients": _NODES, "min-clients": _NODES, "rounds": _ROUNDS, "model": "mlp", "local-epochs": 1, "max-evals": 2,
    "round-timeout": 300.0,
}  # fmt: skip
_IDLE_SECONDS = 30.0
HEADER = (
    "processes", "round, s", "without training, s", "CPU s: SuperLink", "server app", "SuperNode", "client app",
    "idle node, % of a core", "MiB",
)  # fmt: skip
PARTS = {"superlink": "superlink", "superlink-exec": "server app", "node-0": "node", "node-0-exec": "client app"}
"""Process of the topology -> whose CPU seconds a round are counted for it; the apps are children of the SuperExecs."""


@dataclass(frozen=True)
class Topology:
    """A way to run the processes."""

    name: str
    warm: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One run's figures.

    Attributes:
        seconds, beyond: of each round after the first; `beyond` is what is neither training nor encoding.
        cpu: part -> CPU seconds a round, of one node.
        idle_cpu, idle_mib: of one node (SuperNode and SuperExec) without a run: percent of a core, and resident MiB.
    """

    topology: str
    seed: int
    seconds: list[float]
    beyond: list[float]
    cpu: dict[str, float]
    idle_cpu: float
    idle_mib: float


_SLOW_NODE = {"TOFU_NODE_POLL_SECONDS": "3"}

_TOPOLOGIES = (
    Topology("Flower's defaults", environment={"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1.0", **_SLOW_NODE}),
    Topology("SuperExecs poll every 0.2 s", environment=_SLOW_NODE),
    Topology("and warm client apps", warm=True, environment=_SLOW_NODE),
    Topology("and SuperNodes poll every 0.5 s", warm=True),
)


def group_use(leader: int) -> tuple[float, float]:
    """CPU seconds, ended processes that were waited for included, and resident MiB of a process group (Linux only)."""
    ticks = pages = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended while we looked
        if int(values[2]) == leader:
            ticks += sum(map(int, values[11:15]))
            pages += int(values[21])
    return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(topology: Topology, seed: int) -> Measured:
    """One run."""
    with tempfile.TemporaryDirectory(prefix="tofu-latency-") as name:
        folder = Path(name)
        with LocalCluster(
            folder / "federation", nodes=_NODES, app=Path("."), warm=topology.warm, environment=topology.environment
        ) as federation:
            leaders = {part: federation.processes[process].pid for process, part in PARTS.items()}
            node = [leaders["node"], leaders["client app"]]
            _settle(leaders["client app"])
            began, idle = time.monotonic(), sum(group_use(leader)[0] for leader in node)
            time.sleep(_IDLE_SECONDS)
            idle = (sum(group_use(leader)[0] for leader in node) - idle) / (time.monotonic() - began)
            memory = sum(group_use(leader)[1] for leader in node)
            before = {part: group_use(leader)[0] for part, leader in leaders.items()}
            run = federation.run({**TRIVIAL, "seed": seed, "run-folder": str(folder / "run")}, timeout=900)
            if not run.completed:
                sys.exit(f"error: {topology.name}: {run.status} {run.details}")
            # The first round also asks each node who it is.
            cpu = {part: (group_use(leader)[0] - before[part]) / (_ROUNDS + 1) for part, leader in leaders.items()}
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["round"] > 1]
    beyond = [row["seconds"] - row["train_seconds"] - row["encode_seconds"] for row in rows]
    return Measured(topology.name, seed, [row["seconds"] for row in rows], beyond, cpu, 100 * idle, memory)


def _settle(leader: int) -> None:
    """Wait until what is imported ahead has been."""
    last, seen = -1.0, 0.0
    while seen - last > 0.05:
        time.sleep(3)
        last, seen = seen, group_use(leader)[0]


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each topology, in the order in which they were measured."""
    table = []
    for name in dict.fromkeys(row["topology"] for row in rows):
        own = [row for row in rows if row["topology"] == name]
        table.append(
            [
                name,
                *(spread([statistics.fmean(row[key]) for row in own], 1) for key in ("seconds", "beyond")),
                *(spread([row["cpu"][part] for row in own], 2) for part in PARTS.values()),
                spread([row["idle_cpu"] for row in own], 1), spread([row["idle_mib"] for row in own], 0),
            ]
        )  # fmt: skip
    return table


def main(
    repeats: int = 3,
) -> None:
    """Measure every topology, print the table, write the results."""
    rows = []
    for seed in range(repeats):
        for topology in _TOPOLOGIES:
            rows.append(dataclasses.asdict(measure(topology, seed)))
            print(rows[-1], file=sys.stderr, flush=True)
    print_table(HEADER, table_rows(rows))
    settings = {"nodes": _NODES, "rounds": _ROUNDS, "seeds": list(range(repeats)), "run": dict(TRIVIAL)}
    print(write_results("latency", settings=settings, rows=rows))


if __name__ == "__main__":
    run_command(main)
