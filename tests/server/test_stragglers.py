"""How long a round waits for silent clients, and when they are asked again."""

from typing import Any

import pytest

from server.client_registry import Client
from server.stragglers import MIN_SECONDS, Stragglers
from tests.server.memory import MemoryTransport
from tests.server.test_runner import TINY, make, on_train, rounds
from tofu.flower.internals import task_identity
from tofu.settings import Settings

CLIENTS = [Client(number, str(number), 10) for number in range(4)]


def stragglers(**changes: Any) -> Stragglers:
    return Stragglers(Settings.of(changes).server)


def names(clients: list[Client]) -> list[str]:
    return [client.name for client in clients]


def after(known: Stragglers, *seconds: float, kind: str = "compressed") -> Stragglers:
    for number, value in enumerate(seconds, 1):
        known.finished(kind, number, asked={"0"}, silent=set(), seconds=value)
    return known


def test_the_timeout_follows_the_median_of_the_rounds_of_a_kind() -> None:
    known = stragglers(straggler_factor=4, round_timeout=900)
    assert after(known, 20.0).patience("compressed") == 900  # one round says little
    assert after(known, 20.0, 400.0).patience("compressed") == 80
    assert known.patience("secure") == 900
    assert after(known, 1000.0, 1000.0, kind="secure").patience("secure") == 900
    assert after(stragglers(straggler_factor=4), 1.0, 1.0).patience("compressed") == MIN_SECONDS
    assert after(stragglers(straggler_factor=0, round_timeout=77), 1.0, 1.0).patience("compressed") == 77


def test_on_one_machine_a_busy_processor_leaves_nobody_out_unless_the_user_asks_for_it() -> None:
    settings = Settings.of({"round_timeout": 900}).server
    assert after(Stragglers(settings), 20.0, 20.0).patience("compressed") == 100
    assert after(Stragglers(settings, one_machine=True), 20.0, 20.0).patience("compressed") == 900
    chosen = Settings.of({"straggler_factor": 3.0}).server
    assert after(Stragglers(chosen, one_machine=True), 20.0, 20.0).patience("compressed") == 60


def test_a_round_in_which_all_were_silent_says_nothing_about_time() -> None:
    known = stragglers(straggler_factor=1)
    for number in (1, 2, 3):
        known.finished("compressed", number, asked={"0"}, silent={"0"}, seconds=0.0)
    assert known.patience("compressed") == 3600


def test_a_silent_client_is_left_out_for_ever_longer_and_forgiven_at_its_first_reply() -> None:
    known, asked_in = stragglers(suspend_after=2), []
    for round_ in range(1, 40):
        active = names(known.active(CLIENTS, round_, min_clients=1))
        if "3" in active:
            asked_in.append(round_)
        known.finished("compressed", round_, asked=set(active), silent={"3"} & set(active), seconds=1.0)
    assert asked_in == [1, 2, 7, 16, 33]
    known.finished("compressed", 40, asked={"3"}, silent=set(), seconds=1.0)
    assert names(known.active(CLIENTS, 41, min_clients=1)) == ["0", "1", "2", "3"]
    known.finished("compressed", 41, asked={"3"}, silent={"3"}, seconds=1.0)
    assert names(known.active(CLIENTS, 42, min_clients=1)) == ["0", "1", "2", "3"]


def test_all_are_asked_where_too_few_would_be_left_and_where_it_is_switched_off() -> None:
    for known, min_clients in ((stragglers(), 4), (stragglers(suspend_after=0), 1)):
        for round_ in (1, 2, 3):
            known.finished("compressed", round_, asked={"3"}, silent={"3"}, seconds=1.0)
        assert len(known.active(CLIENTS, 4, min_clients=min_clients)) == 4
    suspended = stragglers()
    for round_ in (1, 2):
        suspended.finished("compressed", round_, asked={"3"}, silent={"3"}, seconds=1.0)
    assert len(suspended.active(CLIENTS, 3, min_clients=3)) == 3


@pytest.mark.parametrize("kind", ["fedavg", "secure"])
def test_the_rounds_of_a_run_leave_a_silent_client_out(kind: str) -> None:
    settings = Settings.of(TINY | {"clients": 4, "schedule": kind})
    transport = MemoryTransport(settings, {"2": on_train(lambda message, answer: None)})
    with task_identity():
        runner, _ = make(transport, clients=4, schedule=kind)
        results = rounds(runner, 1, 2, 3)
    assert [sorted(result.nodes) for result in results] == [["0", "1", "2", "3"]] * 2 + [["0", "1", "3"]]
    assert [list(result.failures) for result in results] == [["2"], ["2"], []]
