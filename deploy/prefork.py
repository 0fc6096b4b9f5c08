"""A SuperExec whose client apps start without delay: `python -m deploy.prefork flower-superexec …`

A SuperExec starts a `flwr-clientapp` process for every message, and each spends seconds on importing torch. Here one
process imports the packages once and forks for each message, so every app still has a process of its own. The SuperExec
finds a script called `flwr-clientapp` first on its PATH, which passes its arguments and streams to the forking process.
That process sees when an app fails, and reports it to the SuperNode (deploy/lost_replies.py).

Only packages are imported ahead, none of the app's own modules, which come with the app. `--cold` before the command
imports nothing ahead. With TOFU_PINNED_APP in the environment, all apps but the pinned one are refused
(deploy/pinned.py).

Where this process is killed together with its apps, as all processes of a container are, nobody is left to report
them. TOFU_RUNNING_APPS names a file that outlives it, in which the apps that run are kept. At the next start they are
reported, and the SuperNode need not wait until their tokens expire.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

PACKAGES = (
    "flwr.supernode.cli.flwr_clientapp",
    "torch",
    "sklearn.datasets",
    "flwr_datasets.partitioner",
    "datasets",
    "safetensors.torch",
)
RUNNING_APPS = "TOFU_RUNNING_APPS"
_COMMAND = "flwr-clientapp"
_SHIM = """#!{python} -IS
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as warm:
    warm.connect({path!r})
    streams = array.array("i", [0, 1, 2])
    warm.sendmsg([json.dumps(sys.argv).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    warm.shutdown(socket.SHUT_WR)
    warm.recv(1)  # nothing comes: it closes when the app ends
"""
_MAX_BYTES = 1 << 16
_MAX_END_SECONDS = 5
"""How long a SuperExec, which keeps nothing, may take to end: its end takes long where CPU time is short."""


def main(command: Sequence[str], packages: Sequence[str] = PACKAGES) -> int:
    """Run the command, a SuperExec, to its end; returns its exit status."""
    with tempfile.TemporaryDirectory(prefix="tofu-warm-") as folder:  # readable by this user only
        shim, path = Path(folder) / _COMMAND, str(Path(folder) / "socket")
        shim.write_text(_SHIM.format(python=sys.executable, path=path))
        shim.chmod(0o700)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(64)
            environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
            superexec = subprocess.Popen(command, env=environment)
            asked: set[int] = set()
            imported = False

            # The SuperExec handles the signal itself; this process ends after it, even while imports are in progress.
            def end(received: int, _: object) -> None:
                asked.add(received)
                superexec.send_signal(received)
                signal.alarm(_MAX_END_SECONDS)
                if not imported:
                    raise SystemExit(_status(superexec.wait(), asked))

            def kill(*_: object) -> None:
                asked.add(signal.SIGKILL)
                superexec.kill()

            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, end)
            signal.signal(signal.SIGALRM, kill)
            for app in _read_running():
                _fork(listener, _report, app, "it ended with its service")
            for name in packages:
                with suppress(ImportError):  # the app itself reports a missing package
                    importlib.import_module(name)
            imported = True
            return _status(_serve(listener, superexec), asked)


def _status(returncode: int, asked: set[int]) -> int:
    """Return the exit status: 0 if the SuperExec ended by a signal that it was sent here and
    that it does not handle.
    """
    return 0 if -returncode in asked else returncode


def _serve(listener: socket.socket, superexec: "subprocess.Popen[bytes]") -> int:
    listener.settimeout(0.5)
    apps: dict[int, list[str]] = {}
    while superexec.poll() is None:
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            with connection:
                connection.setblocking(True)
                data, streams, *_ = socket.recv_fds(connection, _MAX_BYTES, 3)
                if data:
                    command = json.loads(data)
                    apps[_fork(listener, _app, command, streams)] = command
                    _write_running(apps.values())
                for stream in streams:
                    os.close(stream)
        for pid, status in _reap(superexec.pid):
            command = apps.pop(pid, [])
            if not command:
                continue
            _write_running(apps.values())
            if status:
                _fork(listener, _report, command, f"ended by signal {-status}" if status < 0 else f"status {status}")
    return superexec.returncode


def _read_running() -> list[list[str]]:
    """Return the command lines of the apps that ran when this process ended last, if it was killed."""
    try:
        return list(json.loads(Path(os.environ[RUNNING_APPS]).read_bytes()))
    except (KeyError, OSError, ValueError):  # no such file, or one that was cut short
        return []


def _write_running(commands: Iterable[list[str]]) -> None:
    """Keep the command lines of the apps that run. They have tokens, so only this user may read them."""
    if file := os.environ.get(RUNNING_APPS):
        with suppress(OSError):  # without it, lost apps are noticed later
            with os.fdopen(os.open(f"{file}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as opened:
                json.dump(list(commands), opened)
            os.replace(f"{file}.new", file)


def _fork(listener: socket.socket, function: Callable[..., int], *arguments: object) -> int:
    """Run a function in a process of its own; returns the process's id."""
    pid = os.fork()
    if not pid:
        listener.close()
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        exit_with(function, *arguments)
    return pid


def exit_with(function: Callable[..., int], *arguments: object) -> NoReturn:
    """End the process with the status that a function returns, without the interpreter's clean-up.

    To take down torch and what else was imported takes half a second of CPU time: many seconds on a busy machine, after
    which Docker kills the container.
    """
    status = 1
    try:
        status = function(*arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _app(arguments: list[str], streams: list[int]) -> int:
    """Become the client app."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    if pinned := os.environ.get("TOFU_PINNED_APP"):
        from flwr.supernode.runtime import run_clientapp

        from deploy.pinned import guard

        guard(run_clientapp, pinned)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(sys.executable)  # as for the command itself; `python -m` had put its folder there
    flwr_clientapp()
    return 0


def _report(command: list[str], reason: str) -> int:
    """Report to the SuperNode that an app failed."""
    from deploy.lost_replies import report_end

    return report_end(command, reason)


def _reap(superexec: int) -> Iterator[tuple[int, int]]:
    """Reap the apps that ended, but not the SuperExec, which its Popen reaps; yields each one's id and exit status."""
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == superexec:
                return
            pid, status = os.waitpid(ended.si_pid, 0)
            yield pid, os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    cold = sys.argv[1:2] == ["--cold"]
    exit_with(main, sys.argv[1 + cold :], () if cold else PACKAGES)
