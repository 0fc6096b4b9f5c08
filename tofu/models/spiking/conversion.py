"""Conversion of a network that was trained without spikes: thresholds from quantiles of each layer's currents.

Layer by layer, the threshold is set to a high percentile of the layer's currents, measured with spikes in all layers
before it (Garg, Chowdhury, Roy, "DCT-SNN", ICCV 2021; Chowdhury, Garg, Roy, arXiv 2104.12528; both 99.9). Quantiles are
estimated from sketches that can be summed over clients.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tofu.models.spiking.layers import LeakyIntegrateFire, MeanOverTime, neurons_of
from tofu.models.spiking.network import SpikingNetwork

BALANCE = 0.999

_SMALLEST, _DECADES, _SIDE_BINS = 1e-4, 7, 1024


class QuantileSketch:
    """A histogram with logarithmic bins, which gives quantiles to within 0.8 % for magnitudes from 1e-4 to 1e3.

    Attributes:
        counts: float64 [`QuantileSketch.BINS`]; the counts of several sketches can be added. The middle bin counts
            magnitudes below 1e-4.

    Example:
        >>> import torch
        >>> sketch = QuantileSketch()
        >>> sketch.add(torch.arange(1001) / 1000)
        >>> round(sketch.quantile(0.5), 2)
        0.5
    """

    BINS = 2 * _SIDE_BINS + 1

    def __init__(self, counts: Tensor | None = None) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.float64) if counts is None else counts

    def add(self, values: Tensor, weight: float = 1.0) -> None:
        """Count values of any shape, each with a weight."""
        magnitude = values.detach().flatten().abs()
        place = (torch.log10(magnitude.clamp(min=1e-30) / _SMALLEST) * (_SIDE_BINS / _DECADES)).floor() + 1
        place = place.clamp(0, _SIDE_BINS).long() * values.detach().flatten().sign().long() + _SIDE_BINS
        self.counts += weight * torch.bincount(place.cpu(), minlength=self.BINS).double()

    def quantile(self, q: float, *, ignore_zeros: bool = False) -> float:
        """Return the value below which a fraction q of the values lies; 0 if there are none.

        Args:
            ignore_zeros: ignore values with a magnitude below 1e-4.
        """
        counts = self.counts.clone()
        if ignore_zeros:
            counts[_SIDE_BINS] = 0
        total = counts.cumsum(0)
        if not total[-1] > 0:
            return 0.0
        bin_ = int(torch.searchsorted(total, q * total[-1]).clamp(max=self.BINS - 1)) - _SIDE_BINS
        if not bin_:
            return 0.0
        magnitude = _SMALLEST * 10 ** ((abs(bin_) - 0.5) * _DECADES / _SIDE_BINS)
        return magnitude if bin_ > 0 else -magnitude


@dataclass(frozen=True)
class Balance:
    """Measurements of `balance_thresholds`; those of several clients can be added.

    Attributes:
        sketches: name of each layer of neurons -> sketch of its currents, in which every image has weight 1.
        outputs: float64 [2], mean squares of the logits without and with spikes, summed over the images.
    """

    sketches: dict[str, QuantileSketch]
    outputs: Tensor

    @property
    def scale(self) -> float:
        """Factor by which the spiking network's logits are smaller; 1 if a mean square is zero."""
        plain, spiking = self.outputs.tolist()
        return (plain / spiking) ** 0.5 if plain > 0 and spiking > 0 else 1.0


@torch.no_grad()
def balance_thresholds(
    network: SpikingNetwork, images: Tensor, *, quantile: float = BALANCE, batch_size: int = 16
) -> Balance:
    """Set the threshold of every layer of neurons in turn, with spikes, at the network's number of steps.

    Firing rates, and thus logits, are smaller than the activations that they replace, and fine-tuning would first have
    to enlarge them. Therefore the scale of the output is set, too (ours).

    Args:
        network: a sequential network; it is in spiking mode afterwards.
        images: float32 [n, channels, height, width] in [-1, 1].
        quantile: quantile of a layer's currents over images, positions and steps. A layer keeps its threshold if it
            is not positive.

    Example:
        >>> import torch
        >>> from tofu.data import ImageShape
        >>> from tofu.models.spiking import spiking_vgg
        >>> network = spiking_vgg([8, 8], ImageShape(channels=1, height=8, width=8, classes=10), steps=8)
        >>> network.spiking = False  # and train it here
        >>> balance = balance_thresholds(network, torch.rand(4, 1, 8, 8))
        >>> abs(float(network.lif2.threshold) / balance.sketches["lif2"].quantile(0.999) - 1) < 1e-6
        True
    """
    parts = torch.split(images, batch_size)
    network.spiking = False
    plain = sum(_power(network(part)) for part in parts)
    network.spiking = True
    sketches: dict[str, QuantileSketch] = {}
    before: list[nn.Module] = []
    for name, module in network.named_children():
        if isinstance(module, LeakyIntegrateFire):
            sketches[name] = sketch = QuantileSketch()
            for part in parts:
                currents = _through(before, part)
                sketch.add(currents, len(part) / currents.numel())
            if (threshold := sketch.quantile(quantile)) > 0:
                module.threshold.fill_(threshold)
        elif isinstance(module, MeanOverTime):
            module.scale.fill_(1)
        before.append(module)
    balance = Balance(sketches, torch.tensor([plain, sum(_power(network(part)) for part in parts)]).double())
    set_output_scale(network, balance.scale)
    return balance


def set_output_scale(network: nn.Module, scale: float) -> None:
    """Set the factor of the outputs' mean over time."""
    for module in network.modules():
        if isinstance(module, MeanOverTime):
            module.scale.fill_(scale)


def _power(logits: Tensor) -> float:
    return float(logits.double().square().mean(1).sum())


def _through(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def thresholds_of(network: nn.Module) -> dict[str, float]:
    """Return a mapping: name of each layer of neurons -> its threshold.

    Thresholds are constants, so a state dict does not have them.
    """
    return {name: float(layer.threshold) for name, layer in neurons_of(network).items()}
