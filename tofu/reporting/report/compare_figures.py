"""The figures of a comparison, from compare.json's document: accuracy against bytes, and by round at each ratio."""

import dataclasses
import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from tofu.formatting import format_bytes, format_fraction
from tofu.reporting.report.chart import (
    BOTTOM,
    LEFT,
    RIGHT,
    WIDTH,
    Axis,
    Drawing,
    nice_step,
    round_axis,
    share_axis,
    thinned,
)
from tofu.reporting.report.compare_tables import cell_name, method_name, ratio_text

Cell = Mapping[str, Any]

WIDE = 880
COLORS = 8
ZOOM_POINTS = 5
"""How far below FedAvg the enlarged figure reaches, in points."""
_CURVE_POINTS = 240
_DODGE = 7.0
_SHAPES = ("circle", "square", "diamond", "up", "down")

SERIES_COLORS = """
:root {
  --s0: #2a78d6; --s1: #d9602b; --s2: #12875a; --s3: #7b57b8;
  --s4: #c2317d; --s5: #8f6b12; --s6: #1190a6; --s7: #5d6470;
}
@media (prefers-color-scheme: dark) {
  :root {
    --s0: #5b9df0; --s1: #ec8152; --s2: #3dbd8a; --s3: #a98ae0;
    --s4: #ee79b4; --s5: #d0ab46; --s6: #4fc7da; --s7: #b4bac4;
  }
}
@media print {
  :root {
    --s0: #2a78d6; --s1: #d9602b; --s2: #12875a; --s3: #7b57b8;
    --s4: #c2317d; --s5: #8f6b12; --s6: #1190a6; --s7: #5d6470;
  }
}
"""
SERIES_STYLE = "\n".join(
    [
        *(f"svg .curve.s{n}, svg .error.s{n} {{ stroke: var(--s{n}); }}" for n in range(COLORS)),
        *(f"svg .mark.s{n} {{ fill: var(--s{n}); }}" for n in range(COLORS)),
        "svg .error { stroke-width: 1.5; fill: none; } svg .again { stroke-dasharray: 5 3; }",
        "svg .band { fill: var(--baseline); fill-opacity: .16; } svg .page { fill: var(--card); }",
    ]
)


def accuracy_by_uplink(document: Mapping[str, Any], *, zoom: bool = False) -> Drawing | None:
    """Final accuracy against a run's uplink bytes, a line for each compressor; None where nothing has been measured.

    Args:
        zoom: draw only the last `ZOOM_POINTS` points below FedAvg; None where that would leave out nothing or all.
    """
    reference, *others = document["cells"]
    done = [cell for cell in others if cell["final_accuracy"]]
    fedavg = reference["final_accuracy"]
    if not done:
        return None
    values = [end for cell in [*done, *([reference] if fedavg else [])] for end in _interval(cell["final_accuracy"])]
    if zoom:
        floor = fedavg["mean"] - ZOOM_POINTS / 100 if fedavg else 0.0
        inside = [cell for cell in done if cell["final_accuracy"]["mean"] >= floor]
        if not fedavg or not inside or min(values) > floor - 0.02:
            return None
        values = [max(value, floor) for value in values]
    series = _series(document)
    drawing = Drawing(_alt(document, done, zoom), 0, WIDE)
    entries = [(series[name], name) for name in document["compressors"] if any(c["compressor"] == name for c in done)]
    top = _legend(drawing, entries, _fedavg_key(reference))
    bottom = top + 270
    _resize(drawing, bottom + 46)
    sizes = [cell["uplink_bytes"]["mean"] for cell in done]
    right = WIDE - (WIDTH - RIGHT)
    x = Axis(min(sizes) / 1.35, max(sizes) * 1.35, LEFT, right, log=True)
    y = dataclasses.replace(_tight(values), start=bottom, end=top)
    drawing.frame(x, y, ("uplink bytes of the whole run (log scale)", "final test accuracy"), x_text=_tick_bytes)
    clip = _clip(drawing, "zoom" if zoom else "all", top, bottom, right)
    if fedavg:
        _level(drawing, y, fedavg, right)
    offsets = {name: _DODGE * (n - (len(entries) - 1) / 2) for n, (_, name) in enumerate(entries)}
    for style, name in entries:
        cells = sorted((c for c in done if c["compressor"] == name), key=lambda c: float(c["uplink_bytes"]["mean"]))
        places = [
            (x.at(c["uplink_bytes"]["mean"]) + offsets[name], y.at(c["final_accuracy"]["mean"]), c) for c in cells
        ]
        if len(places) > 1:
            points = " ".join(f"{px:g},{py:g}" for px, py, _ in places)
            drawing.add("polyline", f"curve {style.css}", points=points, clip_path=clip)
        for px, py, cell in places:
            if py <= bottom:
                _error_bar(drawing, px, [y.at(end) for end in _interval(cell["final_accuracy"])], style, clip)
                style.mark(drawing, px, py, _tip(cell))
    return drawing


def accuracy_by_round(document: Mapping[str, Any], ratio: float) -> Drawing | None:
    """Mean test accuracy after each round of every compressor at one ratio, FedAvg dashed."""
    reference, *others = document["cells"]
    done = [cell for cell in others if ratio in cell["ratios"] and cell["accuracy_by_round"]]
    if not done:
        return None
    series = _series(document)
    drawing = Drawing(
        f"Test accuracy by round at {ratio_text(ratio)}: "
        + "; ".join(
            f"{method_name(c['compressor'])} ends at {format_fraction(c['accuracy_by_round'][-1])}" for c in done
        ),
        0,
    )
    fedavg = reference["accuracy_by_round"]
    entries = [(series[cell["compressor"]], cell["compressor"]) for cell in done]
    top = _legend(drawing, entries, "FedAvg" if fedavg else "")
    bottom = top + BOTTOM - 58
    _resize(drawing, bottom + 44)
    lines = [(series[cell["compressor"]], cell["accuracy_by_round"]) for cell in done]
    last = len(done[0]["accuracy_by_round"]) - 1
    # The first quarter of the rounds would take most of the height, although differences matter at the end.
    late = max(1, last // 4)
    values = [value for points in (*(p for _, p in lines), fedavg) for value in points[late:]]
    x = round_axis(last)
    y = dataclasses.replace(_tight(values), start=bottom, end=top)
    drawing.frame(x, y, ("round", "test accuracy, mean over seeds"), x_text=lambda value: f"{value:.0f}")
    clip = _clip(drawing, f"round-{ratio:.12g}", top, bottom, RIGHT)
    if fedavg:
        _curve(drawing, x, y, fedavg, "c-baseline", clip)
    for style, points in lines:
        _curve(drawing, x, y, points, style.css, clip)
    for style, points in lines:
        style.mark(drawing, x.at(last), min(y.at(points[-1]), bottom), format_fraction(points[-1], 2))
    return drawing


@dataclasses.dataclass(frozen=True)
class _Style:
    """How a compressor is drawn: color and shape both tell it apart; past the colors lines are broken as well."""

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


def _legend(drawing: Drawing, entries: Sequence[tuple[_Style, str]], fedavg: str) -> float:
    """Rows of keys from the left, wrapped; where the plot below may begin."""
    x, y = float(LEFT), 34.0
    for style, text in [*entries, *([(None, fedavg)] if fedavg else [])]:
        wide = 33 + 6.6 * len(text) + 16  # about so many pixels a character: SVG has no layout
        if x > LEFT and x + wide - 16 > drawing.width:
            x, y = float(LEFT), y + 18
        css = style.css if style else "c-baseline"
        drawing.add("line", f"curve {css}", x1=x, x2=x + 26, y1=y - 4, y2=y - 4)
        if style:
            style.mark(drawing, x + 13, y - 4)
        drawing.add("text", "tick", text, x=x + 33, y=y)
        x += wide
    return y + 20


def _fedavg_key(reference: Cell) -> str:
    if not reference["final_accuracy"]:
        return ""
    return f"FedAvg ({format_bytes(round(reference['uplink_bytes']['mean']))})"


def _level(drawing: Drawing, y: Axis, fedavg: Mapping[str, Any], right: float) -> None:
    """FedAvg's mean as a dashed level across the plot, in the band of its deviation."""
    low, high = (y.at(end) for end in _interval(fedavg))
    if high < low:  # pixels count down
        drawing.add("rect", "band", x=LEFT, y=high, width=right - LEFT, height=round(low - high, 2))
    level = y.at(fedavg["mean"])
    drawing.add("line", "curve c-baseline", tip=f"FedAvg: {_share(fedavg)}", x1=LEFT, x2=right, y1=level, y2=level)


def _error_bar(drawing: Drawing, x: float, ends: Sequence[float], style: _Style, clip: str) -> None:
    low, high = ends
    if low != high:
        path = f"M{x - 3.5:g} {low:g}h7M{x:g} {low:g}V{high:g}M{x - 3.5:g} {high:g}h7"
        drawing.add("path", f"error s{style.index % COLORS}", d=path, clip_path=clip)


def _curve(drawing: Drawing, x: Axis, y: Axis, values: Sequence[float], css: str, clip: str) -> None:
    kept = thinned([css] * len(values), _CURVE_POINTS)
    points = " ".join(f"{x.at(index):g},{y.at(values[index]):g}" for index in kept)
    drawing.add("polyline", f"curve {css}", points=points, clip_path=clip)


def _clip(drawing: Drawing, name: str, top: float, bottom: float, right: float) -> str:
    """Nothing drawn with this is seen below the plot, where values beyond its axis would lie."""
    node = ET.SubElement(drawing.svg, "clipPath", id=f"clip-{name}")
    area = {"x": 0, "y": top - 12, "width": right + 12, "height": bottom - top + 12}
    ET.SubElement(node, "rect", {key: f"{value:g}" for key, value in area.items()})
    return f"url(#clip-{name})"


def _resize(drawing: Drawing, height: float) -> None:
    drawing.height = math.ceil(height)
    drawing.svg.set("viewBox", f"0 0 {drawing.width} {drawing.height}")


def _tight(values: Sequence[float]) -> Axis:
    """A vertical axis as `share_axis` makes, for differences down to a tenth of a point."""
    low, high = min(values), max(values)
    step = nice_step(max(high - low, 0.005))
    if step >= 0.02:
        return share_axis(values)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    high = min(max(high, low + step), 1.0)
    return Axis(min(low, high - step), high, BOTTOM, 0)


def _interval(spread: Mapping[str, Any]) -> tuple[float, float]:
    deviation = spread["sd"] or 0.0
    return max(spread["mean"] - deviation, 0.0), min(spread["mean"] + deviation, 1.0)


def _share(spread: Mapping[str, Any]) -> str:
    text = format_fraction(spread["mean"], 2)
    return text if spread["sd"] is None else f"{text} ± {100 * spread['sd']:.2f}"


def _tip(cell: Cell) -> str:
    return (
        f"{cell_name(cell)}: {_share(cell['final_accuracy'])} for {format_bytes(round(cell['uplink_bytes']['mean']))}"
    )


def _alt(document: Mapping[str, Any], done: Sequence[Cell], zoom: bool) -> str:
    what = f"Final test accuracy against uplink bytes{', the points just below FedAvg' if zoom else ''}: "
    parts = [_tip(cell) for cell in done]
    fedavg = document["cells"][0]
    return what + "; ".join(parts + ([_tip(fedavg)] if fedavg["final_accuracy"] else [])) + "."


def _tick_bytes(value: float) -> str:
    return format_bytes(round(value)).replace(".0 ", " ")
