"""The server's optimizers (Reddi et al., ICLR 2021): the negated mean update is the gradient of a torch optimizer.

Flower's FedAvgM and FedAdam compute the same, but only inside strategies that also aggregate.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tofu.rounds import server_optimizers
from tofu.settings.groups import ServerSettings


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
