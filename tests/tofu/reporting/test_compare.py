"""Comparisons without training: what is planned, what is refused, what is made of results, and how that is drawn."""

import math
import re
import statistics
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tofu.compression import compressors
from tofu.errors import SettingError
from tofu.reporting.compare.plan import FEDAVG, Cell, Comparison
from tofu.reporting.compare.results import best_value, document, failed_run
from tofu.reporting.report.chart import BOTTOM, LEFT, RIGHT, TOP
from tofu.reporting.report.compare import render_figure, render_page
from tofu.reporting.report.compare_figures import accuracy_by_round, accuracy_by_seed
from tofu.reporting.report.compare_tables import Table, cell_table, markdown, target_table
from tofu.settings import Settings

RIVALS = tuple(name for name in compressors.names() if name != FEDAVG)
HOSTILE = '<script>alert("&")</script>'
FLOAT32 = 136_440
NONE = "\N{EN DASH}"


def planned(tmp_path: Path, *, settings: dict[str, Any] | None = None, **given: Any) -> Comparison:
    values: dict[str, Any] = {"compressors": "proxy,topk", "ratios": "20,60", "seeds": 2, "folder": tmp_path / "new"}
    return Comparison.of(Settings.of({"model": "mlp", "clients": 2} | (settings or {})), **values | given)


# Plans


def test_every_run_differs_only_in_what_is_compared(tmp_path: Path) -> None:
    made = planned(tmp_path, settings={"seed": 5}, overrides=["topk:error-feedback=0.5"])
    assert [(cell.compressor, cell.ratios) for cell in made.cells] == [
        ("none", (1.0,)), ("proxy", (20.0,)), ("topk", (20.0,)), ("proxy", (60.0,)), ("topk", (60.0,)),
    ]  # fmt: skip
    assert made.seeds == (5, 6)
    for cell in made.cells:
        for seed in made.seeds:
            settings = made.run(cell, seed).settings
            changed = {name for name, value in settings.to_config().items() if value != made.shared.to_config()[name]}
            allowed = {"compressor", "ratio", "seed", "run-folder", "checkpoint"}
            allowed |= {"error-feedback"} if cell.compressor == "topk" else set()
            allowed |= {"schedule"} if cell.compressor == FEDAVG else set()
            assert changed <= allowed
            assert settings.run.seed == seed
            assert settings.codec.compressor == cell.compressor
            assert settings.rounds.schedule == "compressed"
            assert settings.codec.error_feedback == (0.5 if cell.compressor == "topk" else 1.0)
    assert not (tmp_path / "new").exists()  # planning writes nothing
    folders = [made.run(cell, seed).folder.name for cell in made.cells for seed in made.seeds]
    assert folders[0] == "none-1x-seed5"
    assert "topk-60x-seed6" in folders
    assert len(set(folders)) == 10


def test_fedavg_compresses_neither_way_unless_asked(tmp_path: Path) -> None:
    made = planned(tmp_path, settings={"downlink": "topk"})
    assert [made.run(cell, 0).settings.downlink.downlink for cell in made.cells[:2]] == ["full-weights", "topk"]
    asked = planned(tmp_path, settings={"downlink": "topk"}, overrides=["none:downlink=topk"])
    assert asked.run(asked.reference, 0).settings.downlink.downlink == "topk"


def test_fedavg_by_its_old_name(tmp_path: Path) -> None:
    made = planned(tmp_path, folder=tmp_path, overrides=["full:downlink=topk"])
    assert dict(made.overrides) == {FEDAVG: {"downlink": "topk"}}
    (tmp_path / "full-1x-seed0").mkdir()  # the run of an earlier version is not repeated
    assert [made.run(cell, 0).folder.name for cell in made.cells[:2]] == ["full-1x-seed0", "proxy-20x-seed0"]
    assert made.run(made.reference, 1).folder.name == "none-1x-seed1"


def test_every_compressor_keeps_the_budget_or_is_out_of_reach(tmp_path: Path) -> None:
    ratios = (1.5, 3.0, 40.0, 5000.0)
    cells = planned(tmp_path, compressors=",".join(RIVALS), ratios="40,5000,1.5,3").cells[1:]
    for name in RIVALS:
        mine = [cell for cell in cells if cell.compressor == name]
        assert sorted(ratio for cell in mine for ratio in cell.ratios) == list(ratios)
        for cell in mine:
            assert bool(cell.unreachable) != bool(cell.payloads)
            assert all(size * max(cell.ratios) <= FLOAT32 for size in cell.payloads.values())
    unreachable = [cell for cell in cells if cell.unreachable]
    assert ("proxy", (5000.0,)) in [(cell.compressor, cell.ratios) for cell in unreachable]
    assert all(cell.unreachable.startswith("at most ") for cell in unreachable)


def test_equal_payloads_are_one_cell_at_the_lowest_ratio(tmp_path: Path) -> None:
    """Eight proxies are eight proxies, whatever the ratio."""
    made = planned(tmp_path, settings={"proxies": 8, "correction": 0.0}, ratios="60,20")
    assert [(cell.name, cell.ratios) for cell in made.cells] == [
        ("none-1x", (1.0,)), ("proxy-20x", (20.0, 60.0)), ("topk-20x", (20.0,)), ("topk-60x", (60.0,)),
    ]  # fmt: skip


def test_tuning_tries_every_value_with_a_seed_of_its_own(tmp_path: Path) -> None:
    made = planned(tmp_path, settings={"seed": 3}, tune="lr=0.1,0.05")
    for cell in made.cells:
        trials = made.tuning_runs(cell)
        assert [(run.value, run.settings.training.lr, run.seed, run.settings.run.seed) for run in trials] == [
            (0.1, 0.1, 1003, 1003), (0.05, 0.05, 1003, 1003),
        ]  # fmt: skip
        assert trials[1].folder.name == f"{cell.name}-seed1003-tune-lr=0.05"
        assert made.run(cell, 3, 0.05).settings.training.lr == 0.05
    assert planned(tmp_path).tuning_runs(made.reference) == ()


def test_values_out_of_reach_are_not_tried(tmp_path: Path) -> None:
    """Without a correction, one proxy of 32 bits is larger than this budget and one of 2 bits is not."""
    made = planned(tmp_path, settings={"correction": 0.0}, compressors="proxy", ratios="1000", tune="bits=2,32")
    assert [run.value for run in made.tuning_runs(made.cells[1])] == [2]
    assert [run.value for run in made.tuning_runs(made.reference)] == [2, 32]


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({"compressors": "nosuch"}, "compressors", ("nosuch", "proxy")),
        ({"compressors": "none"}, "compressors", ("always run",)),
        ({"compressors": "proxy,topk,proxy"}, "compressors", ("proxy is there twice",)),
        ({"compressors": "proxy,,topk"}, "compressors", ("separated by commas",)),
        ({"compressors": ""}, "compressors", ("separated by commas",)),
        ({"ratios": "20,abc"}, "ratios", ("'abc'", "at least 1")),
        ({"ratios": "0.5"}, "ratios", ("'0.5'", "at least 1")),
        ({"ratios": "nan"}, "ratios", ("'nan'",)),
        ({"ratios": "inf"}, "ratios", ("'inf'",)),
        ({"ratios": "20,20.0"}, "ratios", ("every ratio once",)),
        ({"ratios": ""}, "ratios", ()),
        ({"seeds": 0}, "seeds", ("1 to 1000",)),
        ({"seeds": 1001}, "seeds", ("1 to 1000",)),
        ({"settings": {"seed": 2**31 - 2}, "seeds": 3}, "seed", ("at most",)),
        ({"settings": {"seed": 2**31 - 900}, "tune": "lr=1,2"}, "seed", ("at most",)),
        ({"settings": {"schedule": "fedavg"}}, "schedule", ("FedAvg",)),
        ({"settings": {"train_images": 9999}}, "train-images", ("at most",)),
        ({"overrides": ["proxy"]}, "for", ("NAME:setting=value",)),
        ({"overrides": ["proxy:lr"]}, "for", ("NAME:setting=value",)),
        ({"overrides": [":lr=1"]}, "for", ("NAME:setting=value",)),
        ({"overrides": ["eden:lr=1"]}, "for", ("one of none, proxy, topk",)),
        ({"overrides": ["proxy:nosuch=1"]}, "for", ("known setting",)),
        ({"overrides": ["proxy:lr=abc"]}, "for", ("lr to be a number",)),
        ({"overrides": ["proxy:lr=-1"]}, "for", ("lr to be", "above 0")),
        ({"overrides": ["proxy:bits=7"]}, "for", ("2, 3, 4",)),
        ({"overrides": ["proxy:warm-start=maybe"]}, "for", ("true or false",)),
        ({"overrides": ["proxy:lr=1", "proxy:lr=2"]}, "for", ("once",)),
        ({"overrides": ["proxy:rounds=3"]}, "for", ("rounds may not",)),
        ({"overrides": ["proxy:seed=3"]}, "for", ("seed may not",)),
        ({"overrides": ["proxy:alpha=3"]}, "for", ("alpha may not",)),
        ({"overrides": ["proxy:ratio=3"]}, "for", ("ratio may not",)),
        ({"overrides": ["proxy:lr=1"], "tune": "lr=1,2"}, "for", ("not tuned",)),
        ({"tune": "lr"}, "tune", ("setting=value",)),
        ({"tune": "lr="}, "tune", ("separated by commas",)),
        ({"tune": "lr=0.1"}, "tune", ("at least two values",)),
        ({"tune": "lr=0.1,0.10"}, "tune", ("each once",)),
        ({"tune": "lr=0.1,x"}, "tune", ("lr to be a number",)),
        ({"tune": "nosuch=1,2"}, "tune", ("known setting",)),
        ({"tune": "clients=1,2"}, "tune", ("clients may not",)),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, given: dict[str, Any], field: str, words: Sequence[str]) -> None:
    with pytest.raises(SettingError) as caught:
        planned(tmp_path, **given)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# Results


def comparison(*names: str, seeds: int = 3, **given: Any) -> Comparison:
    """A comparison of compressors that need not exist, at 20x and 60x, the last one out of reach at 60x."""
    cells = [Cell(FEDAVG, (1.0,), {None: FLOAT32 + 22}, FLOAT32)]
    for ratio in (20.0, 60.0):
        for name in names:
            lost = ratio == 60 and name == names[-1] and len(names) > 1
            sizes = {} if lost else {None: int(FLOAT32 / ratio)}
            cells.append(Cell(name, (ratio,), sizes, FLOAT32, "at most 31.7 <for this>" if lost else ""))
    settings = Settings.of(given.pop("settings", {}))
    return Comparison(settings, names, (20.0, 60.0), tuple(range(seeds)), Path("x"), cells=tuple(cells), **given)


def row(made: Comparison, cell: Cell, seed: int, accuracy: float, uplink: int) -> dict[str, Any]:
    """A finished run of two rounds."""
    return failed_run(made.run(cell, seed), "") | {
        "final_accuracy": accuracy, "uplink_bytes": uplink, "downlink_bytes": 900_000, "uplink_ratio": 1e6 / uplink,
        "both_ratio": 1.9,
        "payload_ratio": cell.ratios[0], "train_seconds": 2.0, "encode_seconds": 1.0, "seconds": 4.0,
        "accuracy_by_round": [0.1, accuracy / 2, accuracy], "uplink_bytes_by_round": [0, uplink // 2, uplink // 2],
        "explained_variance_by_round": [None, 0.5, 0.7],
    }  # fmt: skip


def finished(row_: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row_.items() if key != "failed"}


ENDS = {
    (FEDAVG, 1.0): (0.96, 0.94, 0.98),
    ("proxy", 20.0): (0.95, 0.93, 0.965),
    ("proxy", 60.0): (0.94, 0.925, 0.95),
    ("rival", 20.0): (0.957, 0.92, 0.97),
}
UPLINK = {1.0: 1_000_000, 20.0: 60_000, 60.0: 25_000}


def results(made: Comparison, ends: dict[tuple[str, float], tuple[float, ...]] = ENDS) -> dict[str, Any]:
    rows = {
        cell: [
            finished(row(made, cell, seed, value, UPLINK[cell.ratios[0]] + seed))
            for seed, value in enumerate(ends[cell.compressor, cell.ratios[0]])
        ]
        for cell in made.cells
        if (cell.compressor, cell.ratios[0]) in ends
    }
    return document(made, rows, {}, runs_left=0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `Settings` take compressors that do not exist."""
    monkeypatch.setattr(Comparison, "_settings", lambda self, name, ratio, seed, value: Settings.of({"seed": seed}))


@pytest.mark.usefixtures("fake")
def test_means_deviations_and_pairs_are_right() -> None:
    made = results(comparison("proxy", "rival"))
    cells = {(cell["compressor"], *cell["ratios"]): cell for cell in made["cells"]}
    for key, ends in ENDS.items():
        cell = cells[key if key[0] != FEDAVG else (FEDAVG,)]
        assert cell["final_accuracy"] == {"mean": sum(ends) / 3, "sd": pytest.approx(statistics.stdev(ends))}
        lost = [100 * (reference - end) for reference, end in zip(ENDS[FEDAVG, 1.0], ends, strict=True)]
        mean = sum(lost) / 3
        assert cell["points_lost"]["mean"] == pytest.approx(mean)
        assert cell["points_lost"]["sd"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in lost) / 2))
        assert cell["uplink_bytes"] == {"mean": UPLINK[key[1]] + 1, "sd": 1.0}
        assert cell["explained_variance"]["mean"] == pytest.approx(0.6)
        assert cell["complete"]
    assert cells["rival", 60.0]["final_accuracy"] is None
    assert cells["rival", 60.0]["not_reachable"] == "at most 31.7 <for this>"


@pytest.mark.usefixtures("fake")
def test_targets_take_the_cheapest_cell_that_ends_there() -> None:
    made = results(comparison("proxy", "rival"))
    assert [target["points_below_fedavg"] for target in made["targets"]] == [0.5, 1, 2, 5]
    assert [target["accuracy"] for target in made["targets"]] == pytest.approx([0.955, 0.95, 0.94, 0.91])
    found = [
        {name: best and (best["ratio"], best["uplink_bytes"]) for name, best in target["smallest_uplink"].items()}
        for target in made["targets"]
    ]
    fedavg, low, high = (None, 1_000_001), (20.0, 60_001), (60.0, 25_001)
    # The means are proxy 94.83 and 93.83, rival 94.90, FedAvg 96.
    assert found == [
        {FEDAVG: fedavg, "proxy": None, "rival": None},
        {FEDAVG: fedavg, "proxy": None, "rival": None},
        {FEDAVG: fedavg, "proxy": low, "rival": low},
        {FEDAVG: fedavg, "proxy": high, "rival": low},
    ]


@pytest.mark.usefixtures("fake")
def test_ending_exactly_at_a_target_reaches_it() -> None:
    made = results(comparison("proxy", seeds=1), {(FEDAVG, 1.0): (0.95,), ("proxy", 20.0): (0.94,)})
    assert [target["smallest_uplink"]["proxy"] is not None for target in made["targets"]] == [False, True, True, True]


@pytest.mark.usefixtures("fake")
def test_a_cell_with_a_failed_seed_says_so_and_reaches_nothing() -> None:
    made = comparison("proxy", seeds=2)
    reference, low, high = made.cells
    rows = {
        reference: [finished(row(made, reference, seed, 0.9, 10**6)) for seed in (0, 1)],
        low: [finished(row(made, low, 0, 0.95, 60_000)), failed_run(made.run(low, 1), "loss is not finite")],
        high: [failed_run(made.run(high, seed), "loss is not finite") for seed in (0, 1)],
    }
    found = document(made, rows, {}, runs_left=0)
    assert found["cells"][1]["seeds"] == [0]
    assert found["cells"][1]["failed"] == [{"seed": 1, "reason": "loss is not finite"}]
    assert all(target["smallest_uplink"]["proxy"] is None for target in found["targets"])
    table = cell_table(found).rows
    assert table[1][2] == "95.00 (1 of 2 seeds)"
    assert table[2][2] == "failed"
    assert markdown(found).count("failed: loss is not finite") == 3
    render_page(found, "x")


def test_the_best_value_is_the_most_accurate_and_the_first_of_equals() -> None:
    trials = [{"tuned": 1.0, "final_accuracy": 0.5}, {"tuned": 2.0, "final_accuracy": 0.7}]
    assert best_value(trials) == 2.0
    assert best_value(trials[::-1]) == 2.0
    assert best_value([*trials, {"tuned": 3.0, "final_accuracy": 0.7}]) == 2.0
    assert best_value([{"tuned": 4.0, "failed": "diverged"}, trials[0]]) == 1.0
    assert best_value([{"tuned": 4.0, "failed": "diverged"}]) is None


# Tables


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("given", [{"settings": {"downlink": "proxy"}}, {"overrides": {"proxy": {"downlink": "topk"}}}])
def test_both_directions_are_shown_where_the_downlink_is_compressed(given: dict[str, Any]) -> None:
    plain, both = cell_table(results(comparison("proxy"))), cell_table(results(comparison("proxy", **given)))
    assert both.header == (*plain.header, "both directions, less")
    assert [line[-1] for line in both.rows] == [NONE, "1.90x", "1.90x"]


@pytest.mark.usefixtures("fake")
def test_the_time_of_encoding_is_shown_unless_the_document_has_none() -> None:
    document = results(comparison("proxy"))
    table = cell_table(document)
    column = table.header.index("encoding, s")
    assert [line[column] for line in table.rows] == ["1.00 ± 0.00"] * 3
    for cell in document["cells"]:
        del cell["encode_seconds"]
    assert "encoding, s" not in cell_table(document).header


@pytest.mark.usefixtures("fake")
def test_the_page_explains_the_band_and_what_is_cut_at_100_percent() -> None:
    page = render_page(results(comparison("proxy")), "x")
    assert page.count("the gray band its standard deviation") == page.count('class="band"') == 1
    assert "beyond 100%" not in page
    assert "beyond 100% is cut" in render_page(
        results(comparison("proxy"), ENDS | {(FEDAVG, 1.0): (1.0, 0.9, 1.0)}), "x"
    )
    assert "gray band" not in render_page(results(comparison("proxy", seeds=1)), "x")


@pytest.mark.usefixtures("fake")
def test_the_table_is_sorted_by_ratio_then_accuracy() -> None:
    table = cell_table(results(comparison("proxy", "rival")))
    assert [line[:3] for line in table.rows] == [
        (NONE, "FedAvg", "96.00 ± 2.00"),
        ("20x", "rival", "94.90 ± 2.59"),
        ("20x", "proxy", "94.83 ± 1.76"),
        ("60x", "proxy", "93.83 ± 1.26"),
        ("60x", "rival", "not reachable: at most 31.7 <for this>"),
    ]
    assert table.rows[1][3:] == ("1.10 ± 0.85", "60.0 kB", "16.7x", "20.0x", "1.00 ± 0.00")
    targets = target_table(results(comparison("proxy", "rival")))
    assert targets is not None
    assert targets.rows[1] == ("proxy", NONE, NONE, "60.0 kB at 20x", "25.0 kB at 60x")


def test_markdown_escapes_what_would_end_a_cell() -> None:
    lines = Table(("a", "b"), (("x|y\n", "1"),)).markdown().splitlines()
    assert lines == ["| a     |   b |", "| ---   | --: |", "| x\\|y  |   1 |"]


# Figures


class Marks(HTMLParser):
    """Counts the tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def svg(made: dict[str, Any]) -> ET.Element:
    return ET.fromstring(render_figure(made))


def drawn(tree: ET.Element, css: str) -> list[ET.Element]:
    return [node for node in tree.iter() if css in node.get("class", "").split()]


@pytest.mark.usefixtures("fake")
def test_the_figure_marks_every_cell_with_its_spread() -> None:
    tree = svg(results(comparison("proxy", "rival")))
    (figure,) = (node for node in tree if node.tag.endswith("svg"))  # nothing is far below FedAvg: one panel
    titles = [title.text for title in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert sum("proxy at" in f"{text}" for text in titles) == 2
    assert "proxy at 60x: 93.83% ± 1.26 for 25.0 kB" in titles
    assert "FedAvg: 96.00% ± 2.00" in titles
    assert len(drawn(tree, "error")) == 3
    (band,) = drawn(tree, "band")
    ticks = {node.text: float(node.get("y", "")) - 4 for node in drawn(figure, "end")}
    pixels = (ticks["94%"] - ticks["98%"]) / 4  # of a point
    assert float(band.get("height", "")) == pytest.approx(4 * pixels, abs=0.05)
    assert float(band.get("y", "")) == pytest.approx(ticks["98%"], abs=0.05)
    lines = [node for node in drawn(figure, "s0") if node.tag.endswith("polyline")]
    ((_, low), (_, high)) = (map(float, point.split(",")) for point in lines[0].get("points", "").split())
    assert (low - high) / pixels == pytest.approx(1.0, abs=0.02)  # 93.83 at 60x, which has fewer bytes, and 94.83


@pytest.mark.usefixtures("fake")
def test_an_outlier_gets_a_second_panel_for_the_others() -> None:
    far = ENDS | {("rival", 20.0): (0.5, 0.5, 0.5)}
    tree = svg(results(comparison("proxy", "rival"), far))
    everything, near = (node for node in tree if node.tag.endswith("svg"))
    tips = [
        [f"{title.text}" for title in panel.iter("{http://www.w3.org/2000/svg}title")] for panel in (everything, near)
    ]
    assert [any("rival at 20x" in tip for tip in panel) for panel in tips] == [True, False]
    assert [sum("proxy at" in tip for tip in panel) for panel in tips] == [2, 2]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("rival", "seeds", "lead"),
    [
        (
            (0.957, 0.92, 0.97),
            3,
            "At 20x, no winner: rival (94.9%) and proxy (94.8%) differ by no more than the spread over seeds.",
        ),
        ((0.99, 0.98, 0.985), 3, "At 20x, rival is the most accurate: 98.5%."),
        ((0.99,), 1, "At 20x, rival has the highest accuracy, 99.0%, in one run: no winner."),
    ],
)
def test_no_winner_within_the_spread(rival: tuple[float, ...], seeds: int, lead: str) -> None:
    ends = {key: values[:seeds] for key, values in ENDS.items()} | {("rival", 20.0): rival}
    page = render_page(results(comparison("proxy", "rival", seeds=seeds), ends), "mine")
    shown = re.sub("<[^>]*>", "", page.split('<p class="lead">')[1].split("</p>")[0])
    assert shown.startswith(lead)
    assert "At 60x: proxy 93.8%." in shown or seeds == 1


@pytest.mark.usefixtures("fake")
def test_who_is_behind_is_named_although_nobody_wins() -> None:
    equal = ENDS[("proxy", 20.0)]
    ends = ENDS | {("rival", 20.0): equal, ("rival", 60.0): equal, ("own", 20.0): tuple(value - 0.4 for value in equal)}
    page = render_page(results(comparison("proxy", "rival", "own"), ends), "mine")
    shown = re.sub("<[^>]*>", "", page.split('<p class="lead">')[1].split("</p>")[0])
    found = re.match(
        r"At 20x, no winner: (proxy|rival) .* and (proxy|rival) .* differ by no more .*; behind them: own", shown
    )
    assert found is not None
    assert found[1] != found[2]


@pytest.mark.usefixtures("fake")
def test_every_seed_is_a_dot_and_every_curve_is_whole() -> None:
    made = results(comparison("proxy", "rival"))
    figure = accuracy_by_seed(made, 20.0)
    assert figure is not None
    tips = sorted(title.text or "" for node in drawn(figure.svg, "seed") for title in node)
    assert tips == sorted(f"{100 * value:.2f}%" for key in ENDS if key != ("proxy", 60.0) for value in ENDS[key])
    rounds = accuracy_by_round(made, 20.0)
    assert rounds is not None
    points = [point.split(",") for node in drawn(rounds.svg, "curve") for point in node.get("points", "").split()]
    assert len(points) == 3 * 3  # FedAvg, proxy and rival, from round 0
    assert all(LEFT <= float(x) <= RIGHT and TOP <= float(y) <= BOTTOM for x, y in points)


@pytest.mark.usefixtures("fake")
def test_figures_and_page_escape_names() -> None:
    ends = {(HOSTILE if name == "rival" else name, ratio): values for (name, ratio), values in ENDS.items()}
    hostile = comparison("proxy", HOSTILE, settings={"dataset": HOSTILE}, overrides={HOSTILE: {"lr": 0.1}})
    made = results(hostile, ends)
    for cell in made["cells"]:
        cell["failed"] = [{"seed": 0, "reason": HOSTILE}]
    assert HOSTILE in "".join(svg(made).itertext())
    page = render_page(made, HOSTILE)
    assert "script" not in Marks(page).seen
    assert page.count("&lt;script&gt;") >= 5
    for figure in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(figure)
    assert "http" not in page.replace("http-equiv", "")  # the page loads nothing


@pytest.mark.usefixtures("fake")
def test_the_page_holds_both_tables_and_a_figure_a_ratio() -> None:
    made = results(comparison("proxy", "rival"))
    page = render_page(made, "mine")
    tables = [cell_table(made), target_table(made)]
    text = page.replace("&lt;", "<").replace("&gt;", ">")
    for table in tables:
        assert table is not None
        for line in table.rows:
            assert f">{line[0]}</th>" in text
            assert all(f">{cell}</td>" in text for cell in line[1:])
    assert Marks(page).seen.count("svg") == 5
    assert "By round at 20x" in page
    assert "Every seed at 60x" in page
    assert "not finished" not in page


@pytest.mark.usefixtures("fake")
def test_a_comparison_without_results_yet_can_be_shown() -> None:
    empty = document(comparison("proxy"), {}, {}, runs_left=9)
    assert "not finished: 9 runs left" in render_page(empty, "x")
    assert "No compressor has finished" in "".join(svg(empty).itertext())
    assert "not run yet" in markdown(empty)
    assert target_table(empty) is None
