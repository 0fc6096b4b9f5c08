"""What every attack stands on: what it needs, how long it may take, what it hands back."""

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


class AttackError(TofuError):
    """An attack that cannot be made on this message, or a message or model that it cannot be made for."""


Progress = Callable[[int, int, float], None]
"""Called with the max_evals made, those planned, and the attacker's own loss so far."""


class Watch:
    """Time limit and progress of one attack.

    Args:
        seconds: after which `go_on` says no.
        progress: called at most every half second.
        clock: in seconds; a test brings its own.
    """

    def __init__(
        self, seconds: float = math.inf, progress: Progress | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._progress = clock, progress
        self._end, self._next = clock() + seconds, clock()

    def go_on(self, done: int = 0, planned: int = 0, loss: float = math.nan) -> bool:
        """Whether there is time left; reports on the way."""
        now = self._clock()
        if self._progress is not None and now >= self._next:
            self._progress(done, planned, loss)
            self._next = now + 0.5
        return now < self._end


@dataclass(frozen=True)
class Reconstruction:
    """What an attack recovered.

    Attributes:
        images: float32 [n, channels, height, width] in [-1, 1], or None for an attack on labels alone.
        labels: int64 [n], or None.
        loss: the attacker's own objective at the end (nan where it has none).
        max_evals: of that objective.
    """

    images: Tensor | None
    labels: Tensor | None
    loss: float = math.nan
    max_evals: int = 0


class Attack(ABC):
    """An attack; an instance holds settings only.

    Attributes:
        name: how a user selects it.
        needs: names of `CAPABILITIES` without which it cannot be made.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def incompatibility(self, observation: Observation) -> str | None:
        """Why this attack cannot be made on this message; None where it can."""
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
            watch: time limit and progress; what was found until the limit comes back.

        Raises:
            AttackError: the message lacks something that this attack needs.
        """
        incompatibility = self.incompatibility(observation)
        if incompatibility:
            raise AttackError(incompatibility)
        return self._run(observation, generator, watch or Watch())

    @abstractmethod
    def _run(self, observation: Observation, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """The attack itself; its needs are met."""
