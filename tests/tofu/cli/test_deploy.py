"""`tofu deploy`: what cannot be used takes one line on standard error, exit status 2, and leaves nothing behind."""

import sys
from pathlib import Path

import pytest

from tofu.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("status", "--folder=none"), "tofu deploy up"),
        (("down", "--folder=none"), "tofu deploy up"),
        (("run", "--folder=none"), "tofu deploy up"),
        (("run", "--folder=none", "--config=none.toml"), "none.toml"),
        (("up", "--nodes=0", "--folder=new"), "nodes=0"),
        (("up", "--app=data", "--folder=new"), "pyproject.toml"),
        (("up", "--folder=file/x"), "can be written"),
        (("up", "--data=data", "--folder=new"), "node-0"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(sys, "argv", ["tofu", "deploy", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert {path.name for path in tmp_path.iterdir()} == {"file", "data"}
