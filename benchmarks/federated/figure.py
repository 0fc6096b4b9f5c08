"""The picture of the README: accuracy against uplink bytes, mean and range over seeds."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLORS = ("#6b7280", "#d97706", "#2563eb")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw rows of results/federated-CASE.json (one run each) as an SVG."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    # A hybrid run is a proxy run until its full rounds, so earlier methods lie on top of later ones.
    figure, axes = plt.subplots(figsize=(7.2, 3.9))
    for place, (method, color) in enumerate(zip(methods, _COLORS, strict=False)):
        runs = [row for row in rows if row["method"] == method]
        uplinks = [list(accumulate(row["uplink_by_round"])) for row in runs]
        bytes_ = [sum(values) / len(values) for values in zip(*uplinks, strict=True)][1:]
        points = list(zip(*(row["accuracies"] for row in runs), strict=True))[1:]
        mean = [100 * sum(values) / len(values) for values in points]
        axes.plot(bytes_, mean, color=color, marker="o", markersize=3, linewidth=1.6, label=method, zorder=9 - place)
        low, high = [100 * min(values) for values in points], [100 * max(values) for values in points]
        axes.fill_between(bytes_, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xscale("log")
    best = 100 * max(accuracy for row in rows for accuracy in row["accuracies"])
    axes.set_ylim(0.6 * best, 1.03 * best)
    axes.set_xlabel("bytes that all clients sent so far, whole messages")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} MB" if value >= 1e6 else f"{value / 1e3:g} kB")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)
