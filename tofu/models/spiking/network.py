"""Spiking networks that compute all time steps of a layer in one call.

Convolutions, pooling and linear layers receive [steps * n, ...]; only neurons loop over time. Weights do not depend on
the number of steps, so `network.steps = 4` changes it at run time.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tofu.data import ImageShape
from tofu.models.small import enlarge_to
from tofu.models.spiking.dct import DctEncoder
from tofu.models.spiking.layers import (
    LeakyIntegrateFire,
    MeanOverTime,
    OverTime,
    RepeatOverTime,
    neurons_of,
    split_time,
)  # fmt: skip
from tofu.weights import seeing_outputs

POOL = "A"
"""Stands for average-pooling by 2 in a list of widths."""

_MAX_ROWS = 1024
"""Maximum of images times steps that are computed together without gradients, which bounds memory."""

_NOISE_IMAGES = 4
_CURRENT_STD = 0.7  # in thresholds


class SpikingNetwork(nn.Sequential):
    """A sequential network with `OverTime` layers: images [n, channels, height, width] -> logits [n, classes].

    Example:
        >>> import torch
        >>> from tofu.data import ImageShape
        >>> network = spiking_vgg([8, "A", 16], ImageShape(channels=1, height=8, width=8, classes=10), steps=8)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> network(images).shape
        torch.Size([2, 10])
        >>> network.steps = 2
        >>> with record_activity(network) as activity:
        ...     _ = network(images)
        >>> activity["lif2"].spikes.shape, activity["lif2"].potential.shape
        (torch.Size([2, 2, 16, 4, 4]), torch.Size([2, 16, 4, 4]))
    """

    @property
    def steps(self) -> int:
        """Number of time steps, at least 1."""
        return self._over_time()[0].steps

    @steps.setter
    def steps(self, steps: int) -> None:
        for module in self._over_time():
            module.steps = steps

    @property
    def spiking(self) -> bool:
        """False for the non-spiking mode: one step, and ReLU in place of neurons."""
        return self._over_time()[0].spiking

    @spiking.setter
    def spiking(self, spiking: bool) -> None:
        for module in self._over_time():
            module.spiking = spiking

    @property
    def threshold_factor(self) -> float:
        """Factor of all neurons' thresholds, 1 by default; positive."""
        return next(iter(neurons_of(self).values())).threshold_factor

    @threshold_factor.setter
    def threshold_factor(self, factor: float) -> None:
        for layer in neurons_of(self).values():
            layer.threshold_factor = factor

    def _over_time(self) -> list[OverTime]:
        return [module for module in self.modules() if isinstance(module, OverTime)]

    def forward(self, images: Tensor) -> Tensor:
        rows = max(1, _MAX_ROWS // self.steps)
        if torch.is_grad_enabled() or len(images) <= rows:
            return self._layers(images)
        return torch.cat([self._layers(part) for part in torch.split(images, rows)])

    def _layers(self, images: Tensor) -> Tensor:
        for layer in self:
            images = layer(images)
        return images


@dataclass
class LayerActivity:
    """Potentials and spikes of a layer of neurons in the recorded forward passes.

    Attributes:
        spikes: [steps, n, ...], 0 or 1.
        potential: [n, ...], the average accumulated membrane potential: currents summed over time without leak or
            reset, over the number of steps (Chowdhury, Garg, Roy, arXiv 2104.12528, section on spatial pruning).
    """

    spikes: Tensor
    potential: Tensor


@contextmanager
def record_activity(network: nn.Module) -> Iterator[dict[str, LayerActivity]]:
    """Record the activity of all layers of neurons: name of the layer -> its activity, detached and kept in memory."""
    activity: dict[str, LayerActivity] = {}

    def record(name: str, layer: LeakyIntegrateFire, currents: tuple[Tensor], spikes: Tensor) -> None:
        steps = layer.steps if layer.spiking else 1
        new = LayerActivity(split_time(spikes.detach(), steps), split_time(currents[0].detach(), steps).mean(0))
        if (old := activity.get(name)) is not None:
            new = LayerActivity(torch.cat([old.spikes, new.spikes], 1), torch.cat([old.potential, new.potential]))
        activity[name] = new

    with seeing_outputs(neurons_of(network), record):
        yield activity


def spiking_vgg(
    widths: Sequence[int | str], shape: ImageShape, *, steps: int, encoder: DctEncoder | None = None
) -> SpikingNetwork:
    """Convolutions of 3x3 and average-pooling, one linear output layer; no biases and no normalization.

    Args:
        widths: output channels of the convolutions in order, and "A" for average-pooling by 2.
        shape: of the images.
        steps: number of time steps.
        encoder: makes spikes of the images; without one, pixels are constant currents.

    Raises:
        ValueError: there are no widths, or the images are too small for the pooling layers.
    """
    layers: dict[str, nn.Module] = {}
    channels, height, width, number, pools = shape.channels, shape.height, shape.width, 0, 0
    if encoder is not None:
        layers["encoder"] = encoder
        height, width = encoder.encoded_side(height), encoder.encoded_side(width)
    for out in widths:
        if isinstance(out, str):
            pools += 1
            layers[f"pool{pools}"] = nn.AvgPool2d(2)
            height, width = height // 2, width // 2
            continue
        number += 1
        layers[f"conv{number}"] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        if number == 1 and encoder is None:
            layers["repeat"] = RepeatOverTime()  # after the convolution, which is then computed once
        layers[f"lif{number}"] = LeakyIntegrateFire()
        channels = out
    if not number or not height * width:
        raise ValueError(f"widths={list(widths)} is not usable: expected convolutions that leave some of {shape}")
    layers |= {"mean": MeanOverTime(), "flatten": nn.Flatten()}
    layers["fc"] = nn.Linear(channels * height * width, shape.classes, bias=False)
    network = SpikingNetwork(OrderedDict(layers))
    network.steps = steps
    _scale_weights(network, shape)
    return network


@torch.no_grad()
def _scale_weights(network: SpikingNetwork, shape: ImageShape) -> None:
    """Scale the initial weights, layer by layer, so that the currents for uniform noise have a given deviation.

    Otherwise the last layers of a deep network receive hardly any spikes (after Mishkin and Matas, "All you need is a
    good init", ICLR 2016).
    """
    outputs = torch.rand(_NOISE_IMAGES, *shape.chw) * 2 - 1
    for module in network:
        scaled = module(outputs)
        if isinstance(module, nn.Conv2d):
            scale = _CURRENT_STD / scaled.std()
            module.weight.mul_(scale)
            scaled = scaled * scale
        outputs = scaled


_WIDTHS: Mapping[str, Sequence[int | str]] = {
    "small": (16, POOL, 32, POOL),
    "vgg5": (64, POOL, 128, 128, POOL, 128, POOL),
    "vgg9": (64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, 512, POOL),
}
"""VGG5 and VGG9 have 4 and 8 convolutions and one linear layer; VGG9 has the widths of arXiv 2104.12528."""

_STEPS = 8


def dct_model(size: str, stride: int, shape: ImageShape, norm: str) -> nn.Module:
    """Return a `spiking_vgg` of a known size behind a `DctEncoder`, for 48 steps."""
    encoder = DctEncoder(stride)
    widths = _WIDTHS[size]
    smallest = 2 ** list(widths).count(POOL)
    side = next(side for side in range(1, smallest + 1) if encoder.encoded_side(side) >= smallest)
    resize, height, width = enlarge_to(shape, side)
    shape = replace(shape, height=height, width=width)
    network = spiking_vgg(widths, shape, steps=encoder.steps, encoder=encoder)
    return SpikingNetwork(OrderedDict(resize | network._modules)) if resize else network


def spiking_model(size: str, shape: ImageShape, norm: str) -> nn.Module:
    """Return a `spiking_vgg` of a known size, whose pixels are constant currents for 8 steps.

    Images that are too small for the pooling layers are scaled up.
    """
    widths = _WIDTHS[size]
    resize, height, width = enlarge_to(shape, 2 ** list(widths).count(POOL))
    network = spiking_vgg(widths, replace(shape, height=height, width=width), steps=_STEPS)
    return SpikingNetwork(OrderedDict(resize | network._modules)) if resize else network
