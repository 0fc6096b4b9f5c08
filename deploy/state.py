"""The state file of a federation in the background, and the identity of its processes."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tofu.files import replace_file

_FILE = "state.json"


@dataclass(frozen=True)
class Process:
    """A process by its pid and start time, because a pid can be used again after a process has ended.

    Attributes:
        started: its `start_mark`.
        restarts: how often it was restarted.
    """

    pid: int
    started: str
    restarts: int = 0

    @staticmethod
    def of(pid: int, restarts: int = 0) -> "Process":
        """Return the process that has this pid now."""
        return Process(pid, start_mark(pid), restarts)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return bool(self.started) and start_mark(self.pid) == self.started


@dataclass(frozen=True)
class State:
    """The state of a federation, as its supervisor writes it.

    Attributes:
        phase: starting, running, failed or stopped.
        error: why it failed.
        identities: file of the clients' public keys; empty without identities.
        members: in the order in which they were started.
    """

    phase: str
    supervisor: Process
    address: str = ""
    nodes: int = 0
    app: str = ""
    error: str = ""
    identities: str = ""
    members: dict[str, Process] = field(default_factory=dict)

    @property
    def alive(self) -> list[str]:
        """Names of the processes that run, the supervisor first."""
        named = {"supervisor": self.supervisor} | self.members
        return [name for name, process in named.items() if process.alive]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the state in this folder; None if no federation was ever started in it."""
        try:
            values = json.loads((folder / _FILE).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        members = {name: Process(**process) for name, process in values.pop("members").items()}
        return cls(supervisor=Process(**values.pop("supervisor")), members=members, **values)

    def write(self, folder: Path) -> None:
        """Replace the state in this folder."""
        replace_file(folder / _FILE, json.dumps(dataclasses.asdict(self), indent=1).encode())


def start_mark(pid: int) -> str:
    """Return the start time of a process, as text that differs between processes of the same pid; "" if none runs."""
    if Path("/proc/self/stat").exists():
        try:
            # The name, in parentheses, may contain anything. After it come the state and, 19 fields later, the start.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listed.stdout.strip()


def end_group(process: Process, *, seconds: float) -> None:
    """End a process and the group that it leads with SIGTERM, and after `seconds` with SIGKILL."""
    if not process.alive:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while process.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
