"""The report of a run as an observer: report.html in the run folder once all rounds are done."""

from collections.abc import Sequence
from pathlib import Path

from tofu.observers.base import Observer
from tofu.reporting.report import write_report
from tofu.rounds.record import RoundRecord, RunSummary


class ReportWriter(Observer):
    """Writes the report of a finished run, also of one in which no round succeeded.

    A run that is interrupted has none until it is resumed; `tofu report` writes one at any time.

    Raises:
        RunError: the page cannot be written.
    """

    _folder: Path | None = None

    def on_history(self, folder: Path, records: Sequence[RoundRecord]) -> None:
        self._folder = folder

    def on_run_end(self, summary: RunSummary) -> None:
        assert self._folder is not None  # set by on_history
        write_report(self._folder)

    def on_run_error(self, error: BaseException) -> None:
        if self._folder is not None and (self._folder / "summary.json").exists():
            write_report(self._folder)
