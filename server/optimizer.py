"""The server's step on the global model: a torch optimizer whose gradient is the negated mean update."""

import torch
from torch import Tensor, nn

from server.checkpoint import Snapshot
from tofu.rounds import server_optimizers
from tofu.settings import ServerSettings
from tofu.weights import Weights


class ServerOptimizer:
    """Steps a model's trainable parameters; the mean update is added to its buffers unchanged."""

    def __init__(self, model: nn.Module, server: ServerSettings) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._buffers = dict(model.named_buffers())
        self._optimizer = server_optimizers.get(server.server_optimizer)(self._parameters.values(), server)

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
