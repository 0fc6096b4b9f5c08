"""`make certs` where nothing is installed but the two packages that it names, as the user who calls it."""

import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.processes import run

ROOT = Path(__file__).parents[2]
PACKAGES = ("cryptography", "typer")


def _needed(*packages: str) -> set[str]:
    """These packages and all that they need."""
    found: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for requirement in metadata.requires(name) or ():
            if "extra ==" not in requirement:
                needed = re.split(r"[^A-Za-z0-9_.-]", requirement)[0]
                try:
                    metadata.distribution(needed)
                except metadata.PackageNotFoundError:
                    continue  # of another system or Python
                waiting.append(needed)
    return found


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A Python that finds the standard library and these packages only."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in _needed(*PACKAGES):
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            target, link = Path(str(distribution.locate_file(top))), packages / top
            if target.exists() and not link.exists():
                link.symlink_to(target)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PWD:{packages}" exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return python


def test_two_packages_are_enough_and_the_files_are_those_of_the_user(bare_python: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "deploy").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", checkout)
    (checkout / "tofu").symlink_to(ROOT / "tofu")
    for file in (ROOT / "deploy").glob("*.py"):
        shutil.copy(file, checkout / "deploy")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SUDO_", "PYTHON"))}
    command = ["make", "--silent", "certs", f"KEYS={bare_python}", "HOSTS=fl.example.org"]
    result = run(command, cwd=checkout, env=environment)
    assert result.returncode == 0, result.stderr
    user = os.getuid() or 1000  # no container runs as root
    lines = (checkout / "deploy" / ".env").read_text().splitlines()
    assert f"TOFU_UID={user}" in lines
    assert f"TOFU_GID={os.getgid() if os.getuid() else 1000}" in lines
    for top in ("secrets", "state", "results", "data", "journal"):
        for path in (checkout / "deploy" / top, *(checkout / "deploy" / top).rglob("*")):
            assert path.stat().st_uid == user, path
    # The packages really are alone there.
    assert run([bare_python, "-c", "import torch"], cwd=tmp_path, env=environment).returncode == 1
