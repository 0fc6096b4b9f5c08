"""The examples run: each in a process of its own, in a folder of its own, without a network."""

import difflib
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LAUNCH = Path(__file__).parent / "launch.py"


def run(script: str, *options: str, cwd: Path) -> str:
    """What an example writes: its standard output, then Flower's log."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(LAUNCH), str(EXAMPLES / script), *options]
    done = processes.run(command, env=environment, cwd=cwd, check=True, warm=True)
    return done.stdout + done.stderr


def lines_of(folder: Path) -> dict[str, list[str]]:
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".toml")]
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8").splitlines() for path in files}


def test_a_flower_app_changes_in_fewer_than_ten_lines() -> None:
    before, after = lines_of(EXAMPLES / "flower-app" / "before"), lines_of(EXAMPLES / "flower-app" / "after")
    assert before.keys() == after.keys()
    changes = [line for name in before for line in difflib.ndiff(before[name], after[name]) if line[:1] in "+-"]
    added = [line for line in changes if line.startswith("+")]
    assert 2 <= len(added) <= len(changes) < 10
    assert all("tofu" in line for line in added)


@pytest.mark.parametrize("folder", ["before", "after"])
def test_the_flower_app_learns_before_and_after(tmp_path: Path, folder: str) -> None:
    output = run("flower-app/run.py", folder, "4", cwd=tmp_path)
    accuracies = [float(found) for found in re.findall(r"round \d: accuracy ([\d.]+)", output)]
    assert len(accuracies) == 5
    assert accuracies[-1] > 0.75 > accuracies[0]
    ratios = [float(found) for found in re.findall(r"'tofu-ratio': ([\d.]+)", output)]
    assert (ratios != []) == (folder == "after")
    assert all(ratio >= 60 for ratio in ratios)


def test_tabular(tmp_path: Path) -> None:
    output = run("tabular.py", "--rounds", "5", "--folder", "run", cwd=tmp_path)
    ((accuracy, area),) = re.findall(r"accuracy ([\d.]+), AUC ([\d.]+), lowest hospital", output)
    assert float(accuracy) > 0.8
    assert float(area) > 0.9
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra `examples`")
def test_text_with_lora(tmp_path: Path) -> None:
    output = run("text_lora.py", "--rounds", "3", "--folder", "run", cwd=tmp_path)
    accuracy, travel, total, ratio = re.findall(
        r"accuracy ([\d.]+); ([\d,]+) of ([\d,]+) parameters travel, (\d+)", output
    )[0]
    assert float(accuracy) > 0.9
    assert 10 * int(travel.replace(",", "")) < int(total.replace(",", ""))
    assert int(ratio) == 20


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lightning") is None, reason="needs the extra `examples`")
def test_lightning(tmp_path: Path) -> None:
    output = run("lightning_client.py", "--rounds", "3", "--folder", "run", cwd=tmp_path)
    assert float(re.findall(r"accuracy ([\d.]+), payloads 40 times smaller", output)[0]) > 0.75


@pytest.mark.slow
def test_attacking_ones_own_app(tmp_path: Path) -> None:
    options = ("--attacks", "inverting", "--seconds", "3600", "--quiet")
    output = run("attack_own_app.py", "--folder", "recordings", "--", *options, cwd=tmp_path)
    header, _, row = re.findall(r"^\|.*\|$", output, re.MULTILINE)
    columns = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (header, row)), strict=True))
    assert (columns["message"], columns["best attack"]) == ("exact", "inverting")
    assert float(columns["PSNR dB"]) > 25
    assert "The time limit stopped" not in output
    assert (tmp_path / "recordings" / "attacks" / "report.html").exists()


@pytest.mark.skipif(find_spec("nbclient") is None, reason="needs nbclient, of the extra `dev`")
def test_the_notebook_executes_in_its_own_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # outputs are not committed
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output["data"] for output in outputs if output["output_type"] in ("execute_result", "display_data")]
    assert any("image/svg+xml" in each for each in data)
    texts = [each["text/plain"] for each in data]
    assert any(float(found) > 0.8 for text in texts for found in re.findall(r"accuracy ([\d.]+), payloads 50", text))
    streams = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert re.search(r"round 2: [\d.]+, top 3: [\d.]+", streams)
