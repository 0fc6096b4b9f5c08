"""The panels of a run's plugins, stored in panels.json."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from tofu.errors import RunError
from tofu.files import replace_file
from tofu.rounds.panel import Panel
from tofu.rounds.record import from_dict, read_json

_FILE = "panels.json"


def write_panels(run: Path, panels: Mapping[str, Panel]) -> None:
    """Replace the panels of a run; plugin name -> panel.

    Raises:
        RunError: a panel does not have the types that `tofu.rounds.panel` declares.
    """
    values = {name: dataclasses.asdict(panel) for name, panel in panels.items()}
    for name, value in values.items():
        from_dict(Panel, value, f"panel of plugin {name}")
    replace_file(run / _FILE, json.dumps(values).encode())


def read_panels(run: Path) -> dict[str, Panel]:
    """Return a mapping: plugin name -> panel; empty if the run has none. Raises RunError if the file cannot be read."""
    path = run / _FILE
    if not path.exists():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise RunError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return {name: from_dict(Panel, value, f"{path} {name}") for name, value in values.items()}
