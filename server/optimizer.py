"""The server's optimizer: the negated mean update is the gradient of a torch optimizer (Reddi et al., ICLR 2021).

Flower's FedAvgM and FedAdam compute the same, but only inside strategies that also aggregate.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from server.checkpoint import Snapshot
from tofu.registry import Registry
from tofu.settings import Settings
from tofu.weights import Weights

Factory = Callable[[Iterable[nn.Parameter], Settings], torch.optim.Optimizer]

server_optimizers: Registry[Factory] = Registry("server-optimizer", None, "server.optimizer")
"""Functions of (parameters, settings) that make the torch optimizer. `package.module:function` selects another one."""


@server_optimizers.register("sgd")
def sgd(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Adds the mean update, times server-lr."""
    return torch.optim.SGD(parameters, lr=settings.server_lr)


@server_optimizers.register("momentum")
def momentum(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """FedAvgM."""
    return torch.optim.SGD(parameters, lr=settings.server_lr, momentum=settings.server_momentum)


@server_optimizers.register("adam")
def adam(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """FedAdam with the constants of Reddi et al.; epsilon is large because updates are far smaller than 1."""
    return torch.optim.Adam(parameters, lr=settings.server_lr, betas=(0.9, 0.99), eps=1e-3)


class ServerOptimizer:
    """Steps a model's trainable parameters; the mean update is added to its buffers unchanged."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._buffers = dict(model.named_buffers())
        self._optimizer = server_optimizers.get(settings.server_optimizer)(self._parameters.values(), settings)

    @torch.no_grad()
    def step(self, update: Weights) -> None:
        """Apply the mean update, by name, in place."""
        for name, parameter in self._parameters.items():
            parameter.grad = -update[name]
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, buffer in self._buffers.items():
            if name not in update:
                continue
            new = buffer + update[name]
            if name.endswith("running_var"):
                new = new.clamp_min(0)  # a lossy update may undershoot, but a variance is not negative
            buffer.copy_(new if buffer.is_floating_point() else new.round())

    def save(self, snapshot: Snapshot) -> None:
        """Add momenta and moments to a checkpoint."""
        for number, state in self._optimizer.state_dict()["state"].items():
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            snapshot.put_tensors(f"optimizer/{number}", tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore what `save` wrote."""
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in snapshot.tensors_of("optimizer").items():
            number, _, name = path.partition("/")
            state.setdefault(int(number), {})[name] = value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})
