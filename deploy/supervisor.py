"""Keeps a federation of processes running: starts it, starts members again that end, and stops it on SIGTERM.

`tofu deploy up` runs this in the background: python -m deploy.supervisor FOLDER --nodes N --app FOLDER
"""

import argparse
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from deploy.processes import LocalCluster, exit_status
from deploy.state import Process, State
from tofu.errors import TofuError
from tofu.log import about, start_logging

LOG = logging.getLogger("tofu.deploy")

_WAIT_SECONDS = (2.0, 60.0)
"""Before the first restart, and the most before a later one.

A SuperNode that was killed counts as online for about 40 s, and until then the SuperLink refuses its key.
"""
_STEADY_SECONDS = 120.0
"""A member that ran so long starts again with the first wait."""


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
        """Whether a member that is found ended may be started now."""
        if name not in self._due:
            first, most = _WAIT_SECONDS
            steady = now - self._began.get(name, now) >= _STEADY_SECONDS
            self._waits[name] = first if steady else min(2 * self._waits.get(name, first / 2), most)
            self._due[name] = now + self._waits[name]
        if now < self._due[name]:
            return False
        self.counts[name] = self.counts.get(name, 0) + 1
        return True


def supervise(federation: LocalCluster, stopping: threading.Event) -> None:
    """Run a federation until `stopping` is set; the folder's state says at any time who runs.

    Raises:
        TofuError: it could not be started.
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
        state = dataclasses.replace(state, phase="running")
        LOG.info("federation runs", extra=about(address=federation.address, nodes=federation.nodes))
        while True:
            state = dataclasses.replace(state, members=_members(federation, state, restarts))
            state.write(federation.folder)
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
                    break
            if stopping.is_set():
                break
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
    """The members now. One that was not started again keeps its entry, as its number is not its own once it ended."""
    old = state.members
    return {
        name: old[name]
        if name in old and old[name].pid == process.pid
        else Process.of(process.pid, restarts.counts.get(name, 0))
        for name, process in federation.processes.items()
    }


def main() -> int:
    """The command: 0 after a stop, 1 with one line on standard error when the federation could not be started."""
    parser = argparse.ArgumentParser(prog="python -m deploy.supervisor", description="Keep a federation running.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--app", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--pinned", default="")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--identities", action="store_true")
    given = parser.parse_args()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        start_logging("text")  # and where the environment says
        federation = LocalCluster(
            given.folder, nodes=given.nodes, app=given.app, data=given.data, warm=given.warm,
            identities=given.identities, policy=given.policy, pinned=given.pinned,
        )  # fmt: skip
        supervise(federation, stopping)
    except TofuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
