"""The interface of attacks: requirements, time limit and result."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.observation import CAPABILITIES, Observation
from tofu.errors import TofuError
from tofu.registry import Registry


class AttackError(TofuError):
    """The attack cannot run on this message, or the message or model cannot be attacked."""


Progress = Callable[[int, int, float], None]
"""Called with the evaluations made, those planned, and the attacker's best loss so far."""


class Watch:
    """Time limit and progress of one attack.

    Args:
        seconds: time after which `go_on` returns False.
        progress: called at most every half second.
        clock: returns seconds; tests replace it.

    Attributes:
        stopped: whether `go_on` has returned False, so that the attack ended before it was done.
    """

    def __init__(
        self, seconds: float = math.inf, progress: Progress | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._progress = clock, progress
        self._end, self._next = clock() + seconds, clock()
        self.seconds, self.stopped = seconds, False

    def go_on(self, done: int = 0, planned: int = 0, loss: float = math.nan) -> bool:
        """Report progress and return whether time is left."""
        now = self._clock()
        if self._progress is not None and now >= self._next:
            self._progress(done, planned, loss)
            self._next = now + 0.5
        self.stopped |= now >= self._end
        return not self.stopped


@dataclass(frozen=True)
class Reconstruction:
    """Result of an attack.

    Attributes:
        images: float32 [n, channels, height, width] in [-1, 1], or None for an attack on labels alone.
        labels: int64 [n], or None.
        loss: the attacker's final objective (nan if it has none).
        evals: number of evaluations of that objective.
    """

    images: Tensor | None
    labels: Tensor | None
    loss: float = math.nan
    evals: int = 0


class Attack(ABC):
    """Base class of attacks; an instance holds settings only.

    Attributes:
        name: the registered name.
        needs: names of `CAPABILITIES` that the attack requires.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def incompatibility(self, observation: Observation) -> str | None:
        """Return the reason why this attack cannot run on this message, or None."""
        for need in self.needs:
            reason, given = CAPABILITIES[need]
            if not given(observation):
                return f"{self.name} needs {need}, which {observation.message} does not give: {reason}"
        return None

    def run(
        self, observation: Observation, *, generator: torch.Generator, watch: Watch | None = None
    ) -> Reconstruction:
        """Attack one message.

        Args:
            generator: the only source of randomness.
            watch: time limit and progress. The best result until the limit is returned.

        Raises:
            AttackError: the message lacks something that this attack needs.
        """
        incompatibility = self.incompatibility(observation)
        if incompatibility:
            raise AttackError(incompatibility)
        return self._run(observation, generator, watch or Watch())

    @abstractmethod
    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Run the attack; its requirements are met."""


registry: Registry[type[Attack]] = Registry("attacks", Attack, "attacks")

ATTACKS = registry.names()
"""Names of the attacks in this package."""


def make_attack(name: str) -> Attack:
    """Create the attack with this name, with its default settings.

    Raises:
        SettingError: the name is unknown, or it names an object that is not an attack.
    """
    return registry.get(name)()
