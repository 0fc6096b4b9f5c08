"""The server's optimizers (Reddi et al., ICLR 2021): the negated mean update is the gradient of a torch optimizer.

Flower's FedAvgM and FedAdam compute the same, but only inside strategies that also aggregate.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tofu.rounds import server_optimizers
from tofu.settings.groups import ServerSettings

MAX_STEP = 3.0
"""Largest step that `automatic_step` returns."""


def automatic_step(diversity: float, round_: int, rounds: int) -> float:
    """Return the factor of the mean update that the diversity of the updates allows (FedExP, Jhunjhunwala et al.,
    ICLR 2023, algorithm 1).

    Half of the diversity, from 1 to `MAX_STEP`: updates that point in different directions have a short mean, so a
    longer step still approaches what all clients want. FedExP's last iterates oscillate; instead of their average, what
    exceeds 1 falls linearly to 0 in the last round. The result is a multiple of 1/256, rounded down, so that the last
    bits of sums do not matter.

    Args:
        diversity: see `tofu.rounds.aggregation.gradient_diversity`.
        round_: counted from 1.
        rounds: number of rounds of the run.

    Example:
        >>> [automatic_step(4.0, round_, 3) for round_ in (1, 2, 3)]
        [2.0, 1.5, 1.0]
    """
    excess = min(MAX_STEP, max(1.0, diversity / 2)) - 1
    return 1 + math.floor(256 * excess * (rounds - round_) / max(1, rounds - 1)) / 256


@server_optimizers.register("sgd")
class ServerSGD:
    """Adds the mean update, times server-lr.

    Unlike `torch.optim.SGD` it does not import torch's compiler, which takes seconds at the start of a server.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], server: ServerSettings) -> None:
        self._parameters, self._lr = list(parameters), server.server_lr

    @torch.no_grad()
    def step(self) -> None:
        """Take one step along the gradients."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-self._lr)

    def zero_grad(self) -> None:
        """Remove the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Empty: the optimizer has no state."""
        return {"state": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: the optimizer has no state."""


@server_optimizers.register("momentum")
def momentum(parameters: Iterable[nn.Parameter], server: ServerSettings) -> torch.optim.Optimizer:
    """FedAvgM."""
    return torch.optim.SGD(parameters, lr=server.server_lr, momentum=server.server_momentum)


@server_optimizers.register("adam")
def adam(parameters: Iterable[nn.Parameter], server: ServerSettings) -> torch.optim.Optimizer:
    """FedAdam with the constants of Reddi et al.; epsilon is large because updates are far smaller than 1."""
    return torch.optim.Adam(parameters, lr=server.server_lr, betas=(0.9, 0.99), eps=1e-3)


@server_optimizers.register("ef21")
def ef21(parameters: Iterable[nn.Parameter], server: ServerSettings) -> torch.optim.Optimizer:
    """EF21: adds the sum of all mean updates in every round.

    Clients send changes of their direction (`tofu.rounds.steps.SubtractDirection`), of which one round has the fraction
    client-fraction.
    """
    return torch.optim.SGD(parameters, lr=server.server_lr * server.client_fraction, momentum=1.0)
