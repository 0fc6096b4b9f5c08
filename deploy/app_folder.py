"""The folder that `flwr run` reads for our own app: a pyproject.toml that names the two apps of the installed package.

Flower packs the folder and sends it to the nodes. On one machine all processes have this package installed, so the
folder needs no code, and a federation works from a wheel as from a checkout.
"""

import json
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tofu.settings import FIELDS, dashed


def write_app(folder: Path) -> Path:
    """Write the app's pyproject.toml into `folder`, which is created if missing, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "[project]", 'name = "tofu-fl"', f'version = "{_version()}"', 'license = "Apache-2.0"',
        'description = "Federated learning with proxy images"', "dependencies = []", "", "[tool.flwr.app]",
        'publisher = "tofu-fl"', "", "[tool.flwr.app.components]",
        'serverapp = "server.app:app"', 'clientapp = "client.app:app"', "", "[tool.flwr.app.config]",
        *(f"{dashed(name)} = {json.dumps(field.default)}" for name, field in FIELDS.items()),
    ]  # fmt: skip
    (folder / "pyproject.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _version() -> str:
    """Return the installed version, or that of a checkout which is not installed, as in the containers."""
    try:
        return version("tofu-fl")
    except PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
        return str(project["project"]["version"])
