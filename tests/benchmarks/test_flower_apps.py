"""The edits that the benchmark of Flower's example apps makes."""

from pathlib import Path

import pytest

from benchmarks.flower_apps.apps import APPS, MAX_CHANGED_LINES, App, changed

CLIENT = "from flwr.clientapp import ClientApp\n\nfrom {package}.task import Net\n\n{app}\n"
SERVER = "{imports}\ndef main():\n    strategy = {strategy}\n"


def example(folder: Path, app: App) -> Path:
    """The two files of an app, as far as the edits look at them."""
    made = f"app = ClientApp(\n{app.mods}\n        own,\n    ],\n)" if app.mods else "app = ClientApp()"
    (folder / app.package).mkdir(parents=True)
    (folder / app.package / "client_app.py").write_text(CLIENT.format(package=app.package, app=made))
    (folder / app.package / "server_app.py").write_text(SERVER.format(imports=app.server_import, strategy=app.strategy))
    return folder


@pytest.mark.parametrize("variant", ["plain", "compress", "sparse", "secure"])
@pytest.mark.parametrize("name", APPS)
def test_edits_are_few_and_leave_valid_code(tmp_path: Path, name: str, variant: str) -> None:
    app = APPS[name]
    lines = changed(example(tmp_path, app), app.edits(variant))
    assert (lines == 0) == (variant == "plain")
    assert lines <= MAX_CHANGED_LINES
    client = (tmp_path / app.package / "client_app.py").read_text()
    server = (tmp_path / app.package / "server_app.py").read_text()
    compile(client + server, name, "exec")
    assert ("tofu." in client) == ("tofu." in server) == (variant != "plain")


def test_an_app_that_changed_since_is_refused(tmp_path: Path) -> None:
    app = APPS["fl-tabular"]
    folder = example(tmp_path, app)
    path = folder / app.package / "server_app.py"
    path.write_text(path.read_text().replace(app.strategy, "FedAvg(fraction_train=0.5)"))
    with pytest.raises(ValueError, match=r"contains 'FedAvg\(\)' 0 times, expected once"):
        changed(folder, app.edits("secure"))
