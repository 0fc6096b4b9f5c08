"""Processes are known by more than their number, and the state survives its writer."""

import os
import subprocess
import sys
from pathlib import Path

from deploy.state import Process, State, end_group, start_mark

_SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_a_process_is_alive_until_it_ends() -> None:
    child = subprocess.Popen(_SLEEP, start_new_session=True)
    process = Process.of(child.pid)
    assert process.alive
    assert start_mark(child.pid) == process.started
    end_group(process, seconds=5)
    child.wait(10)
    assert not process.alive
    assert start_mark(child.pid) == ""


def test_another_process_with_the_same_number_is_left_alone() -> None:
    child = subprocess.Popen(_SLEEP, start_new_session=True)
    try:
        reused = Process(child.pid, Process.of(os.getpid()).started)
        assert not reused.alive
        end_group(reused, seconds=0)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_a_process_that_was_never_started_is_not_alive() -> None:
    assert not Process(0, "").alive
    assert not Process(os.getpid(), "").alive


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert State.read(tmp_path) is None
    own = Process.of(os.getpid(), restarts=2)
    state = State("running", own, "127.0.0.1:1", 2, "app", members={"superlink": Process(0, ""), "node-0": own})
    state.write(tmp_path)
    assert State.read(tmp_path) == state
    assert state.alive == ["supervisor", "node-0"]
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]
