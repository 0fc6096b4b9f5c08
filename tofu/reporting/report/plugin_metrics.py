"""The metrics of plugins: one row per metric, with a sparkline over the rounds."""

from collections.abc import Sequence
from dataclasses import dataclass

from tofu.reporting.report.chart import Axis, Drawing, thinned
from tofu.reporting.report.run_data import RunData

MAX = 60
_WIDTH, _HEIGHT, _MARGIN = 180, 28, 4
_POINTS = 120


@dataclass(frozen=True)
class Metric:
    """A plugin's metric, "plugin/metric", by round: at least one (round, value)."""

    name: str
    points: tuple[tuple[int, float], ...]

    def cells(self) -> list[str]:
        """Return the number of rounds with a value; first, last, lowest and highest value."""
        values = [value for _, value in self.points]
        numbers = (values[0], values[-1], min(values), max(values))
        return [f"{len(values):,}", *(f"{number:.4g}" for number in numbers)]


def metrics_of(run: RunData) -> list[Metric]:
    """Return all metrics of the run by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in run.rounds:
        for name, value in row.plugins.items():
            if value is not None:
                found.setdefault(name, []).append((row.round, value))
    return [Metric(name, tuple(found[name])) for name in sorted(found)]


def sparkline(metric: Metric, last: int) -> str:
    """Draw a metric over rounds 0 to `last`, on a scale of its own."""
    first, end = metric.points[0], metric.points[-1]
    drawing = Drawing(f"{first[1]:.4g} at round {first[0]}, {end[1]:.4g} at round {end[0]}.", _HEIGHT, _WIDTH)
    x = Axis(0, max(last, 1), _MARGIN, _WIDTH - _MARGIN)
    y = _axis([value for _, value in metric.points])
    drawing.add("line", "axis", x1=_MARGIN, x2=_WIDTH - _MARGIN, y1=_HEIGHT - 1, y2=_HEIGHT - 1)
    kept = [metric.points[index] for index in thinned([""] * len(metric.points), _POINTS)]
    drawing.curve([(x.at(round_), y.at(value)) for round_, value in kept], "c-run")
    drawing.add("circle", "dot c-run", cx=x.at(end[0]), cy=y.at(end[1]), r=3)
    return drawing.markup()


def _axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    if low == high:  # a level line, through the middle
        low, high = low - (abs(low) or 1), high + (abs(high) or 1)
    return Axis(low, high, _HEIGHT - _MARGIN, _MARGIN)
