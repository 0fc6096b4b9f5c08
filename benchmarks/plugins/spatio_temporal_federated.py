"""The plugin `spatio-temporal` in federations: ten clients, Dirichlet 0.5, against centralized training.

All methods train the same spiking network from scratch on digits, with the same schedule of channels and time steps and
the same optimizer: "centralized" on one node with all images, "proxy" by proxy rounds, "secure" by secure rounds.
Finished runs are kept in --runs and not run again.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

from benchmarks.common import joined, print_table, run_command, several, spread, write_results
from client.app import app as client_app
from server.app import serve_in_process
from tofu.settings import Settings

COMMON: dict[str, Any] = {
    "dataset": "digits", "model": "snn-small", "clients": 10, "partition": "dirichlet", "alpha": 0.5, "rounds": 40,
    "local_epochs": 5, "batch_size": 32, "lr": 0.1, "momentum": 0.9, "lr_final_factor": 0.3, "ema_decay": 0.5,
    "server_lr": 1.0, "proxies_below": 1.0,
    "plugins": "spatio-temporal",
    "plugin_options": "spatio-temporal.steps=4 spatio-temporal.variance=0.999 spatio-temporal.prune-after=12 "
    "spatio-temporal.reduce-after=16 spatio-temporal.reduce-until=24",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "centralized": {"schedule": "fedavg", "clients": 1, "partition": "iid"},
    "proxy": {"schedule": "compressed", "ratio": 10.0, "max_evals": 10},
    "secure": {"schedule": "secure", "secure_ratio": 4.0},
}


def run(method: str, seed: int, runs: Path) -> dict[str, Any]:
    """One run, from its folder if it has finished."""
    folder = runs / f"{method}-{seed}"
    settings = Settings.of(COMMON | METHODS[method] | {"seed": seed, "run_folder": str(folder)})
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        serve_in_process(client_app, settings)
    end = json.loads((folder / "summary.json").read_text())
    panel = json.loads((folder / "panels.json").read_text())["spatio-temporal"]
    parameters = panel["figures"][1]["series"][0]["values"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "method": method, "seed": seed, "accuracy": end["final_accuracy"], "uplink_bytes": end["uplink_bytes"],
        "parameters": [parameters[0], parameters[-1]], "by_round": [line["accuracy"] for line in lines],
        "seconds": end["seconds"],
    }  # fmt: skip


def main(
    seeds: Annotated[Any, several(int)] = joined([0, 1, 2]),
    runs: Path = Path("runs/spatio-temporal-federated"),
) -> None:
    """The plugin `spatio-temporal` in federations: ten clients, Dirichlet 0.5, against centralized training."""
    rows = []
    for seed in seeds:
        for method in METHODS:
            rows.append(run(method, seed, runs))
            print(f"seed {seed} {method}: {rows[-1]['accuracy']:.4f} in {rows[-1]['seconds']:.0f} s", flush=True)
        settings = {"common": COMMON, "methods": METHODS}
        write_results("plugins-spatio-temporal-federated", settings=settings, rows=rows,
                      script="plugins spatio-temporal-federated")  # fmt: skip
    lines = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        lines.append([
            method, spread([100 * row["accuracy"] for row in own], 2),
            spread([row["parameters"][1] / row["parameters"][0] for row in own], 2),
            spread([row["uplink_bytes"] / 1e6 for row in own], 2),
        ])  # fmt: skip
    print_table(["method", "accuracy", "parameters kept", "uplink MB"], lines)


if __name__ == "__main__":
    run_command(main)
