"""Warm client apps: each in a process of its own, on the streams of who asked for it, and none left at the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run

_SUPEREXEC = """
import os, subprocess, sys
for arguments in (["--help"], ["--token"]):
    app = subprocess.run(["flwr-clientapp", *arguments], capture_output=True, text=True)
    print(app.stdout.startswith("usage: flwr-clientapp"), "expected one argument" in app.stderr)
print(os.environ["PATH"].split(os.pathsep)[0])
sys.exit(7)
"""


def test_apps_are_forked_and_speak_on_the_streams_they_were_given(tmp_path: Path) -> None:
    """None of the app's own modules are imported ahead: those come with the app."""
    code = (
        "import sys; from deploy.prefork import main; status = main(sys.argv[1:])\n"
        "own = {name.split('.')[0] for name in sys.modules} & {'tofu', 'client', 'server', 'attacks', 'torch'}\n"
        "print(*own); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, sys.executable, "-c", _SUPEREXEC]
    result = run(command, cwd=tmp_path)
    assert result.returncode == 7, result.stderr
    said = result.stdout.splitlines()
    assert said[:2] == ["True False", "False True"]
    assert not Path(said[2]).exists()
    assert said[3:] == ["torch"]
    assert result.stderr == ""


def _status_after_a_signal(code: str, superexec: str, modules: Path, *, says: set[str]) -> int:
    """The status with which `code` ends that starts a stand-in for the SuperExec, stopped when both have said so."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(modules), *sys.path])}
    command = [sys.executable, "-c", code, sys.executable, "-c", superexec]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert {process.stdout.readline().strip() for _ in range(2)} == says
            process.terminate()
            return process.wait(60)
        finally:
            process.kill()


@pytest.mark.parametrize("handles", ["signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))", "None"])
def test_a_signal_during_the_imports_ends_it_at_once(handles: str, tmp_path: Path) -> None:
    """As where a container is stopped just after its start; the SuperExec may not have a handler of its own yet."""
    (tmp_path / "endless.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    code = "import sys; from deploy.prefork import main; sys.exit(main(sys.argv[1:], ['endless']))"
    superexec = f"import signal, sys, time; {handles}; print('started', flush=True); time.sleep(600)"
    assert _status_after_a_signal(code, superexec, tmp_path, says={"importing", "started"}) == 0


_IGNORES = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('started', flush=True); time.sleep(600)"
)


def test_a_superexec_that_does_not_end_is_killed_and_no_time_is_lost_on_taking_modules_down(tmp_path: Path) -> None:
    """Docker kills a container whose end takes longer than 30 s, which it does where it gets little CPU time."""
    (tmp_path / "slow.py").write_text(
        "import atexit, time\natexit.register(time.sleep, 600)\nprint('imported', flush=True)\n"
    )
    code = "import sys; from deploy import prefork; prefork.exit_with(prefork.main, sys.argv[1:], ['slow'])"
    assert _status_after_a_signal(code, _IGNORES, tmp_path, says={"imported", "started"}) == 0
