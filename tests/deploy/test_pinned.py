"""A node runs the app that its operator pinned, whatever the server sends."""

import hashlib
import io
import sys
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.supernode.runtime import run_clientapp

from deploy.app_folder import write_app
from deploy.background import pin_of
from deploy.pinned import INSTALLED, guard, incompatibility
from tests.processes import run
from tofu.errors import SettingError

IDENTITY = ("tofu-fl/tofu-fl", "0.1.0")


def sent(content: bytes, pinned: str = INSTALLED, app: str = IDENTITY[0], version: str = IDENTITY[1]) -> str:
    return incompatibility(content, pinned, app=app, version=version, digest=hashlib.sha256(content).hexdigest())


def bundle(**changed: str) -> bytes:
    """A bundle of our app's pyproject.toml, with changed or added files."""
    files = {"pyproject.toml": PROJECT, ".info/CONTENT": ""} | changed
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # without the time
    return made.getvalue()


PROJECT = """[project]
name = "tofu-fl"
version = "0.1.0"
[tool.flwr.app]
publisher = "tofu-fl"
[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
"""


def test_the_bundle_that_flower_builds_of_our_app_is_accepted_by_kind_and_by_checksum(tmp_path: Path) -> None:
    built = build_fab_from_disk(write_app(tmp_path / "app"))
    content = built if isinstance(built, bytes) else built[0]
    assert sent(content) == ""
    assert sent(content, f"{'0' * 64}, {hashlib.sha256(content).hexdigest()}") == ""
    assert "is not pinned" in sent(content, "0" * 64)


def test_the_app_has_its_version_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the containers, which have a copy of the code."""
    installed = (write_app(tmp_path / "app") / "pyproject.toml").read_text()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("deploy.app_folder.version", missing)
    assert (write_app(tmp_path / "copy") / "pyproject.toml").read_text() == installed


def test_a_users_app_is_pinned_as_it_is_when_the_nodes_start(tmp_path: Path) -> None:
    app = write_app(tmp_path / "app")
    (app / "own.py").write_text("answer = 42\n")
    pin = pin_of(app)
    built: Any = build_fab_from_disk(app)
    assert sent(built, pin) == ""
    (app / "own.py").write_text("answer = 43\n")
    changed: Any = build_fab_from_disk(app)
    assert "is not pinned (the app may have changed" in sent(changed, pin)
    (app / "pyproject.toml").write_text("[project]")
    with pytest.raises(SettingError, match="expected a folder that flwr build accepts"):
        pin_of(app)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (bundle(**{"client/app.py": "import os"}), "files besides"),
        (bundle(**{"torch.so": ""}), "files besides"),
        (bundle(**{"pyproject.toml": PROJECT.replace("client.app:app", "os:system")}), "client app is 'os:system'"),
        (bundle(**{"pyproject.toml": PROJECT.replace("publisher", "owner")}), "cannot be read"),
        (bundle(**{"pyproject.toml": "no TOML"}), "cannot be read"),
        (bundle(**{"pyproject.toml": PROJECT + "#" * 2**21}), "bytes, too large: expected at most 1048576"),
        (b"no zip file", "cannot be read"),
        (bundle()[:-30], "cannot be read"),
    ],
)
def test_a_bundle_with_code_or_another_client_app_is_refused(content: bytes, why: str) -> None:
    assert why in sent(content)


def test_a_bundle_with_a_file_twice_is_refused() -> None:
    content = io.BytesIO(bundle())
    with zipfile.ZipFile(content, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("pyproject.toml", PROJECT)
    assert sent(content.getvalue()) == "it has 'pyproject.toml' twice"


def test_a_bundle_must_be_the_one_that_the_run_names() -> None:
    assert sent(bundle()) == ""
    assert "name or version" in sent(bundle(), version="9")
    assert "name or version" in sent(bundle(), app="evil/tofu-fl")
    assert "checksum" in incompatibility(bundle(), INSTALLED, app=IDENTITY[0], version=IDENTITY[1], digest="0" * 64)


def test_a_pin_that_is_neither_is_refused() -> None:
    with pytest.raises(ValueError, match="TOFU_PINNED_APP='yes' is not usable"):
        sent(bundle(), "yes")


@pytest.mark.parametrize("content", [bundle(), bundle(**{"evil.py": ""})])
def test_flower_unpacks_a_bundle_only_after_the_check(content: bytes) -> None:
    """The names that `guard` replaces are those that Flower's module calls."""
    names = run_clientapp.run_clientapp.__code__.co_names
    assert {"pull_task_input", "install_from_fab"} <= set(names)
    run, fab = SimpleNamespace(fab_id=IDENTITY[0], fab_version=IDENTITY[1]), SimpleNamespace()
    fab.content, fab.hash_str = content, hashlib.sha256(content).hexdigest()
    unpacked: list[Any] = []
    runtime: Any = SimpleNamespace(
        pull_task_input=lambda client: (None, None, run, fab), install_from_fab=lambda data: unpacked.append(data)
    )
    guard(runtime, INSTALLED)
    with pytest.raises(PermissionError, match="was not checked"):
        runtime.install_from_fab(content)
    runtime.pull_task_input(None)
    if content == bundle():
        runtime.install_from_fab(content)
    else:
        with pytest.raises(PermissionError, match="files besides"):
            runtime.install_from_fab(content)
    assert unpacked == ([content] if content == bundle() else [])


def test_a_forked_client_app_has_the_guard() -> None:
    """In the children that `deploy.prefork` forks, with a stand-in for the rest of the command."""
    code = (
        "import importlib, os; from deploy import prefork\n"
        "from flwr.supernode.runtime import run_clientapp as r\n"
        "cli = importlib.import_module('flwr.supernode.cli.flwr_clientapp')\n"
        "cli.flwr_clientapp = lambda: print(r.install_from_fab.__module__, flush=True)\n"
        f"for os.environ['TOFU_PINNED_APP'] in ('', {INSTALLED!r}):\n"
        "    if os.fork() == 0: prefork.exit_with(prefork._app, ['flwr-clientapp'], [os.dup(n) for n in range(3)])\n"
        "    assert os.wait()[1] == 0"
    )
    result = run([sys.executable, "-c", code], check=True)
    assert result.stdout.split() == ["flwr.cli.install", "deploy.pinned"]
