"""Current rivals on the two small tasks of `benchmarks.error_feedback`: NNC, smaller networks, and fewer rounds.

Local training, seeds and error feedback are those of that benchmark, whose figures for the default, the correction
alone and STC stand beside these. Each method has the setting that is better on a seed of its own (`TUNING`). A run's
ratio is FedAvg's float32 bytes over its own payload bytes, of the whole run and of the full network. As there, each row
is written at once, and an interrupted benchmark continues. NNC needs the package `nncodec` (`benchmarks.rivals.nnc`).
"""

import json
import statistics
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.coding.__main__ import open_case
from benchmarks.common import RESULTS, print_table, run_command, spread, versions
from benchmarks.error_feedback.__main__ import (
    AUTO,
    SEEDS,
    TASKS,
    TUNING_SEED,
    Row,
    Run,
    Table,
    comparison,
    factor,
    make,
)
from benchmarks.rivals.__main__ import FEDERATION
from tofu.compression import make_compressor
from tofu.data import ImageShape
from tofu.files import replace_file
from tofu.models import build_model
from tofu.weights import explained_variance, load_weights

SHAPES = {"cifar10": ImageShape(3, 32, 32, 10), "mnist": ImageShape(1, 28, 28, 10)}
METHODS = ("nnc", "narrow", "8-bit", "4-bit", "fedpara")
SHOWN = ("FedAvg", "proxies+correction", "correction", "stc")
"""Methods of `benchmarks.error_feedback` that the tables repeat."""
RATIOS = (1000, 200, 50, 500)
MODELS: dict[tuple[str, str], dict[int, str]] = {
    ("cifar10", "narrow"): {50: "cnn_9", 200: "cnn_4", 500: "cnn_3", 1000: "cnn_2"},
    ("mnist", "narrow"): {50: "lenet5_4", 200: "lenet5_3", 500: "lenet5_2", 1000: "lenet5_1"},
    ("cifar10", "fedpara"): {50: "fedpara_cnn_4"} | dict.fromkeys((200, 500, 1000), "fedpara_cnn_1"),
    ("mnist", "fedpara"): {50: "fedpara_lenet5_2"} | dict.fromkeys((200, 500, 1000), "fedpara_lenet5_1"),
}
"""(task, method) -> ratio -> model. QSGD sends their updates, in 8 bits a parameter or as few as the ratio asks for."""
BITS = {"8-bit": 8, "4-bit": 4}
"""Method -> bits of a parameter of FedAvg with fewer rounds."""
FEWER_ROUNDS = (1, 2)
"""Their numbers of rounds. Each has as many local epochs as make a run as long as the others."""
CODERS = {
    "nnc": "benchmarks.rivals.nnc:Nnc", "nnc-dependent": "benchmarks.rivals.nnc:DependentNnc", "correction": "sparse",
    "stc": "stc",
}  # fmt: skip
"""Compressors of the comparison on single updates."""
TUNED_RATIO = 200
"""Of the tuning runs."""
GAINS = (1.8, AUTO, 1.0)
"""w of NNC in the tuning runs."""
LR_FACTORS = (1.0, 2.0, 4.0)
"""Step sizes of smaller networks in the tuning runs, over that of the task."""


@dataclass(frozen=True)
class Rival(Run):
    """One run.

    Attributes:
        lr_factor: step size over that of the task.
    """

    lr_factor: float = 1.0

    @property
    def name(self) -> str:
        step = f"-lr{self.lr_factor:g}" if self.lr_factor != 1 else ""
        return f"{self.task}/{self.method}-{self.ratio}x-w{factor(self.w)}-a{self.a:g}{step}-seed{self.seed}"

    @property
    def model(self) -> str:
        """The name of the network that is trained."""
        found = MODELS.get((self.task, self.method), {}).get(self.ratio)
        return f"benchmarks.rivals.reduced:{found}" if found else TASKS[self.task]["model"]

    @property
    def bits(self) -> int:
        """Bits of a parameter where rounds are left out, else 0."""
        return BITS.get(self.method, 0)

    @property
    def rounds(self) -> int:
        rounds: int = TASKS[self.task]["rounds"]
        return round(32 * rounds / (self.bits * self.ratio)) if self.bits else rounds

    @property
    def smaller(self) -> float:
        """Parameters of the network that is trained over those of the task's."""
        return parameters(self.task, self.model) / parameters(self.task, TASKS[self.task]["model"])

    @property
    def method_settings(self) -> dict[str, Any]:
        ratio = 32 / self.bits if self.bits else self.ratio * self.smaller
        return {
            "compressor": CODERS.get(self.method, "qsgd"), "ratio": ratio,
            "model": self.model, "rounds": self.rounds, "lr": self.lr_factor * TASKS[self.task]["lr"],
            "local_epochs": TASKS[self.task]["rounds"] // self.rounds,
        }  # fmt: skip


@cache
def parameters(task: str, model: str) -> int:
    return sum(parameter.numel() for parameter in build_model(model, SHAPES[task]).parameters())


CHOSEN: dict[tuple[str, str], dict[str, Any]] = {}
"""(task, method) -> what was better on the tuning seed, where that is not the task's setting with w = auto."""


def ratios(task: str, method: str) -> list[int]:
    """The ratios at which a method is run."""
    if method not in BITS:
        return list(RATIOS)
    return [round(32 * TASKS[task]["rounds"] / (BITS[method] * rounds)) for rounds in FEWER_ROUNDS]


def run_of(task: str, method: str, ratio: int, seed: int, **changes: Any) -> Rival:
    own: dict[str, Any] = {"w": AUTO, "a": 0.5} | CHOSEN.get((task, method), {}) | changes
    return Rival(task, method, ratio, final_factor=1.0, seed=seed, **own)


def all_runs() -> list[Rival]:
    """All runs, in the order in which they are made: those that choose, then those that count."""
    runs = []
    for task in SHAPES:
        runs += [run_of(task, "nnc", TUNED_RATIO, TUNING_SEED, w=w) for w in GAINS]
        runs += [
            run_of(task, method, TUNED_RATIO, TUNING_SEED, lr_factor=lr)
            for method in ("narrow", "fedpara") for lr in LR_FACTORS
        ]  # fmt: skip
    for method in METHODS:
        for task in SHAPES:
            runs += [run_of(task, method, ratio, seed) for ratio in ratios(task, method) for seed in SEEDS]
    return list(dict.fromkeys(runs))


def made(run: Rival, folder: Path) -> Row:
    """Make one run; `reached` is FedAvg's payload bytes over this run's."""
    row = make(run, folder) | {"model": run.model, "rounds": run.rounds}
    if "failed" not in row:
        row["reached"] = row["payload_ratio"] / run.smaller * TASKS[run.task]["rounds"] / run.rounds
    return row


def table(rows: list[Row], known: list[Row], task: str) -> Table:
    """Final accuracy by method and ratio, and the ratios that were reached.

    Args:
        rows: of this benchmark.
        known: of `benchmarks.error_feedback`; the first lines are from there.
    """
    header, lines = comparison(known, task)
    columns = [header.index(f"{ratio}x") for ratio in sorted(RATIOS)]
    w, ahead, step = header.index("w"), header.index("a"), header.index("step")
    known_lines = [line for line in lines if line[0] in SHOWN and line[ahead] in ("", "0.5") and line[step] == "1"]
    made = [[line[0], line[w], *(line[column] for column in columns), ""] for line in known_lines]
    for method in METHODS:
        if method not in BITS and (found := [_of(rows, task, method, ratio) for ratio in sorted(RATIOS)]) != [[]] * 4:
            reached = (f"{statistics.fmean(row['reached'] for row in mine):,.0f}x" for mine in found if mine)
            made.append(
                [method, factor(run_of(task, method, RATIOS[0], SEEDS[0]).w), *map(_cell, found), ", ".join(reached)]
            )
    return ["method", "w", *(f"{ratio:,}x" for ratio in sorted(RATIOS)), "reached"], made


def fewer_rounds(rows: list[Row]) -> Table:
    """Final accuracy of FedAvg with fewer rounds of few bits."""
    lines = []
    for task in SHAPES:
        for method in BITS:
            for ratio in ratios(task, method):
                if mine := _of(rows, task, method, ratio):
                    reached = statistics.fmean(row["reached"] for row in mine)
                    lines.append([task, method, str(mine[0]["rounds"]), f"{reached:.0f}x", _cell(mine)])
    return ["task", "updates", "rounds", "ratio", "accuracy"], lines


def explained(recordings: Path) -> list[Row]:
    """Explained variance of the updates, residuals included, that `benchmarks.coding` recorded, at their ratio."""
    rows = []
    for file in sorted(recordings.glob("coding-*.pt")):
        _, task, ratio, seed = file.stem.split("-")
        _, network = open_case(task, int(ratio), int(seed))
        for round_, moment in torch.load(file).items():
            load_weights(network.model, moment["base"])
            for client, target in enumerate(moment["targets"]):
                row: Row = {"task": task, "ratio": int(ratio), "seed": int(seed), "round": round_, "client": client}
                for name, compressor in CODERS.items():
                    codec = make_compressor(compressor, network, ratio=float(ratio))
                    made = codec.compress(network, target, generator=torch.Generator().manual_seed(0))
                    row |= {name: explained_variance(target, made.decoded), f"{name} bytes": len(made.body)}
                rows.append(row)
    return rows


def updates(rows: list[Row]) -> Table:
    """Mean explained variance of single updates."""
    lines = []
    for key in sorted({(row["task"], row["ratio"], row["round"]) for row in rows}):
        mine = [row for row in rows if (row["task"], row["ratio"], row["round"]) == key]
        values = {name: statistics.fmean(row[name] for row in mine) for name in CODERS}
        more = f"{values['nnc'] / values['correction']:.2f}"
        lines.append([key[0], f"{key[1]:,}x", str(key[2]), *(f"{value:.3f}" for value in values.values()), more])
    return ["task", "ratio", "round", *CODERS, "nnc / correction"], lines


def _of(rows: list[Row], task: str, method: str, ratio: int) -> list[Row]:
    names = [run_of(task, method, ratio, seed).name for seed in SEEDS]
    return [row for row in rows if row["run"] in names and "failed" not in row]


def _cell(rows: list[Row]) -> str:
    if not rows:
        return "not run"
    accuracy = spread([100 * row["final_accuracy"] for row in rows], 1)
    return accuracy if len(rows) == len(SEEDS) else f"{accuracy} ({len(rows)} of {len(SEEDS)} seeds)"


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="only runs with such names, as 'mnist/nnc-*'; may be repeated, in order")
    ] = None,
    names: Annotated[bool, typer.Option("--list", help="print the names of the runs that are left, and stop")] = False,
    table_only: Annotated[bool, typer.Option("--table", help="print the results so far, and stop")] = False,
    folder: Annotated[Path, typer.Option("--runs", help="folder for the runs")] = Path("runs/benchmark-current-rivals"),
    recordings: Annotated[
        Path | None, typer.Option(help="folder of recordings of benchmarks.coding: encode these updates, and stop")
    ] = None,
    output: Annotated[Path, typer.Option(help="results")] = RESULTS / "current-rivals.json",
) -> None:
    """NNC, narrower networks, FedPara, and fewer rounds of 8 and 4 bits: accuracy over seeds, by ratio."""
    kept = json.loads(output.read_text()) if output.is_file() else {}
    rows: list[Row] = kept.get("rows", [])
    encoded: list[Row] = explained(recordings) if recordings else kept.get("updates", [])
    done = {row["run"] for row in rows}
    runs = all_runs()
    left = [run for pattern in only or ["*"] for run in runs if fnmatch(run.name, pattern) and run.name not in done]
    if names:
        print("\n".join(run.name for run in dict.fromkeys(left)))
        return

    def write() -> None:
        missing = sum(run.name not in done for run in runs)
        document = versions("python -m benchmarks.current_rivals") | {
            "complete": not missing, "runs_left": missing,
            "settings": {task: FEDERATION | TASKS[task] for task in SHAPES}, "rows": rows, "updates": encoded,
        }  # fmt: skip
        replace_file(output, (json.dumps(document, indent=1) + "\n").encode())

    if recordings:
        write()
    for number, run in enumerate([] if table_only or recordings else dict.fromkeys(left), start=1):
        rows.append(made(run, folder / run.name))
        done.add(run.name)
        result = rows[-1].get("final_accuracy", rows[-1].get("failed"))
        print(f"{number} of {len(left)}: {run.name}: {result}", file=sys.stderr, flush=True)
        write()
    known = json.loads((RESULTS / "error-feedback.json").read_text())["rows"]
    for made_table in (*(table(rows, known, task) for task in SHAPES), fewer_rounds(rows), updates(encoded)):
        print_table(*made_table)
        print()


if __name__ == "__main__":
    run_command(main)
