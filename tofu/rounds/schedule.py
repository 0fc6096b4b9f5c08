"""Which kind a round is: compressed, float32 ("fedavg") or an encrypted sum ("secure")."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tofu.errors import SettingError
from tofu.rounds import KINDS, schedules
from tofu.settings.groups import RoundSettings


class Schedule(ABC):
    """The kind of each round, a function of its number and the accuracies so far.

    Args:
        settings: the settings of rounds.
        rounds: number of rounds of the run.

    Attributes:
        kinds: the kinds of round that can occur, of `tofu.rounds.KINDS`. "compressed" and "fedavg" rounds average
            updates that the server decodes one by one, "secure" rounds reveal the sum only.

    Example:
        >>> schedule = make_schedule(RoundSettings(schedule="switch", switch_round=3, recovery="fedavg"), 4)
        >>> [schedule.kind(round_, ()) for round_ in (1, 2, 3, 4)]
        ['compressed', 'compressed', 'fedavg', 'fedavg']
    """

    kinds: tuple[str, ...]

    def __init__(self, settings: RoundSettings, rounds: int) -> None:
        self.settings, self.rounds = settings, rounds

    @abstractmethod
    def kind(self, round_: int, accuracies: Sequence[float]) -> str:
        """Return the kind of a round, counted from 1.

        Args:
            accuracies: after each earlier round, `accuracies[0]` being that before the first.
        """

    def secure_may_follow(self, round_: int, accuracies: Sequence[float]) -> bool:
        """Return whether the round after this one may be a secure one, for which the clients then send keys ahead.

        Args:
            accuracies: as for `kind`; that of this round is not known yet.
        """
        worst = [*accuracies[:round_], float("-inf")]
        return round_ < self.rounds and self.kind(round_ + 1, worst) == "secure"


def make_schedule(settings: RoundSettings, rounds: int) -> Schedule:
    """Return the schedule of a run of so many rounds.

    Raises:
        SettingError: the schedule is unknown, or a setting does not fit the number of rounds.
    """
    schedule = schedules.get(settings.schedule)(settings, rounds)
    if not set(schedule.kinds) <= set(KINDS):
        raise SettingError("schedule", settings.schedule, f"a schedule with kinds of {', '.join(KINDS)}")
    return schedule


@schedules.register("compressed")
class CompressedRounds(Schedule):
    """All rounds are compressed."""

    kinds = ("compressed",)

    def kind(self, round_: int, accuracies: Sequence[float]) -> str:
        return self.kinds[0]


@schedules.register("fedavg")
class FedAvgRounds(CompressedRounds):
    """All rounds send float32 updates."""

    kinds = ("fedavg",)


@schedules.register("secure")
class SecureRounds(CompressedRounds):
    """All rounds are secure."""

    kinds = ("secure",)


@schedules.register("switch")
class Switch(Schedule):
    """Recovery rounds from `switch_round` on; by default in the last tenth of the rounds, at least one.

    This is the paper's hybrid training: a few rounds without compression recover what was lost.
    """

    def __init__(self, settings: RoundSettings, rounds: int) -> None:
        super().__init__(settings, rounds)
        if settings.switch_round > rounds:
            raise SettingError("switch-round", settings.switch_round, f"at most rounds, {rounds}")
        self._first = settings.switch_round or rounds - max(1, rounds // 10) + 1
        self.kinds = (settings.recovery,) if self._first == 1 else ("compressed", settings.recovery)

    def kind(self, round_: int, accuracies: Sequence[float]) -> str:
        return self.settings.recovery if round_ >= self._first else "compressed"


@schedules.register("plateau")
class Plateau(Schedule):
    """Recovery rounds once the accuracy did not gain for `plateau_patience` rounds; a switch is not taken back."""

    def __init__(self, settings: RoundSettings, rounds: int) -> None:
        super().__init__(settings, rounds)
        self.kinds = ("compressed", settings.recovery)

    def kind(self, round_: int, accuracies: Sequence[float]) -> str:
        best, waited = float("-inf"), 0
        for accuracy in accuracies[:round_]:
            if accuracy >= best + self.settings.plateau_gain:
                best, waited = accuracy, 0
            else:
                waited += 1
                if waited >= self.settings.plateau_patience:
                    return self.settings.recovery
        return "compressed"
