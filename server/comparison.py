"""Runs the unfinished runs of a comparison, and updates its document, figure and page after each.

A run whose folder holds summary.json is finished and not repeated. An unfinished run starts again from round 0, so a
comparison can be interrupted at any time and continued with the same command.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from server.app import serve_in_process
from tofu.errors import RunError, SettingError
from tofu.files import lock_file, replace_file
from tofu.formatting import format_seconds
from tofu.observers import trackers
from tofu.observers.base import Observer
from tofu.reporting.compare.plan import FEDAVG, Cell, Comparison, Run
from tofu.reporting.compare.results import Row, best_value, document, failed_run, read_run
from tofu.reporting.report.compare import render_figure, render_page
from tofu.settings import Settings, settings_of_section

_WRITTEN = frozenset(
    (
        "config.json",
        "modules.json",
        "data.json",
        "model.json",
        "metrics.jsonl",
        "metrics.prom",
        "failure.json",
        "ledger.jsonl",
        "weights.safetensors",
        "summary.json",
        "report.html",
        "panels.json",
        "samples.npz",
        "plugins.state",
    )
)
_OURS = frozenset((*_WRITTEN, ".config.json.lock", *(f".{name}.part" for name in _WRITTEN)))
_NOT_COMPARED = ("run-folder", "workers", "checkpoint", "resume", "log", "metrics-port", "tracker")
"""Settings that change nothing about a run's results."""


def run_comparison(
    comparison: Comparison,
    client_app: ClientApp,
    *,
    log: Callable[[str], None] = lambda line: None,
    view: Callable[[], Observer] = Observer,
) -> Row:
    """Run what is not finished yet; compare.json, compare.html and compare.svg are rewritten after each run.

    Args:
        log: called with each line of progress.
        view: makes the view of one run.

    Returns:
        The document, as in compare.json.

    Raises:
        SettingError: the folder cannot be used, holds finished runs with other settings, or files that are not ours.
        TofuError: as `serve` does, except that a RunError of one run is recorded and the others go on.
    """
    with claimed(comparison.folder):
        return _Work(comparison, client_app, log, view).run()


class _Work:
    """The state of one call of `run_comparison`."""

    def __init__(
        self, comparison: Comparison, client_app: ClientApp, log: Callable[[str], None], view: Callable[[], Observer]
    ) -> None:
        self._comparison, self._client_app, self._log, self._view = comparison, client_app, log, view
        self._rows: dict[Cell, list[Row]] = {}
        self._tuning: dict[Cell, list[Row]] = {}
        self._began = time.perf_counter()
        trials = {cell: comparison.tuning_runs(cell) for cell in comparison.reachable}
        self._trials = trials
        # The tuned values are not known yet, so this list serves only to count runs and to estimate their time.
        self._waiting = [cell.compressor for cell in trials for _ in trials[cell]]
        self._waiting += [cell.compressor for _ in comparison.seeds for cell in trials]
        self._total, self._done = len(self._waiting), 0
        self._seconds: dict[str, list[float]] = {}

    def run(self) -> Row:
        comparison = self._comparison
        self._check()
        for cell in comparison.cells:
            if cell.unreachable:
                self._log(f"{cell.compressor} at {cell.ratios[0]:g}x is not reachable: ratio {cell.unreachable}")
        self._write()  # an unwritable folder is refused before any training
        for cell, runs in self._trials.items():
            for run in runs:
                self._tuning.setdefault(cell, []).append(self._outcome(run))
                self._write()
        # Seed by seed, so that every cell has early results.
        for seed in comparison.seeds:
            for cell in comparison.reachable:
                value = best_value(self._tuning[cell]) if comparison.tune else None
                run = comparison.run(cell, seed, value)
                if comparison.tune and value is None:
                    self._next(cell)
                    row = failed_run(run, "every tuning run failed")
                else:
                    row = self._outcome(run)
                self._rows.setdefault(cell, []).append(row)
                self._write()
        return self._document()

    def _check(self) -> None:
        """Check every folder before anything runs or is deleted."""
        for runs in self._trials.values():
            for run in runs:
                _finished(run)
        tune = self._comparison.tune
        for cell in self._comparison.reachable:
            for seed in self._comparison.seeds:
                _finished(self._comparison.run(cell, seed), unknown=tune.setting if tune else "")

    def _outcome(self, run: Run) -> Row:
        """Return the row of a run that was finished before, or is run now."""
        self._next(run.cell)
        if _finished(run):
            self._log(f"{self._place(run)}: finished before")
        else:
            self._log(f"{self._place(run)}{self._times(run)}")
            _clear(run.folder)
            try:
                serve_in_process(self._client_app, run.settings, self._view())
            except RunError as error:  # training that diverges is a result; the other cells go on
                self._log(f"{self._place(run)}: failed: {error}")
                return failed_run(run, str(error))
        row = read_run(run)
        self._seconds.setdefault(run.cell.compressor, []).append(row["seconds"])
        return row

    def _next(self, cell: Cell) -> None:
        self._waiting.remove(cell.compressor)
        self._done += 1

    def _place(self, run: Run) -> str:
        name = "FedAvg" if run.cell.compressor == FEDAVG else f"{run.cell.compressor} at {run.cell.ratios[0]:g}x"
        text = f"run {self._done} of {self._total}: {name}, seed {run.seed}"
        tune = self._comparison.tune
        if tune and run.value is not None:
            text += f", {'trying ' if run.tuning else ''}{tune.setting}={run.value}"
        return text

    def _times(self, run: Run) -> str:
        """Return the elapsed time, and an estimate of the remaining time from earlier runs of the same compressors."""
        text = f"; {format_seconds(time.perf_counter() - self._began)} elapsed"
        known = {name: sum(values) / len(values) for name, values in self._seconds.items()}
        if not known:
            return text
        typical = sum(known.values()) / len(known)
        left = sum(known.get(name, typical) for name in (run.cell.compressor, *self._waiting))
        return f"{text}, about {format_seconds(left)} left"

    def _document(self) -> Row:
        return document(self._comparison, self._rows, self._tuning, runs_left=self._total - self._done)

    def _write(self) -> None:
        made = self._document()
        folder = self._comparison.folder
        for name, text in (
            ("compare.json", json.dumps(made, indent=1, allow_nan=False)),
            ("compare.svg", render_figure(made)),
            ("compare.html", render_page(made, folder.resolve().name)),
        ):
            data = text.encode(errors="replace")
            try:
                replace_file(folder / name, data)
            except OSError as error:
                raise SettingError("folder", str(folder), f"a folder that can be written ({error.strerror})") from error


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Create the folder and lock it: a second comparison in it would restart the first one's current run.

    Raises:
        SettingError: it cannot be written, or another comparison holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / "compare.json")
    except OSError as error:
        raise SettingError("folder", str(folder), f"a folder that can be written ({error.strerror})") from error
    if lock is None:
        raise SettingError("folder", str(folder), "a folder in which no other comparison is running")
    with lock:
        yield


def _finished(run: Run, unknown: str = "") -> bool:
    """Return whether the run has finished, by the files in its folder.

    Args:
        unknown: a setting whose value is not known yet and may be anything.

    Raises:
        SettingError: it was finished with other settings, or it is unfinished and has files that no run writes.
    """
    folder = run.folder
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise SettingError("folder", str(folder), "a run folder (this is a file or a link)")
    if not (folder / "summary.json").is_file():
        _written(folder)
        return False
    found = _config(folder)
    ignored = {*_NOT_COMPARED, unknown}
    if "proxy" not in (run.settings.codec.compressor, run.settings.downlink.downlink):
        ignored |= {name.replace("_", "-") for name in settings_of_section("Proxies")}
    for name, value in run.settings.to_config().items():
        if name not in ignored and found[name] != value:
            raise SettingError(
                name, value, f"{found[name]!r}, as in the finished run {folder}; other settings need another folder"
            )
    return True


def _config(folder: Path) -> dict[str, Any]:
    """Return the settings of a finished run; settings that did not exist then have their default."""
    try:
        return dict(Settings.of(json.loads((folder / "config.json").read_text()), warn=False).to_config())
    except (OSError, ValueError, AttributeError, SettingError) as error:
        reason = " ".join(str(error).split())
        raise SettingError("folder", str(folder), f"a finished run with its config.json ({reason})") from error


def _written(folder: Path) -> list[Path]:
    """Return the files in a run's folder.

    Raises:
        SettingError: a file was not written by a run, so it must not be deleted.
    """
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in found:
        ours = path.is_dir() if path.name == trackers.FOLDER else path.name in _OURS and path.is_file()
        if not ours or path.is_symlink():
            raise SettingError("folder", str(folder), f"nothing but the files of a run to begin again ({path.name})")
    return found


def _clear(folder: Path) -> None:
    """Delete the files of an unfinished run."""
    for path in _written(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
