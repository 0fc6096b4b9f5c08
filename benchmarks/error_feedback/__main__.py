"""Error feedback: an ablation of over-relaxation w, step-ahead a, proxies and correction, and a comparison with rivals.

Every method has the same local training, rounds and seeds, and on a seed of its own the same grid of w and a. After
each run its row is written to the results, so an interrupted benchmark continues with the same command; a row that is
there is not run again. Accuracies during a run are measured on 1,000 test images, the final accuracy on all of them,
because evaluation would otherwise take more than half of a run. The step sizes are those of `benchmarks.rivals`.
"""

import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
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
Table = tuple[list[str], list[list[str]]]
"""Header and lines."""

TASKS: dict[str, dict[str, Any]] = {
    "cifar10": COMPARISONS["cifar10-group"][0],
    "mnist-100": COMPARISONS["mnist-100"][0],
    "mnist": COMPARISONS["mnist"][0] | {"lr": 0.2},
}
MOMENTUM: dict[str, Any] = {"server_optimizer": "momentum", "server_momentum": 0.5, "server_lr": 0.5}
"""Of the server; the steps of all rounds add up to those without momentum."""
SEARCHING: dict[str, Any] = {"compressor": "proxy", "correction": 0.4, "proxies_below": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "default": {"compressor": "proxy", "correction": 0.4, "proxies_below": 0.33},
    "proxies+correction": SEARCHING,
    "correction": {"compressor": "proxy", "correction": 1.0},
    "proxies": {"compressor": "proxy", "correction": 0.0},
    "by-lag": SEARCHING | {"compressor": "benchmarks.error_feedback.criteria:ByLag"},
    **{f"below-{below:g}": SEARCHING | {"proxies_below": below} for below in (0.5, 0.25)},
    **{f"split-{share:g}": SEARCHING | {"correction": share} for share in (0.1, 0.7, 0.85)},
    "stc": {"compressor": "stc"},
    "topk": {"compressor": "topk"},
    "powersgd": {"compressor": "powersgd"},
    "eden-stateless": {"compressor": "eden", "error_feedback": 0.0},
    "stc-stateless": {"compressor": "stc", "error_feedback": 0.0},
    "stc-half-life": {"compressor": "stc", "residual_half_life": 5.0},
    "stc-ef21": {"compressor": "stc", "server_optimizer": "ef21"},
    "stc-ef21-sgdm": {"compressor": "stc", "server_optimizer": "ef21", "ef21_momentum": 0.3},
    "stc-momentum": {"compressor": "stc"} | MOMENTUM,
    "fedavg-momentum": {"schedule": "fedavg"} | MOMENTUM,
}
"""The default does not search for proxies where the correction alone explains a third of an update;
proxies+correction always does. Proxies without a correction have no w: it applies to the correction only. The split is
the correction's share of the bytes. The three after these are rivals. The last ones are other kinds of error feedback,
none at all, and the server's momentum."""
AUTO = 0.0
"""Each message chooses its w; the default of proxies with a correction."""
AUTO_STEP = 0.0
"""The server chooses its step from the diversity of the updates; the default."""
SEEDS = (0, 1, 2)
TUNING_SEED = 7
"""Of the runs that w and a are chosen by; the tables have none of them."""
COMPARED = (
    ("proxies+correction", AUTO), ("correction", 1.8), ("proxies", 1.0), ("stc", 1.8), ("topk", 1.8),
    ("powersgd", 1.8),
)  # fmt: skip
"""(method, w), all with a = 0.5, and those of STEPPED_METHODS with a = 0, too, at the ratios of WITHOUT_AHEAD."""
RATIOS: dict[str, tuple[int, ...]] = {
    "cifar10": (1000, 200, 500, 2000, 50), "mnist": (1000, 500, 200, 50, 2000), "mnist-100": (200,),
}  # fmt: skip
"""Of the comparison."""
WITHOUT_AHEAD = {"cifar10": (1000, 2000), "mnist": (1000,)}
"""Ratios at which the default, the correction alone and STC have a = 0, too: rivals prefer it on the tuning seed."""
REACHED: dict[str, tuple[int, ...]] = {"proxies": (500, 1000, 2000), "powersgd": (50, 1000)}
"""Ratios of a method that is not run at all of them with a step of 1: at 1,000x PowerSGD has rank 1 and is far
behind."""
ABLATED = {"cifar10": 1000, "mnist": 500, "mnist-100": 200}
"""Ratio of the ablation."""
ABLATION = {
    "default": ("default", AUTO, 0.5, AUTO_STEP),
    "without over-relaxation (w = 1)": ("default", 1.0, 0.5, AUTO_STEP),
    "without step-ahead (a = 0)": ("default", AUTO, 0.0, AUTO_STEP),
    "with a server's step of 1": ("default", AUTO, 0.5, 1.0),
    "with a search in each round": ("proxies+correction", AUTO, 0.5, AUTO_STEP),
    "without proxies": ("correction", AUTO, 0.5, AUTO_STEP),
    "without the correction": ("proxies", 1.0, 0.5, AUTO_STEP),
}
"""Name -> (method, w, a, server's step)."""
VARIANTS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "mnist-100": (
        ("stc", 1.8, 0.5), ("eden-stateless", 1.0, 0.0), ("stc-stateless", 1.0, 0.0), ("stc-half-life", 1.8, 0.5),
        ("stc-ef21", 1.0, 0.0), ("stc-ef21-sgdm", 1.0, 0.0),
    ),
    "cifar10": (
        ("fedavg", 1.0, 0.0), ("fedavg-momentum", 1.0, 0.0), ("stc", 1.8, 0.5), ("stc-momentum", 1.8, 0.5),
        ("stc-momentum", 1.0, 0.0), ("stc-ef21", 1.0, 0.0), ("stc-ef21", 1.8, 0.0), ("stc-ef21-sgdm", 1.0, 0.0),
    ),
}  # fmt: skip
"""(method, w, a) of other kinds of error feedback at 200x, with 10 of 100 clients and with all of five."""
TUNED = {"cifar10": 1000}
"""Task and ratio that w and a are chosen at, on one grid for all methods."""
TUNING = tuple((w, a) for w in (1.8, 1.4, 1.0) for a in (0.5, 0.0))
BODIES = {"cifar10": (1000, 2000), "mnist": (2000,), "mnist-100": (200,)}
"""Ratios at which the codec's criterion between bodies is compared with another one."""
BELOW = {
    1.0: "proxies+correction", 0.5: "below-0.5", 0.33: "default", 0.25: "below-0.25", 0.0: "correction",
}  # fmt: skip
"""Explained variance of the correction alone from which there is no search -> method."""
BELOW_AT = (("cifar10", 50), ("cifar10", 200), ("mnist", 50), ("mnist", 200), ("mnist", 500), ("mnist-100", 200))
"""Tasks and ratios at which it is chosen on the tuning seed: those where it decides about some of the messages."""
SPLITS = {"cifar10": (1000,), "mnist": (500,)}
"""Ratios at which proxies and correction share the bytes in other ways, on the tuning seed."""
AUTOMATIC = (
    ("default", AUTO), ("correction", AUTO), ("stc", AUTO), ("proxies+correction", AUTO), ("correction", 1.8),
    ("stc", 1.8), ("proxies", 1.0),
)  # fmt: skip
"""(method, w) that have the automatic step, with a = 0.5."""
STEPS, AHEADS = (1.0, 1.5, 2.0, 3.0, AUTO_STEP), (0.5, 0.0)
"""Steps of the server (`server-lr`) and values of a, which are chosen for each method on the tuning seed."""
STEPPED: dict[str, tuple[int, ...]] = {"cifar10": (1000, 2000, 500), "mnist": (1000, 500, 2000), "mnist-100": (200,)}
"""Ratios of the comparison with the server's step tuned; it is tuned at the first one."""
STEPPED_METHODS = (("fedavg", 1.0), ("proxies+correction", AUTO), ("correction", 1.8), ("stc", 1.8))
"""(method, w)."""
BEST_OF = ("fedavg", "proxies+correction", "correction", "proxies", "stc")
"""Methods whose best settings are shown beside the default."""
CHOSEN_STEP: dict[str, dict[str, tuple[tuple[float, float], ...]]] = {
    "cifar10": {
        "fedavg": ((1.5, 0.0),), "proxies+correction": ((1.5, 0.5),), "correction": ((2.0, 0.5),), "stc": ((2.0, 0.5),),
    },
    "mnist": {
        "fedavg": ((1.0, 0.0),), "proxies+correction": ((2.0, 0.0),), "correction": ((2.0, 0.5),),
        "stc": ((1.5, 0.5), (1.0, 0.0)),
    },
    "mnist-100": {
        "fedavg": ((1.5, 0.0),), "proxies+correction": ((2.0, 0.5),), "correction": ((1.0, 0.5),), "stc": ((1.5, 0.5),),
    },
}  # fmt: skip
"""Constant steps with the a that are run on the seeds that are shown: those that are best on the tuning seed, or were
best in first runs."""
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
    server_lr: float = 1.0

    @property
    def name(self) -> str:
        tail = (
            "" if self.method == "fedavg" else f"-{self.ratio}x-w{factor(self.w)}-a{falling(self.a, self.final_factor)}"
        )
        step = "" if self.server_lr == 1 else f"-step{step_text(self.server_lr)}"
        return f"{self.task}/{self.method}{tail}{step}-seed{self.seed}"

    @property
    def method_settings(self) -> dict[str, Any]:
        """The settings that this method changes."""
        return METHODS[self.method] | {"ratio": float(self.ratio)}

    def settings(self, folder: Path) -> Settings:
        task = TASKS[self.task]
        hub = task["dataset"]
        own: dict[str, Any] = {"schedule": "fedavg"}
        if self.method == "fedavg" and self.server_lr == AUTO_STEP:  # which applies to compressed rounds only
            own = {"schedule": "compressed", "compressor": "none"}
        elif self.method != "fedavg":
            own = self.method_settings | {
                "over_relaxation": self.w, "step_ahead": self.a, "step_ahead_final_factor": self.final_factor,
            }  # fmt: skip
        common = {
            "server_lr": self.server_lr,
            "dataset": find_data(hub.split("/")[1], hub), "seed": self.seed, "workers": 1, "threads": 1,
            "checkpoint": False, "test_images": CURVE_IMAGES, "run_folder": str(folder),
        }  # fmt: skip
        return Settings.of(FEDERATION | task | common | own)


def step_text(server_lr: float) -> str:
    """The server's step."""
    return "auto" if server_lr == AUTO_STEP else f"{server_lr:g}"


def factor(w: float) -> str:
    """Over-relaxation: 0 lets each message choose it."""
    return f"{w:g}" if w else "auto"


def falling(a: float, final_factor: float) -> str:
    """Step-ahead in the first and in the last round, such as 0.5 or 1to0."""
    return f"{a:g}" if not a or final_factor == 1 else f"{a:g}to{a * final_factor:g}"


def all_runs() -> list[Run]:
    """All runs, in the order in which they are made."""
    runs = [
        Run(task, method, ratio, w, 0.5, 1.0, seed, AUTO_STEP)
        for task, ratios in RATIOS.items() for method, w in AUTOMATIC for ratio in ratios for seed in SEEDS
    ]  # fmt: skip
    runs += [Run(task, "fedavg", 0, 1.0, 0.0, 1.0, seed, AUTO_STEP) for task in RATIOS for seed in SEEDS]
    runs += [
        Run(task, method, ratio, AUTO, 0.5, 1.0, TUNING_SEED, AUTO_STEP)
        for task, ratio in BELOW_AT for method in BELOW.values()
    ]  # fmt: skip
    runs += [
        Run(task, method, ratio, AUTO, 0.5, 1.0, TUNING_SEED, AUTO_STEP)
        for task, ratios in SPLITS.items() for ratio in ratios
        for method in ("proxies+correction", *(name for name in METHODS if name.startswith("split-")))
    ]  # fmt: skip
    runs += [
        Run(task, method, ratio, w, a, 1.0, seed, step)
        for task, ratio in ABLATED.items() for seed in SEEDS for method, w, a, step in ABLATION.values()
    ]  # fmt: skip
    runs += [
        Run(task, "by-lag", ratio, AUTO, 0.5, 1.0, seed, AUTO_STEP)
        for task, ratios in BODIES.items() for ratio in ratios for seed in SEEDS
    ]  # fmt: skip
    tuned = [(method, w, a) for method, _ in reversed(COMPARED) if method not in REACHED for w, a in TUNING]
    tuned += [("proxies+correction", AUTO, 0.5), ("proxies+correction", AUTO, 0.0)]
    runs += [
        Run(task, method, ratio, w, a, 1.0, TUNING_SEED) for task, ratio in TUNED.items() for method, w, a in tuned
    ]
    runs += [
        Run(task, method, ratio, w, 0.5, 1.0, seed)
        for task, ratios in RATIOS.items() for method, w in COMPARED for ratio in ratios for seed in SEEDS
        if ratio in REACHED.get(method, ratios)
    ]  # fmt: skip
    runs += [
        Run(task, method, ratio, w, 0.0, 1.0, seed)
        for task, ratios in WITHOUT_AHEAD.items() for ratio in ratios for method, w in STEPPED_METHODS for seed in SEEDS
        if method != "fedavg"
    ]  # fmt: skip
    runs += [
        Run(task, method, 200, w, a, 1.0, seed)
        for task, kinds in VARIANTS.items() for method, w, a in kinds if method != "fedavg" for seed in SEEDS
    ]  # fmt: skip
    runs += [
        Run(task, method, ratios[0], w, a, 1.0, TUNING_SEED, step)
        for task, ratios in STEPPED.items() for a in AHEADS for step in STEPS
        for method, w in STEPPED_METHODS if method != "fedavg"
    ]  # fmt: skip
    runs += [Run(task, "fedavg", 0, 1.0, 0.0, 1.0, TUNING_SEED, step) for task in STEPPED for step in STEPS]
    for task, chosen in CHOSEN_STEP.items():
        for method, w in STEPPED_METHODS:
            ratios = (0,) if method == "fedavg" else STEPPED[task]
            runs += [
                Run(task, method, ratio, w, a, 1.0, seed, step)
                for step, a in chosen[method] for ratio in ratios for seed in SEEDS
            ]  # fmt: skip
    fedavg = [Run(run.task, "fedavg", 0, 1.0, 0.0, 1.0, run.seed) for run in runs]
    return list(dict.fromkeys(fedavg + runs))


def make(run: Run, folder: Path) -> Row:
    """Make one run. Training that diverges, or a ratio out of reach, is a result, too."""
    row: Row = {"run": run.name, **vars(run)}
    shutil.rmtree(folder, ignore_errors=True)
    settings = run.settings(folder)
    try:
        summary = serve_in_process(client_app, settings, Observer())
    except (RunError, SettingError) as error:  # SettingError: the compressor does not reach this ratio
        return row | {"failed": str(error).partition("; the run is in ")[0]}
    rounds = read_rounds(folder / "metrics.jsonl")
    return row | {
        "final_accuracy": _accuracy(settings, folder),
        "accuracy_by_round": [one.accuracy for one in rounds],
        "explained_variance_by_round": [one.explained_variance for one in rounds],
        "with_proxies": sum(one.with_proxies or 0 for one in rounds) / max(1, sum(one.clients for one in rounds)),
        "encode_seconds": sum(one.encode_seconds or 0.0 for one in rounds),
        **{name: summary[name] for name in ("payload_ratio", "uplink_bytes", "seconds", "weights_sha256")},
    }


def _accuracy(settings: Settings, folder: Path) -> float:
    """Accuracy of a finished run's weights on all test images."""
    weights, shape, _ = read_model(folder)
    model = initial_model(settings.model, shape, settings.run.seed)
    load_weights(model, weights)
    return evaluate(model, FederatedData.of(settings.data.replace(test_images=0), settings.run.seed).test()).accuracy


def comparison(rows: list[Row], task: str) -> Table:
    """Final accuracy by method, server's step and ratio, with and without step-ahead."""
    ratios, lines = sorted(RATIOS[task]), []
    for step in (AUTO_STEP, 1.0):
        fedavg = _cell(_of(rows, task, "fedavg", 0, 1.0, 0.0, step=step))
        lines.append(["FedAvg", "", "", step_text(step), *[fedavg] * len(ratios)])
        for method, w in (("default", AUTO), *COMPARED, ("correction", AUTO), ("stc", AUTO)):
            for a in AHEADS:
                found = [_of(rows, task, method, ratio, w, a, step=step) for ratio in ratios]
                if any(len(cell) == len(SEEDS) for cell in found):
                    lines.append([method, factor(w), f"{a:g}", step_text(step), *map(_cell, found)])
    return ["method", "w", "a", "step", *(f"{ratio}x" for ratio in ratios)], lines


def bodies(rows: list[Row]) -> Table:
    """Final accuracy by the criterion between proxies with a correction and the correction alone."""
    lines = []
    for task, ratio in [(task, ratio) for task, ratios in BODIES.items() for ratio in ratios]:
        lag = _of(rows, task, "by-lag", ratio, AUTO, 0.5, step=AUTO_STEP)
        explained = _of(rows, task, "proxies+correction", ratio, AUTO, 0.5, step=AUTO_STEP)
        lines.append([f"{task}, {ratio}x", _cell(explained), _cell(lag)])
    return ["", "explained variance", "lag and overshoot"], lines


def thresholds(rows: list[Row]) -> Table:
    """Final accuracy on the tuning seed by `proxies_below`, and the fraction of the updates that had proxies."""
    lines = []
    for task, ratio in BELOW_AT:
        names = [Run(task, one, ratio, AUTO, 0.5, 1.0, TUNING_SEED, AUTO_STEP).name for one in BELOW.values()]
        found = {row["run"]: row for row in rows if row["run"] in names and "failed" not in row}
        lines.append([f"{task}, {ratio}x", *(_with_proxies(found.get(name)) for name in names)])
    return ["", *(f"{below:g}" for below in BELOW)], lines


def _with_proxies(row: Row | None) -> str:
    """Accuracy of one run, and the fraction of updates with proxies if it is known."""
    if row is None:
        return "not run"
    share = row.get("with_proxies")
    return f"{100 * row['final_accuracy']:.1f}" + ("" if share is None else f" ({share:.2f})")


def splits(rows: list[Row]) -> Table:
    """Final accuracy on the tuning seed by the correction's minimum share of the bytes."""
    shares = {0.1: "split-0.1", 0.4: "proxies+correction", 0.7: "split-0.7", 0.85: "split-0.85"}
    cells = [(task, ratio) for task, ratios in SPLITS.items() for ratio in ratios]
    lines = []
    for share, method in shares.items():
        found = [_of(rows, task, method, ratio, AUTO, 0.5, (TUNING_SEED,), AUTO_STEP) for task, ratio in cells]
        lines.append([f"{share:g}", *(f"{cell[0]:.1f}" if cell else "not run" for cell in found)])
    return ["correction's share", *(f"{task}, {ratio}x" for task, ratio in cells)], lines


def default(rows: list[Row], task: str, ratio: int) -> list[float]:
    """Final accuracies in % of the default, which has no tuned setting."""
    return _of(rows, task, "default", ratio, AUTO, 0.5, step=AUTO_STEP)


def best(rows: list[Row], task: str, method: str, ratio: int) -> tuple[str, list[float]]:
    """Step and a of the highest mean over all seeds, of all that were run, as text; and the final accuracies in %."""
    found, usual = [], dict(COMPARED).get(method, 1.0)
    aheads, factors = ((0.0,), (1.0,)) if method == "fedavg" else (AHEADS, {usual, AUTO})
    for step, a, w in product(STEPS, aheads, factors):
        values = _of(rows, task, method, 0 if method == "fedavg" else ratio, w, a, step=step)
        text = step_text(step) if method == "fedavg" else f"{step_text(step)}, {a:g}"
        if len(values) == len(SEEDS):
            found.append((text if w == usual else f"{text}, w {factor(w)}", values))
    return max(found, key=lambda one: statistics.fmean(one[1]), default=("", []))


def ablation(rows: list[Row]) -> Table:
    """Final accuracy of the default and of the default without its parts."""
    lines = [["FedAvg", *(_cell(_of(rows, task, "fedavg", 0, 1.0, 0.0, step=AUTO_STEP)) for task in ABLATED)]]
    lines += [
        [name, *(_cell(_of(rows, task, method, ratio, w, a, step=step)) for task, ratio in ABLATED.items())]
        for name, (method, w, a, step) in ABLATION.items()
    ]
    return ["", *(f"{task}, {ratio}x" for task, ratio in ABLATED.items())], lines


def tuning(rows: list[Row], task: str) -> Table:
    """Final accuracy on the tuning seed by w and a, one column for each method."""
    methods, ratio = [method for method, _ in COMPARED if method not in REACHED], TUNED[task]
    lines = []
    for w, a in ((AUTO, 0.5), (AUTO, 0.0), *TUNING):
        cells = [_of(rows, task, method, ratio, w, a, (TUNING_SEED,)) for method in methods]
        lines.append([factor(w), f"{a:g}", *(f"{cell[0]:.1f}" if cell else "" for cell in cells)])
    return ["w", "a", *methods], lines


def steps(rows: list[Row]) -> Table:
    """The default, and every method with the server's step and a, in brackets, that are best on these seeds."""
    lines = []
    for task, ratio in [(task, ratio) for task, ratios in RATIOS.items() for ratio in sorted(ratios)]:
        cells = [best(rows, task, method, ratio) for method in BEST_OF]
        texts = [f"{_cell(found)} ({text})" if found else "not run" for text, found in cells]
        lines.append([f"{task}, {ratio}x", _cell(default(rows, task, ratio)), *texts])
    return ["", "default", *BEST_OF], lines


def tuned_steps(rows: list[Row]) -> Table:
    """Final accuracy on the tuning seed by the server's step and a."""
    lines = []
    for task, ratios in STEPPED.items():
        for method, w in STEPPED_METHODS:
            ratio = 0 if method == "fedavg" else ratios[0]
            for a in (0.0,) if method == "fedavg" else AHEADS:
                cells = [_of(rows, task, method, ratio, w, a, (TUNING_SEED,), step) for step in STEPS]
                text = [f"{cell[0]:.1f}" if cell else "" for cell in cells]
                lines.append([f"{task}, {ratios[0]}x", method, "" if method == "fedavg" else f"{a:g}", *text])
    return ["", "method", "a", *(f"step {step_text(step)}" for step in STEPS)], lines


def variants(rows: list[Row], task: str) -> Table:
    """Final accuracy by kind of error feedback."""
    cells = [_of(rows, task, method, 0 if method == "fedavg" else 200, w, a) for method, w, a in VARIANTS[task]]
    return ["method", "w", "a", "200x"], [
        [method, factor(w), f"{a:g}", _cell(found)] for (method, w, a), found in zip(VARIANTS[task], cells, strict=True)
    ]


def _of(
    rows: list[Row], task: str, method: str, ratio: int, w: float, a: float, seeds: tuple[int, ...] = SEEDS,
    step: float = 1.0,
) -> list[float]:  # fmt: skip
    """Final accuracies in %, by seed."""
    names = {Run(task, method, ratio, w, a, 1.0, seed, step).name for seed in seeds}
    found = {row["seed"]: row for row in rows if row["run"] in names and "failed" not in row}
    return [100 * found[seed]["final_accuracy"] for seed in seeds if seed in found]


def _cell(values: list[float]) -> str:
    """Mean and deviation; the number of seeds if some are missing."""
    if not values:
        return "not run"
    return spread(values, 1) + ("" if len(values) == len(SEEDS) else f" ({len(values)} of {len(SEEDS)} seeds)")


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
    draw(rows, list(RATIOS), SEEDS, output.with_suffix(".svg"))
    missing = sum(run.name not in done for run in runs)
    if missing:
        print(f"Partial results: {missing} of {len(runs)} runs were not made.")
    for title, (header, lines) in {
        **{task: comparison(rows, task) for task in RATIOS}, "ablation": ablation(rows),
        **{f"{task}, other kinds": variants(rows, task) for task in VARIANTS},
        "criterion between bodies": bodies(rows), "split of the bytes": splits(rows),
        "explained variance from which no client searches": thresholds(rows), "server's step": steps(rows),
        "server's step on the tuning seed": tuned_steps(rows),
        **{f"{task}, tuning on seed {TUNING_SEED}": tuning(rows, task) for task in TUNED},
    }.items():  # fmt: skip
        print(f"\n## {title}\n")
        print_table(header, lines)


if __name__ == "__main__":
    run_command(main)
