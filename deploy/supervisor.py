"""Keeps a federation of processes running: starts it, restarts processes that end, and stops it on SIGTERM.

`tofu deploy up` runs this in the background: python -m deploy.supervisor FOLDER --nodes N --app FOLDER
"""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from deploy.files import run_command
from deploy.processes import LocalCluster, exit_status
from deploy.state import Process, State
from tofu.errors import TofuError
from tofu.log import about, start_logging

LOG = logging.getLogger("tofu.deploy")

_WAIT_SECONDS = (2.0, 60.0)
"""Delay before the first restart, and the longest delay before a later one.

A SuperNode that was killed counts as online for about 40 s, and until then the SuperLink refuses its key.
"""
_STEADY_SECONDS = 120.0
"""After a member has run this long, its next restart has the first delay again."""


class Restarts:
    """When each member that ended may start again: after 2 s, then twice as long each time, at most 60 s."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._waits: dict[str, float] = {}
        self._due: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def started(self, name: str, now: float) -> None:
        """A member started."""
        self._due.pop(name, None)
        self._began[name] = now

    def is_due(self, name: str, now: float) -> bool:
        """Return whether a member that has ended may be started now."""
        if name not in self._due:
            first, longest = _WAIT_SECONDS
            steady = now - self._began.get(name, now) >= _STEADY_SECONDS
            self._waits[name] = first if steady else min(2 * self._waits.get(name, first / 2), longest)
            self._due[name] = now + self._waits[name]
        if now < self._due[name]:
            return False
        self.counts[name] = self.counts.get(name, 0) + 1
        return True


def supervise(federation: LocalCluster, stopping: threading.Event) -> None:
    """Run a federation until `stopping` is set. The state file in its folder always names the running processes.

    Raises:
        TofuError: the federation could not be started.
    """
    state = State(
        "starting", Process.of(os.getpid()), federation.address, federation.nodes, str(federation.app),
        identities=str(federation.identities or ""),
    )  # fmt: skip
    state.write(federation.folder)
    restarts = Restarts()
    try:
        federation.start()
        for name in federation.processes:
            restarts.started(name, time.monotonic())
        state = dataclasses.replace(state, phase="running", members=_members(federation, state, restarts))
        state.write(federation.folder)
        LOG.info("federation runs", extra=about(address=federation.address, nodes=federation.nodes))
        while not stopping.wait(0.5):
            found = {name: exit_status(process) for name, process in federation.processes.items()}
            ended = {name: status for name, status in found.items() if status is not None}
            due = [name for name in ended if restarts.is_due(name, time.monotonic())]
            for name in due:
                print(f"{name} ended with {ended[name]}: restart {restarts.counts[name]}", flush=True)
                extra = about(member=name, status=ended[name], restarts=restarts.counts[name])
                LOG.warning("member ended", extra=extra)
                federation.restart(name)
                restarts.started(name, time.monotonic())
            if due:
                state = dataclasses.replace(state, members=_members(federation, state, restarts))
                state.write(federation.folder)
        federation.stop()
        LOG.info("federation stopped", extra=about())
        dataclasses.replace(state, phase="stopped", members={}).write(federation.folder)
    except (TofuError, OSError, subprocess.SubprocessError) as error:
        federation.stop()
        reason = " ".join(str(error).split())
        LOG.error("federation failed", extra=about(reason=reason))
        dataclasses.replace(state, phase="failed", error=reason, members={}).write(federation.folder)
        raise


def _members(federation: LocalCluster, state: State, restarts: Restarts) -> dict[str, Process]:
    """Return the present members. One that was not restarted keeps its entry, because its pid may be used again."""
    old = state.members
    return {
        name: old[name]
        if name in old and old[name].pid == process.pid
        else Process.of(process.pid, restarts.counts.get(name, 0))
        for name, process in federation.processes.items()
    }


def command(
    folder: Path,
    nodes: Annotated[int, typer.Option()],
    app: Annotated[Path, typer.Option()],
    data: Path | None = None,
    policy: Path | None = None,
    pinned: str = "",
    warm: Annotated[bool, typer.Option("--warm")] = False,
    identities: Annotated[bool, typer.Option("--identities")] = False,
) -> None:
    """Keep a federation running until SIGTERM or SIGINT."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    start_logging("text")  # and where the environment says
    federation = LocalCluster(
        folder, nodes=nodes, app=app, data=data, warm=warm, identities=identities, policy=policy, pinned=pinned
    )
    supervise(federation, stopping)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    sys.exit(run_command(app, None, "python -m deploy.supervisor", refused=1))
