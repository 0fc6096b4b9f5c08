"""The server's optimizer: the mean update, negated, is the gradient of a torch optimizer (Reddi et al., ICLR 2021).

Flower's FedAvgM and FedAdam do the same sums, but only inside strategies that also aggregate, so torch's own
fit better.
"""

import torch
from torch import Tensor, nn

from server.checkpoint import Snapshot
from tofu.settings import Settings
from tofu.weights import Weights


class ServerOptimizer:
    """Steps a model's trainable parameters; buffers take the mean update as it is."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._buffers = dict(model.named_buffers())
        parameters = list(self._parameters.values())
        self._optimizer: torch.optim.Optimizer
        if settings.server_optimizer == "adam":
            # The constants are those of Reddi et al.'s FedAdam, whose gradients are updates, far smaller than 1.
            self._optimizer = torch.optim.Adam(parameters, lr=settings.server_lr, betas=(0.9, 0.99), eps=1e-3)
        else:
            momentum = settings.server_momentum if settings.server_optimizer == "momentum" else 0.0
            self._optimizer = torch.optim.SGD(parameters, lr=settings.server_lr, momentum=momentum)

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
            moved = buffer + update[name]
            if name.endswith("running_var"):
                moved = moved.clamp_min(0)  # a lossy update may undershoot, and a variance cannot
            buffer.copy_(moved if buffer.is_floating_point() else moved.round())

    def save(self, snapshot: Snapshot) -> None:
        """Put momentum and moments into a checkpoint; the settings are the run's."""
        for number, state in self._optimizer.state_dict()["state"].items():
            held = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            snapshot.put_tensors(f"optimizer/{number}", held)

    def restore(self, snapshot: Snapshot) -> None:
        """The inverse of `save`."""
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in snapshot.tensors_of("optimizer").items():
            number, _, name = path.partition("/")
            state.setdefault(int(number), {})[name] = value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})
