"""Draws the panels of plugins (`tofu.rounds.panel`): charts as SVG, tables and images."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from tofu.reporting.report import images
from tofu.reporting.report.chart import LEFT, RIGHT, TOP, Bar, Drawing, bar_chart, thinned, value_axis
from tofu.rounds.panel import Chart, Figure, ImageFigure, Panel, Series, TableFigure

SERIES = 8
"""Number of series with a color of their own; more of them share the colors."""
_POINTS = 240
_BARS = 24
_ROWS = 200


def panel_context(panel: Panel) -> dict[str, Any]:
    """Return the values with which the page's template renders a panel."""
    return {"title": panel.title, "text": panel.text, "figures": [_context(figure) for figure in panel.figures]}


def _context(figure: Figure) -> dict[str, Any]:
    found: dict[str, Any] = {"title": figure.title, "svg": "", "table": None, "image": ""}
    if isinstance(figure, TableFigure):
        rows = [[_cell(value) for value in row] for row in figure.rows[:_ROWS]]
        return found | {"table": {"header": figure.header, "rows": rows}}
    if isinstance(figure, ImageFigure):
        pixels = [np.atleast_3d(np.array(image, dtype=np.float32)).transpose(2, 0, 1) for image in figure.images]
        usable = pixels and all(image.shape == pixels[0].shape and image.size for image in pixels)
        return found | {"image": images.sheet(np.stack(pixels)) if usable else ""}
    # Safe as markup: built as an XML tree, which escapes its texts.
    return found | {"svg": Markup(_chart(figure))}


def _cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _chart(chart: Chart) -> str:
    if chart.kind == "bars":
        return _bars(chart)
    if chart.kind == "histogram":
        series = tuple(_histogram(each, _limits(chart), chart.bins) for each in chart.series)
    else:
        series = tuple(_points(each) for each in chart.series)
    drawing = Drawing(f"{chart.title}: {', '.join(each.name for each in chart.series)}.")
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    if not xs:
        drawing.add("text", "label", "no values", x=0, y=TOP)
        return drawing.markup()
    x, y = value_axis(xs, LEFT, RIGHT - 6), value_axis(ys)
    drawing.frame(x, y, (chart.x_label, chart.y_label), x_text="{:.4g}".format, y_text="{:.4g}".format)
    if len(series) > 1:
        drawing.legend([(f"c-s{index % SERIES}", name[:24]) for index, (name, _) in enumerate(series)])
    for index, (name, points) in enumerate(series):
        css = f"c-s{index % SERIES}"
        kept = [points[at] for at in thinned([css] * len(points), _POINTS)]
        drawing.curve([(x.at(a), y.at(b)) for a, b in kept], css)
        if kept:
            a, b = kept[-1]
            drawing.add("circle", f"dot {css}", tip=f"{name}: {b:.4g}", cx=x.at(a), cy=y.at(b), r=3)
    return drawing.markup()


def _points(series: Series) -> tuple[str, list[tuple[float, float]]]:
    xs: Sequence[float] = series.x or range(len(series.values))
    pairs = zip(xs, series.values, strict=False)
    return series.name, [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]


def _limits(chart: Chart) -> tuple[float, float]:
    """Return the range of all samples: histograms of one chart share their bins."""
    values = [value for series in chart.series for value in series.values if math.isfinite(value)]
    return (min(values), max(values)) if values else (0.0, 1.0)


def _histogram(series: Series, limits: tuple[float, float], bins: int) -> tuple[str, list[tuple[float, float]]]:
    """Return a histogram as a step curve of fractions."""
    values = [value for value in series.values if math.isfinite(value)]
    if not values:
        return series.name, []
    counts, edges = np.histogram(values, bins=max(1, bins), range=limits)
    points = [(float(edges[0]), 0.0)]
    for count, left, right in zip(counts / len(values), edges, edges[1:], strict=False):
        points += [(float(left), float(count)), (float(right), float(count))]
    return series.name, [*points, (float(edges[-1]), 0.0)]


def _bars(chart: Chart) -> str:
    bars = [
        (series.labels[at] if at < len(series.labels) else f"{at}", series.name, index, value)
        for index, series in enumerate(chart.series)
        for at, value in enumerate(series.values)
        if math.isfinite(value)
    ][:_BARS]
    alt = f"{chart.title}: " + "; ".join(f"{name} {value:.4g}" for name, _, _, value in bars)
    drawn = [
        Bar(f"{label} ({name})" if len(chart.series) > 1 else label, f"{value:.4g}", value, f"k-s{index % SERIES}")
        for label, name, index, value in bars
    ]
    return bar_chart(alt, drawn).markup()
