"""Panels: data that a plugin adds to the report of a run. The report draws it; a plugin writes no HTML.

The server calls `Plugin.panel()` after each round and stores the panels of all plugins in panels.json. Everything a
panel shows is visible to readers of the report, so it must be data that the server has (broadcasts, sums).

    def panel(self) -> Panel | None:
        return Panel(
            "Subspaces",
            "Rank of the protected subspace of each layer.",
            (
                Chart("Rank by layer", (Series("rank", (4, 9, 12), labels=("conv1", "conv2", "fc")),), kind="bars"),
                Chart("Mean rank by round", (Series("rank", (4.0, 6.5), x=(1, 2)),), x_label="round", y_label="rank"),
                TableFigure("Layers", ("layer", "rank"), (("conv1", 4), ("conv2", 9))),
                ImageFigure("Mean inputs", (((0.0, 0.5), (0.5, 1.0)),)),
            ),
        )
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict


class StrictFields:
    """Base of dataclasses that are read from JSON with pydantic and have no unknown fields."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Series(StrictFields):
    """One line, group of bars or sample of a histogram.

    Attributes:
        values: y values; for a histogram, the sample.
        x: x values of a line, as many as `values`; empty means 0, 1, 2, ...
        labels: names of the bars, as many as `values`.
    """

    name: str
    values: tuple[float, ...]
    x: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart(StrictFields):
    """A chart of one or more series. `bins`: number of bins of a histogram."""

    title: str
    series: tuple[Series, ...]
    kind: Literal["lines", "bars", "histogram"] = "lines"
    x_label: str = ""
    y_label: str = ""
    bins: int = 30
    type: Literal["chart"] = "chart"


@dataclass(frozen=True)
class TableFigure(StrictFields):
    """A table; numbers are right-aligned and shown with four digits."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]
    type: Literal["table"] = "table"


@dataclass(frozen=True)
class ImageFigure(StrictFields):
    """Gray images, each a tuple of rows of pixels; each image is scaled to its own range."""

    title: str
    images: tuple[tuple[tuple[float, ...], ...], ...]
    type: Literal["images"] = "images"


Figure = Chart | TableFigure | ImageFigure


@dataclass(frozen=True)
class Panel(StrictFields):
    """A section of the report: a title, a paragraph and figures."""

    title: str
    text: str
    figures: tuple[Figure, ...] = ()
