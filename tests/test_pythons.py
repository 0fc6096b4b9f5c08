"""Other versions of Python: the source compiles on each that is found, and a run from the wheel ends alike.

TOFU_PYTHONS lists interpreters that have what tofu needs, separated by the character that PATH has, such as
`env312/bin/python`. Those on the PATH and of pyenv are found without it; most of them have no torch.
"""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.processes import NO_TOTAL_LIMIT, run

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.12", "3.13", "3.14")
PACKAGES = ("tofu", "client", "server", "attacks", "deploy")
COMPILE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")
for package in sys.argv[1:]:
    for path in Path(package).rglob("*.py"):
        compile(path.read_bytes(), str(path), "exec")
"""
RUN = ["run", "--rounds=1", "--local-epochs=1", "--train-images=200", "--max-evals=2", "--clients=3", "--json"]


@cache
def interpreter(version: str) -> Path | None:
    """An interpreter of this version; one of TOFU_PYTHONS is preferred."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [
        *os.environ.get("TOFU_PYTHONS", "").split(os.pathsep), shutil.which(f"python{version}") or "",
        *map(str, sorted(pyenv.glob(f"{version}.*/bin/python"))),
    ]  # fmt: skip
    for path in filter(None, candidates):
        asked = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([path, "-c", asked], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return Path(path).absolute()
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_the_source_compiles_without_warnings(version: str) -> None:
    if (python := interpreter(version)) is None:
        pytest.skip(f"no Python {version} here; TOFU_PYTHONS may name one")
    run([str(python), "-c", COMPILE, *PACKAGES], cwd=ROOT, check=True)


@NO_TOTAL_LIMIT
@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_ends(version: str, tmp_path: Path) -> None:
    if (python := interpreter(version)) is None:
        pytest.skip(f"no Python {version} here; TOFU_PYTHONS may name one")
    needs = "import torch, torchvision, flwr, pydantic, typer"
    if subprocess.run([str(python), "-c", needs], capture_output=True, check=False).returncode:
        pytest.skip(f"Python {version} has no torch or Flower: name one that has in TOFU_PYTHONS")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for more in ([], ["--schedule=secure"]):
        command = [str(python), "-m", "tofu.cli", *RUN, *more]
        run(command, cwd=tmp_path, env=environment, check=True)
