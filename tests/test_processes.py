"""The limits of tests of real processes: they follow progress, and not the time that passes."""

import os
import socket
import sys
from itertools import count
from pathlib import Path

import pytest

from tests.processes import Stall, files, free_port, port_conflicts, run, wait_for


def test_progress_puts_off_the_limit_and_nothing_else_does() -> None:
    states, clock = iter([0, 1, 2, 2, 2]), count(0, 7.0)
    stall = Stall(lambda: next(states), seconds=10, clock=lambda: next(clock))
    stall.check()
    stall.check()
    stall.check()
    with pytest.raises(AssertionError, match="nothing moved for 10 s; the last state was 2"):
        stall.check()


def test_a_file_that_grows_is_progress(tmp_path: Path) -> None:
    file = tmp_path / "run" / "metrics.jsonl"
    seen = {files(tmp_path, tmp_path / "absent")}
    file.parent.mkdir()
    for text in ("", "a", "ab"):
        file.write_text(text)
        seen.add(files(tmp_path, tmp_path / "absent"))
    assert len(seen) == 4


def test_a_command_that_hangs_is_killed_and_its_output_shown() -> None:
    code = "import time; print('before', flush=True); time.sleep(1000)"
    with pytest.raises(AssertionError, match=r"nothing moved for 3 s(?s:.*)before"):
        run([sys.executable, "-c", code], seconds=3)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_output_and_status_are_returned(tmp_path: Path, how: str, warm: bool) -> None:
    code = "import os, sys; print(os.getcwd(), *sys.argv[1:], os.environ['A']); sys.exit('e')"
    (tmp_path / "said.py").write_text(code)
    named = {"-c": ["-c", code], "-m": ["-m", "said"], "script": [str(tmp_path / "said.py")]}[how]
    command = [sys.executable, *named, "x"]
    environment = os.environ | {"A": "b"}
    done = run(command, cwd=tmp_path, env=environment, warm=warm)
    assert (done.returncode, done.stdout, done.stderr) == (1, f"{tmp_path} x b\n", "e\n")
    with pytest.raises(AssertionError, match="ended with 1: e"):
        run(command, cwd=tmp_path, env=environment, check=True, warm=warm)


def test_a_warm_process_has_nothing_of_another_and_none_of_the_tests() -> None:
    code = "import sys, torch; print(torch.initial_seed() == 5, 'pytest_timeout' in sys.modules); torch.manual_seed(5)"
    for _ in range(2):
        assert run([sys.executable, "-c", code], check=True, warm=True).stdout == "False False\n"


def test_a_condition_that_never_holds_fails() -> None:
    with pytest.raises(AssertionError, match="nothing moved"):
        wait_for(lambda: False, seconds=0.3)


def test_free_ports_differ_and_lie_outside_those_of_outgoing_connections() -> None:
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 45
    assert all(15000 <= port < 32768 for port in ports)


def test_a_taken_port_is_named_with_its_process() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (line,) = port_conflicts(f"[Errno 98] error while attempting to bind on address 127.0.0.1:{port}: in use")
    assert line.startswith(f"port {port} is taken: process ")
    assert port_conflicts(f"connection to 127.0.0.1:{port} was refused") == []
