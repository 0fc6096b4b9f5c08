"""`tofu deploy`: what cannot be used takes one line on standard error, exit status 2, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import background
from deploy.state import Process, State
from tests.processes import run
from tofu.cli import main
from tofu.errors import RunError


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
        (
            ("up", "--data=nowhere", "--folder=new"),
            "data='nowhere' is not usable: expected a folder (it does not exist)",
        ),
        (("add-client", "x", "--superlink=a:1"), "make certs"),
        (("add-client", "x", "--superlink=a:1", "--compose=file"), "docker is not found: expected its command"),
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
    monkeypatch.setenv("PATH", "")
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


def test_waiting_for_nodes_says_how_many_are_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter((0, 1, 1, 3))
    monkeypatch.setattr(background, "online", lambda folder, state: next(found))
    monkeypatch.setattr(background.time, "sleep", lambda seconds: None)
    State("running", Process(0, ""), nodes=3).write(tmp_path)
    lines: list[str] = []
    with subprocess.Popen(["sleep", "60"]) as supervisor:
        background._await(tmp_path, supervisor, 60, lines.append)
        assert lines == ["0 of 3 nodes online", "1 of 3 nodes online", "3 of 3 nodes online"]
        with pytest.raises(RunError, match=r"^no nodes were online after 0 s: a slow machine needs --timeout"):
            background._await(tmp_path, supervisor, 0, lines.append)
        supervisor.kill()


def test_a_missing_command_of_flower_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.processes._BIN", tmp_path)
    for name in ("flower-superlink", "flower-supernode", "flwr"):
        (tmp_path / name).write_text("")
    with pytest.raises(RunError, match="flower-superexec is missing: pip install --force-reinstall --no-deps flwr"):
        background.up(tmp_path / "new", nodes=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command", ["up --nodes=0", "down", "status", "run", "certificates", "add-client", "identities"]
)
def test_windows_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setattr(sys, "argv", ["tofu", "deploy", *command.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: `tofu deploy` needs Linux or macOS, or WSL on Windows")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_certificates_and_identities_are_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    commands = {
        "certificates": ["certificates", str(keys), "--host=127.0.0.1", "--node=a", "--node=b"],
        "identities": ["identities", f"--folder={keys}", "0", "1"],
    }
    for command in commands.values():
        monkeypatch.setattr(sys, "argv", ["tofu", "deploy", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {"ca.crt", "a.pub", "b.pub", "identities.json"} <= {file.name for file in files}
    assert all(file.is_file() for file in files)
    assert sorted(json.loads((keys / "identities.json").read_text())) == ["0", "1"]
    for command in commands.values():
        monkeypatch.setattr(sys, "argv", ["tofu", "deploy", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_certificates_need_neither_torch_nor_flower(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'flwr'): sys.modules[name] = None\n"
        "from deploy.certificates import main\n"
        f"sys.exit(main([{str(tmp_path / 'keys')!r}, '--node=a']))"
    )
    run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "keys" / "a.pub").is_file()
