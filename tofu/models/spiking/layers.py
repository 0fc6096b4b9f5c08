"""Layers that depend on the number of time steps. Activations are [steps * n, ...], with the steps outermost.

In non-spiking mode there is one step, and neurons are ReLUs; a spiking network is converted from this one. The codec's
surrogate of a spiking network also has one step, and replaces a neuron by its firing rate, a smooth ReLU of current /
threshold. Its gradients approximate those of the spiking network, at the cost of 1 step instead of T.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu.codec.surrogate import register_surrogate, smooth_relu
from tofu.models.spiking.neuron import LEAK, integrate_and_fire


def split_time(x: Tensor, steps: int) -> Tensor:
    """[steps * n, ...] -> [steps, n, ...]."""
    return x.view(steps, -1, *x.shape[1:])


class OverTime(nn.Module):
    """Base class of layers that depend on the number of time steps.

    Attributes:
        steps: number of time steps; it may be changed at any time.
        spiking: False for the non-spiking mode, which has one step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = 1
        self.spiking = True

    def extra_repr(self) -> str:
        return f"steps={self.steps}" if self.spiking else "non-spiking"


class RepeatOverTime(OverTime):
    """A constant current: [n, ...] -> [steps * n, ...]."""

    def forward(self, current: Tensor) -> Tensor:
        if not self.spiking:
            return current
        return current.expand(self.steps, *current.shape).flatten(0, 1)


class MeanOverTime(OverTime):
    """[steps * n, ...] -> [n, ...]. A linear layer after it integrates over time without leak or reset.

    Attributes:
        scale: constant factor of the mean, which conversion sets so that outputs keep their size.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0), persistent=False)

    def forward(self, spikes: Tensor) -> Tensor:
        return split_time(spikes, self.steps).mean(0) * self.scale if self.spiking else spikes


class LeakyIntegrateFire(OverTime):
    """Leaky integrate-and-fire neurons with soft reset: currents [steps * n, ...] -> spikes 0 or 1 of that shape.

    Potentials start at 0 for every input. The threshold is a constant of the architecture that is set by balancing and
    not trained: it is the same on all clients, is not sent with updates, and is not in the state dict.

    Args:
        threshold: positive.
        leak: fraction of a potential that is left after a step, 0 to 1.

    Attributes:
        threshold_factor: positive; multiplies the threshold. It may be changed at any time, as the number of steps may.

    Example:
        >>> import torch
        >>> layer = LeakyIntegrateFire(leak=1.0)
        >>> layer.steps = 4
        >>> layer(torch.full((4, 1), 0.4)).flatten().tolist()
        [0.0, 0.0, 1.0, 0.0]
    """

    threshold: Tensor

    def __init__(self, threshold: float = 1.0, leak: float = LEAK) -> None:
        super().__init__()
        self.leak, self.threshold_factor = leak, 1.0
        self.register_buffer("threshold", torch.tensor(threshold), persistent=False)

    @property
    def firing_threshold(self) -> Tensor:
        """The threshold times its factor: a neuron fires where its potential is larger."""
        return self.threshold * self.threshold_factor

    def forward(self, current: Tensor) -> Tensor:
        if not self.spiking:
            return F.relu(current)
        return integrate_and_fire(split_time(current, self.steps), self.firing_threshold, self.leak).flatten(0, 1)


def neurons_of(model: nn.Module) -> dict[str, LeakyIntegrateFire]:
    """Return a mapping: name -> each layer of neurons, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LeakyIntegrateFire)}


def _firing_rate(beta: float) -> Callable[[LeakyIntegrateFire, Tensor], Tensor]:
    """Return the surrogate of a neuron.

    Unlike a rate it is not bounded by 1: proxies then explain more of an update.
    """

    def forward(layer: LeakyIntegrateFire, current: Tensor) -> Tensor:
        return smooth_relu(current / layer.firing_threshold if layer.spiking else current, beta)

    return forward


register_surrogate(LeakyIntegrateFire, _firing_rate)
register_surrogate(RepeatOverTime, lambda beta: lambda layer, current: current)
register_surrogate(MeanOverTime, lambda beta: lambda layer, rates: rates)
