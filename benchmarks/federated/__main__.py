"""FedAvg against proxy rounds only and against hybrid rounds: accuracy and uplink bytes at equal rounds.

MNIST, LeNet-5, ten clients, Dirichlet 0.5; the last two rounds of the hybrid are secure ones. Every method uses the
same local training, the same rounds and the same running average of weights; they differ in what travels. Finished
runs are kept in --runs and not run again, so that an interrupted benchmark goes on where it was.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, find_data, print_table, spread, write_results
from benchmarks.federated.figure import draw
from client.app import app as client_app
from server.app import serve_in_process
from server.progress import PlainProgress
from tofu.settings import Settings
from tofu.units import human_bytes

COMMON: dict[str, Any] = {
    "model": "lenet5",
    "clients": 10,
    "partition": "dirichlet",
    "alpha": 0.5,
    "local_epochs": 1,
    "batch_size": 32,
    "lr": 0.2,
    "weight_average": 0.5,
}
PROXY: dict[str, Any] = {"ratio": 115.0}
"""Of payloads; with Flower's envelope around each, the uplink is about 87 times less than FedAvg's."""
METHODS: dict[str, dict[str, Any]] = {
    "FedAvg": {"schedule": "full"},
    "proxy rounds only": {"schedule": "proxy"} | PROXY,
    "hybrid (last two rounds secure)": {"schedule": "switch", "secure_ratio": 16.0} | PROXY,
}


def one_run(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run, or read what an earlier invocation left."""
    folder = Path(options.runs) / f"{method.split(' ')[0].lower()}-{seed}"
    values = COMMON | METHODS[method] | {"dataset": options.data, "rounds": options.rounds, "seed": seed}
    if method.startswith("hybrid"):
        values["switch_round"] = options.rounds - 1
    settings = Settings.of(values | {"run_folder": str(folder), "train_images": options.train_images})
    if not (folder / "summary.json").is_file():
        if folder.is_dir():  # interrupted: begin it again
            for file in folder.iterdir():
                file.unlink()
        serve_in_process(client_app, settings, PlainProgress())
    kept = json.loads((folder / "config.json").read_text())
    if any(kept[name.replace("_", "-")] != value for name, value in values.items()):
        raise SystemExit(f"error: {folder} holds a run with other settings: give another --runs")
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "method": method,
        "seed": seed,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=find_data("mnist", "ylecun/mnist"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--train-images", type=int, default=12_000, help="0 is all 60,000")
    parser.add_argument("--runs", default="runs/benchmark-federated", help="folder for the runs")
    options = parser.parse_args()
    rows = [one_run(method, seed, options) for seed in range(options.seeds) for method in METHODS]
    settings = {"dataset": "mnist", "rounds": options.rounds, "train_images": options.train_images} | COMMON
    print(write_results("federated", settings=settings | {"proxy": PROXY}, rows=rows))
    draw(rows, RESULTS / "federated.svg")
    table = []
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        fedavg = [row["final_accuracy"] for row in rows if row["method"] == "FedAvg"]
        lost = [100 * (f - row["final_accuracy"]) for f, row in zip(fedavg, mine, strict=True)]
        table.append(
            (
                method,
                spread([100 * row["final_accuracy"] for row in mine], 2),
                "" if method == "FedAvg" else spread(lost, 2),
                human_bytes(round(sum(row["uplink_bytes"] for row in mine) / len(mine))),
                f"{sum(row['uplink_ratio'] for row in mine) / len(mine):.1f}x",
            )
        )
    print_table(("method", "test accuracy, %", "points lost", "uplink", "less than FedAvg"), table)


if __name__ == "__main__":
    main()
