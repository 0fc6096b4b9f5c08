"""The report page, checked by parsing it: what it says, what it escapes, and what it refuses."""

import base64
import json
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tofu.errors import RunError
from tofu.reporting.report import write_report
from tofu.reporting.report.chart import BOTTOM, TOP, Axis, fraction_axis, thinned
from tofu.reporting.report.images import sheet

HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Collects the text, the tags with their attributes, and the cells of tables by the table's id."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[list[str]] | None = None
        self._in_cell = self._in_style = False
        self.feed(source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append((tag, given))
        self._in_style = tag == "style"
        if tag == "table":
            self._open = self.tables.setdefault(given.get("id", ""), [])
        elif tag == "tr" and self._open is not None:
            self._open.append([])
        elif tag in ("td", "th") and self._open is not None:
            self._in_cell = True
            self._open[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "style":
            self._in_style = False
        elif tag in ("td", "th"):
            self._in_cell = False
        elif tag == "table":
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._in_style:
            return
        self.text += f" {data}"
        if self._in_cell and self._open is not None:
            self._open[-1][-1] += data.strip()

    def named(self, tag: str) -> list[dict[str, str]]:
        return [given for name, given in self.tags if name == tag]

    def marks(self, kind: str) -> int:
        """How many marks of a kind of round the figures hold, keys of legends included."""
        return sum(f"mark k-{kind}" in given.get("class", "") for _, given in self.tags)


def line(number: int, kind: str, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    """A row of metrics.jsonl for a run of ten clients: a compressed round sends 1 % of FedAvg's bytes."""
    compressed = kind == "compressed"
    sent = {"start": 0, "compressed": 25_000}.get(kind, 2_500_000)
    row = {
        "round": number,
        "kind": kind,
        "accuracy": accuracy,
        "loss": 0.5,
        "clients": 10 if number else 0,
        "failures": [],
        "explained_variance": 0.71 if compressed else None,
        "cosine": 0.84 if compressed else None,
        "train_loss": 0.7,
        "uplink_bytes": sent,
        "downlink_bytes": 2_600_000 if number else 0,
        "fedavg_uplink_bytes": 2_500_000 if number else 0,
        "seconds": 3.0,
    }
    return row | changes


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


ROWS = [
    line(0, "start", 0.1032),
    line(1, "compressed", 0.8125),
    line(2, "compressed", 0.9042, failures=[{"client": HOSTILE, "reason": "wrong <magic>"}]),
    line(3, "secure", 0.9473),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three rounds that has not ended: settings and metrics only."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "dataset": "digits",
        "model": "lenet5",
        "clients": 10,
        "rounds": 5,
        "unheard_of": HOSTILE,
        "privacy": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_lines(folder / "metrics.jsonl", ROWS)
    return folder


def finish(run: Path, **changes: Any) -> None:
    summary = {
        "final_accuracy": 0.9473,
        "rounds": 3,
        "uplink_bytes": 2_550_000,
        "downlink_bytes": 7_800_000,
        "fedavg_uplink_bytes": 7_500_000,
        "uplink_ratio": 7_500_000 / 2_550_000,
        "payload_ratio": 3.21,
        "weights_sha256": "ab" * 32,
        "run": str(run),
        "seconds": 125.0,
    }
    (run / "summary.json").write_text(json.dumps(summary | changes))


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_headline_and_facts_of_a_finished_run(run: Path) -> None:
    finish(run)
    page = page_of(run)
    assert "94.7% test accuracy after 3 rounds, for 2.5 MB of uplink: 2.94x less than the 7.5 MB FedAvg" in page.text
    assert "payload ratio 3.21x" in page.text
    assert "2 min 05 s" in page.text
    assert "ab" * 32 in page.text
    assert "not finished" not in page.text


def test_headline_does_not_call_more_bytes_less(run: Path) -> None:
    finish(run, uplink_bytes=15_000_000)
    page = page_of(run)
    assert "2.00x more than the 7.5 MB FedAvg sends" in page.text
    assert "2.00x more bytes" in page.text
    assert "x less" not in page.text.split("Rounds")[0]


@pytest.mark.parametrize("uplink", [7_490_000, 7_500_000, 7_510_000])
def test_headline_calls_equal_bytes_equal(run: Path, uplink: int) -> None:
    finish(run, uplink_bytes=uplink, both_ratio=7_500_000 / uplink)
    page = page_of(run)
    assert "for 7.5 MB of uplink: as much as the 7.5 MB FedAvg sends. Both directions" in page.text
    assert ", as much as FedAvg." in page.text


@pytest.mark.parametrize(
    ("schedule", "kinds", "named"),
    [
        ("fedavg", (), False),
        ("fedavg", ("fedavg",), False),
        ("secure", ("secure",), False),
        ("switch", (), True),
        ("switch", ("compressed", "secure"), True),
        ("mine:Schedule", ("fedavg", "secure"), False),
    ],
)
def test_the_title_names_a_compressor_only_where_rounds_are_compressed(
    run: Path, schedule: str, kinds: tuple[str, ...], named: bool
) -> None:
    config = json.loads((run / "config.json").read_text()) | {"schedule": schedule, "compressor": "topk"}
    (run / "config.json").write_text(json.dumps(config))
    write_lines(run / "metrics.jsonl", [ROWS[0], *(line(n, kind, 0.5) for n, kind in enumerate(kinds, start=1))])
    title = re.search("<title>(.*)</title>", page_of(run).source)
    assert title
    assert ("compressor topk" in title[1]) == named


@pytest.mark.parametrize(
    ("spent", "expected"),
    [
        ({"epsilon": 4.5}, "with epsilon 4.5 at delta 1e-05, for"),
        ({"epsilon": 4.5, "model_epsilon": 1.5}, "with epsilon 4.5 at delta 1e-05, for"),
        ({"epsilon": None, "model_epsilon": 1.5}, "with epsilon 1.5 at delta 1e-05 against readers of the models, for"),
        ({"epsilon": None}, "with no bound on epsilon , for"),
    ],
)
def test_headline_has_what_noise_spent(run: Path, spent: dict[str, Any], expected: str) -> None:
    write_lines(run / "metrics.jsonl", [*ROWS[:-1], ROWS[-1] | spent])
    finish(run, **spent, delta=1e-5)
    assert f"after 3 rounds, {expected} 2.5 MB of uplink" in page_of(run).text


def test_table_has_every_round_and_the_totals(run: Path) -> None:
    head, start, first, _, secure, total = page_of(run).tables["rounds"]
    assert head[:5] == ["round", "kind", "accuracy", "uplink", "less than FedAvg"]
    none = "\N{EN DASH}"
    assert start[:3] == ["0", "start", "10.32%"]
    assert start[9:] == [*[none] * 4, "3.0 s"]
    assert first == [
        *("1", "compressed", "81.25%", "25.0 kB", "100x", "0.5000", "0.7000", "71.0%", "0.840", "10", "0"),
        *("2.6 MB", "2.5 MB", "3.0 s"),
    ]
    assert secure[7:9] == [none, none]
    assert total[3:5] == ["2.5 MB", "2.94x"]
    assert total[-3:] == ["7.8 MB", "7.5 MB", "12 s"]


def test_figures_mark_the_kinds_of_rounds_and_have_texts(run: Path) -> None:
    page = page_of(run)
    drawings = page.named("svg")
    assert len(drawings) == 4
    assert all(len(drawing["aria-label"]) > 20 and drawing["role"] == "img" for drawing in drawings)
    assert "94.7% at round 3" in drawings[0]["aria-label"]
    # Two figures and a legend in each: rounds 1 and 2 are compressed rounds, round 0 has no place on a log axis.
    assert page.marks("compressed") == 2 * 2 + 2
    assert page.marks("secure") == 2 + 2
    assert page.marks("start") == 1 + 1
    assert "round 2, compressed: 90.42% after 50.0 kB" in page.text


def test_classes_are_drawn_the_lowest_accuracy_first_and_not_all_of_many(run: Path) -> None:
    some = [{"name": "cat", "samples": 40, "right": 30}, {"name": "7", "samples": 20, "right": 5}]
    finish(run, by_class=[*some, {"name": "unseen", "samples": 0, "right": 0}])
    page = page_of(run)
    label = next(given["aria-label"] for given in page.named("svg") if "by class" in given["aria-label"])
    assert label == "Final test accuracy by class: class 7: 25.0% of 20; cat: 75.0% of 40."
    widths = [float(given["width"]) for given in page.named("rect") if given["class"] == "bar k-start"]
    assert widths == [100, 300]  # of a figure 400 wide, which stands for 100 %
    finish(run, by_class=[{"name": f"n{number}", "samples": 10, "right": number % 11} for number in range(33)])
    page = page_of(run)
    assert "The 20 lowest of 33 classes; summary.json has all." in page.text
    finish(run)
    assert "Accuracy by class" not in page_of(run).text


def test_baseline_is_drawn_and_compared(run: Path) -> None:
    finish(run)
    without = page_of(run)
    curves = [given for given in without.named("polyline") if "c-baseline" in given["class"]]
    assert curves == []
    assert "FedAvg was not run" in without.text
    rows = [ROWS[0], *(line(number, "fedavg", 0.9 + number / 50) for number in (1, 2, 3))]
    finish(run, baseline={"final_accuracy": 0.96, "uplink_bytes": 7_500_000, "metrics": rows})
    page = page_of(run)
    curves = [given for given in page.named("polyline") if "c-baseline" in given["class"]]
    assert [len(given["points"].split()) for given in curves] == [4, 3]
    assert "reached 96.0%: this run is 1.3 points below it" in page.text


def test_bars_count_the_ledger(run: Path) -> None:
    messages = [
        {"round": 1, "kind": "compressed", "direction": "uplink", "client": f"{c}", "bytes": 1000, "payload_bytes": 750}
        for c in range(3)
    ]
    messages.insert(
        0, {"round": 1, "kind": "compressed", "direction": "downlink", "client": "0", "bytes": 4, "payload_bytes": 4}
    )
    messages.append(messages[1] | {"kind": "hello", "bytes": 9})
    write_lines(run / "ledger.jsonl", messages)
    page = page_of(run)
    assert "Uplink, introductions of clients 9 B" in page.text
    assert "3.0 kB in 3 messages, 75.0% payload" in page.text
    assert "4 B in 1 message, 100.0% payload" in page.text
    assert re.search("Uplink, compressed .*Uplink, had it been FedAvg .*Downlink, compressed", page.text)
    (run / "ledger.jsonl").unlink()
    page = page_of(run)
    assert not re.search(r"in \d+ message|pale end", page.text)
    assert "Uplink, compressed rounds 50.0 kB" in page.text


def test_hostile_texts_are_shown_not_run(run: Path) -> None:
    finish(run, weights_sha256=HOSTILE)
    np.savez(run / "samples.npz", real=np.zeros((1, 1, 2, 2), np.uint8), real_caption=np.array(HOSTILE + '" onload="x'))
    rows = [*ROWS, line(4, HOSTILE, 0.9)]
    write_lines(run / "metrics.jsonl", rows)
    write_lines(
        run / "ledger.jsonl",
        [{"round": 1, "kind": HOSTILE, "direction": "uplink", "client": "0", "bytes": 5, "payload_bytes": 1}],
    )
    page = page_of(run)
    assert page.named("script") == []
    assert not any(name.startswith("on") for _, given in page.tags for name in given)
    assert page.tables["failures"][1] == ["2", HOSTILE, "wrong <magic>"]
    assert ["unheard_of", HOSTILE] in page.tables["config"]
    assert page.tables["rounds"][5][1] == HOSTILE
    assert page.named("img")[0]["alt"].endswith('" onload="x')


def test_page_loads_nothing(run: Path) -> None:
    finish(run)
    proxies = np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32)
    np.savez(run / "samples.npz", real=np.zeros((2, 1, 4, 4), np.uint8), proxies_1=proxies)
    page = page_of(run)
    assert not re.search(r"https?://|url\(|@import", page.source)
    addresses = [given[name] for _, given in page.tags for name in ("src", "href", "data") if name in given]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not {"script", "link", "iframe", "object"} & {name for name, _ in page.tags}
    policies = [
        given["content"] for given in page.named("meta") if given.get("http-equiv") == "Content-Security-Policy"
    ]
    assert ["default-src 'none'" in policy for policy in policies] == [True]
    assert "prefers-color-scheme: dark" in page.source
    assert "@media print" in page.source


def test_samples_show_first_and_last_recorded_round(run: Path) -> None:
    proxies = {f"proxies_{number}": np.full((20, 1, 7, 7), number, np.float32) for number in (2, 9, 10)}
    np.savez(
        run / "samples.npz", real=np.zeros((4, 1, 8, 8), np.uint8), real_caption=np.array(["test images"]), **proxies
    )
    page = page_of(run)
    assert [given["alt"] for given in page.named("img")] == [
        "Real images: test images",
        "20 proxies of 7x7 that one client sent in round 2",
        "20 proxies of 7x7 that one client sent in round 10",
    ]
    assert "16 of 20 images of 7x7, values from 10 to 10" in page.text
    assert "no guarantee of privacy" in page.text


def test_run_that_goes_on_is_readable(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 4, "kind": "pro')
    page = page_of(run)
    assert "not finished: 3 of 5 rounds" in page.text
    assert "94.7% test accuracy after 3 rounds" in page.text
    assert page.named("img") == []
    (run / "metrics.jsonl").write_text("")
    assert "No round has ended yet." in page_of(run).text
    write_lines(run / "metrics.jsonl", [ROWS[0]])
    page = page_of(run)
    assert "No round has ended yet." in page.text
    assert len(page.named("svg")) == 1


def test_round_written_twice_counts_once(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [*ROWS, line(3, "compressed", 0.5)])
    page = page_of(run)
    assert [row[0] for row in page.tables["rounds"]] == ["round", "0", "1", "2", "3", "all"]
    assert page.tables["rounds"][-1][2] == "50.00%"


def test_values_that_are_not_finite_are_left_out(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [*ROWS, line(4, "compressed", float("nan"), loss=float("inf"))])
    page = page_of(run)
    assert (page.tables["rounds"][5][2], page.tables["rounds"][5][5]) == ("\N{EN DASH}", "\N{EN DASH}")
    assert "nan" not in page.source.lower()


def test_replaces_the_page_and_leaves_nothing_else(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    (run / "report.html").write_text("old")
    path = write_report(run)
    assert path == run / "report.html"
    assert path.read_text().startswith("<!doctype html>")
    assert {entry.name for entry in run.iterdir()} == before | {"report.html"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_failed_write_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "report.html").write_text("old")
    before = {path.name for path in run.iterdir()}

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tofu.files.os.replace", refuse)
    with pytest.raises(RunError, match=r"report\.html cannot be written: No space left on device"):
        write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert {path.name for path in run.iterdir()} == before


def test_long_run_keeps_a_small_page(run: Path) -> None:
    failures = [{"client": "c" * 400, "reason": "r" * 400}] * 2
    rows = [line(n, "secure" if n == 1999 else "compressed", 0.5 + n / 5000, failures=failures) for n in range(1, 2001)]
    write_lines(run / "metrics.jsonl", rows)
    noise = np.random.default_rng(0)
    real = noise.integers(0, 256, (40, 3, 100, 100), dtype=np.uint8)
    np.savez(run / "samples.npz", real=real, proxies_1=noise.normal(size=(64, 3, 64, 64)).astype(np.float32))
    page = page_of(run)
    assert len(page.source) < 1_500_000
    assert "1500 earlier ones" in page.text
    # The one secure round is found in both figures although most rounds are not drawn.
    assert page.marks("secure") == 2 + 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{\n"a": 1,\n', r"config\.json line 3 is not JSON"),
        ("config.json", "[]", r"config\.json must hold a JSON object, found list"),
        ("metrics.jsonl", '{"round": 0, "kind": "start"}\n{"round"\n', r"metrics\.jsonl line 2 is not JSON"),
        ("metrics.jsonl", "\n7\n", r"metrics\.jsonl line 2 must hold a JSON object, found int"),
        ("metrics.jsonl", '{"kind": "compressed"}\n', r"metrics\.jsonl line 1: 'round': Field required"),
        ("metrics.jsonl", '{"round": 1}\n', r"metrics\.jsonl line 1: 'kind': Field required"),
        (
            "metrics.jsonl",
            '{"round": 1, "kind": "compressed", "accuracy": "high"}\n',
            r"metrics\.jsonl line 1: 'accuracy': .*number or null, found 'high'",
        ),
        (
            "metrics.jsonl",
            '{"round": 1, "kind": "compressed", "uplink_bytes": -1}\n',
            r"metrics\.jsonl line 1: 'uplink_bytes': .*, found -1",
        ),
        (
            "metrics.jsonl",
            '{"round": 1, "kind": "compressed", "failures": ["3"]}\n',
            r"metrics\.jsonl line 1: 'failures.0': .*, found '3'",
        ),
        (
            "ledger.jsonl",
            '{"kind": "compressed", "direction": "sideways"}\n',
            r"ledger\.jsonl line 1: 'direction': .*'uplink' or 'downlink', found 'sideways'",
        ),
        ("summary.json", '{"final_accuracy": true}', r"summary\.json: 'final_accuracy': .*number"),
        ("summary.json", '{"baseline": 3}', r"summary\.json: 'baseline': .*, found 3"),
        (
            "summary.json",
            '{"baseline": {"metrics": [{"round": 0, "kind": "start"}, {"round": 1}]}}',
            r"summary\.json: 'baseline.metrics.1.kind': Field required",
        ),
        ("samples.npz", "not an archive", r"samples\.npz cannot be read as arrays"),
    ],
)
def test_malformed_file_is_one_line(run: Path, name: str, content: str, message: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(RunError, match=message) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_missing_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(RunError, match=f"{re.escape(name)} is missing"):
        write_report(run)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere is not a run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"proxies_1": np.zeros((3, 7, 7), np.float32)}, r"'proxies_1' must hold images \[n, c, h, w\]"),
        ({"real": np.zeros((1, 1, 2, 2), np.float32)}, "'real' must be uint8, found float32"),
        ({"real": np.array([{"a": 1}], dtype=object)}, "cannot be read as arrays"),
    ],
)
def test_samples_of_a_wrong_form_are_refused(run: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(run / "samples.npz", **arrays)
    with pytest.raises(RunError, match=message):
        write_report(run)


def decoded(address: str, tmp_path: Path) -> np.ndarray[Any, Any]:
    """A sheet read back by another decoder, as uint8 [h, w, 4]."""
    path = tmp_path / "sheet.png"
    path.write_bytes(base64.b64decode(address.removeprefix("data:image/png;base64,")))
    return np.round(imread(path) * 255).astype(np.uint8)


def test_sheet_stretches_each_image_and_leaves_clear_gaps(tmp_path: Path) -> None:
    ramp = np.arange(4, dtype=np.float32).reshape(1, 2, 2)
    pixels = decoded(sheet(np.stack([ramp, 100 * ramp - 7, np.ones_like(ramp)]), columns=2), tmp_path)
    # Images of 2x2 are drawn at 64x64 with a gap of 6: two columns, two rows, the last place empty.
    assert pixels.shape == (134, 134, 4)
    for left in (0, 70):
        assert pixels[[0, 0, 63, 63], [left, left + 63, left, left + 63], 0].tolist() == [0, 85, 170, 255]
    assert pixels[70, 0].tolist() == [128, 128, 128, 255]
    assert pixels[100, 100, 3] == pixels[10, 66, 3] == 0


def test_sheet_draws_colors_and_survives_what_is_not_finite(tmp_path: Path) -> None:
    image = np.zeros((1, 3, 1, 2), np.float32)
    image[0, 0, 0, 0] = 1
    image[0, 1, 0, 1] = np.nan
    pixels = decoded(sheet(image), tmp_path)
    assert pixels[0, 0].tolist() == [255, 0, 0, 255]
    assert pixels[0, -1].tolist() == [0, 0, 0, 255]


def test_axes_have_round_ticks_inside() -> None:
    axis = fraction_axis([0.8125, 0.9473])
    assert (axis.low, axis.high) == pytest.approx((0.8, 0.95), abs=0.051)
    assert axis.at(axis.low) == BOTTOM
    assert axis.at(axis.high) == TOP
    assert all(axis.low - 1e-9 <= tick <= axis.high + 1e-9 for tick in axis.ticks())
    assert Axis(700, 3_000_000, 0, 1, log=True).ticks() == [1e3, 1e4, 1e5, 1e6]
    assert Axis(900, 9000, 0, 1, log=True).ticks() == [1e3, 2e3, 5e3]
    assert Axis(0, 3, 0, 1, pieces=3).ticks() == [0, 1, 2, 3]


def test_thinned_keeps_ends_and_changes_of_kind() -> None:
    kinds = ["a"] * 500 + ["b"] * 2 + ["a"] * 500
    kept = thinned(kinds, 20)
    assert {0, 500, 502, 1001} <= set(kept)
    assert len(kept) <= 22
    assert thinned(kinds[:20], 20) == list(range(20))
    assert len(thinned(["a", "b"] * 500, 20)) == 20
