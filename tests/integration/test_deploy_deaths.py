"""Five supervised nodes, which die as machines do that lose power: at every stage of a secure round, in a long run."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deploy.processes import LocalCluster
from deploy.state import State
from tests.integration.deployed import (
    Background,
    in_process,
    megabytes,
    misbehaving_app,
    rows,
    run_on,
    server_app,
    set_faults,
    supervised,
    wait_online,
)
from tests.processes import NO_TOTAL_LIMIT, wait_for
from tofu.settings import Settings

SOAK_ROUNDS = int(os.environ.get("TOFU_SOAK_ROUNDS", "200"))
TINY: dict[str, Any] = {
    "clients": 5, "min-clients": 2, "model": "mlp", "local-epochs": 1, "batch-size": 32, "lr": 0.1, "ratio": 40.0,
    "max-evals": 3, "schedule": "switch", "round-timeout": 150.0, "secure-timeout": 40.0,
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    NO_TOTAL_LIMIT,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the kernel's list of processes"),
]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("deploy")
    app = misbehaving_app(folder / "app")
    federation = LocalCluster(folder / "federation", nodes=5, app=app, warm=True, identities=True)
    with supervised(federation):
        yield federation


def settings_of(federation: LocalCluster, folder: Path, **more: object) -> Settings:
    own: dict[str, Any] = {"secure-identities": str(federation.identities), "run-folder": str(folder)}
    return Settings.of(TINY | own | {name.replace("_", "-"): value for name, value in more.items()})


@pytest.mark.parametrize("stage", ["share", "mask", "confirm", "reveal"])
def test_a_node_that_dies_in_a_secure_round_is_in_the_sum_or_not_and_comes_back(
    stage: str, federation: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are to the bit those of one process in which that client falls silent at that stage."""
    wait_online(federation)
    set_faults(federation.folder, {"2": {f"2:{stage}": "dies"}})
    # A SuperNode that dies takes its client's state with it: none is kept, so that all runs begin alike.
    settings = settings_of(federation, tmp_path / "run", rounds=3, switch_round=2, error_feedback=0.0)
    run = run_on(federation, settings.to_config())
    assert run.completed, run.log
    first, second, third = rows(tmp_path / "run")[1:]
    assert (first["clients"], first["failures"]) == (5, [])
    assert second["clients"] == (4 if stage in ("share", "mask") else 5), second
    assert {failure["client"] for failure in second["failures"]} == {"2"}
    assert "round 2: client 2: " in run.log
    assert third["clients"] in (4, 5)
    assert second["abandoned"] == third["abandoned"] == ""

    # One process has no stage "confirm"; who dies there does not answer at the next one either.
    lost = {f"2:{'reveal' if stage == 'confirm' else stage}": "lost"}
    if third["clients"] == 4:
        lost["3:advert"] = "lost"
    in_process(tmp_path / "alone", settings, {"2": lost}, monkeypatch)
    ends = [folder / "weights.safetensors" for folder in (tmp_path / "run", tmp_path / "alone" / "run")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_all_are_back_in_a_secure_round(federation: LocalCluster, tmp_path: Path) -> None:
    wait_online(federation)
    set_faults(federation.folder, {})
    run = run_on(federation, settings_of(federation, tmp_path / "run", rounds=2).to_config())
    assert run.completed, run.log
    assert [(row["kind"], row["clients"]) for row in rows(tmp_path / "run")] == [
        ("start", 0), ("compressed", 5), ("secure", 5)
    ]  # fmt: skip


def _came_to(background: Background, number: int) -> bool:
    return len(rows(background.folder)) > number or not background.alive


def _long_lived(federation: LocalCluster) -> dict[str, int]:
    """Member, and where it is warm its SuperExec too -> process."""
    found = {name: process.pid for name, process in list(federation.processes.items())}
    for name, pid in list(found.items()):
        with suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if b"flower-superexec" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found[f"{name} superexec"] = int(child)
    return found


def test_memory_stays_flat_over_many_rounds_with_deaths(federation: LocalCluster, tmp_path: Path) -> None:
    """200 rounds, or $TOFU_SOAK_ROUNDS; the last tenth are secure. After every eighth something dies: of three, one
    SuperNode, which stays away for a minute, and two SuperExecs, for which a round only waits.
    """
    wait_online(federation)
    set_faults(federation.folder, {})
    generator, killed = random.Random(7), []
    settings = settings_of(
        federation, tmp_path / "run", rounds=SOAK_ROUNDS, compressor="topk", round_timeout=30.0, secure_timeout=20.0
    )
    background = Background(federation, settings.to_config())
    background.wait_for_round(0)
    memory: dict[tuple[str, int], dict[int, float]] = {}
    pid = server_app(federation)
    for number in range(1, SOAK_ROUNDS + 1):
        wait_for(partial(_came_to, background, number), background.progress)
        for name, process in (_long_lived(federation) | {"server app": pid}).items():
            if now := megabytes(process):
                memory.setdefault((name, process), {})[number] = now
        if number % 8 == 0 and number < SOAK_ROUNDS:
            name = f"node-{generator.randrange(5)}" + ("" if len(killed) % 3 == 1 else "-exec")
            state = State.read(federation.folder)
            if state is not None and state.members[name].alive:
                os.killpg(state.members[name].pid, signal.SIGKILL)
                killed.append(name)
    run = background.end()
    assert run.completed, run.log
    metrics = rows(tmp_path / "run")
    assert [row["round"] for row in metrics] == list(range(SOAK_ROUNDS + 1))
    assert len(killed) >= SOAK_ROUNDS // 16
    assert any(row["clients"] < 5 for row in metrics[1:]) == (len(killed) > 1)
    assert {row["clients"] for row in metrics[1:]} <= {0, 2, 3, 4, 5}
    tenth, compared = max(2, SOAK_ROUNDS // 10), set()
    for (name, _), seen in memory.items():
        begin = [now for number, now in seen.items() if number <= tenth]
        end = [now for number, now in seen.items() if number > SOAK_ROUNDS - tenth]
        if begin and len(end) > 1:
            compared.add(name)
            grown = sum(end) / len(end) - sum(begin) / len(begin)
            print(f"{name}: {sum(begin) / len(begin):.0f} MB, {grown:+.1f} MB")
            # Flower's SuperNode, in which no code of ours runs, grows by 0.3 MB a round in runs of this size.
            supernode = name.startswith("node-") and "exec" not in name
            assert grown < 0.1 * sum(begin) / len(begin) + 20 + (SOAK_ROUNDS / 2 if supernode else 0), name
    assert {"superlink", "superlink-exec", "server app"} <= compared
    assert any(name.startswith("node-") for name in compared)
