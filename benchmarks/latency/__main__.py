"""`python -m benchmarks.latency`: what a round takes beyond training and encoding, with real processes over TLS.

Two nodes train the small network on the digits for next to nothing, so that nearly all of a round is Flower's: polls,
process starts, imports. Each setting is run `--repeats` times, in turns, on a machine that may have other work: CPU
seconds are the steadier measure.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import print_table, run_command, spread, write_results
from deploy.processes import LocalCluster

_NODES = 2
_ROUNDS = 5
_TRIVIAL: Mapping[str, bool | float | int | str] = {
    "clients": _NODES, "min-clients": _NODES, "rounds": _ROUNDS, "model": "mlp", "local-epochs": 1, "max_evals": 2,
    "round-timeout": 300.0,
}  # fmt: skip


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
        beyond: seconds of each round that are neither training nor encoding.
        cpu: CPU seconds a message on a node: the SuperExec and the client apps.
    """

    topology: str
    seed: int
    beyond: list[float]
    cpu: float


_SLOW_NODE = {"TOFU_NODE_POLL_SECONDS": "3"}

_TOPOLOGIES = (
    Topology("Flower's defaults", environment={"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1.0", **_SLOW_NODE}),
    Topology("SuperExecs poll every 0.2 s", environment=_SLOW_NODE),
    Topology("and warm client apps", warm=True, environment=_SLOW_NODE),
    Topology("and SuperNodes poll every 0.5 s", warm=True),
)


def group_cpu_seconds(leader: int) -> float:
    """CPU seconds of all processes of a group, ended ones that were waited for included (Linux only)."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended while we looked
        if int(values[2]) == leader:
            ticks += sum(map(int, values[11:15]))
    return ticks / 100


def measure(topology: Topology, seed: int) -> Measured:
    """One run."""
    with tempfile.TemporaryDirectory(prefix="tofu-latency-") as name:
        folder = Path(name)
        with LocalCluster(
            folder / "federation", nodes=_NODES, app=Path("."), warm=topology.warm, environment=topology.environment
        ) as federation:
            leader = federation.processes["node-0-exec"].pid
            _settle(leader)
            before = group_cpu_seconds(leader)
            run = federation.run({**_TRIVIAL, "seed": seed, "run-folder": str(folder / "run")}, timeout=900)
            if not run.completed:
                sys.exit(f"error: {topology.name}: {run.status} {run.details}")
            cpu = group_cpu_seconds(leader) - before
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    # The first round also asks each node who it is.
    beyond = [row["seconds"] - row["train_seconds"] - row["encode_seconds"] for row in rows if row["round"] > 1]
    return Measured(topology.name, seed, beyond, cpu / (_ROUNDS + 1))


def _settle(leader: int) -> None:
    """Wait until what is imported ahead has been."""
    last, seen = -1.0, 0.0
    while seen - last > 0.05:
        time.sleep(3)
        last, seen = seen, group_cpu_seconds(leader)


def main(
    repeats: int = 3,
) -> None:
    """Measure every topology, print the table, write the results."""
    rows = []
    for seed in range(repeats):
        for topology in _TOPOLOGIES:
            rows.append(measure(topology, seed))
            print(rows[-1], file=sys.stderr, flush=True)
    first, *_ = by_name = [[row for row in rows if row.topology == topology.name] for topology in _TOPOLOGIES]
    table = []
    for own in by_name:
        pairs = list(zip(own, first, strict=True))
        rounds = [statistics.fmean(row.beyond) / statistics.fmean(base.beyond) for row, base in pairs]
        table.append([own[0].topology, spread(rounds, 2), spread([row.cpu / base.cpu for row, base in pairs], 2)])
    print_table(["topology", "round beyond training / first row", "CPU a message / first row"], table)
    settings = {"nodes": _NODES, "rounds": _ROUNDS, "seeds": list(range(repeats)), "run": dict(_TRIVIAL)}
    print(write_results("latency", settings=settings, rows=[dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    run_command(main)
