"""`tofu report` and `tofu serve`: a run's report as a file, and the reports of many runs in a browser."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Write a run's report again."""
    from tofu.reporting.report import write_report

    print(write_report(run))


def serve(
    runs: Annotated[Path, typer.Argument(help="a folder with runs, at any depth")] = Path("runs"),
    *,
    port: Annotated[int, typer.Option(help="port on 127.0.0.1; 0 takes a free one", min=0, max=65535)] = 0,
) -> None:
    """List the runs of a folder and follow live ones in a browser, on this machine only."""
    from tofu.reporting.serve import RunServer

    with RunServer(runs, port) as server, suppress(KeyboardInterrupt):
        print(f"{runs}: {server.url} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
