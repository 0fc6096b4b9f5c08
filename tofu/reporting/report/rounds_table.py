"""The table of rounds. Most columns are left out if no round of a run has a value for them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tofu.formatting import format_bytes, format_factor, format_fraction, format_seconds
from tofu.reporting.report.figures import epsilon_text
from tofu.reporting.report.run_data import RunData
from tofu.rounds.record import RoundRecord

_NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column between the kind of a round and the end of the line.

    Attributes:
        cell: text of a round's cell.
        total: text of the run's cell, under all rounds.
        optional: only runs have it that have a value for some round.
    """

    name: str
    cell: Callable[[RoundRecord], str]
    total: Callable[[RunData], str] = lambda _: ""
    optional: bool = False

    def is_shown(self, run: RunData) -> bool:
        """Return whether the table of this run has the column."""
        return not self.optional or any(self.cell(row) != _NONE for row in run.rounds)


def columns_of(run: RunData) -> list[Column]:
    """Return the columns that this run's table has."""
    names = sorted({name for row in run.rounds for name in row.metrics})
    own = [Column(name[:60], partial(_metric, name)) for name in names]
    return [*(column for column in _COLUMNS if column.is_shown(run)), *own]


def _metric(name: str, row: RoundRecord) -> str:
    return _number(row.metrics.get(name), "{:.4g}".format)


def _number(value: float | None, write: Callable[[float], str]) -> str:
    return _NONE if value is None else write(value)


def _percent(fraction: float) -> str:
    return format_fraction(fraction, 2)


def _trained(write: Callable[[RoundRecord], str]) -> Callable[[RoundRecord], str]:
    """Empty for round 0, in which no client trained."""
    return lambda row: write(row) if row.round > 0 else _NONE


def _less(fedavg: int, sent: int) -> str:
    return format_factor(fedavg / sent) if fedavg and sent else _NONE


def _clipped(row: RoundRecord) -> str:
    if row.clipped is None or row.epsilon is not None:  # under differential privacy clients do not report it
        return _NONE
    far = f" ({row.largest_clipped:.3g}x)" if row.clipped and row.largest_clipped is not None else ""
    return f"{row.clipped:,}{far}"


def _tested(row: RoundRecord) -> str:
    found = [row.accuracy_quantiles.get(percent) for percent in ("10", "50", "90")]
    return " / ".join(_number(value, format_fraction) for value in found) if row.accuracy_quantiles else _NONE


_COLUMNS = (
    Column("accuracy", lambda row: _number(row.accuracy, _percent), lambda run: _number(run.final_accuracy, _percent)),
    Column("uplink", _trained(lambda row: format_bytes(row.uplink_bytes)), lambda run: format_bytes(run.uplink_bytes)),
    Column("less than FedAvg", lambda row: _less(row.fedavg_uplink_bytes, row.uplink_bytes),
           lambda run: _less(run.fedavg_uplink_bytes, run.uplink_bytes)),
    Column("task", lambda row: _number(row.task, "{}".format), optional=True),
    Column("clients' own accuracy (10% / 50% / 90%)", _tested, optional=True),
    Column("loss", lambda row: _number(row.loss, "{:.4f}".format)),
    Column("training loss", lambda row: _number(row.train_loss, "{:.4f}".format)),
    Column("explained variance", lambda row: _number(row.explained_variance, format_fraction), optional=True),
    Column("updates with proxies", lambda row: _number(row.with_proxies, "{}".format), optional=True),
    Column("cosine", lambda row: _number(row.cosine, "{:.3f}".format), optional=True),
    Column("epsilon", lambda row: _number(row.epsilon, epsilon_text), lambda run: _number(run.epsilon, epsilon_text),
           optional=True),
    Column("valid replies", _trained(lambda row: f"{row.clients}"),
           lambda run: f"{sum(row.clients for row in run.trained)}"),
    Column("failed", _trained(lambda row: f"{len(row.failures)}"), lambda run: f"{run.failures}"),
    Column("values clipped (largest / range)", _clipped,
           lambda run: f"{sum(row.clipped or 0 for row in run.rounds):,}", optional=True),
    Column("downlink", _trained(lambda row: format_bytes(row.downlink_bytes)),
           lambda run: format_bytes(run.downlink_bytes)),
    Column("FedAvg's uplink", _trained(lambda row: format_bytes(row.fedavg_uplink_bytes)),
           lambda run: format_bytes(run.fedavg_uplink_bytes)),
    Column("time", lambda row: _number(row.seconds, format_seconds), lambda run: _number(run.seconds, format_seconds)),
)  # fmt: skip
"""The most important ones come first: a phone shows four, and the others by scrolling."""
