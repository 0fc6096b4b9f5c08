"""`tofu run`: a federation in this process."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tofu.cli.options import ConfigFile, Json, Quiet, settings_from, with_settings
from tofu.errors import Interrupted, SettingError
from tofu.settings import Settings, Value

if TYPE_CHECKING:
    from tofu.rounds.record import RoundRecord


@with_settings
def run(*, config: ConfigFile = None, json_: Json = False, quiet: Quiet = False, overrides: dict[str, Value]) -> None:
    """Run a federation in this process: the same server and client apps as `flwr run`, no ray, no open port."""
    if overrides.get("resume") and config is not None:
        raise SettingError("config", str(config), "no file with --resume, which takes the settings of that run")
    settings = _resumed(overrides) if overrides.get("resume") else settings_from(config, overrides)
    summary = run_settings(settings, quiet=quiet or json_)
    if json_:
        print(json.dumps(summary))
    else:
        print(f"{'' if quiet else 'report: '}{summary['run']}/report.html")


def run_settings(settings: Settings, *, quiet: bool) -> dict[str, object]:
    """Run a federation with these settings and return its summary.

    Raises:
        Interrupted: by Ctrl-C, once the run folder exists.
    """
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
    view = make_progress(sys.stderr, quiet=quiet or settings.run.log == "json")
    try:
        return serve_in_process(client_app, settings, Observers((started, view)))
    except KeyboardInterrupt:
        if started.folder == Path():
            raise
        way = f"`tofu run --resume {started.folder}` goes on from there"
        if not settings.run.checkpoint:
            way = "it cannot be resumed, as checkpoint=false"
        raise Interrupted(f"interrupted after round {started.round}; results are in {started.folder}; {way}") from None


def _resumed(overrides: dict[str, Value]) -> Settings:
    from tofu.reporting.folder import resumed_settings

    return resumed_settings(overrides)
