import pytest

from server.schedule import Schedule
from tofu.settings import Settings


def kinds(accuracies: list[float] | None = None, **settings: object) -> list[str]:
    made = Settings.of({"rounds": 10, **settings})
    schedule = Schedule.of(made)
    history = accuracies or [0.1] * 11
    return [schedule.kind(round_, history[:round_]) for round_ in range(1, made.rounds + 1)]


def test_plain_schedules() -> None:
    assert kinds(schedule="proxy") == ["proxy"] * 10
    assert kinds(schedule="full") == ["full"] * 10


@pytest.mark.parametrize(("switch", "full"), [(1, 10), (8, 3), (10, 1), (0, 1)])
def test_switch(switch: int, full: int) -> None:
    assert kinds(schedule="switch", switch_round=switch) == ["proxy"] * (10 - full) + ["full"] * full


def test_default_switch_is_the_last_tenth() -> None:
    assert kinds(schedule="switch", rounds=30).count("full") == 3


def test_plateau_switches_once_accuracy_stalls_and_stays() -> None:
    rising = [0.1 * i for i in range(11)]
    assert kinds(rising, schedule="plateau") == ["proxy"] * 10
    stalls = [0.1, 0.5, 0.6, 0.6, 0.601, 0.6, 0.9, 0.95, 0.96, 0.97, 0.98]
    assert kinds(stalls, schedule="plateau") == ["proxy"] * 5 + ["full"] * 5
    assert kinds(stalls, schedule="plateau", plateau_patience=4) == ["proxy"] * 10
