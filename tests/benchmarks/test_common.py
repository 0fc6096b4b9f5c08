import json
import sys
from typing import Any

import pytest

from benchmarks import common


def test_results_name_their_command_without_folders_of_this_machine(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["x", "--data", str(tmp_path / "cifar10"), "--seeds", "3", "--only", "a/b c"])
    path = common.write_results("rows", settings={"ratio": 50}, rows=[{"seed": 0}], script="plugins hierarchy")
    document = json.loads(path.read_text())
    command = "python -m benchmarks.plugins hierarchy --data FOLDER/cifar10 --seeds 3 --only 'a/b c'"
    assert document["command"] == command
    assert (document["settings"], document["rows"]) == ({"ratio": 50}, [{"seed": 0}])


def test_an_error_of_a_benchmark_prints_no_values_of_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(images: int = 3) -> None:
        kept = [12345678] * images
        raise OSError(len(kept))

    monkeypatch.setattr(sys, "argv", ["benchmark", "--images", "4"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
    with pytest.raises(OSError, match="4") as raised:
        common.run_command(main)
    sys.excepthook(raised.type, raised.value, raised.tb)
    assert "12345678" not in capsys.readouterr().err
