"""`tofu run`: a federation in this process."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tofu.cli.early import check_early
from tofu.cli.options import ConfigFile, Json, Quiet, settings_from, with_settings
from tofu.errors import Interrupted, SettingError, TofuError
from tofu.reporting.run_settings import resumed_settings
from tofu.settings import MIN_SECURE, Settings, Value
from tofu.settings.unused import unused_notes

if TYPE_CHECKING:
    from tofu.rounds.record import RoundRecord


FastDevRun = Annotated[
    bool,
    typer.Option(
        "--fast-dev-run",
        help="try every step quickly: a round of each kind, two clients (three if secure), few images; keeps nothing",
        rich_help_panel="Run",
    ),
]


@with_settings
def run(
    *,
    config: ConfigFile = None,
    fast_dev_run: FastDevRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    overrides: dict[str, Value],
) -> None:
    """Run a federation in this process: the same server and client apps as `flwr run`, no ray, no open port."""
    try:
        _run(config, overrides, fast_dev_run=fast_dev_run, json_=json_, quiet=quiet)
    except KeyboardInterrupt:
        raise Interrupted("interrupted before the first round: no results were written") from None


def _run(config: Path | None, overrides: dict[str, Value], *, fast_dev_run: bool, json_: bool, quiet: bool) -> None:
    if fast_dev_run:
        _try_out(settings_from(config, overrides), quiet=quiet or json_)
        return
    if overrides.get("resume") and config is not None:
        raise SettingError("config", str(config), "no file with --resume, which takes the settings of that run")
    settings = resumed_settings(overrides) if overrides.get("resume") else settings_from(config, overrides)
    check_early(settings)
    summary = run_settings(settings, quiet=quiet or json_, notes=tuple(unused_notes(settings, overrides)))
    if json_:
        print(json.dumps(summary))
    else:
        print(f"{'' if quiet else 'report: '}{summary['run']}/report.html")


def _try_out(settings: Settings, *, quiet: bool) -> None:
    """Run a small version of every step in a temporary folder: rounds of each kind, evaluation, checkpoint, resume and
    report."""
    from tempfile import TemporaryDirectory

    from tofu.rounds.schedule import make_schedule

    if settings.run.resume:
        raise SettingError("resume", settings.run.resume, "no run to resume with --fast-dev-run")
    check_early(settings.replace(record_clients=""), starts=False)
    _check_data(settings)
    kinds = make_schedule(settings.rounds, settings.training.rounds).kinds
    rounds = max(len(kinds), settings.plugins.task_count)
    small: dict[str, Value] = {
        "clients": MIN_SECURE if "secure" in kinds else 2, "rounds": rounds, "local_epochs": 1, "switch_round": 0,
        "plateau_patience": 1, "plateau_gain": 1.0, "max_evals": min(5, settings.codec.max_evals), "min_clients": 1,
        "client_fraction": 1.0, "record_clients": "", "checkpoint": True, "metrics_port": 0, "max_epsilon": 0.0,
        "tracker": "",
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        chosen = _fewer_images(settings.replace(**small, run_folder=f"{folder}/run"))
        run_settings(chosen, quiet=quiet, kept=False)
        more = max(2, settings.plugins.task_count)
        run_settings(resumed_settings({"resume": f"{folder}/run", "rounds": rounds * more}), quiet=quiet, kept=False)
    print("fast dev run: every step works; nothing was kept")


def _check_data(settings: Settings) -> None:
    """Raises SettingError or DataError if the data cannot be divided as the whole run would divide them."""
    from tofu.workload import workload_of

    workload_of(settings).client(0)


def _fewer_images(settings: Settings) -> Settings:
    """Return the settings with at most 64 images for each client, if the dataset has more and can be cut."""
    from tofu.workload import workload_of

    images = 64 * settings.data.clients
    wanted = {"train_images": images, "test_images": images}
    smaller = settings.replace(**{name: value for name, value in wanted.items() if not getattr(settings.data, name)})
    try:
        workload_of(smaller).client(0)
    except TofuError:
        return settings
    return smaller


def run_settings(settings: Settings, *, quiet: bool, kept: bool = True, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Run a federation with these settings and return its summary. Without `kept`, its folder is a temporary one.
    The progress view shows `notes` first.

    Raises:
        Interrupted: by Ctrl-C, once the run folder exists.
    """
    quiet = quiet or settings.run.log == "json"
    if sys.stderr.isatty() and not quiet:
        print("loading torch, Flower and the data", file=sys.stderr)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    from client.app import app as client_app
    from server.app import serve_in_process
    from tofu.observers.base import Observer, Observers
    from tofu.observers.terminal import make_progress

    class Started(Observer):
        """Keeps the run folder and the last round."""

        folder, round = Path(), 0

        def on_history(self, folder: Path, records: "Sequence[RoundRecord]") -> None:
            self.folder, self.round = folder, records[-1].round if records else 0

        def on_round_end(self, record: "RoundRecord") -> None:
            self.round = record.round

    started = Started()
    view = make_progress(sys.stderr, quiet=quiet, kept=kept, notes=notes)
    try:
        return serve_in_process(client_app, settings, Observers((started, view)))
    except KeyboardInterrupt:
        if started.folder == Path():
            raise
        if not kept:
            raise Interrupted(f"interrupted after round {started.round}; a fast dev run keeps nothing") from None
        way = f"`tofu run --resume {started.folder}` goes on from there"
        if not settings.run.checkpoint:
            way = "it cannot be resumed, as checkpoint=false"
        raise Interrupted(f"interrupted after round {started.round}; results are in {started.folder}; {way}") from None
