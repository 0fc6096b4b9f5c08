"""The published method's own figures beside ours: FedAvg, proxies as published, and our default, on MNIST and CIFAR-10.

Garg, Nagaraj, Roy, "TOFU", arXiv 2201.08494: with proxies alone less than 1 point is lost on MNIST and less than 7 on
CIFAR-10; with the last rounds in full next to nothing, at 4x and 6.6x fewer bytes than FedAvg. The paper does not say
how many clients, proxies and evaluations it has, nor which network on MNIST. Ours: the two small tasks of
`benchmarks.error_feedback` with IID clients; full-size proxies of 8 bits, as many as fit in a sixteenth of an update;
200 evaluations by Adam; no error feedback. The hybrid's last rounds are as many as leave 4x and 6.6x. Paper mode has
the better of two steps of the server, 1 and 2, on a seed of its own. As in that benchmark, an interrupted run begins
anew and finished ones are kept. Its row on VGG13 is in `benchmarks.rivals cifar10-vgg13-small`.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, find_data, print_table, run_command, spread, versions
from benchmarks.error_feedback.__main__ import CURVE_IMAGES, SEEDS, TASKS, TUNING_SEED, Row, Run, Table, make
from benchmarks.rivals.__main__ import FEDERATION
from tofu.files import replace_file
from tofu.settings import Settings

IID: dict[str, dict[str, Any]] = {name: TASKS[name] | {"partition": "iid"} for name in ("mnist", "cifar10")}
PUBLISHED: dict[str, Any] = {
    "compressor": "proxy", "codec_mode": "paper", "correction": 0.0, "bits": 8, "max_evals": 200, "tolerance": 0.0,
    "error_feedback": 0.0, "over_relaxation": 1.0, "step_ahead": 0.0,
}  # fmt: skip
OURS: dict[str, Any] = {"compressor": "proxy", "over_relaxation": 0.0, "step_ahead": 0.5, "proxies_below": 0.33}
SIDE = {"mnist": 28, "cifar10": 32}
RATIO = 16.0
OUR_RATIO = 50.0
FULL_ROUNDS = {"mnist": 3, "cifar10": 1}
"""Last rounds of the hybrid, with which all of it takes about the bytes that the paper reports."""
REPORTED = {
    ("mnist", "proxies"): "less than 1", ("cifar10", "proxies"): "less than 7",
    ("mnist", "hybrid"): "about 0, 4x", ("cifar10", "hybrid"): "about 0, 6.6x",
}  # fmt: skip
STEPS = (1.0, 2.0)
KINDS = ("fedavg", "paper proxies", "paper hybrid", "our proxies", "our hybrid")


@dataclass(frozen=True)
class PaperRun(Run):
    """One run; `method` is one of KINDS."""

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method.replace(' ', '-')}-step{self.server_lr:g}-seed{self.seed}"

    def settings(self, folder: Path) -> Settings:
        task, rounds = IID[self.task], int(IID[self.task]["rounds"])
        hub, own = task["dataset"], {"schedule": "fedavg", "server_lr": self.server_lr}
        if self.method != "fedavg":
            paper = self.method.startswith("paper")
            own = PUBLISHED | {"proxy_size": SIDE[self.task]} if paper else OURS
            own = own | {"ratio": RATIO if paper else OUR_RATIO, "server_lr": self.server_lr}
            if self.method.endswith("hybrid"):
                full = FULL_ROUNDS[self.task] if paper else 1
                recovery = "fedavg" if paper else "secure"
                own |= {"schedule": "switch", "switch_round": rounds - full + 1, "recovery": recovery}
        common = {
            "dataset": find_data(hub.split("/")[1], hub), "seed": self.seed, "workers": 1, "threads": 1,
            "checkpoint": False, "test_images": CURVE_IMAGES, "run_folder": str(folder),
        }  # fmt: skip
        return Settings.of(FEDERATION | task | common | own)


def run(task: str, kind: str, seed: int, step: float = 1.0) -> PaperRun:
    """A run; our server chooses its step itself (0), and FedAvg's is 1."""
    own = {"paper": step, "our": 0.0}.get(kind.partition(" ")[0], 1.0)
    return PaperRun(task, kind, 0, 1.0, 0.0, 1.0, seed, own)


def chosen(rows: list[Row], task: str) -> float:
    """The server's step with which the published proxies end best on the tuning seed."""
    names = {run(task, "paper proxies", TUNING_SEED, step).name: step for step in STEPS}
    tried = [row for row in rows if row["run"] in names]
    return names[max(tried, key=lambda row: row.get("final_accuracy") or 0.0)["run"]] if tried else 1.0


def table(rows: list[Row]) -> Table:
    """Final accuracy and bytes by row of the paper's table."""
    lines = []
    for task in IID:
        fedavg = found(rows, task, "fedavg")
        for kind in KINDS:
            mine = found(rows, task, kind)
            both = sorted(fedavg.keys() & mine.keys())
            if not both:
                continue
            lost = [100 * (fedavg[seed]["final_accuracy"] - mine[seed]["final_accuracy"]) for seed in both]
            fewer = [fedavg[seed]["uplink_bytes"] / mine[seed]["uplink_bytes"] for seed in both]
            lines.append([
                task, kind, str(len(both)), spread([100 * mine[seed]["final_accuracy"] for seed in both], 2),
                "" if kind == "fedavg" else spread(lost, 2), f"{statistics.fmean(fewer):.1f}x",
                REPORTED.get((task, kind.rpartition(" ")[2]), "") if kind.startswith("paper") else "",
            ])  # fmt: skip
    return ["data", "method", "seeds", "accuracy, %", "points lost", "uplink", "the paper: points lost"], lines


def found(rows: list[Row], task: str, kind: str) -> dict[int, Row]:
    """Seed -> row of the runs that ended."""
    step = chosen(rows, task) if kind.startswith("paper") else 1.0
    names = {run(task, kind, seed, step).name: seed for seed in SEEDS}
    return {names[row["run"]]: row for row in rows if row["run"] in names and "failed" not in row}


def main(
    only: Annotated[str, typer.Option(help="only runs with such names, as 'mnist/*'")] = "*",
    folder: Annotated[Path, typer.Option("--runs", help="folder for the runs")] = Path("runs/benchmark-paper"),
    output: Annotated[Path, typer.Option(help="results")] = RESULTS / "paper.json",
) -> None:
    """The published method in its own mode beside ours."""
    rows: list[Row] = json.loads(output.read_text())["rows"] if output.is_file() else []

    def measure(one: PaperRun) -> None:
        if not fnmatch(one.name, only) or any(row["run"] == one.name for row in rows):
            return
        rows.append(make(one, folder / one.name))
        print(f"{one.name}: {rows[-1].get('final_accuracy', rows[-1].get('failed'))}", file=sys.stderr, flush=True)
        document = versions("python -m benchmarks.paper") | {
            "settings": {task: FEDERATION | own for task, own in IID.items()}, "published": PUBLISHED, "ours": OURS,
            "curve_images": CURVE_IMAGES, "rows": rows,
        }  # fmt: skip
        replace_file(output, (json.dumps(document, indent=1) + "\n").encode())

    for task in IID:
        for step in STEPS:
            measure(run(task, "paper proxies", TUNING_SEED, step))
        for seed in SEEDS:
            for kind in KINDS:
                measure(run(task, kind, seed, chosen(rows, task)))
    print_table(*table(rows))


if __name__ == "__main__":
    run_command(main)
