"""The figures of a comparison, from compare.json's document: accuracy against bytes, and by round at each ratio."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tofu.formatting import format_bytes, format_fraction
from tofu.reporting.report.chart import (
    LEFT,
    RIGHT,
    WIDTH,
    Axis,
    Drawing,
    fraction_axis,
    round_axis,
    thinned,
    tick_bytes,
)
from tofu.reporting.report.compare_tables import cell_name, method_name, ratio_text

Cell = Mapping[str, Any]

COLORS = 8
ZOOM_POINTS = 5
"""Range of the enlarged figure below FedAvg, in percentage points."""
_CURVE_POINTS = 240
_DODGE = 5.0
_ROW = 44
_SPAN = 0.005
"""Smallest span of an axis of accuracies: the ticks show a tenth of a point."""
_SHAPES = ("circle", "square", "diamond", "up", "down")

SERIES_COLORS = """
:root {
  --s0: #2a78d6; --s1: #d9602b; --s2: #12875a; --s3: #7b57b8;
  --s4: #c2317d; --s5: #8f6b12; --s6: #1190a6; --s7: #5d6470;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --s0: #5b9df0; --s1: #ec8152; --s2: #3dbd8a; --s3: #a98ae0;
    --s4: #ee79b4; --s5: #d0ab46; --s6: #4fc7da; --s7: #b4bac4;
  }
}
"""
SERIES_STYLE = "\n".join(
    [
        *(f"svg .curve.s{n}, svg .error.s{n} {{ stroke: var(--s{n}); }}" for n in range(COLORS)),
        *(f"svg .mark.s{n} {{ fill: var(--s{n}); }}" for n in range(COLORS)),
        *(f"svg .seed.s{n} {{ stroke: var(--s{n}); }}" for n in range(COLORS)),
        "svg .error { stroke-width: 1.5; fill: none; } svg .again { stroke-dasharray: 5 3; }",
        "svg .seed { fill: var(--card); stroke-width: 1.4; } svg .fedavg { stroke: var(--baseline); }",
        "svg .band { fill: var(--baseline); fill-opacity: .16; }",
    ]
)


def accuracy_by_uplink(document: Mapping[str, Any], *, zoom: bool = False) -> Drawing | None:
    """Draw final accuracy against a run's uplink bytes, a line for each compressor;
    None where nothing has been measured.

    Args:
        zoom: draw only what ends less than `ZOOM_POINTS` points below FedAvg; None where that is nothing or all.
    """
    reference, *others = document["cells"]
    done = [cell for cell in others if cell["final_accuracy"]]
    fedavg = reference["final_accuracy"]
    if zoom:
        everything, done = done, near_fedavg(document)
        if len(done) == len(everything):
            return None
    if not done:
        return None
    series = _series(document)
    drawing = Drawing(_alt(document, done, zoom))
    entries = [(series[name], name) for name in document["compressors"] if any(c["compressor"] == name for c in done)]
    sizes = [cell["uplink_bytes"]["mean"] for cell in done]
    x = Axis(min(sizes) / 1.35, max(sizes) * 1.35, LEFT, RIGHT, log=True)
    y = fraction_axis([end for cell in done for end in _interval(cell)] + list(_interval(reference)), span=_SPAN)
    drawing.frame(x, y, ("uplink bytes of the whole run (log scale)", "final test accuracy"), x_text=tick_bytes)
    _legend(drawing, entries, _fedavg_key(reference))
    if fedavg:
        _level(drawing, y, reference)
    offsets = {name: _DODGE * (n - (len(entries) - 1) / 2) for n, (_, name) in enumerate(entries)}
    for style, name in entries:
        cells = sorted((c for c in done if c["compressor"] == name), key=lambda c: float(c["uplink_bytes"]["mean"]))
        places = [
            (x.at(c["uplink_bytes"]["mean"]) + offsets[name], y.at(c["final_accuracy"]["mean"]), c) for c in cells
        ]
        drawing.curve([(px, py) for px, py, _ in places], style.css)
        for px, py, cell in places:
            low, high = (y.at(end) for end in _interval(cell))
            if low != high:
                path = f"M{px - 3.5:g} {low:g}h7M{px:g} {low:g}V{high:g}M{px - 3.5:g} {high:g}h7"
                drawing.add("path", f"error s{style.index % COLORS}", d=path)
            style.mark(drawing, px, py, _tip(cell))
    return drawing


def near_fedavg(document: Mapping[str, Any]) -> list[Cell]:
    """Return the cells that end less than `ZOOM_POINTS` points below FedAvg;
    all of them if the others are hardly lower.
    """
    reference, *others = document["cells"]
    done = [cell for cell in others if cell["final_accuracy"]]
    if not reference["final_accuracy"]:
        return done
    floor = reference["final_accuracy"]["mean"] - ZOOM_POINTS / 100
    near = [cell for cell in done if cell["final_accuracy"]["mean"] >= floor]
    return near if any(cell["final_accuracy"]["mean"] < floor - 0.02 for cell in done) else done


def accuracy_by_round(document: Mapping[str, Any], ratio: float) -> Drawing | None:
    """Draw mean test accuracy after each round of every compressor at one ratio, FedAvg dashed."""
    reference, *others = document["cells"]
    done = [cell for cell in others if ratio in cell["ratios"] and cell["accuracy_by_round"]]
    if not done:
        return None
    series = _series(document)
    drawing = Drawing(
        f"Test accuracy by round at {ratio_text(ratio)}: "
        + "; ".join(
            f"{method_name(c['compressor'])} ends at {format_fraction(c['accuracy_by_round'][-1])}" for c in done
        )
    )
    fedavg = reference["accuracy_by_round"]
    lines = [(series[cell["compressor"]], cell["accuracy_by_round"]) for cell in done]
    last = len(done[0]["accuracy_by_round"]) - 1
    x = round_axis(last)
    y = fraction_axis([value for points in (*(p for _, p in lines), fedavg) for value in points], span=_SPAN)
    drawing.frame(x, y, ("round", "test accuracy, mean over seeds"), x_text=lambda value: f"{value:.0f}")
    _legend(drawing, [(series[cell["compressor"]], cell["compressor"]) for cell in done], "FedAvg" if fedavg else "")
    for css, points in [("c-baseline", fedavg), *((style.css, points) for style, points in lines)]:
        kept = thinned([css] * len(points), _CURVE_POINTS)
        drawing.curve([(x.at(index), y.at(points[index])) for index in kept], css)
    for style, points in lines:
        style.mark(drawing, x.at(last), y.at(points[-1]), format_fraction(points[-1], 2))
    return drawing


def accuracy_by_seed(document: Mapping[str, Any], ratio: float) -> Drawing | None:
    """Draw final test accuracy of every run at one ratio: a row per compressor
    with a dot per seed, mean and deviation.
    """
    reference, *others = document["cells"]
    done = [cell for cell in others if ratio in cell["ratios"] and cell["final_accuracy"]]
    if not done:
        return None
    done.sort(key=lambda cell: -float(cell["final_accuracy"]["mean"]))
    rows = [*([reference] if reference["final_accuracy"] else []), *done]
    ends = {cell_name(cell): seed_accuracies(document, cell) for cell in rows}
    drawing = Drawing(
        f"Final test accuracy of every seed at {ratio_text(ratio)}: "
        + "; ".join(f"{name} {', '.join(format_fraction(value, 2) for value in ends[name])}" for name in ends)
    )
    bottom = 22 + _ROW * len(rows)
    scale = fraction_axis([value for cell in rows for value in (*_interval(cell), *ends[cell_name(cell)])], span=_SPAN)
    x = dataclasses.replace(scale, start=14, end=WIDTH - 14)
    series = _series(document)
    for row, cell in enumerate(rows):
        y = 28 + _ROW * row
        name = method_name(cell["compressor"])
        drawing.add("text", "bar-name", name[:30], x=0, y=y - 10)
        drawing.add("text", "tick end", _percent(cell["final_accuracy"]), x=WIDTH, y=y - 10)
        drawing.add("rect", "rail", x=0, y=y + 5, width=WIDTH, height=2)
        low, high = (x.at(end) for end in _interval(cell))
        style = series.get(cell["compressor"])
        css = style.css.split()[0] if style else "fedavg"
        if low != high:
            drawing.add(
                "path", f"error {css}", d=f"M{low:g} {y + 1:g}v10M{low:g} {y + 6:g}H{high:g}M{high:g} {y + 1:g}v10"
            )
        for value in ends[cell_name(cell)]:
            drawing.add("circle", f"seed {css}", tip=format_fraction(value, 2), cx=x.at(value), cy=y + 6, r=3.2)
        mean = x.at(cell["final_accuracy"]["mean"])
        if style:
            style.mark(drawing, mean, y + 6)
        else:
            drawing.add("circle", "mark k-baseline", cx=mean, cy=y + 6, r=4.6)
    drawing.bottom_axis(x, bottom, "final test accuracy")
    return drawing


def seed_accuracies(document: Mapping[str, Any], cell: Cell) -> list[float]:
    """Return the final accuracies of a cell's runs, in the order of the seeds."""
    ratio = cell["ratios"][0] if cell["ratios"] else None
    return [
        row["final_accuracy"]
        for row in document["runs"]
        if row["compressor"] == cell["compressor"] and row["ratio"] == ratio and "failed" not in row
    ]


@dataclasses.dataclass(frozen=True)
class _Style:
    """Color and shape of a compressor; if there are more compressors than colors, further lines are dashed."""

    index: int

    @property
    def css(self) -> str:
        return f"s{self.index % COLORS}" + (" again" if self.index >= COLORS else "")

    def mark(self, drawing: Drawing, x: float, y: float, tip: str = "") -> None:
        shape = _SHAPES[self.index % len(_SHAPES)]
        css = f"mark s{self.index % COLORS}"
        if shape == "circle":
            drawing.add("circle", css, tip=tip, cx=x, cy=y, r=4.6)
        elif shape == "square":
            drawing.add("rect", css, tip=tip, x=x - 4.2, y=y - 4.2, width=8.4, height=8.4)
        else:
            paths = {"diamond": "m0-6 6 6-6 6-6-6z", "up": "m0-5.5 5.6 9.7h-11.2z", "down": "m0 5.5 5.6-9.7h-11.2z"}
            drawing.add("path", css, tip=tip, d=f"M{x:g} {y:g}{paths[shape]}")


def _series(document: Mapping[str, Any]) -> dict[str, _Style]:
    return {name: _Style(index) for index, name in enumerate(document["compressors"])}


def _legend(drawing: Drawing, entries: Sequence[tuple[_Style, str]], fedavg: str) -> None:
    keys: list[tuple[str | Callable[[float, float], None], str]] = [
        (partial(_key, drawing, style), text[:40]) for style, text in entries
    ]
    drawing.legend([*keys, *([("c-baseline", fedavg)] if fedavg else [])])


def _key(drawing: Drawing, style: _Style, x: float, y: float) -> None:
    drawing.add("line", f"curve {style.css}", x1=x - 13, x2=x + 13, y1=y, y2=y)
    style.mark(drawing, x, y)


def _fedavg_key(reference: Cell) -> str:
    if not reference["final_accuracy"]:
        return ""
    return f"FedAvg ({format_bytes(round(reference['uplink_bytes']['mean']))})"


def _level(drawing: Drawing, y: Axis, reference: Cell) -> None:
    """Draw FedAvg's mean as a dashed level across the plot, in the band of its deviation."""
    low, high = (y.at(end) for end in _interval(reference))
    if high < low:  # pixels count down
        drawing.add("rect", "band", x=LEFT, y=high, width=RIGHT - LEFT, height=round(low - high, 2))
    fedavg = reference["final_accuracy"]
    level = y.at(fedavg["mean"])
    drawing.add("line", "curve c-baseline", tip=f"FedAvg: {_percent(fedavg)}", x1=LEFT, x2=RIGHT, y1=level, y2=level)


def _interval(cell: Cell) -> tuple[float, ...]:
    """Return the mean accuracy less and plus one standard deviation; () for a cell without results."""
    spread = cell["final_accuracy"]
    if not spread:
        return ()
    deviation = spread["sd"] or 0.0
    return max(spread["mean"] - deviation, 0.0), min(spread["mean"] + deviation, 1.0)


def _percent(spread: Mapping[str, Any]) -> str:
    text = format_fraction(spread["mean"], 2)
    return text if spread["sd"] is None else f"{text} ± {100 * spread['sd']:.2f}"


def _tip(cell: Cell) -> str:
    uplink = format_bytes(round(cell["uplink_bytes"]["mean"]))
    return f"{cell_name(cell)}: {_percent(cell['final_accuracy'])} for {uplink}"


def _alt(document: Mapping[str, Any], done: Sequence[Cell], zoom: bool) -> str:
    what = f"Final test accuracy against uplink bytes{', the points just below FedAvg' if zoom else ''}: "
    parts = [_tip(cell) for cell in done]
    fedavg = document["cells"][0]
    return what + "; ".join(parts + ([_tip(fedavg)] if fedavg["final_accuracy"] else [])) + "."
