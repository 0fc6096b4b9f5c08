"""`tofu report`: a run's report."""

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Write a run's report again."""
    from tofu.reporting.report import write_report

    print(write_report(run))
