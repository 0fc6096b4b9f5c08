"""The wheel: what it holds, and that commands run from it outside of a checkout, without the extras."""

import os
import sys
import zipfile
from pathlib import Path

import pytest

from tests.processes import run

ROOT = Path(__file__).parents[1]
COMMANDS = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "torchmetrics", "dp_accounting"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from tofu.cli import main
import tofu, server, deploy
assert all(sys.argv[1] in module.__file__ for module in (tofu, server, deploy)), tofu.__file__
from deploy.app_folder import write_app
from pathlib import Path
write_app(Path("app"))

TINY = ["--rounds=1", "--local-epochs=1", "--train-images=200", "--max-evals=2"]
for expected, command in (
    (0, ["--version"]), (0, ["plan"]), (0, ["settings"]), (0, ["demo", *TINY, "--clients=2", "--run-folder=demo"]),
    (0, ["run", *TINY, "--clients=3", "--schedule=secure", "--run-folder=secure"]), (0, ["report", "secure"]),
    (0, ["compare", "--compressors=topk", "--ratios=20", "--seeds=1", "--folder=c", *TINY, "--clients=2"]),
    (2, ["attack", "secure"]), (2, ["run", *TINY, "--noise-multiplier=1"]),
):
    sys.argv = ["tofu", *command]
    try:
        main()
    except SystemExit as end:
        assert (end.code or 0) == expected, (command, end.code)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "uv", "build", "--wheel", "--quiet", "--offline", "--no-build-isolation"]
    run([*command, "-o", str(folder), str(ROOT)], check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    assert {"tofu/py.typed", "client/app.py", "server/app.py", "deploy/compose.yaml"} <= set(names)
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "tofu",
        "client",
        "server",
        "attacks",
        "deploy",
    }


@pytest.mark.slow
def test_commands_run_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    library, folder = tmp_path / "library", tmp_path / "user"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(library)
    environment = os.environ | {"PYTHONPATH": str(library), "OMP_NUM_THREADS": "1"}
    done = run([sys.executable, "-c", COMMANDS, str(library)], cwd=folder, env=environment, check=True)
    for extra in ("attacks", "privacy"):
        assert f"pip install 'tofu-fl[{extra}]'" in done.stderr
    assert (folder / "demo" / "report.html").exists()
    assert (folder / "app" / "pyproject.toml").exists()
