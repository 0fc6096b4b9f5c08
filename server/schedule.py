"""Which kind a round is: compressed ("proxy") or float32 ("full")."""

from collections.abc import Sequence
from dataclasses import dataclass

from tofu.settings import Settings


@dataclass(frozen=True)
class Schedule:
    """The kind of each round, from its number and the accuracies so far.

    The paper's hybrid training is "switch": proxies for most rounds, then a few full updates recover what was lost.

    Attributes:
        name: "proxy", "full", "switch" (full from `switch_round` on) or "plateau" (full once accuracy stalls).
        switch_round: first full round of "switch".
        patience: rounds that may pass without gain before "plateau" switches.
        gain: the accuracy gain that counts.
    """

    name: str
    switch_round: int
    patience: int
    gain: float

    @staticmethod
    def of(settings: Settings) -> "Schedule":
        """The schedule of a run; by default "switch" makes the last tenth of the rounds full, at least one."""
        switch = settings.switch_round or settings.rounds - max(1, settings.rounds // 10) + 1
        return Schedule(settings.schedule, switch, settings.plateau_patience, settings.plateau_gain)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of round that can occur."""
        if self.name == "full" or (self.name == "switch" and self.switch_round == 1):
            return ("full",)
        return ("proxy",) if self.name == "proxy" else ("proxy", "full")

    def kind(self, round_: int, accuracies: Sequence[float]) -> str:
        """The kind of a round, counted from 1.

        Args:
            accuracies: after each earlier round, `accuracies[0]` being that before the first.
        """
        if self.name == "full":
            return "full"
        if self.name == "switch":
            return "full" if round_ >= self.switch_round else "proxy"
        if self.name == "plateau" and self._stalled(accuracies[:round_]):
            return "full"
        return "proxy"

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
