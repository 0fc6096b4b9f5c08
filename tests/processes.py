"""Tests of real processes: free ports, and limits that a busy machine does not reach.

A process or a condition fails a test when nothing has moved for `STALL_SECONDS`: no output, no file of a run, and less
than `CPU_STEP` seconds of CPU time. No test fails because it takes long in all.
"""

import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from deploy.processes import free_port

__all__ = ["NO_TOTAL_LIMIT", "Stall", "WarmProcess", "files", "free_port", "port_conflicts", "run", "wait_for"]

NO_TOTAL_LIMIT = pytest.mark.timeout(0)
"""Mark of tests that wait with the functions of this module only."""
STALL_SECONDS = 240.0
CPU_STEP = 3.0
"""CPU seconds that count as progress. A process that only polls uses fewer in `STALL_SECONDS`."""
MAX_CPU_SECONDS = 1200.0
"""CPU seconds after which a command is taken for one that computes for ever."""


_FORK_SERVER = multiprocessing.get_context("forkserver")
_FORK_SERVER.set_forkserver_preload(
    [
        "torch", "sklearn.datasets", "datasets", "flwr_datasets.partitioner", "safetensors.torch", "client.app",
        "server.app", "flwr.superlink.grid", "tofu.cli",
        "tofu.reporting.report", "tofu.observers.terminal", "tests.processes",
    ]
)  # fmt: skip


class WarmProcess:
    """A Python command as a process of its own, which is forked from one that has imported what a run needs.

    For tests that need a process, and for which its start is not the subject: the imports take seconds each time.
    The interface is the part of `subprocess.Popen` that tests use.

    Args:
        command: the interpreter, then `-m` and a module, `-c` and code, or a script, then arguments.
        stdout, stderr: files that are written.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        stdout: Path,
        stderr: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        _, *arguments = map(os.fspath, command)
        given = (arguments, cwd or Path.cwd(), dict(os.environ if env is None else env), stdout, stderr)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or it would import the package that is installed
            patch.setenv("HF_HUB_OFFLINE", "1")  # read at import
            forkserver.ensure_running()
        self._process = _FORK_SERVER.Process(target=_become, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As in `subprocess.Popen`."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As in `subprocess.Popen`."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """As in `subprocess.Popen`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a warm process", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        """As in `subprocess.Popen`."""
        self._process.kill()


def _become(arguments: list[str], cwd: Path, env: dict[str, str], stdout: Path, stderr: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, file in ((1, stdout), (2, stderr)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    option = arguments[0] if arguments[0] in ("-c", "-m") else ""
    sys.argv = arguments[1:] if option else arguments
    sys.path.insert(0, str(cwd if option else Path(arguments[0]).parent))
    if option == "-c":
        exec(sys.argv[0], {"__name__": "__main__"})
    elif option == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


class Stall:
    """Fails when a fingerprint has stayed the same for too long.

    Args:
        fingerprint: returns a value that changes with each progress.
        seconds: how long it may stay the same.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        fingerprint: Callable[[], Hashable],
        seconds: float = STALL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fingerprint, self._seconds, self._clock = fingerprint, seconds, clock
        self._last, self._since = fingerprint(), clock()

    def check(self) -> None:
        """Raises AssertionError if the fingerprint has been the same for `seconds`."""
        now = self._fingerprint()
        if now != self._last:
            self._last, self._since = now, self._clock()
        elif self._clock() - self._since >= self._seconds:
            raise AssertionError(f"nothing moved for {self._seconds:g} s; the last state was {self._last}")


def files(*paths: Path) -> tuple[tuple[str, int], ...]:
    """Names and sizes of these files and of the files in these folders, a fingerprint for `Stall`."""
    found = []
    for path in paths:
        for file in (path, *path.rglob("*")):
            with suppress(OSError):
                found.append((str(file), file.stat().st_size if file.is_file() else 0))
    return tuple(sorted(found))


def wait_for(
    condition: Callable[[], bool], fingerprint: Callable[[], Hashable] = lambda: None, *, seconds: float = STALL_SECONDS
) -> None:
    """Wait until a condition holds; raises AssertionError when the fingerprint has not changed for `seconds`."""
    stall = Stall(fingerprint, seconds)
    while not condition():
        stall.check()
        time.sleep(0.2)


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = False,
    watch: Sequence[Path] = (),
    cpu: bool = True,
    seconds: float = STALL_SECONDS,
    warm: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """`subprocess.run` with captured text; the process and its children are killed when nothing moves any more.

    Args:
        check: raise AssertionError with the end of standard error where the exit status is not zero.
        watch: files and folders whose change is progress too, besides output.
        cpu: whether CPU time of the process and its children is progress; not for processes that poll.
        seconds: how long nothing may move.
        warm: fork the process (`WarmProcess`); for Python commands.
    """
    process: subprocess.Popen[bytes] | WarmProcess
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            if warm:
                process = WarmProcess(command, cwd=cwd, env=env, stdout=out, stderr=err)
            else:
                process = subprocess.Popen(
                    command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                    start_new_session=True,
                )  # fmt: skip

        def fingerprint() -> Hashable:
            used = _cpu_seconds(process.pid) if cpu else 0.0
            assert used < MAX_CPU_SECONDS, f"used {used:.0f} s of CPU time"
            return int(used / CPU_STEP), files(out, err, *watch)

        try:
            stall = Stall(fingerprint, seconds)
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                    break
                stall.check()
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, AssertionError):
                raise AssertionError(f"{command}: {error}\n{_end(out)}\n{_end(err)}") from None
            raise
        done = subprocess.CompletedProcess(
            list(command), process.wait(), *(file.read_text(errors="replace") for file in (out, err))
        )
    if check:
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr[-3000:]}"
    return done


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all that it started and that has not outlived it."""
    total = 0.0
    with suppress(psutil.Error):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def _end(file: Path) -> str:
    return file.read_text(errors="replace")[-2000:]


def port_conflicts(text: str) -> list[str]:
    """One line for each port that an error message calls taken, with the process that listens on it."""
    lines = [line for line in text.splitlines() if re.search(r"in use|EADDRINUSE|Errno 98|not available", line)]
    ports = {int(port) for line in lines for port in re.findall(r"(?:port\D{1,12}|:)(\d{4,5})\b", line, re.IGNORECASE)}
    return [f"port {port} is taken: {_listener(port)}" for port in sorted(ports)]


def _listener(port: int) -> str:
    with suppress(psutil.Error):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port:
                name = psutil.Process(each.pid).name() if each.pid else "of another user"
                return f"process {each.pid or '?'} ({name}) listens on it"
    return "nothing listens on it any more"
