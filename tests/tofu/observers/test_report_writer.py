"""The report is written by an observer: at the end of a run, and of one that failed after its last round."""

from pathlib import Path

import pytest

from tests.tofu.reporting.test_report import finish
from tests.tofu.reporting.test_report import run as run  # a fixture: a run folder without summary.json
from tofu.errors import RunError
from tofu.observers.report import ReportWriter
from tofu.rounds.record import RunSummary


def following(folder: Path) -> ReportWriter:
    writer = ReportWriter()
    writer.on_history(folder, ())
    return writer


def test_the_end_of_a_run_writes_its_report(run: Path) -> None:
    finish(run)
    following(run).on_run_end(RunSummary())
    assert "94.73" in (run / "report.html").read_text()


@pytest.mark.parametrize("summarized", [True, False])
def test_a_failed_run_has_a_report_if_all_its_rounds_are_done(run: Path, summarized: bool) -> None:
    if summarized:
        finish(run)
    following(run).on_run_error(RunError("no round succeeded"))
    assert (run / "report.html").exists() == summarized


def test_a_run_that_fails_before_its_folder_exists_has_no_report() -> None:
    ReportWriter().on_run_error(RunError("no data"))
