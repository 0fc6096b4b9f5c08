"""The pages as a browser shows them: no errors, figures with data, readable at phone width and in dark mode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attacks.report import write_report as write_attack_report
from tests.tofu.reporting.pages import SIZES, opened, problems
from tests.tofu.reporting.test_compare import ENDS, comparison, results
from tests.tofu.reporting.test_report import line, write_lines
from tofu.reporting.compare.plan import Comparison
from tofu.reporting.panels import write_panels
from tofu.reporting.report import write_report
from tofu.reporting.report.compare import render_page
from tofu.rounds.panel import Chart, ImageFigure, Panel, Series, TableFigure
from tofu.settings import Settings

NOISE = np.random.default_rng(0)
LONG = "a/rather/long/name/of/a/client/that/has/no/spaces/at/all/and/goes/on/and/on"
PANEL = Panel(
    "A plugin",
    "Of everything that a panel can have one.",
    (
        Chart(
            "Bars", (Series("first", (1.0, 2.5), labels=("conv1.weight", LONG)), Series("second", (0.5, 3.0))), "bars"
        ),
        Chart(
            "Lines", (Series("one", (1.0, 3.0, 2.0)), Series("two", (0.0, 1.0, 4.0))), x_label="round", y_label="rank"
        ),
        Chart("Samples", (Series("values", tuple(NOISE.normal(size=60))),), kind="histogram"),
        TableFigure("Table", ("layer", "rank"), (("conv1", 4), (LONG, 9))),
        ImageFigure("Images", (((0.0, 0.5), (0.5, 1.0)),)),
    ),
)


def run_report(folder: Path) -> Path:
    """Of a run that has everything that a page can show."""
    settings = {"model": "mlp", "compressor": "proxy", "rounds": 6, "clients": 4, "noise_multiplier": 1.0}
    (folder / "config.json").write_text(json.dumps(Settings.of({**settings, "max_epsilon": 30.0}).to_config()))
    secure = {"clipped": 0, "largest_clipped": 1.0, "abandoned": ""}
    clients = [
        {"client": name, "explained_variance": 0.7, "train_seconds": 1.5, "encode_seconds": 2.0} for name in ("0", LONG)
    ]
    tasks = {"task": 0, "task_accuracies": [0.1 * task for task in range(10)]}
    rows = [line(0, "start", 0.1, **tasks)]
    rows += [
        line(
            number,
            "compressed",
            0.5 + number / 20,
            epsilon=number + 0.5,
            by_client=clients,
            plugins={"ood/" + LONG: number},
        )
        | tasks
        | {"task": number - 1}
        for number in (1, 2, 3)
    ]
    rows.append(line(4, "fedavg", 0.8, epsilon=5.0, failures=[{"client": LONG, "reason": "no answer " * 20}]))
    rows.append(line(5, "secure", 0.82, epsilon=6.0, **secure))
    rows.append(line(6, "secure", 0.82, epsilon=6.0, **secure | {"abandoned": "too few clients", "clipped": None}))
    write_lines(folder / "metrics.jsonl", rows)
    images = {"real": NOISE.integers(0, 256, (16, 1, 8, 8)).astype(np.uint8)}
    np.savez(folder / "samples.npz", proxies_1=NOISE.normal(size=(6, 1, 7, 7)).astype(np.float32), **images)
    write_panels(folder, {"own": PANEL})
    return write_report(folder)


def compare_report(folder: Path) -> Path:
    names = ("proxy", "rival", "package.of.mine.module:Compressor")
    made = results(comparison(*names), ENDS | {(names[2], 20.0): (0.85, 0.84, 0.86)})
    (folder / "compare.html").write_text(render_page(made, "mine"))
    return folder / "compare.html"


def attack_report(folder: Path) -> Path:
    scenario = {
        "dataset": "digits", "model": "mlp", "norm": "group", "lr": 0.1, "pretrain_rounds": 0, "batch_size": 2,
        "steps": 1, "rounds": 1, "know_labels": False, "seed": 0, "attack": "dlg", "ssim": 0.9, "mse": 0.1,
        "lpips": None, "recovered": 1.0, "labels": 1.0, "payload_bytes": 133_310, "images": "images.npz",
    }  # fmt: skip
    shown = NOISE.uniform(-1, 1, (8, 1, 8, 8)).astype(np.float32)
    np.savez(folder / "images.npz", originals=shown, reconstructions=-shown)
    rows = [
        scenario | {"message": "exact", "psnr": 53.5, "refused": ""},
        scenario | {"message": "proxy:smooth:20", "psnr": 6.8, "refused": ""},
        scenario | {"message": "proxy:smooth:20", "attack": "analytic", "psnr": None, "refused": f"needs {LONG}"},
    ]
    return write_attack_report(rows, folder)


FIRST = {"rounds": ("accuracy", "uplink"), "clients": ("explained variance",), "cells": ("test accuracy, %",)}
"""Table -> columns that a phone shows before anything is scrolled."""

_HIDDEN = """
columns => [...document.querySelectorAll('table')].flatMap(table =>
  (columns[table.id] || []).filter(name => {
    const cell = [...table.querySelectorAll('thead th')].find(one => one.textContent.trim() === name);
    return !cell || cell.getBoundingClientRect().right > table.closest('.scroll').getBoundingClientRect().right + 1;
  }))
"""


_BROKEN = (
    "() => [...document.querySelectorAll('.kind:not(.hollow)')].filter(one => one.getClientRects().length > 1).length"
)
"""Kinds of rounds that take more than one line."""


_HALF_EMPTY = """
() => [...document.querySelectorAll('.grid2')].filter(grid => grid.lastElementChild &&
  grid.lastElementChild.getBoundingClientRect().right < grid.getBoundingClientRect().right - 1).length
"""
"""Grids of figures whose last row has a figure in one half and nothing in the other."""


@pytest.mark.parametrize("write", [run_report, compare_report, attack_report])
def test_a_page_is_readable_everywhere(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    monkeypatch.setattr(Comparison, "_settings", lambda self, name, ratio, seed, value: Settings.of({"seed": seed}))
    with opened(browser, write(tmp_path).as_uri()) as (page, errors):
        assert problems(page) == []
        page.set_viewport_size({"width": 1280, "height": 900})
        assert page.evaluate(_HALF_EMPTY) == 0
        page.set_viewport_size({"width": SIZES["phone"][0], "height": SIZES["phone"][1]})
        assert page.evaluate(_HIDDEN, FIRST) == []
        assert page.evaluate(_BROKEN) == 0
        assert errors == []
