"""The report of a run: one self-contained page, made from the files of the run folder."""

from tofu.reporting.report.html import write_report

__all__ = ["write_report"]
