"""Ablation of error feedback: over-relaxation w, step-ahead a, proxies and correction, each switched off in turn.

Every method has the same grid of w and a, the same local training, rounds and seeds. After each run its row is written
to the results, so an interrupted benchmark continues with the same command; a row that is there is not run again.
Accuracies during a run are measured on 1,000 test images, the final accuracy on all of them, because evaluation would
otherwise take more than half of a run. The step sizes are those of `benchmarks.rivals`.
"""

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, find_data, print_table, run_command, spread, versions
from benchmarks.error_feedback.figure import draw
from benchmarks.rivals.__main__ import COMPARISONS, FEDERATION
from client.app import app as client_app
from server.app import serve_in_process
from tofu.data import FederatedData
from tofu.errors import RunError, SettingError
from tofu.evaluation import evaluate
from tofu.files import replace_file
from tofu.models import initial_model
from tofu.observers.base import Observer
from tofu.reporting.folder import read_model
from tofu.rounds.record import read_rounds
from tofu.settings import Settings
from tofu.weights import load_weights

Row = dict[str, Any]

TASKS: dict[str, dict[str, Any]] = {
    "cifar10": COMPARISONS["cifar10-group"][0],
    "mnist-100": COMPARISONS["mnist-100"][0],
    "mnist": COMPARISONS["mnist"][0] | {"lr": 0.2},
}
METHODS: dict[str, dict[str, Any]] = {
    "proxies+correction": {"compressor": "proxy", "correction": 0.4},
    "correction": {"compressor": "proxy", "correction": 1.0},
    "proxies": {"compressor": "proxy", "correction": 0.0},
    "stc": {"compressor": "stc"},
    "topk": {"compressor": "topk"},
    "powersgd": {"compressor": "powersgd"},
}
"""The last three are rivals. Proxies without a correction have no w: it applies to the correction only."""
FEEDBACK = ((0.0, 0.5, 1.0), (1.8, 0.5, 1.0), (1.0, 0.5, 1.0), (1.8, 0.0, 1.0), (1.0, 0.0, 1.0), (1.8, 0.5, 0.0))
"""(w, a, step-ahead-final-factor). w = 0 is the default, where each message chooses w. Then a constant w: with
step-ahead, each of the two switched off, neither, and both with an a that falls to 0."""
RATIOS = (1000, 200, 500, 2000, 50, 10)
SEEDS = (0, 1, 2)
TUNING_SEED = 7
"""Of the runs that w and a were chosen by; the tables have none of them."""
TUNING = tuple(
    (w, a, final)
    for w in (1.8, 1.4, 1.0)
    for a, final in ((0.5, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0))
)
TUNED = (("cifar10", 200), ("cifar10", 1000), ("mnist-100", 200))
"""(task, ratio) that w and a are chosen at, on this grid, for proxies with a correction, the correction and STC."""
CURVE_IMAGES = 1000


@dataclass(frozen=True)
class Run:
    """One run; `fedavg` has no ratio and no error feedback."""

    task: str
    method: str
    ratio: int
    w: float
    a: float
    final_factor: float
    seed: int

    @property
    def name(self) -> str:
        tail = (
            "" if self.method == "fedavg" else f"-{self.ratio}x-w{factor(self.w)}-a{falling(self.a, self.final_factor)}"
        )
        return f"{self.task}/{self.method}{tail}-seed{self.seed}"

    def settings(self, folder: Path) -> Settings:
        task = TASKS[self.task]
        hub = task["dataset"]
        own: dict[str, Any] = {"schedule": "fedavg"}
        if self.method != "fedavg":
            own = METHODS[self.method] | {
                "ratio": float(self.ratio), "over_relaxation": self.w, "step_ahead": self.a,
                "step_ahead_final_factor": self.final_factor,
            }  # fmt: skip
        common = {
            "dataset": find_data(hub.split("/")[1], hub), "seed": self.seed, "workers": 1, "threads": 1,
            "checkpoint": False, "test_images": CURVE_IMAGES, "run_folder": str(folder),
        }  # fmt: skip
        return Settings.of(FEDERATION | task | own | common)


def factor(w: float) -> str:
    """Over-relaxation: 0 lets each message choose it."""
    return f"{w:g}" if w else "auto"


def falling(a: float, final_factor: float) -> str:
    """Step-ahead in the first and in the last round, such as 0.5 or 1to0."""
    return f"{a:g}" if not a or final_factor == 1 else f"{a:g}to{a * final_factor:g}"


def all_runs() -> list[Run]:
    """The whole ablation, in the order in which it is run: by seed, so that every cell has early results."""
    runs = [Run(task, "fedavg", 0, 1.0, 0.0, 1.0, TUNING_SEED) for task, _ in TUNED]
    runs += [
        Run(task, method, ratio, *feedback, TUNING_SEED)
        for task, ratio in TUNED for method in ("correction", "stc", "proxies+correction") for feedback in TUNING
    ]  # fmt: skip
    for task in TASKS:
        for ratio in RATIOS:
            for seed in SEEDS:
                runs.append(Run(task, "fedavg", 0, 1.0, 0.0, 1.0, seed))
                for w, a, final in FEEDBACK:
                    for method in METHODS:
                        if method != "proxies" or w == 1:
                            runs.append(Run(task, method, ratio, w, a, final, seed))
    return list(dict.fromkeys(runs))


def make(run: Run, folder: Path) -> Row:
    """Make one run. Training that diverges, or a ratio out of reach, is a result, too."""
    row: Row = {"run": run.name, **vars(run)}
    shutil.rmtree(folder, ignore_errors=True)
    settings = run.settings(folder)
    try:
        summary = serve_in_process(client_app, settings, Observer())
    except (RunError, SettingError) as error:  # SettingError: the compressor does not reach this ratio
        return row | {"failed": str(error)}
    rounds = read_rounds(folder / "metrics.jsonl")
    return row | {
        "final_accuracy": _accuracy(settings, folder),
        "accuracy_by_round": [one.accuracy for one in rounds],
        "explained_variance_by_round": [one.explained_variance for one in rounds],
        "encode_seconds": sum(one.encode_seconds or 0.0 for one in rounds),
        **{name: summary[name] for name in ("payload_ratio", "uplink_bytes", "seconds", "weights_sha256")},
    }


def _accuracy(settings: Settings, folder: Path) -> float:
    """Accuracy of a finished run's weights on all test images."""
    weights, shape, _ = read_model(folder)
    model = initial_model(settings.model, shape, settings.run.seed)
    load_weights(model, weights)
    return evaluate(model, FederatedData.of(settings.data.replace(test_images=0), settings.run.seed).test()).accuracy


def table(rows: Iterable[Row], seeds: tuple[int, ...] = SEEDS) -> list[tuple[str, list[str], list[list[str]]]]:
    """Per task: its name, the header, and one line per method, w and a, with mean and deviation over the seeds."""
    found = [row for row in rows if "failed" not in row and row["seed"] in seeds]
    tables = []
    for task in TASKS:
        here = [row for row in found if row["task"] == task]
        ratios = sorted({row["ratio"] for row in here if row["ratio"]})
        lines = []
        for method in ("fedavg", *METHODS):
            mine = [row for row in here if row["method"] == method]
            for w, a, final in sorted({(row["w"], row["a"], row["final_factor"]) for row in mine}, reverse=True):
                same = [row for row in mine if (row["w"], row["a"], row["final_factor"]) == (w, a, final)]
                cells = [_cell([row for row in same if row["ratio"] in (ratio, 0)], seeds) for ratio in ratios]
                named = ("", "") if method == "fedavg" else (factor(w), falling(a, final).replace("to", " to "))
                lines.append([method, *named, *cells])
        if lines:
            tables.append((task, ["method", "w", "a", *(f"{ratio}x" for ratio in ratios)], lines))
    return tables


def _cell(rows: list[Row], seeds: tuple[int, ...]) -> str:
    """Final accuracy in %; the number of seeds if some are missing."""
    if not rows:
        return "not run"
    text = spread([100 * row["final_accuracy"] for row in rows], 1)
    return text if len(rows) == len(seeds) else f"{text} ({len(rows)} of {len(seeds)} seeds)"


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help="only runs with such names, as 'cifar10/stc-1000x-w1.8-a0.5-*'; may be repeated, in order"),
    ] = None,
    names: Annotated[bool, typer.Option("--list", help="print the names of the runs that are left, and stop")] = False,
    table_only: Annotated[bool, typer.Option("--table", help="print and draw the results so far, and stop")] = False,
    folder: Annotated[Path, typer.Option("--runs", help="folder for the runs")] = Path("runs/benchmark-error-feedback"),
    output: Annotated[Path, typer.Option(help="results")] = RESULTS / "error-feedback.json",
) -> None:
    """Error feedback with over-relaxation and step-ahead: accuracy over seeds, by compressor and ratio."""
    rows: list[Row] = json.loads(output.read_text())["rows"] if output.is_file() else []
    done = {row["run"] for row in rows}
    runs = all_runs()
    asked = [run for pattern in only or ["*"] for run in runs if fnmatch(run.name, pattern)]
    left = [run for run in dict.fromkeys(asked) if run.name not in done]
    if names:
        print("\n".join(run.name for run in left))
        return
    for number, run in enumerate([] if table_only else left, start=1):
        rows.append(make(run, folder / run.name))
        done.add(run.name)
        result = rows[-1].get("final_accuracy", rows[-1].get("failed"))
        print(f"{number} of {len(left)}: {run.name}: {result}", file=sys.stderr, flush=True)
        missing = sum(run.name not in done for run in runs)
        document = versions("python -m benchmarks.error_feedback") | {
            "complete": not missing, "runs_left": missing, "curve_images": CURVE_IMAGES,
            "settings": {task: FEDERATION | own for task, own in TASKS.items()}, "rows": rows,
        }  # fmt: skip
        replace_file(output, (json.dumps(document, indent=1) + "\n").encode())
    draw(rows, list(TASKS), SEEDS, output.with_suffix(".svg"))
    missing = sum(run.name not in done for run in runs)
    if missing:
        print(f"Partial results: {missing} of {len(runs)} runs were not made.")
    for title, seeds in (("", SEEDS), (f", tuning on seed {TUNING_SEED}", (TUNING_SEED,))):
        for task, header, lines in table(rows, seeds):
            print(f"\n## {task}{title}\n")
            print_table(header, lines)


if __name__ == "__main__":
    run_command(main)
