"""Axes and marks: the few SVG parts that the figures are made of.

Colors and fonts are CSS classes of the page, so a figure follows light mode, dark mode and print. Text passes through
an XML tree and is escaped there, never pasted into markup.
"""

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 540, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 534, 58, 286
_MARGIN = 12
KINDS = ("start", "proxy", "fedavg", "secure")


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to pixels in [start, end], on a linear or a logarithmic scale.

    `pieces` is about how many steps the ticks of a linear axis cut it into.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    pieces: int = 5

    def at(self, value: float) -> float:
        """The pixel of a value; with `log`, values must be positive."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 2)

    def ticks(self) -> list[float]:
        """Round values inside the axis: on a log axis the decades, with 2s and 5s if they are few."""
        if not self.log:
            step = nice_step(self.high - self.low, self.pieces)
            first = math.ceil(self.low / step - 1e-9)
            return [round(n * step, 10) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        few = math.log10(self.high / self.low) < 2.5
        values = [10.0**decade * factor for decade in decades for factor in ((1, 2, 5) if few else (1,))]
        return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]


def nice_step(span: float, about: int = 5) -> float:
    """A step of 1, 2 or 5 times a power of ten that cuts `span` (positive) into about `about` pieces."""
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if rough <= factor * power * 1.0001)


def share_axis(values: Sequence[float]) -> Axis:
    """A vertical axis for shares of one, as tight around the values as whole ticks allow and never past 0 or 1."""
    low, high = min(values), max(values)
    step = nice_step(max(high - low, 0.1))
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if min(values) >= 0:
        low = max(low, 0.0)
    if max(values) <= 1:
        high = min(high, 1.0)
    return Axis(low, high if high > low else low + step, BOTTOM, TOP)


def round_axis(last: int) -> Axis:
    """A horizontal axis over the rounds 0 to `last`."""
    return Axis(0, max(last, 1), LEFT, RIGHT - 6, pieces=min(8, max(last, 1)))


class Drawing:
    """One figure under construction: an SVG of `width` times `height` with the text `alt` for who cannot see it."""

    def __init__(self, alt: str, height: int = HEIGHT, width: int = WIDTH) -> None:
        self.width, self.height = width, height
        self.svg = ET.Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": alt})

    def add(self, tag: str, css: str = "", text: str = "", tip: str = "", **attributes: float | str) -> None:
        """Append one element; `tip` is shown while the pointer rests on it. `_` in an attribute name stands for `-`."""
        given = {name.replace("_", "-"): f"{value}" for name, value in attributes.items()}
        node = ET.SubElement(self.svg, tag, {"class": css, **given} if css else given)
        node.text = text or None
        if tip:
            ET.SubElement(node, "title").text = tip

    def frame(
        self,
        x: Axis,
        y: Axis,
        labels: tuple[str, str],
        *,
        x_text: Callable[[float], str],
        y_text: Callable[[float], str] | None = None,
    ) -> None:
        """Grid, ticks and the names of both axes; the vertical one counts in percent unless `y_text` says otherwise."""
        decimals = 0 if nice_step(y.high - y.low) >= 0.01 else 1
        y_text = y_text or (lambda value: f"{100 * value:.{decimals}f}%")
        right, bottom = self.width - (WIDTH - RIGHT), y.start
        for value in y.ticks():
            self.add("line", "grid", x1=LEFT, x2=right, y1=y.at(value), y2=y.at(value))
            self.add("text", "tick end", y_text(value), x=LEFT - 8, y=y.at(value) + 4)
        for value in x.ticks():
            self.add("line", "axis", x1=x.at(value), x2=x.at(value), y1=bottom, y2=bottom + 4)
            self.add("text", "tick middle", x_text(value), x=x.at(value), y=bottom + 18)
        self.add("line", "axis", x1=LEFT, x2=right, y1=bottom, y2=bottom)
        self.add("text", "label middle", labels[0], x=(LEFT + right) / 2, y=bottom + 38)
        self.add("text", "label", labels[1], x=0, y=12)

    def curve(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """A line through pixel positions."""
        if len(points) > 1:
            self.add("polyline", f"curve {css}", points=" ".join(f"{x:g},{y:g}" for x, y in points))

    def mark(self, x: float, y: float, kind: str, tip: str = "", *, hollow: bool = False) -> None:
        """The mark of a kind of round. Shape as well as color tells the kinds apart; `hollow`: it was abandoned."""
        css = f"mark k-{kind}" if kind in KINDS else "mark k-other"
        css += " hollow" if hollow else ""
        if kind == "fedavg":
            self.add("rect", css, tip=tip, x=x - 4, y=y - 4, width=8, height=8)
        elif kind == "secure":
            self.add("path", css, tip=tip, d=f"M{x:g} {y - 5.5:g}l5.5 5.5-5.5 5.5-5.5-5.5z")
        else:
            self.add("circle", css, tip=tip, cx=x, cy=y, r=4.2)

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """A row of keys above the plot, from the right: pairs of a kind (or the CSS class of a curve) and its text."""
        x = float(RIGHT)
        for kind, text in reversed(entries):
            # About 6.2 pixels a character at 12 px: SVG has no layout, and a key may be a little wide.
            x -= 6.2 * len(text)
            self.add("text", "tick", text, x=x, y=28)
            if kind.startswith("c-"):
                self.add("line", f"curve {kind}", x1=x - 26, x2=x - 6, y1=24, y2=24)
                x -= 42
            else:
                self.mark(x - 11, 24, kind)
                x -= 34

    def markup(self) -> str:
        """The figure as markup that can be placed in a page."""
        return ET.tostring(self.svg, encoding="unicode")


def standalone(drawings: Sequence[Drawing], style: str) -> str:
    """Figures below each other as a file of its own, with the CSS that a page would give them and a background."""
    width = max(drawing.width for drawing in drawings) + 2 * _MARGIN
    height = sum(drawing.height + 2 * _MARGIN for drawing in drawings)
    size = {"width": f"{width}", "height": f"{height}"}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}", **size})
    ET.SubElement(root, "style").text = style
    ET.SubElement(root, "rect", {"class": "page", **size})
    top = _MARGIN
    for drawing in drawings:
        place = {"x": _MARGIN, "y": top, "width": drawing.width, "height": drawing.height}
        node = ET.SubElement(root, "svg", drawing.svg.attrib | {name: f"{value}" for name, value in place.items()})
        node.extend(drawing.svg)
        top += drawing.height + 2 * _MARGIN
    return ET.tostring(root, encoding="unicode")


def thinned(kinds: Sequence[str], most: int) -> list[int]:
    """At most about `most` of the indices of `kinds`, evenly spread and with both ends: long runs keep a small page.

    Where the kind changes is kept as well (if it does not change all the time): a few secure rounds among thousands of
    others are what a reader looks for.
    """
    count = len(kinds)
    if count <= most:
        return list(range(count))
    changes = [index for index in range(1, count) if kinds[index] != kinds[index - 1]]
    spread = {round(index * (count - 1) / (most - 1)) for index in range(most)}
    return sorted(spread.union(changes if len(changes) <= most else []))
