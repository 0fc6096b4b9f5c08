"""Axes and marks: the few SVG parts that the figures are made of.

Colors and fonts are CSS classes of the page, so a figure follows light mode, dark mode and print. Text passes through
an XML tree and is escaped there, never pasted into markup. A figure is `WIDTH` units wide at every size of the page; on
a phone, where a unit is less than a pixel, its text has more units (`template.FIGURE_STYLE`). The layout leaves space
for that larger text.
"""

import math
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tofu.formatting import format_bytes

WIDTH, HEIGHT = 400, 286
LEFT, RIGHT, TOP, BOTTOM = 54, 394, 34, 236
_MARGIN = 12
_SCALE = 1.4
"""Pixels per unit in a separate SVG file."""
_CHARACTER = 8.4
"""Units that a character of the larger text takes at most, on average: SVG has no layout."""
_LINE = 46
"""Characters of a line of text."""
KINDS = ("start", "compressed", "fedavg", "secure")
_FILE_STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
svg .page { fill: var(--card); }
"""
"""What a separate file needs besides the style of figures: in a page, the page has the font and the background."""
_Key = str | Callable[[float, float], None]


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
        """Return the pixel of a value; with `log`, values must be positive."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 2)

    def ticks(self) -> list[float]:
        """Round values inside the axis: on a log axis the decades, and values between them if they are few."""
        if not self.log:
            step = nice_step(self.high - self.low, self.pieces)
            first = math.ceil(self.low / step - 1e-9)
            return [round(n * step, 10) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        few = math.log10(self.high / self.low) < 2.5
        for factors in ((1, 2, 5) if few else (1,), (1, 1.5, 2, 3, 4, 5, 7)):
            values = [10.0**decade * factor for decade in decades for factor in factors]
            inside = [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]
            if len(inside) > 2:
                break
        return inside


def nice_step(span: float, about: int = 5) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that cuts `span` (positive) into about `about` pieces."""
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if rough <= factor * power * 1.0001)


def value_axis(values: Sequence[float], start: float = BOTTOM, end: float = TOP, *, span: float = 0.0) -> Axis:
    """Return an axis as tight around the values as whole ticks allow.

    Args:
        span: what the ticks are chosen for if the values span less.
    """
    low, high = min(values), max(values)
    step = nice_step(max(high - low, span) or abs(low) or 1.0)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(low, high if high > low else low + step, start, end)


def fraction_axis(values: Sequence[float], *, span: float = 0.1) -> Axis:
    """Return a vertical axis for fractions, as `value_axis`, that does not extend past 0 or 1 without need."""
    axis = value_axis(values, span=span)
    low = max(axis.low, 0.0) if min(values) >= 0 else axis.low
    high = min(axis.high, 1.0) if max(values) <= 1 else axis.high
    return replace(axis, low=low if high > low else low - nice_step(span), high=high)


def round_axis(last: int) -> Axis:
    """Return a horizontal axis over the rounds 0 to `last`."""
    return Axis(0, max(last, 1), LEFT, RIGHT - 6, pieces=min(8, max(last, 1)))


def tick_bytes(value: float) -> str:
    """Return a number of bytes at a tick, without a decimal of zero."""
    return format_bytes(round(value)).replace(".0 ", " ")


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
        self._x_axis(x, bottom, (LEFT, right), labels[0], x_text)
        self.add("text", "label", labels[1], x=0, y=12)

    def bottom_axis(self, x: Axis, y: float, label: str) -> None:
        """Draw a horizontal axis in percent below a figure without a vertical axis, at its end."""
        decimals = 0 if nice_step(x.high - x.low) >= 0.01 else 1
        self._x_axis(x, y, (0, self.width), label, lambda value: f"{100 * value:.{decimals}f}%")
        self.height = math.ceil(y) + 50
        self.svg.set("viewBox", f"0 0 {self.width} {self.height}")

    def _x_axis(
        self, x: Axis, bottom: float, ends: tuple[float, float], label: str, text: Callable[[float], str]
    ) -> None:
        free = 0.0
        for value in x.ticks():
            self.add("line", "axis", x1=x.at(value), x2=x.at(value), y1=bottom, y2=bottom + 4)
            half = _CHARACTER * len(text(value)) / 2
            middle = round(min(x.at(value), self.width - half), 2)
            if middle - half >= free:
                self.add("text", "tick middle", text(value), x=middle, y=bottom + 20)
                free = middle + half + 6
        self.add("line", "axis", x1=ends[0], x2=ends[1], y1=bottom, y2=bottom)
        self.add("text", "label middle", label, x=sum(ends) / 2, y=bottom + 42)

    def curve(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """Draw a line through pixel positions."""
        if len(points) > 1:
            self.add("polyline", f"curve {css}", points=" ".join(f"{x:g},{y:g}" for x, y in points))

    def mark(self, x: float, y: float, kind: str, tip: str = "", *, hollow: bool = False) -> None:
        """Draw the mark of a kind of round. Shape as well as color tells the kinds apart;
        `hollow`: it was abandoned.
        """
        css = f"mark k-{kind}" if kind in KINDS else "mark k-other"
        css += " hollow" if hollow else ""
        if kind == "fedavg":
            self.add("rect", css, tip=tip, x=x - 4, y=y - 4, width=8, height=8)
        elif kind == "secure":
            self.add("path", css, tip=tip, d=f"M{x:g} {y - 5.5:g}l5.5 5.5-5.5 5.5-5.5-5.5z")
        else:
            self.add("circle", css, tip=tip, cx=x, cy=y, r=4.2)

    def legend(self, entries: Sequence[tuple[_Key, str]]) -> None:
        """Draw rows of keys above the figure: pairs of a key and its text.

        A key is a kind of round, the CSS class of a curve, or a function that draws it around a position.
        """
        rows: list[list[tuple[float, _Key, str]]] = [[]]
        x = 0.0
        for key, text in entries:
            wide = _key_width(key) + _CHARACTER * len(text)
            if x and x + wide > self.width:
                rows.append([])
                x = 0.0
            rows[-1].append((x, key, text))
            x += wide + 12
        for above, row in enumerate(reversed(rows)):
            y = -14.0 - 22 * above
            for left, key, text in row:
                if callable(key):
                    key(left + 13, y - 4)
                elif key.startswith("c-"):
                    self.add("line", f"curve {key}", x1=left, x2=left + 26, y1=y - 4, y2=y - 4)
                else:
                    self.mark(left + 6, y - 4, key)
                self.add("text", "tick", text, x=left + _key_width(key), y=y)
        self._grow(22 * len(rows) + 10)

    def _grow(self, above: int) -> None:
        """Add space above the figure, at negative positions."""
        self.height += above
        self.svg.set("viewBox", f"0 {-above} {self.width} {self.height}")

    def markup(self) -> str:
        """Return the figure as markup that can be placed in a page."""
        return ET.tostring(self.svg, encoding="unicode")


def _key_width(key: _Key) -> int:
    return 18 if key in KINDS else 34


@dataclass(frozen=True)
class Bar:
    """A bar, its name on the left above it and its note on the right, or below the name where both are long.

    `solid` is the part of `size` that is not drawn pale.
    """

    name: str
    note: str
    size: float
    css: str
    solid: float | None = None


def bar_chart(alt: str, bars: Sequence[Bar], *, widest: float = 0.0) -> Drawing:
    """Draw bars below each other on one linear scale from zero, by magnitude.

    Args:
        widest: the size of a bar as wide as the figure; by default that of the largest.
    """
    drawing = Drawing(alt, 0)
    widest = widest or max((abs(bar.size) for bar in bars), default=0.0) or 1.0
    y = 0
    for bar in bars:
        names = textwrap.wrap(bar.name, _LINE)[:3]
        together = len(names) == 1 and len(bar.name) + len(bar.note) <= _LINE - 4
        for text in names:
            y += 18
            drawing.add("text", "bar-name", text, x=0, y=y - 4)
        y += 0 if together else 18
        drawing.add("text", "tick end" if together else "tick", bar.note, x=WIDTH if together else 0, y=y - 4)
        drawing.add("rect", "rail", x=0, y=y + 2, width=WIDTH, height=10, rx=2)
        width = round(max(WIDTH * abs(bar.size) / widest, 2.0), 2)
        tip = f"{bar.name}: {bar.note}"
        drawing.add("rect", f"bar {bar.css}", tip=tip, x=0, y=y + 2, width=width, height=10, rx=2)
        if bar.solid is not None and bar.solid < abs(bar.size) and width > 8:
            inner = round(width * bar.solid / abs(bar.size), 2)
            drawing.add("rect", "overhead", x=inner, y=y + 2, width=round(width - inner, 2), height=10, rx=2)
        y += 26
    drawing.height = max(y - 8, 1)
    drawing.svg.set("viewBox", f"0 0 {WIDTH} {drawing.height}")
    return drawing


def standalone(figures: Sequence[ET.Element], style: str) -> str:
    """Figures below each other as a separate SVG file, with the page's CSS, its font and a background."""
    boxes = [[float(number) for number in figure.get("viewBox", "").split()] for figure in figures]
    width = max(box[2] for box in boxes) + 2 * _MARGIN
    height = sum(box[3] + 2 * _MARGIN for box in boxes)
    pixels = {"width": f"{_SCALE * width:g}", "height": f"{_SCALE * height:g}"}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width:g} {height:g}", **pixels})
    ET.SubElement(root, "style").text = style + _FILE_STYLE
    ET.SubElement(root, "rect", {"class": "page", "width": f"{width:g}", "height": f"{height:g}"})
    top = float(_MARGIN)
    for figure, box in zip(figures, boxes, strict=True):
        place = {"x": _MARGIN, "y": top, "width": box[2], "height": box[3]}
        node = ET.SubElement(root, "svg", figure.attrib | {name: f"{value:g}" for name, value in place.items()})
        node.extend(figure)
        top += box[3] + 2 * _MARGIN
    return ET.tostring(root, encoding="unicode")


def thinned(kinds: Sequence[str], limit: int) -> list[int]:
    """At most about `limit` of the indices of `kinds`, evenly spread and with both ends: long runs keep a small page.

    Where the kind changes is kept as well (if it does not change all the time): a few secure rounds among thousands of
    others are what a reader looks for.
    """
    count = len(kinds)
    if count <= limit:
        return list(range(count))
    changes = [index for index in range(1, count) if kinds[index] != kinds[index - 1]]
    spread = {round(index * (count - 1) / (limit - 1)) for index in range(limit)}
    return sorted(spread.union(changes if len(changes) <= limit else []))
