"""What the report says of secure rounds, differential privacy, tasks and plugins: the files' numbers, and no more."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.app import app as client_app
from server.app import serve_in_process
from tests.tofu.reporting.test_report import HOSTILE, ROWS, finish, line, page_of, write_lines
from tofu.errors import RunError
from tofu.reporting.report import write_report
from tofu.reporting.report.chart import BOTTOM, TOP
from tofu.reporting.report.figures import epsilon_by_round
from tofu.reporting.report.plugin_metrics import MAX, Metric, metrics_of, sparkline
from tofu.reporting.report.run_data import RunData, read_run
from tofu.reporting.report.task_matrix import task_matrix
from tofu.reporting.report.template import COLORS
from tofu.settings import Settings

CONFIG = {"dataset": "digits", "rounds": 4, "compressor": "proxy"}
PRIVATE = {"noise-multiplier": 1.0, "privacy-delta": 1e-5, "max-epsilon": 13.0}
SECURE = {"clipped": 0, "largest_clipped": 1.0, "abandoned": ""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    return run


def written(folder: Path, rows: list[dict[str, Any]], **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    write_lines(folder / "metrics.jsonl", rows)
    return folder


def read(folder: Path, rows: list[dict[str, Any]], **config: Any) -> RunData:
    return read_run(written(folder, rows, **config))


def elements(svg: str | None, css: str) -> list[dict[str, str]]:
    """The attributes of a figure's elements of a class, each with its `text` and its `tip`."""
    assert svg is not None
    found = [node for node in ET.fromstring(svg).iter() if css in node.get("class", "").split()]
    return [{**node.attrib, "text": node.text or "", "tip": node.findtext("title", "")} for node in found]


def column(page: Any, name: str) -> list[str]:
    head, *rows = page.tables["rounds"]
    return [row[head.index(name)] for row in rows]


# Secure rounds


def secure_rows() -> list[dict[str, Any]]:
    late = [{"client": "3", "reason": "no answer at stage reveal within 120 s"}]
    return [
        ROWS[0],
        line(1, "compressed", 0.81),
        line(2, "secure", 0.90, **SECURE | {"clipped": 1234, "largest_clipped": 2.5}),
        line(3, "secure", 0.90, clients=0, failures=late, clipped=None, abandoned=f"too few {HOSTILE}"),
        line(4, "secure", 0.92, **SECURE | {"clipped": 6, "largest_clipped": 1.75}),
    ]


def test_abandoned_round_is_plain_in_table_figure_and_section(folder: Path) -> None:
    page = page_of(written(folder, secure_rows()))
    assert column(page, "kind") == ["start", "compressed", "secure", "secure, abandoned", "secure", ""]
    assert page.tables["abandoned"][1:] == [["3", f"too few {HOSTILE}"]]
    assert page.named("script") == []
    assert "abandoned rounds 1" in page.text
    assert "One secure round was abandoned: the server learned no sum" in page.text
    assert "The round went on with the others, unless it was abandoned. A client of a secure round" in page.text
    hollow = [given["class"] for _, given in page.tags if "hollow" in given.get("class", "").split()]
    assert hollow == ["mark k-secure hollow"] * 2 + ["kind t-secure hollow"]
    assert "round 3, secure, abandoned: 90.00%" in page.text


def test_clipped_values_are_counted_with_their_distance(folder: Path) -> None:
    page = page_of(written(folder, secure_rows()))
    none = "\N{EN DASH}"
    cells = [none, none, "1,234 (2.5x)", none, "6 (1.75x)", "1,240"]
    assert column(page, "values clipped (largest / range)") == cells
    assert "1,240 values of all clients were clipped in 2 rounds, the largest at most 2.5 times" in page.text
    assert "its range (round 2)." in page.text


def test_says_what_the_server_learned_and_what_is_not_covered(folder: Path) -> None:
    rows = [*secure_rows(), line(5, "fedavg", 0.93)]
    given = {"secagg-collusion-fraction": 0.1, "secure-identities": ""}
    text = page_of(written(folder, rows, **given)).text
    assert "In 2 secure rounds the server learned the weighted sum of the clients' updates and which clients" in text
    assert "not a single client's update" in text
    assert "at most 10% of the clients colluding with the server and a server that follows the protocol" in text
    assert "does not cover the one compressed round: proxies of different clients do not add up" in text
    assert "Nor does it cover the one FedAvg round" in text
    text = page_of(written(folder, rows, **given | {"secure-identities": "keys.json", "compressor": "topk"})).text
    assert "follows the protocol" not in text
    assert "does not cover the one topk round: the server decoded each client's update" in text


OPEN_ROUNDS = [ROWS[0], line(1, "compressed", 0.81), line(2, "compressed", 0.85)]
SUMS = [ROWS[0], *(line(number, "secure", 0.9, **SECURE) for number in (1, 2))]


@pytest.mark.parametrize(
    ("rows", "config", "saw", "bound", "model"),
    [
        (
            OPEN_ROUNDS,
            {},
            "The update of each client in 2 open rounds",
            "Nothing in the 2 open rounds",
            "Nothing. A model",
        ),
        (
            SUMS,
            {},
            "Only the sum of the updates in 2 secure rounds",
            "Nothing bounds what the sums",
            "Nothing. A model",
        ),
        (
            SUMS,
            PRIVATE,
            "Only the sum of the updates",
            "no single update. Differential privacy",
            "epsilon 4.5 at delta",
        ),
        (OPEN_ROUNDS, PRIVATE, "The update of each client", "epsilon 4.5 at delta 1e-05", "epsilon 4.5 at delta 1e-05"),
        (
            [*SUMS, line(3, "fedavg", 0.9), line(4, "secure", 0.9, **SECURE | {"abandoned": "too few"})],
            {},
            "The update of each client in one open round and only the sum of the updates in 2 secure rounds",
            "Secure aggregation: no single update. Nothing in the one open round",
            "Nothing. A model",
        ),
    ],
)
def test_the_privacy_box_says_what_bounds_what_was_seen(
    folder: Path, rows: list[dict[str, Any]], config: dict[str, Any], saw: str, bound: str, model: str
) -> None:
    if config:
        rows = [row | {"epsilon": 2.25 * row["round"]} for row in rows]
    _, server, clients, receiver, reader = page_of(written(folder, rows, **config)).tables["privacy"]
    assert server[1].startswith(saw)
    assert bound in server[2]
    assert model in clients[2]
    assert clients[2] == receiver[2]
    assert reader[1] == "Accuracies, losses and bytes"


def test_the_privacy_box_counts_the_images_on_the_page(folder: Path) -> None:
    np.savez(folder / "samples.npz", real=np.zeros((3, 1, 4, 4), np.uint8), proxies_1=np.ones((1, 1, 4, 4), np.float32))
    (*_, reader) = page_of(written(folder, ROWS)).tables["privacy"]
    assert reader[1].endswith("3 images of one client (report-images); decoded proxies of one client")


def test_the_table_of_clients_has_the_bytes_of_secure_rounds(folder: Path) -> None:
    sizes = [("0", "uplink", 1000), ("0", "downlink", 5000), ("1", "uplink", 2000), ("0", "uplink", 500)]
    write_lines(
        written(folder, SUMS) / "ledger.jsonl",
        [{"round": 1, "kind": "secure", "direction": way, "client": name, "bytes": size} for name, way, size in sizes],
    )
    head, first, second = page_of(folder).tables["clients"]
    assert (*head[:2], head[-1]) == ("client", "uplink", "downlink")
    assert (*first[:2], first[-1]) == ("0", "1.5 kB", "5.0 kB")
    assert (*second[:2], second[-1]) == ("1", "2.0 kB", "0 B")


def test_run_of_abandoned_rounds_claims_no_sum(folder: Path) -> None:
    page = page_of(written(folder, [ROWS[0], line(1, "secure", 0.1, clients=0, abandoned="nobody came")]))
    assert "the server learned the weighted sum" not in page.text
    assert page.tables["abandoned"][1:] == [["1", "nobody came"]]


# Differential privacy


def private_rows() -> list[dict[str, Any]]:
    spent = [4.377, 6.573, 8.385]
    rows = [line(n, "secure", 0.2, epsilon=value, **SECURE) for n, value in enumerate(spent, start=1)]
    return [ROWS[0], *rows]


def test_epsilon_is_a_column_a_fact_and_a_figure(folder: Path) -> None:
    written(folder, private_rows(), **PRIVATE)
    finish(folder, epsilon=8.385, delta=1e-5, stopped=f"the privacy budget allows no round 4 {HOSTILE}")
    page = page_of(folder)
    assert column(page, "epsilon") == ["\N{EN DASH}", "4.377", "6.573", "8.385", "8.385"]
    assert "client-level (epsilon, delta) (8.385, 1e-05)" in page.text
    assert "(epsilon, delta)-differential privacy at the level of clients" in page.text
    assert "stopped early: 3 of 4 rounds" in page.text
    assert f"Stopped early: the privacy budget allows no round 4 {HOSTILE}." in page.text
    assert page.named("script") == []
    # Clients say nothing of what they clipped: zeros would be no measurement.
    assert "values clipped (largest / range)" not in page.tables["rounds"][0]
    assert "clients do not report what they clipped" in page.text
    assert not re.search(r"\bprivate\b", page.text)


def test_epsilon_figure_places_rounds_and_budget_on_one_scale(folder: Path) -> None:
    run = read(folder, private_rows(), **PRIVATE)
    svg = epsilon_by_round(run)
    _key, budget = elements(svg, "c-baseline")
    points = [tuple(map(float, point.split(","))) for point in elements(svg, "c-run")[0]["points"].split()]
    assert budget["y1"] == budget["y2"]
    unit = (BOTTOM - float(budget["y1"])) / 13
    assert [(BOTTOM - y) / unit for _, y in points] == pytest.approx([4.377, 6.573, 8.385], abs=0.01)
    steps = {round(b - a, 1) for (a, _), (b, _) in itertools.pairwise(points)}
    assert len(steps) == 1
    assert TOP <= float(budget["y1"]) < min(y for _, y in points)
    assert [mark["tip"] for mark in elements(svg, "k-secure") if mark["tip"]][-1] == "round 3, secure: epsilon 8.385"
    assert not elements(epsilon_by_round(read(folder, private_rows(), **PRIVATE | {"max-epsilon": 0.0})), "c-baseline")


def test_epsilon_beyond_any_bound_is_never_a_smaller_one(folder: Path) -> None:
    rows = [*private_rows(), line(4, "secure", 0.2, epsilon=None, **SECURE)]
    page = page_of(written(folder, rows, **PRIVATE))
    assert column(page, "epsilon")[-2:] == ["beyond any bound"] * 2
    assert "(beyond any bound, 1e-05)" in page.text
    finish(folder, epsilon=math.inf, delta=1e-5)
    assert "(beyond any bound, 1e-05)" in page_of(folder).text
    (folder / "summary.json").unlink()
    assert "(0, 1e-05)" in page_of(written(folder, [ROWS[0]], **PRIVATE)).text


# Tasks

MATRIX = [[0.8357, 0.1448, 0.1699], [0.8774, 0.8273, 0.0919], [0.8997, 0.9192, None]]


def task_rows(matrix: list[list[float | None]], each: int = 2) -> list[dict[str, Any]]:
    rows = [ROWS[0]]
    for task, after in enumerate(matrix):
        for step in range(each):
            # Before a task's last round the accuracies are others, which the matrix must not show.
            found = after if step == each - 1 else [0.5] * len(after)
            rows.append(line(1 + task * each + step, "fedavg", 0.5, task=task, task_accuracies=found))
    return rows


def test_matrix_holds_the_accuracies_after_each_task(folder: Path) -> None:
    run = read(folder, task_rows(MATRIX), rounds=6, **{"task-count": 3})
    svg = task_matrix(run)
    shown = [f"{100 * share:.1f}" for row in MATRIX for share in row if share is not None]
    assert [number["text"] for number in elements(svg, "number")] == shown
    cells = [cell for cell in elements(svg, "cell") if cell["tip"]]
    assert [cell["tip"] for cell in cells][:2] == [
        "after task 0 (round 2), on task 0: 83.57%",
        "after task 0 (round 2), on task 1: 14.48%",
    ]
    # One hue, the darker the more accurate, whatever the order of the cells.
    shares = [share for row in MATRIX for share in row if share is not None]
    by_share = sorted(zip(shares, (float(cell["fill-opacity"]) for cell in cells), strict=True))
    assert [opacity for _, opacity in by_share] == sorted(opacity for _, opacity in by_share)
    assert len({cell["x"] for cell in cells}) == len({cell["y"] for cell in cells}) == 3
    # On the diagonal, less its last cell, which was not measured.
    assert [(b["x"], b["y"]) for b in elements(svg, "learnt")] == [(cells[n]["x"], cells[n]["y"]) for n in (0, 4)]


def test_acc_and_bwt_are_facts(folder: Path) -> None:
    written(folder, task_rows(MATRIX), rounds=6, **{"task-count": 3})
    finish(folder, mean_accuracy=86.6295, backward_transfer=-7.7994)
    page = page_of(folder)
    assert "mean accuracy (ACC) 86.6%" in page.text
    assert "backward transfer (BWT) -7.8 points" in page.text
    assert column(page, "task") == ["\N{EN DASH}", "0", "0", "1", "1", "2", "2", ""]


def test_caption_tells_an_unfinished_task_and_orders_of_their_own(folder: Path) -> None:
    rows = task_rows(MATRIX)
    assert "not been trained to its end" not in page_of(written(folder, rows, rounds=6, **{"task-count": 3})).text
    page = page_of(written(folder, rows[:-1], rounds=6, **{"task-count": 3}))
    assert "Task 2 has not been trained to its end." in page.text
    run = read(folder, rows, rounds=6, **{"task-count": 3, "task-order": "own"})
    assert elements(task_matrix(run), "learnt") == []
    assert "in its own order" in page_of(folder).text


def test_many_tasks_are_thinned(folder: Path) -> None:
    matrix: list[list[float | None]] = [[(i + j) / 200 for j in range(100)] for i in range(100)]
    page = page_of(written(folder, task_rows(matrix, each=1), rounds=100, **{"task-count": 100}))
    assert "Of 100 tasks, 20 are drawn." in page.text
    cells = [cell for cell in elements(task_matrix(read_run(folder)), "cell") if cell["tip"]]
    assert len(cells) == 400
    assert cells[-1]["tip"] == "after task 99 (round 100), on task 99: 99.00%"


def colors() -> list[dict[str, str]]:
    """The page's colors in light mode, dark mode and print."""
    light, dark, printed = (
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", block))
        for block in re.findall(r":root \{(.*?)\}", COLORS, re.DOTALL)
    )
    return [light, dark, light | printed]


def rgb(color: str) -> list[float]:
    digits = color.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    return [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]


def luminance(color: list[float]) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", range(3), ids=["light", "dark", "print"])
def test_numbers_are_legible_on_every_cell(folder: Path, mode: int) -> None:
    """WCAG 2.1, 1.4.3: at least 4.5 to 1. The steps are told apart by luminance alone, so hue does not matter."""
    matrix: list[list[float | None]] = [[0.0, 0.25], [0.5, 1.0]]
    cells = elements(task_matrix(read(folder, task_rows(matrix, each=1))), "cell")
    opacities = sorted({float(cell["fill-opacity"]) for cell in cells})
    given = colors()[mode]
    hue, card, ink = rgb(given["run"]), rgb(given["card"]), luminance(rgb(given["ink"]))
    shades = [luminance([a * h + (1 - a) * c for h, c in zip(hue, card, strict=True)]) for a in opacities]
    assert all((max(ink, s) + 0.05) / (min(ink, s) + 0.05) >= 4.5 for s in shades)
    assert shades == sorted(shades, reverse=card[0] > 0.5)
    assert (max(shades) + 0.05) / (min(shades) + 0.05) > 1.9


# Plugins


def test_plugin_metrics_are_listed_with_their_course(folder: Path) -> None:
    name = f"gpm/{HOSTILE}"
    rows = [
        ROWS[0],
        line(1, "fedavg", 0.5, plugins={name: 2.0}),
        line(2, "fedavg", 0.6),
        line(3, "fedavg", 0.7, plugins={name: 8.0, "ood/false-alarms": 0.25}),
        line(4, "fedavg", 0.8, plugins={name: 5.0, "ood/false-alarms": float("nan")}),
    ]
    page = page_of(written(folder, rows))
    listed = [row[:6] for row in page.tables["plugins"][1:]]
    assert listed == [[name, "3", "2", "5", "2", "8"], ["ood/false-alarms", "1", "0.25", "0.25", "0.25", "0.25"]]
    assert page.named("script") == []
    assert "nan" not in page.source.lower()
    first, _ = metrics_of(read_run(folder))
    assert first.points == ((1, 2.0), (3, 8.0), (4, 5.0))
    svg = sparkline(first, 4)
    points = [tuple(map(float, point.split(","))) for point in elements(svg, "curve")[0]["points"].split()]
    assert [x for x, _ in points] == pytest.approx([4 + 172 * n / 4 for n in (1, 3, 4)])
    assert [y for _, y in points] == pytest.approx([24, 4, 14])


def test_many_metrics_are_cut(folder: Path) -> None:
    page = page_of(written(folder, [ROWS[0], line(1, "fedavg", 0.5, plugins={f"p/{n:03}": n for n in range(70)})]))
    assert len(page.tables["plugins"]) == 1 + MAX
    assert "10 more are in metrics.jsonl" in page.text


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=30))
def test_sparkline_stays_in_its_box(values: list[float]) -> None:
    svg = sparkline(Metric("p/m", tuple(enumerate(values))), len(values) - 1)
    for curve in elements(svg, "curve"):
        for x, y in (map(float, point.split(",")) for point in curve["points"].split()):
            assert 4 <= x <= 176
            assert 4 <= y <= 24


def test_what_was_left_out_is_named_with_whose_data_it_was(folder: Path) -> None:
    (folder / "data.json").write_text(
        json.dumps(
            {
                "left_out": ["dogs/0.txt is no image"],
                "test_left_out": ["b.png cannot be read"],
                "clients": {"0": {"left_out": []}, "1": {"left_out": ["<b>c.png</b> cannot be read"]}, "2": {}},
            }
        )
    )
    page = page_of(written(folder, ROWS))
    assert page.tables["left-out"][1:] == [
        ["all", "dogs/0.txt is no image"],
        ["server", "b.png cannot be read"],
        ["client 1", "<b>c.png</b> cannot be read"],
    ]
    assert "3 images or rows were not used in this run." in page.text
    (folder / "summary.json").write_text(json.dumps({"unreadable": 9}))
    assert "9 images or rows were not used in this run. 6 of them are not listed" in page_of(folder).text
    (folder / "data.json").write_text('{"clients": [1]}')
    with pytest.raises(RunError, match=r"data\.json must hold an object"):
        read_run(folder)


# Older runs, and files that somebody else wrote


def test_older_runs_have_none_of_it(folder: Path) -> None:
    rows = [row for row in ROWS if row["kind"] != "secure"]
    page = page_of(written(folder, rows))
    assert {"abandoned", "plugins", "left-out"}.isdisjoint(page.tables)
    assert {"task", "epsilon", "values clipped (largest / range)"}.isdisjoint(page.tables["rounds"][0])
    assert len(page.named("svg")) == 4
    assert not re.search(r"secure|epsilon|ACC|plugin|Stopped", page.text.split("Settings")[0])
    # A secure round of a run from before rounds said what they clipped.
    page = page_of(written(folder, ROWS))
    assert "In one secure round the server learned the weighted sum" in page.text
    assert "values clipped (largest / range)" not in page.tables["rounds"][0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clipped", -1, "'clipped': "),
        ("abandoned", 7, "'abandoned': "),
        ("epsilon", "low", "'epsilon': expected a number or null, found 'low'"),
        ("task", 0.5, "'task': "),
        ("task_accuracies", "90", "'task_accuracies': "),
        ("task_accuracies", [0.5, "x"], "'task_accuracies.1': expected a number or null, found 'x'"),
        ("plugins", [1], "'plugins': "),
        ("plugins", {"a/b": "x"}, "'plugins.a/b': expected a number or null, found 'x'"),
    ],
)
def test_wrong_types_are_one_line(folder: Path, field: str, value: object, message: str) -> None:
    written(folder, [ROWS[0], line(1, "fedavg", 0.5, **{field: value})])
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        write_report(folder)
    assert "metrics.jsonl line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", ["13", True, None, [1], float("nan"), 10**400])
def test_odd_settings_are_listed_and_not_drawn(folder: Path, budget: object) -> None:
    run = read(folder, private_rows(), **PRIVATE | {"max-epsilon": budget})
    assert elements(epsilon_by_round(run), "c-baseline") == []
    assert "max-epsilon" in [row[0] for row in page_of(folder).tables["config"]]


def test_numbers_too_large_for_a_float_count_as_not_measured(folder: Path) -> None:
    page = page_of(written(folder, [ROWS[0], line(1, "fedavg", 0.5, loss=10**400, plugins={"a/b": 10**400})]))
    assert column(page, "loss")[1] == "\N{EN DASH}"
    assert "plugins" not in page.tables


def test_report_of_a_run_with_tasks_and_a_plugin(tmp_path: Path) -> None:
    """A real run: the page's numbers are those of its files."""
    settings = Settings.of({
        "clients": 2, "model": "mlp", "rounds": 4, "local_epochs": 1, "train_images": 200,
        "schedule": "fedavg", "tasks": "pixels", "task_count": 2, "plugins": "gpm", "run_folder": str(tmp_path / "run"),
    })  # fmt: skip
    summary = serve_in_process(client_app, settings)
    rows = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    numbers = [number["text"] for number in elements(task_matrix(read_run(tmp_path / "run")), "number")]
    assert numbers == [f"{100 * share:.1f}" for row in (rows[2], rows[4]) for share in row["task_accuracies"]]
    page = page_of(tmp_path / "run")
    assert f"mean accuracy (ACC) {summary['mean_accuracy']:.1f}%" in page.text
    assert f"backward transfer (BWT) {summary['backward_transfer']:+.1f} points" in page.text
    assert [row[0] for row in page.tables["plugins"][1:]] == sorted(rows[4]["plugins"])
