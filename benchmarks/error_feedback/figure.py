"""The picture of the ablation: final accuracy against the payload ratio, from results/error-feedback.json alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TITLES = {
    "cifar10": "CIFAR-10, five clients, 10 rounds",
    "mnist": "MNIST, ten clients, 15 rounds",
    "mnist-100": "MNIST, 10 of 100 clients per round",
}
LINES = (
    ("default", 0.0, "proxies and correction (default)", "#0b6e99", "o"),
    ("correction", 1.8, "correction alone", "#c05621", "s"),
    ("stc", 1.8, "STC", "#5f6b3c", "^"),
    ("topk", 1.8, "top-k, server's step of 1", "#7a5195", "v"),
    ("powersgd", 1.8, "PowerSGD, server's step of 1", "#8a8a8a", "D"),
)
"""(method, w, name, color, marker); w = 0 is the default, the others have the best step, a and w that were run."""

LOWEST = 50
"""Ratios below are in the table only."""
DEEPEST = 18
"""Points below FedAvg where an axis ends; what is lower has no mark."""

Row = dict[str, Any]


def draw(rows: Sequence[Row], tasks: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Write an SVG with one panel for each task that has results at two or more ratios."""
    found = [
        row for row in rows
        if "failed" not in row and row["seed"] in seeds and not 0 < row["ratio"] < LOWEST
    ]  # fmt: skip
    shown = [task for task in tasks if len({row["ratio"] for row in found if row["task"] == task} - {0}) > 1]
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "tofu", "svg.fonttype": "none", "font.size": 9}
    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 3.6), squeeze=False, layout="constrained")
    for task, axis in zip(shown, axes[0], strict=True):
        _panel(axis, task, [row for row in found if row["task"] == task], len(seeds))
    axes[0][0].set_ylabel("final test accuracy, %")
    axes[0][0].legend(frameon=False, loc="lower left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _panel(axis: Axes, task: str, rows: Sequence[Row], seeds: int) -> None:
    """Means over all seeds with their standard deviation; a ratio that lacks a seed has none."""
    fedavg = _best([row for row in rows if row["method"] == "fedavg"], seeds)
    mean, deviation = statistics.fmean(fedavg), statistics.stdev(fedavg)
    axis.axhline(mean, color="black", linewidth=1, label="FedAvg")
    axis.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.08, linewidth=0)
    bottom = mean
    for offset, (method, w, name, color, marker) in enumerate(LINES):
        mine = [row for row in rows if row["method"] == method and row["w"] in (w, 0.0) and row["final_factor"] == 1]
        points = []
        for ratio in sorted({row["ratio"] for row in mine}):
            values = _best([row for row in mine if row["ratio"] == ratio and (w or _is_default(row))], seeds)
            if values and statistics.fmean(values) > mean - DEEPEST:
                points.append((ratio * 1.03 ** (offset - 2), statistics.fmean(values), statistics.stdev(values)))
        if points:
            x, y, spread = zip(*points, strict=True)
            axis.errorbar(x, y, spread, color=color, marker=marker, markersize=4, linewidth=1.2, capsize=2, label=name)
            bottom = min([bottom, *y])
    axis.set(title=TITLES[task], xscale="log", xlabel="payload ratio", ylim=(bottom - 3, mean + 2))
    ticks = sorted({row["ratio"] for row in rows} - {0})
    axis.set_xticks(ticks, [f"{ratio}x" for ratio in ticks])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)


def _is_default(row: Row) -> bool:
    return bool(row["a"] == 0.5 and row.get("server_lr") == 0)


def _best(rows: Sequence[Row], seeds: int) -> list[float]:
    """Accuracies in % of the step, a and w with the highest mean over all seeds; empty if all lack a seed."""
    cells: dict[tuple[float, ...], list[float]] = {}
    for row in rows:
        cells.setdefault((row.get("server_lr", 1.0), row["a"], row["w"]), []).append(100 * row["final_accuracy"])
    return max((cell for cell in cells.values() if len(cell) == seeds), key=statistics.fmean, default=[])
