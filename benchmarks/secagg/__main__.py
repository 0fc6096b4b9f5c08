"""What secure aggregation costs: ours, Flower's SecAgg+, and float32 without any secrecy.

Simulated clients in one process, one thread, processor time. Both protocols get the same graph, threshold and dropouts
(10% of the clients, after they shared keys; choose_topology with 10% dropouts and 5% in league with the server) and
their messages are counted as the contents of Flower messages, all stages together. Ours is a session as it is where
that is quick, else as `ours.sampled_session` says; Flower's as `flower` says. Rows say which.

"client / float32 add" is a client's time over the server's to add one float32 update: how it grows with the graph.
"""

import statistics
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import joined, print_table, run_command, several, spread, write_results
from benchmarks.secagg import flower, ours
from benchmarks.secagg.cost import Case, Cost, sampled, update_of, wire_bytes
from tofu.secagg.graph import choose_topology

CLIENTS = (10, 100, 1000)
PARAMETERS = (61_706, 1_000_000, 10_000_000)
DROPOUT, CORRUPTED = 0.1, 0.05
LEVELS = {10: (100, 200), 100: (100,), 1000: (100,)}
"""Steps on either side of zero, by clients: at 10 a ring of 11 bits and one of 12."""

SHORT = 1_000
WHOLE_UP_TO = 2e9
"""Elements masked by all clients up to which a session is run whole."""


def float32(case: Case) -> Cost:
    """Updates as they are, and their weighted sum."""
    total, data = np.zeros(case.parameters, dtype=np.float64), update_of(case.parameters, 0).tobytes()

    def add() -> None:
        np.add(total, 0.1 * np.frombuffer(data, dtype=np.float32), out=total)

    update = update_of(case.parameters, 0)
    client = sampled(1, update.tobytes)
    return Cost(client, sampled(case.survivors, add), wire_bytes(b=data), 0, sampled=True)


def measure(case: Case, repeat: int, short: dict[tuple[int, int, int], Cost]) -> list[dict[str, Any]]:
    """A row for each number of levels; the rivals are measured once, in between."""
    theirs, plain = flower.cost(case), float32(case)
    rows = []
    for levels in LEVELS.get(case.clients, (100,)):
        code = ours.fixed_point(case.clients, levels)
        if case.clients * (1 + case.topology.neighbors) * case.parameters <= WHOLE_UP_TO:
            mine = ours.whole_session(case, code)
        else:
            key = (case.clients, levels, repeat)
            if key not in short:
                short[key] = ours.whole_session(Case(case.clients, SHORT, case.topology, case.dropped), code)
            mine = ours.sampled_session(case, code, short[key], SHORT)
        row = {
            "clients": case.clients,
            "parameters": case.parameters,
            "neighbors": case.topology.neighbors,
            "threshold": case.topology.threshold,
            "dropped": case.dropped,
            "repeat": repeat,
            "levels": levels,
            "bits": code.bits,
            "bytes_up": mine.up / case.parameters,
            "bytes_down": mine.down / case.parameters,
            "flower_bytes_up": theirs.up / case.parameters,
            "flower_bytes_down": theirs.down / case.parameters,
            "float32_bytes_up": plain.up / case.parameters,
            "client_over_flower": mine.client / theirs.client,
            "server_over_flower": mine.server / theirs.server,
            "server_over_float32": mine.server / plain.server,
            "flower_server_over_float32": theirs.server / plain.server,
            "client_over_float32_add": mine.client / (plain.server / case.survivors),
            "flower_client_over_float32_add": theirs.client / (plain.server / case.survivors),
            "sampled": mine.sampled,
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main(
    repeats: Annotated[int, typer.Option(help="at 10 and 100 clients; once at 1,000")] = 3,
    clients: Annotated[Any, several(int)] = joined(list(CLIENTS)),
    parameters: Annotated[Any, several(int)] = joined(list(PARAMETERS)),
) -> None:
    """What secure aggregation costs: ours, Flower's SecAgg+, and float32 without any secrecy."""
    options = SimpleNamespace(**locals())
    torch.set_num_threads(1)
    settings = {"dropout": DROPOUT, "corrupted": CORRUPTED, "short": SHORT, "whole_up_to": WHOLE_UP_TO}
    rows: list[dict[str, Any]] = []
    short: dict[tuple[int, int, int], Cost] = {}
    for clients in options.clients:
        topology = choose_topology(clients, dropout=DROPOUT, corrupted=CORRUPTED)
        for parameters in options.parameters:
            case = Case(clients, parameters, topology, round(DROPOUT * clients))
            for repeat in range(options.repeats if clients < 1000 else 1):
                rows += measure(case, repeat, short)
            path = write_results("secagg", settings=settings, rows=rows)
    print(path)
    header = ["clients", "neighbors", "parameters", "bits", "bytes up", "Flower's up", "bytes down"]
    header += ["client / Flower's", "server / Flower's", "client / float32 add", "server / float32 sum", "sampled"]
    table = []
    for key in dict.fromkeys((row["clients"], row["parameters"], row["bits"]) for row in rows):
        mine = [row for row in rows if (row["clients"], row["parameters"], row["bits"]) == key]
        names = ("client_over_flower", "server_over_flower", "client_over_float32_add", "server_over_float32")
        times = [spread([row[name] for row in mine], 3) for name in names]
        first = mine[0]
        sent = [
            f"{statistics.fmean(row[n] for row in mine):.3f}" for n in ("bytes_up", "flower_bytes_up", "bytes_down")
        ]
        place = (str(key[0]), str(first["neighbors"]), f"{key[1]:,}", str(key[2]))
        table.append((*place, *sent, *times, "yes" if first["sampled"] else "no"))
    print_table(header, table)


if __name__ == "__main__":
    run_command(main)
