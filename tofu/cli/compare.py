"""`tofu compare`: compressors at equal bytes on the same data."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tofu.cli.early import check_early
from tofu.cli.options import ConfigFile, Json, Quiet, line_printer, settings_from, with_settings
from tofu.errors import Interrupted, RunError, SettingError
from tofu.settings import Value


def _comparison(flag: str, help_: str) -> Any:
    return typer.Option(flag, help=help_, rich_help_panel="Comparison")


Compressors = Annotated[str, _comparison("--compressors", "names of compressors, separated by commas")]
Ratios = Annotated[str, _comparison("--ratios", "ratios to run each of them at, separated by commas")]
Seeds = Annotated[int, _comparison("--seeds", "how many seeds, counted up from --seed")]
Folder = Annotated[Path, _comparison("--folder", "where the runs and the results go; finished runs are not run again")]
For = Annotated[
    list[str] | None,
    _comparison("--for", "NAME:setting=value for one compressor (none is FedAvg); may be given several times"),
]
Tune = Annotated[
    str | None,
    _comparison("--tune", "setting=value,value,... to choose from for FedAvg and each compressor at each ratio"),
]


@with_settings
def compare(
    *,
    compressors: Compressors,
    folder: Folder,
    ratios: Ratios = "100",
    seeds: Seeds = 3,
    for_: For = None,
    tune: Tune = None,
    config: ConfigFile = None,
    json_: Json = False,
    quiet: Quiet = False,
    overrides: dict[str, Value],
) -> None:
    """Run compressors at several ratios, and FedAvg, on the same data: which is more accurate at equal bytes.

    Runs are kept in the folder, so the same command goes on after an interruption. With --tune, FedAvg and every
    compressor at every ratio is first run once with each value and a seed of its own (the first plus 1000), and then
    uses its best.
    """
    for name, instead in {"compressor": "--compressors", "ratio": "--ratios", "run_folder": "--folder"}.items():
        if name in overrides:
            raise SettingError(name, overrides[name], f"{instead} in its place")
    settings = settings_from(config, overrides)
    check_early(settings)
    from tofu.reporting.compare.plan import Comparison

    comparison = Comparison.of(
        settings, compressors=compressors, ratios=ratios, seeds=seeds, folder=folder,
        overrides=for_ or (), tune=tune or "",
    )  # fmt: skip
    quiet = quiet or json_
    logging.getLogger("flwr").setLevel(logging.ERROR)
    from client.app import app as client_app
    from server.comparison import run_comparison
    from tofu.observers.base import Observer
    from tofu.observers.terminal import make_progress
    from tofu.reporting.compare.results import failed_compressors
    from tofu.reporting.report.compare_tables import markdown

    def view() -> Observer:
        # A line for each round of each run would bury the lines that say how far the comparison is.
        return make_progress(sys.stderr, quiet=quiet) if sys.stderr.isatty() else Observer()

    try:
        document = run_comparison(comparison, client_app, log=line_printer(quiet=quiet), view=view)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; runs are in {folder}; the same command goes on from here") from None
    if json_:
        print(json.dumps(document))
    else:
        print(markdown(document))
        print(f"\nreport: {folder / 'compare.html'}")
    if failed := failed_compressors(document):
        raise RunError(f"every run of {', '.join(failed)} failed: see {folder / 'compare.html'}")
