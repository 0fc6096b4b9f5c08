"""`tofu run`: a federation in this process."""

import json
import logging
import sys

from tofu.cli.options import ConfigFile, Json, Quiet, settings_from, with_settings
from tofu.settings import Settings, Value


@with_settings
def run(*, config: ConfigFile = None, json_: Json = False, quiet: Quiet = False, overrides: dict[str, Value]) -> None:
    """Run a federation in this process: the same server and client apps as `flwr run`, no ray, no open port."""
    settings = _resumed(overrides) if overrides.get("resume") else settings_from(config, overrides)
    summary = run_settings(settings, quiet=quiet or json_)
    if json_:
        print(json.dumps(summary))
    elif quiet:
        print(f"{summary['run']}/report.html")


def run_settings(settings: Settings, *, quiet: bool) -> dict[str, object]:
    """Run a federation with these settings and return its summary."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    from client.app import app as client_app
    from server.app import serve_in_process
    from tofu.observers.terminal import make_progress

    return serve_in_process(client_app, settings, make_progress(sys.stderr, quiet=quiet or settings.run.log == "json"))


def _resumed(overrides: dict[str, Value]) -> Settings:
    from tofu.reporting.folder import resumed_settings

    return resumed_settings(overrides)
