"""FedAvg against compressed rounds only, hybrid rounds, and both directions compressed: accuracy and bytes.

MNIST with LeNet-5 and ten clients, CIFAR-10 with the small cnn (GroupNorm) and five, both Dirichlet 0.5; the last
round of the hybrid is a secure one. Every method uses the same local training, the same rounds and the same running
average of weights; they differ in what travels, and each has its own best step size of a few, on a seed that is not
reported. Finished runs are kept in --runs and not run again, so that an interrupted benchmark goes on where it was.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, find_data, print_table, run_command, spread, write_results
from benchmarks.federated.figure import draw
from client.app import app as client_app
from server.app import serve_in_process
from tofu.formatting import format_bytes
from tofu.observers.terminal import PlainProgress
from tofu.settings import Settings

COMMON: dict[str, Any] = {
    "partition": "dirichlet", "alpha": 0.5, "local_epochs": 1, "batch_size": 32, "ema_decay": 0.5,
    "over_relaxation": 1.0, "step_ahead": 0.0, "server_lr": 1.0, "proxies_below": 1.0,  # as in the results
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "mnist": {"dataset": "ylecun/mnist", "model": "lenet5", "clients": 10, "train_images": 12_000, "rounds": 15},
    "cifar10": {"dataset": "uoft-cs/cifar10", "model": "cnn", "clients": 5, "train_images": 5_000, "rounds": 12},
}  # fmt: skip
STEP_SIZES: dict[str, dict[str, tuple[float, ...]]] = {
    "mnist": {"FedAvg": (0.2, 0.3), "others": (0.2, 0.3)},
    "cifar10": {"FedAvg": (0.02, 0.03, 0.05), "others": (0.03, 0.05)},
}
"""Of these each method takes what is best on `TUNING_SEED`."""
TUNING_SEED = 7
PROXY: dict[str, dict[str, Any]] = {"mnist": {"ratio": 76.0}, "cifar10": {"ratio": 25.0}}
"""Ratios are of payloads; an envelope around each of Flower's messages counts too."""
SECURE: dict[str, dict[str, Any]] = {
    "mnist": {"switch_round": 15, "secure_ratio": 16.0},
    "cifar10": {"switch_round": 12, "secure_ratio": 8.0},
}
BOTH: dict[str, dict[str, Any]] = {
    "mnist": {"schedule": "compressed", "ratio": 110.0, "downlink_ratio": 45.0},
    "cifar10": {"schedule": "compressed", "ratio": 26.0, "correction": 1.0, "downlink_ratio": 17.0},
}
"""On CIFAR-10 the sparse correction alone is sent, which takes next to no time to encode."""
METHODS = ("FedAvg", "compressed rounds only", "hybrid", "both directions")


def changes(case: str, method: str) -> dict[str, Any]:
    """Settings of a method in addition to those of all methods."""
    if method == "FedAvg":
        return {"schedule": "fedavg"}
    if method == "compressed rounds only":
        return {"schedule": "compressed"} | PROXY[case]
    if method == "hybrid":
        return {"schedule": "switch"} | PROXY[case] | SECURE[case]
    return {"downlink": "proxy"} | BOTH[case]


def tuned(case: str, method: str, options: SimpleNamespace) -> tuple[float, list[dict[str, Any]]]:
    """The step size with which the method ends most accurate on `TUNING_SEED`, and the runs that say so."""
    choices = STEP_SIZES[case].get(method, STEP_SIZES[case]["others"])
    trials = [one_run(case, method, TUNING_SEED, lr, options) for lr in choices]
    return max(trials, key=lambda row: row["final_accuracy"])["lr"], trials


def one_run(case: str, method: str, seed: int, lr: float, options: SimpleNamespace) -> dict[str, Any]:
    """Run, or read what an earlier invocation left."""
    folder = Path(options.runs) / case / f"{method.split(' ')[0].lower()}-{seed}-lr{lr:g}"
    hub = CASES[case]["dataset"]
    data = find_data(hub.split("/")[1], hub)
    values = COMMON | CASES[case] | changes(case, method) | {"dataset": data, "seed": seed, "lr": lr}
    settings = Settings.of(values | {"run_folder": str(folder), "workers": options.workers})
    if not (folder / "summary.json").is_file():
        if (folder / "config.json").is_file():  # interrupted: begin it again
            shutil.rmtree(folder)
        serve_in_process(client_app, settings, PlainProgress())
    kept = json.loads((folder / "config.json").read_text())
    if any(kept[name.replace("_", "-")] != value for name, value in values.items()):
        raise SystemExit(f"error: {folder} holds a run with other settings: give another --runs")
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "case": case,
        "method": method,
        "seed": seed,
        "lr": lr,
        "final_accuracy": summary["final_accuracy"],
        "uplink_bytes": summary["uplink_bytes"],
        "downlink_bytes": summary["downlink_bytes"],
        "uplink_ratio": summary["uplink_ratio"],
        "payload_ratio": summary["payload_ratio"],
        "seconds": summary["seconds"],
        "uplink_by_round": [row["uplink_bytes"] for row in metrics],
        "accuracies": [row["accuracy"] for row in metrics],
        "explained_variance": [row["explained_variance"] for row in metrics],
        "train_seconds": [row.get("train_seconds") for row in metrics],
        "encode_seconds": [row.get("encode_seconds") for row in metrics],
    }


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"some of {', '.join(CASES)}")] = None,
    methods: Annotated[str, typer.Option(help="only these, separated by commas")] = ",".join(METHODS),
    name: Annotated[str, typer.Option(help="of the results, before the case's")] = "federated",
    seeds: int = 3,
    workers: int = 2,
    runs: Annotated[str, typer.Option(help="folder for the runs")] = "runs/benchmark-federated",
) -> None:
    """FedAvg against compressed rounds, hybrid rounds, and both directions compressed, at equal rounds."""
    options = SimpleNamespace(**locals())
    asked = [method for method in METHODS if method in methods.split(",")]
    for case in names or CASES:
        chosen = {method: tuned(case, method, options) for method in asked}
        rows = [
            one_run(case, method, seed, chosen[method][0], options) for seed in range(options.seeds) for method in asked
        ]
        settings = COMMON | CASES[case] | {"proxy": PROXY[case], "secure": SECURE[case], "both": BOTH[case]}
        settings["tuning"] = [row for _, trials in chosen.values() for row in trials]
        print(write_results(f"{options.name}-{case}", script="federated", settings=settings, rows=rows))
        if "both directions" not in asked:  # the picture shows the uplink alone
            draw(rows, RESULTS / f"{options.name}-{case}.svg")
        print_case(rows)


def print_case(rows: list[dict[str, Any]]) -> None:
    table = []
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        fedavg = [row["final_accuracy"] for row in rows if row["method"] == "FedAvg"]
        full = sum(row["uplink_bytes"] + row["downlink_bytes"] for row in rows if row["method"] == "FedAvg")
        lost = [100 * (f - row["final_accuracy"]) for f, row in zip(fedavg, mine, strict=True)]
        table.append(
            (
                method,
                spread([100 * row["final_accuracy"] for row in mine], 2),
                "" if method == "FedAvg" else spread(lost, 2),
                format_bytes(round(sum(row["uplink_bytes"] for row in mine) / len(mine))),
                f"{sum(row['uplink_ratio'] for row in mine) / len(mine):.1f}x",
                f"{full / sum(row['uplink_bytes'] + row['downlink_bytes'] for row in mine):.1f}x",
            )
        )
    print_table(("method", "test accuracy, %", "points lost", "uplink", "less than FedAvg", "both ways"), table)


if __name__ == "__main__":
    run_command(main)
