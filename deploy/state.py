"""What a federation in the background says of itself in its folder, and whether a process is still the one it names."""

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

_FILE = "state.json"


@dataclass(frozen=True)
class Process:
    """A process that was started here; its number alone could belong to another one by now.

    Attributes:
        started: what `start_mark` said of it.
        restarts: how often it was started again.
    """

    pid: int
    started: str
    restarts: int = 0

    @staticmethod
    def of(pid: int, restarts: int = 0) -> "Process":
        """The process that runs under this number now."""
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
        """The state in this folder; None where no federation was ever started in it."""
        try:
            values = json.loads((folder / _FILE).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        members = {name: Process(**process) for name, process in values.pop("members").items()}
        return cls(supervisor=Process(**values.pop("supervisor")), members=members, **values)

    def write(self, folder: Path) -> None:
        """Replace the state in this folder."""
        part = folder / f"{_FILE}.part"
        part.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        part.replace(folder / _FILE)


def start_mark(pid: int) -> str:
    """When the process started, in words that no other process with its number shares; empty where none runs."""
    if Path("/proc/self/stat").exists():
        try:
            # The name, in brackets, may hold anything; after it come the state and, 19 fields on, the start in ticks.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listed.stdout.strip()


def end_group(process: Process, *, seconds: float) -> None:
    """End a process that leads a group, and its group: politely, and after so many seconds by force."""
    if not process.alive:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while process.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
