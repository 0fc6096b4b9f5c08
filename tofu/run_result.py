"""What `tofu.run` returns: the run folder, read back as Python objects."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tofu.data import ImageShape
from tofu.errors import RunError
from tofu.reporting.folder import read_model
from tofu.reporting.report import write_report
from tofu.reporting.report.chart import standalone
from tofu.reporting.report.figures import accuracy_by_bytes, accuracy_by_round
from tofu.reporting.report.run_data import read_run
from tofu.reporting.report.template import COLORS, FIGURE_STYLE
from tofu.rounds.record import RoundRecord, RunSummary, json_lines, read_rounds
from tofu.weights import Weights, load_weights


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: its run folder.
        summary: accuracy, bytes and ratios of the whole run.
    """

    folder: Path
    summary: RunSummary
    _build_model: Callable[[ImageShape], nn.Module] = field(repr=False)

    @property
    def history(self) -> tuple[RoundRecord, ...]:
        """The record of each round; round 0 is the evaluation before training."""
        return read_rounds(self.folder / "metrics.jsonl")

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """One row per message: round, kind, direction, client, bytes; the rows make a `pandas.DataFrame`."""
        return [row for row, _ in json_lines(self.folder / "ledger.jsonl")]

    @property
    def weights(self) -> Weights:
        """The final weights by name: trainable parameters and buffers."""
        return read_model(self.folder)[0]

    def model(self) -> nn.Module:
        """A new copy of the model with the final weights, in eval mode on the CPU. Plugins are not applied."""
        weights, shape, _ = read_model(self.folder)
        model = self._build_model(shape).eval()
        load_weights(model, weights)
        return model

    def plot(self, against: Literal["rounds", "bytes"] = "rounds") -> "Plot":
        """Test accuracy against rounds or uplink bytes; a notebook shows the figure.

        Raises:
            RunError: the run has no accuracy, for example because there is no test data.
        """
        run = read_run(self.folder)
        markup = accuracy_by_round(run) if against == "rounds" else accuracy_by_bytes(run)
        if markup is None:
            raise RunError(f"{self.folder} has no accuracy to plot: is there test data, and are targets class numbers?")
        return Plot(standalone([ET.fromstring(markup)], COLORS + FIGURE_STYLE))

    def report(self) -> Path:
        """Write report.html, a page that needs no other file, and return its path."""
        return write_report(self.folder)


@dataclass(frozen=True)
class Plot:
    """A figure as SVG."""

    svg: str

    def save(self, path: str | Path) -> None:
        """Write the figure to an .svg file."""
        Path(path).write_text(self.svg, encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg
