"""Which kind a round is: compressed ("proxy"), float32 ("fedavg") or an encrypted sum ("secure")."""

from collections.abc import Sequence
from dataclasses import dataclass

from tofu.settings import Settings


@dataclass(frozen=True)
class Schedule:
    """The kind of each round, from its number and the accuracies so far.

    The paper's hybrid training is "switch": proxies for most rounds, then a few full updates recover what was lost.

    Attributes:
        name: "proxy", "fedavg", "secure", "switch" (recovery from `switch_round` on) or "plateau" (recovery once
            accuracy stalls).
        recovery: the kind of the rounds that recover: "secure" or "fedavg".
        switch_round: first such round of "switch".
        patience: rounds that may pass without gain before "plateau" switches.
        gain: the accuracy gain that counts.
        rounds: of the run.
    """

    name: str
    recovery: str
    switch_round: int
    patience: int
    gain: float
    rounds: int

    @staticmethod
    def of(settings: Settings) -> "Schedule":
        """The schedule of a run; by default "switch" recovers in the last tenth of the rounds, at least one."""
        switch = settings.switch_round or settings.rounds - max(1, settings.rounds // 10) + 1
        patience, gain = settings.plateau_patience, settings.plateau_gain
        return Schedule(settings.schedule, settings.recovery, switch, patience, gain, settings.rounds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of round that can occur."""
        if self.name in ("proxy", "fedavg", "secure"):
            return (self.name,)
        if self.name == "switch" and self.switch_round == 1:
            return (self.recovery,)
        return ("proxy", self.recovery)

    def kind(self, round_: int, accuracies: Sequence[float]) -> str:
        """The kind of a round, counted from 1.

        Args:
            accuracies: after each earlier round, `accuracies[0]` being that before the first.
        """
        if self.name == "switch":
            return self.recovery if round_ >= self.switch_round else "proxy"
        if self.name == "plateau":
            return self.recovery if self._stalled(accuracies[:round_]) else "proxy"
        return self.name

    def secure_may_follow(self, round_: int, accuracies: Sequence[float]) -> bool:
        """Whether the round after this one may be a secure one, for which the clients then send keys ahead.

        Args:
            accuracies: as for `kind`; that of this round is not known yet.
        """
        worst = [*accuracies[:round_], float("-inf")]
        return round_ < self.rounds and self.kind(round_ + 1, worst) == "secure"

    def _stalled(self, accuracies: Sequence[float]) -> bool:
        """Whether accuracy ever stalled for `patience` rounds: a switch is not taken back."""
        best, waited = float("-inf"), 0
        for accuracy in accuracies:
            if accuracy >= best + self.gain:
                best, waited = accuracy, 0
            else:
                waited += 1
                if waited >= self.patience:
                    return True
        return False
