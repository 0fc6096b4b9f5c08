"""Warm client apps: each in a process of its own, on the streams of who asked for it, and none left at the end."""

import http.server
import json
import os
import queue
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.prefork import RUNNING_APPS
from tests.processes import run, wait_for

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


@pytest.fixture
def calls() -> Iterator[tuple[int, "queue.Queue[tuple[str, str]]"]]:
    """The port of a node that answers no app, but reports of their ends, and the (path, body) of each request."""
    found: queue.Queue[tuple[str, str]] = queue.Queue()
    ended = threading.Event()

    class Node(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode("latin-1")
            if not self.path.endswith("heartbeat"):
                found.put((self.path, f"{self.headers}{body}"))
            if not self.path.endswith("push-task-output"):
                ended.wait()
                return
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Node) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], found
        ended.set()
        server.shutdown()


def test_apps_that_ended_with_the_service_are_reported_at_its_next_start(
    tmp_path: Path, calls: "tuple[int, queue.Queue[tuple[str, str]]]"
) -> None:
    """As in a container that is killed. Without the report the node waits until the app's token has expired."""
    port, requests = calls
    running = tmp_path / "apps.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), RUNNING_APPS: str(running)}
    app = ["flwr-clientapp", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}", "--token", "secret"]
    code = "import sys; from deploy import prefork; prefork.exit_with(prefork.main, sys.argv[1:], [])"
    for superexec, call in (
        (f"import subprocess; subprocess.run({app!r})", "pull-task-input"),
        ("import time; time.sleep(600)", "push-task-output"),
    ):
        command = [sys.executable, "-c", code, sys.executable, "-c", superexec]
        with subprocess.Popen(command, env=environment, start_new_session=True) as process:
            try:
                path, said = requests.get(timeout=120)
                assert path == f"/v1/runtime/{call}"
                assert "secret" in said
                if call == "pull-task-input":
                    wait_for(running.exists)
                    assert [command[1:] for command in json.loads(running.read_text())] == [app[1:]]
                    assert stat.S_IMODE(running.stat().st_mode) == 0o600
            finally:
                os.killpg(process.pid, signal.SIGKILL)
    assert "it ended with its service" in said
