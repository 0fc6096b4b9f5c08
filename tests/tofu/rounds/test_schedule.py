from collections.abc import Sequence

import pytest

from tofu.errors import SettingError
from tofu.rounds import schedules
from tofu.rounds.schedule import Schedule, make_schedule
from tofu.settings import Settings


def kinds(accuracies: list[float] | None = None, **settings: object) -> list[str]:
    made = Settings.of({"rounds": 10, "recovery": "fedavg", **settings})
    schedule = make_schedule(made.rounds, made.training.rounds)
    history = accuracies or [0.1] * 11
    return [schedule.kind(round_, history[:round_]) for round_ in range(1, made.training.rounds + 1)]


def test_plain_schedules() -> None:
    assert kinds(schedule="compressed") == ["compressed"] * 10
    assert kinds(schedule="fedavg") == ["fedavg"] * 10


@pytest.mark.parametrize(("switch", "full"), [(1, 10), (8, 3), (10, 1), (0, 1)])
def test_switch(switch: int, full: int) -> None:
    assert kinds(schedule="switch", switch_round=switch) == ["compressed"] * (10 - full) + ["fedavg"] * full


def test_default_switch_is_the_last_tenth() -> None:
    assert kinds(schedule="switch", rounds=30).count("fedavg") == 3


def test_plateau_switches_once_accuracy_stalls_and_stays() -> None:
    rising = [0.1 * i for i in range(11)]
    assert kinds(rising, schedule="plateau") == ["compressed"] * 10
    stalls = [0.1, 0.5, 0.6, 0.6, 0.601, 0.6, 0.9, 0.95, 0.96, 0.97, 0.98]
    assert kinds(stalls, schedule="plateau") == ["compressed"] * 5 + ["fedavg"] * 5
    assert kinds(stalls, schedule="plateau", plateau_patience=4) == ["compressed"] * 10


def test_recovery_is_secure_unless_it_is_asked_to_be_full() -> None:
    assert kinds(schedule="switch", switch_round=9, recovery="secure") == ["compressed"] * 8 + ["secure"] * 2
    assert kinds(schedule="secure") == ["secure"] * 10
    assert Settings.of({}).rounds.recovery == "secure"


def test_keys_are_asked_for_in_the_rounds_before_a_secure_one() -> None:
    def asked(history: list[float], **settings: object) -> list[int]:
        made = Settings.of({"rounds": 6, **settings})
        schedule = make_schedule(made.rounds, made.training.rounds)
        return [round_ for round_ in range(1, 7) if schedule.secure_may_follow(round_, history[:round_])]

    rising = [0.1 * i for i in range(7)]
    assert asked(rising, schedule="switch", switch_round=5) == [4, 5]
    assert asked(rising, schedule="secure") == [1, 2, 3, 4, 5]
    assert asked(rising, schedule="compressed") == []
    assert asked(rising, schedule="switch", recovery="fedavg") == []
    # Of a plateau, where one more round without gain would be one too many.
    stalls = [0.1, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9]
    assert asked(stalls, schedule="plateau", plateau_patience=3) == [4]
    assert asked(stalls, schedule="plateau", plateau_patience=2) == [3, 4, 5]


class Alternate(Schedule):
    """Every other round is a FedAvg round."""

    kinds = ("compressed", "fedavg")

    def kind(self, round_: int, accuracies: Sequence[float]) -> str:
        return self.kinds[round_ % 2]


class Wrong(Alternate):
    kinds = ("compressed", "plain")


def test_a_schedule_of_one_s_own() -> None:
    assert kinds(schedule=f"{__name__}:Alternate", rounds=4) == ["fedavg", "compressed", "fedavg", "compressed"]
    assert schedules.names() == ("compressed", "fedavg", "secure", "switch", "plateau")
    for wrong, accepted in {
        f"{__name__}:Wrong": "kinds of compressed, fedavg, secure",
        f"{__name__}:Missing": "imported",
        f"{__name__}:Settings": "a subclass of tofu.rounds.schedule.Schedule",
        "alternate": "one of compressed, fedavg, secure, switch, plateau, or package.module:Class",
    }.items():
        with pytest.raises(SettingError, match=f"schedule='{wrong}' is not usable: .*{accepted}"):
            Settings.of({"schedule": wrong})
