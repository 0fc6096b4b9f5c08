"""Several runs of a comparison at a time, each in a process of its own.

Not in `__main__`, which processes that are spawned cannot import.
"""

import json
import multiprocessing
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from client.app import app as client_app
from server.app import serve_in_process
from server.comparison import claimed
from tofu.errors import RunError
from tofu.observers.base import Observer
from tofu.reporting.compare.plan import Comparison, Run
from tofu.reporting.compare.results import best_value, read_run


def run_at_a_time(comparison: Comparison, processes: int) -> None:
    """Make a comparison's runs in several processes, so that `run_comparison` finds them finished.

    What fails here it runs again, and records.
    """
    cells = comparison.reachable
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    with claimed(comparison.folder), pool:

        def make(runs: Sequence[Run]) -> None:
            longest_first = sorted(runs, key=lambda run: run.cell.compressor != "proxy")
            for number, line in enumerate(pool.map(_run, longest_first), start=1):
                print(f"{number} of {len(runs)}: {line}", file=sys.stderr, flush=True)

        make([run for cell in cells for run in comparison.tuning_runs(cell)])
        chosen = {
            cell: best_value([read_run(run) for run in comparison.tuning_runs(cell) if _is_finished(run)])
            for cell in cells
        }
        make([comparison.run(cell, seed, chosen[cell]) for seed in comparison.seeds for cell in cells])


def _run(run: Run) -> str:
    """Make one run, unless it is finished; returns a line about it."""
    name = run.folder.name
    if not _is_finished(run):
        shutil.rmtree(run.folder, ignore_errors=True)
        try:
            serve_in_process(client_app, run.settings, Observer())
        except RunError as error:
            return f"{name} failed: {error}"
    return f"{name} {100 * json.loads((run.folder / 'summary.json').read_text())['final_accuracy']:.2f} %"


def _is_finished(run: Run) -> bool:
    return (run.folder / "summary.json").is_file()
