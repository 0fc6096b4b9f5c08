"""A run with a model of the user's own, used from another folder: predict, attack, resume, the suggested command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NET = """
import torch

def small(channels, height, width, classes):
    assert (height, width) == (8, 8)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * height * width, classes))
"""


def tofu(*arguments: str, cwd: Path, modules: Path | None = None) -> subprocess.CompletedProcess[str]:
    return shell(" ".join(("tofu", *arguments)), cwd=cwd, modules=modules)


def shell(command: str, *, cwd: Path, modules: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which `tofu` is the one of this checkout."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "TOFU_MODULES": str(modules or "")}
    line = f'tofu() {{ {sys.executable} -m tofu.cli "$@"; }}\n{command}'
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=os.environ | own, capture_output=True, text=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user with images of 12 x 12, a model for 8 x 8, and a run."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "nets_27.py").write_text(NET)
    pixels = np.random.default_rng(0)
    for number in range(60):
        place = folder / "photos" / f"class-{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(128 * (number % 2), 256, (12, 12), np.uint8)).save(place / f"{number}.png")
    made = tofu(
        "run --dataset photos --resize 8x8 --model nets_27:small --clients 3 --rounds 2 --ratio 4 --lr 0.05",
        "--local-epochs 30 --momentum 0.5 --record-clients 0 --run-folder mine --quiet",
        cwd=folder,
    )
    assert made.returncode == 0, made.stderr
    return folder


def test_a_run_remembers_where_its_model_was_and_imports_from_there_when_told(project: Path, tmp_path: Path) -> None:
    assert json.loads((project / "mine" / "modules.json").read_text()) == {"nets_27": str(project)}
    run, images = str(project / "mine"), str(project / "photos" / "class-0")
    assert_refused(project, tmp_path, "predict", run, images)
    found = tofu("predict", run, images, cwd=tmp_path, modules=project)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_so_do_resume_and_attack(project: Path, tmp_path: Path) -> None:
    run = str(shutil.copytree(project / "mine", tmp_path / "copy"))
    for arguments in (("run --resume", run, "--rounds 3 --quiet"), ("attack", run)):
        assert_refused(project, tmp_path, *arguments)
    more = tofu("run --resume", run, "--rounds 3 --quiet", cwd=tmp_path, modules=project)
    assert more.returncode == 0, more.stderr


def assert_refused(project: Path, elsewhere: Path, *arguments: str) -> None:
    """The command ends with one line that says how to find the module."""
    refused = tofu(*arguments, cwd=elsewhere)
    assert refused.returncode != 0
    (line,) = [line for line in refused.stderr.splitlines() if "nets_27" in line]
    assert f"write TOFU_MODULES={project} before the command to search where the run had it" in line


def test_a_model_that_has_moved_has_a_line_with_both_folders(project: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(project / "mine", tmp_path / "run"))
    (run / "modules.json").write_text(json.dumps({"nets_27": str(tmp_path / "gone")}))
    found = tofu("predict", str(run), str(project / "photos"), cwd=tmp_path)
    assert found.returncode != 0
    (line,) = found.stderr.splitlines()
    assert f"No module named 'nets_27' in {tmp_path} " in line
    assert f"it is no longer in {tmp_path / 'gone'}, where the run had it; run the command in the folder of" in line
    (run / "modules.json").write_text("[1")
    assert "modules.json cannot be read" in tofu("predict", str(run), "x.png", cwd=tmp_path).stderr


@pytest.mark.slow
def test_the_command_that_an_attack_s_report_suggests_works_as_it_stands(project: Path, tmp_path: Path) -> None:
    made = tofu("attack", str(project / "mine"), "--attacks label-counts --seconds 1", cwd=tmp_path, modules=project)
    assert made.returncode == 0, made.stderr
    line = next(line for line in made.stdout.splitlines() if "tofu run " in line)
    command = line.partition("invert): ")[2]
    for option in ("--resize=8x8", "--lr=0.05", "--local-epochs 1", "--momentum=0.5", f"TOFU_MODULES={project} "):
        assert option in command
    first = command.partition(" && ")[0]
    again = shell(f"{first} --quiet", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert list((project / "mine-few" / "record").glob("round-*"))
