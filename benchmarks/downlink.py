"""Both directions compressed at more and more ratios on the downlink: accuracy, and bytes of both directions.

The tasks of `benchmarks.federated`, with the library's defaults (server's step, over-relaxation, step-ahead) and one
step size for all, so that nothing is tuned. The uplink has a ratio of 100, and the server sends its step by the same
compressor: proxies and corrections, or STC, which its authors propose for both directions (Sattler et al., IEEE TNNLS
2020, arXiv 1903.02891), without over-relaxation. Finished runs are kept in --runs and not run again. A run that
diverges is counted as such.
"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import find_data, joined, print_table, run_command, several, spread, write_results
from benchmarks.federated.__main__ import CASES
from client.app import app as client_app
from server.app import serve_in_process
from tofu.errors import RunError
from tofu.observers.terminal import PlainProgress
from tofu.settings import Settings

COMMON: dict[str, Any] = {
    "partition": "dirichlet", "alpha": 0.5, "local_epochs": 1, "batch_size": 32, "ema_decay": 0.5, "rounds": 20,
}  # fmt: skip
STEP_SIZE = {"mnist": 0.2, "cifar10": 0.03}
"""Of those that `benchmarks.federated` tries. With 0.3 on MNIST, as good for FedAvg, compressed runs diverge."""
UPLINK_RATIO = 100.0
DOWNLINK_RATIOS = (25, 50, 100, 200)
METHODS: dict[str, dict[str, Any]] = {
    "default": {"compressor": "proxy", "downlink": "proxy"},
    "stc": {"compressor": "stc", "downlink": "stc", "over_relaxation": 1.0},
}
SEEDS = (0, 1, 2)
HEADER = ("data", "method", "down", "accuracy, %", "points lost", "uplink", "downlink", "both directions")


def one_run(case: str, method: str, down: int, seed: int, runs: Path) -> dict[str, Any]:
    """Run, or read what an earlier invocation left; `down` is the downlink's ratio, 0 for FedAvg."""
    folder = runs / case / f"{method}-{down}x-{seed}"
    hub = CASES[case]["dataset"]
    values = CASES[case] | COMMON | {"dataset": find_data(hub.split("/")[-1], hub), "seed": seed, "lr": STEP_SIZE[case]}
    if down:
        values |= {"schedule": "compressed", "ratio": UPLINK_RATIO, "downlink_ratio": float(down)} | METHODS[method]
    else:
        values |= {"schedule": "fedavg"}
    if not any((folder / name).is_file() for name in ("summary.json", "diverged")):
        if folder.is_dir():  # interrupted: begin it again
            shutil.rmtree(folder)
        try:
            serve_in_process(client_app, Settings.of(values | {"run_folder": str(folder)}), PlainProgress())
        except RunError as error:
            print(error)
            (folder / "diverged").write_text(str(error))
    if (folder / "diverged").is_file():
        return {"case": case, "method": method, "down": down, "seed": seed, "final_accuracy": None}
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("final_accuracy", "uplink_bytes", "downlink_bytes", "uplink_ratio", "both_ratio", "fedavg_downlink_bytes")
    return {"case": case, "method": method, "down": down, "seed": seed} | {name: summary[name] for name in kept}


def table_rows(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row per task, method and ratio of the downlink: means over seeds, and what is lost against FedAvg."""
    fedavg = {(row["case"], row["seed"]): row for row in rows if not row["down"]}
    table: list[tuple[str, ...]] = []
    for case, method, down in dict.fromkeys((row["case"], row["method"], row["down"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["method"], row["down"]) == (case, method, down)]
        diverged = sum(row["final_accuracy"] is None for row in mine)
        mine = [row for row in mine if row["final_accuracy"] is not None]
        if not mine:
            table.append((case, method, f"{down}x", f"diverged ({diverged} of {diverged})", "", "", "", ""))
            continue
        lost = [100 * (fedavg[case, row["seed"]]["final_accuracy"] - row["final_accuracy"]) for row in mine]
        ratios = [
            statistics.fmean(values)
            for values in (
                [row["uplink_ratio"] for row in mine],
                [row["fedavg_downlink_bytes"] / row["downlink_bytes"] for row in mine],
                [row["both_ratio"] for row in mine],
            )
        ]
        table.append(
            (
                case,
                method,
                f"{down}x" if down else "",
                spread([100 * row["final_accuracy"] for row in mine], 2)
                + (f" ({diverged} of {len(mine) + diverged} diverged)" if diverged else ""),
                spread(lost, 2) if down else "",
                *(f"{ratio:.1f}x" if down else "" for ratio in ratios),
            )
        )
    return table


def main(
    tasks: Annotated[Any, several(str, CASES, f"some of {', '.join(CASES)}")] = joined(CASES),
    seeds: Annotated[Any, several(int)] = joined(SEEDS),
    runs: Annotated[Path, typer.Option(help="folder for the runs")] = Path("runs/benchmark-downlink"),
) -> None:
    """Both directions compressed at more and more ratios on the downlink."""
    kinds = [("fedavg", 0), *((method, down) for method in METHODS for down in DOWNLINK_RATIOS)]
    rows = [one_run(case, method, down, seed, runs) for case in tasks for method, down in kinds for seed in seeds]
    settings = COMMON | {"uplink_ratio": UPLINK_RATIO, "methods": METHODS, "lr": STEP_SIZE, "cases": CASES}
    print(write_results("downlink", settings=settings, rows=rows))
    print_table(HEADER, table_rows(rows))


if __name__ == "__main__":
    run_command(main)
