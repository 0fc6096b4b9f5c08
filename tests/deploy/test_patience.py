"""Time limits follow the load of the machine."""

import datetime
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import background, patience
from deploy.patience import extend_tokens, load_factor
from deploy.state import Process, State
from tofu.errors import RunError


@pytest.mark.parametrize(("load", "cores", "factor"), [(0.1, 2, 1.0), (2.0, 2, 1.0), (40.0, 2, 20.0), (3.0, 1, 3.0)])
def test_the_factor_is_the_load_of_each_core(
    monkeypatch: pytest.MonkeyPatch, load: float, cores: int, factor: float
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)  # a container with one of the cores
    assert load_factor() == factor


@pytest.fixture
def supervisor() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("busy", [False, True])
def test_up_waits_longer_on_a_busy_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supervisor: "subprocess.Popen[bytes]", busy: bool
) -> None:
    (tmp_path / "logs").mkdir()
    State("running", Process.of(supervisor.pid), nodes=1).write(tmp_path)
    answers = iter([0, 0, 0])  # half a second apart; then the node is online
    monkeypatch.setattr(background, "online", lambda folder, state: next(answers, 1))
    monkeypatch.setattr(background, "load_factor", lambda: 1000.0 if busy else 1.0)
    seen: list[str] = []
    if busy:
        background._await(tmp_path, supervisor, 0.7, seen.append)
        assert seen == ["0 of 1 nodes online", "1 of 1 nodes online"]
    else:
        with pytest.raises(RunError, match=r"0 of 1 nodes were online after \d+ s"):
            background._await(tmp_path, supervisor, 0.7, seen.append)


@pytest.mark.parametrize("stored", ["sql", "in_memory"])
def test_an_app_that_starts_slowly_keeps_its_token_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
    from flwr.supercore.corestate import in_memory_corestate, sql_corestate
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate import InMemoryNodeState

    module = sql_corestate if stored == "sql" else in_memory_corestate
    owner = sql_corestate.SqlCoreState if stored == "sql" else in_memory_corestate.InMemoryCoreState
    for name in ("claim_task", "activate_task", "acknowledge_task_heartbeat"):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # undone after the test
    monkeypatch.setattr(module, "HEARTBEAT_DEFAULT_INTERVAL", 30)
    factor = [1.0]
    monkeypatch.setattr(patience, "load_factor", lambda: factor[0])
    extend_tokens(module, owner)
    begin = datetime.datetime.now(datetime.UTC)
    clock = [begin]
    monkeypatch.setattr(module, "now", lambda: clock[0])
    objects = ObjectStoreFactory().store()
    state: Any = InMemoryNodeState(objects)
    if stored == "sql":
        federations: Any = SimpleNamespace()  # the state sets an attribute of it
        state = SqlLinkState(":memory:", federations, objects)
        state.initialize()

    def claimed_for(seconds: float, *, running: bool = False, heartbeat: bool = True) -> bool:
        """Whether the token of a task is valid this long after the claim, the app's start, or its heartbeat."""
        task = state.create_task("flwr-serverapp", 1)
        token = state.claim_task(task)
        if running:
            assert state.activate_task(task)
            assert not heartbeat or state.acknowledge_task_heartbeat(task)
        clock[0] += datetime.timedelta(seconds=seconds)
        return state.get_task_by_token(token) is not None

    assert (claimed_for(29), claimed_for(31)) == (True, False)  # Flower's own limits on an idle machine
    assert (claimed_for(59, running=True), claimed_for(61, running=True)) == (True, False)
    factor[0] = 20.0
    assert (claimed_for(599), claimed_for(601)) == (True, False)
    # Not longer, or a crash is noticed late.
    for heartbeat in (False, True):
        assert claimed_for(239, running=True, heartbeat=heartbeat)
        assert not claimed_for(241, running=True, heartbeat=heartbeat)
