"""Models with fewer parameters, which make FedAvg's updates smaller: narrower networks, and FedPara.

Each is a factory for `--model benchmarks.rivals.reduced:NAME`, such as `cnn_9` or `fedpara_lenet5_2`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from tofu.data import ImageShape
from tofu.models import build_model
from tofu.models.small import norm_layer, sequential


def narrow_cnn(first: int, shape: ImageShape) -> nn.Module:
    """Build the small cnn with `first`, twice and four times as many channels, where it has 32, 64 and 128."""
    layers: dict[str, nn.Module] = {}
    channels = shape.channels
    for number, out in enumerate((first, 2 * first, 4 * first), start=1):
        layers |= {
            f"conv{number}": nn.Conv2d(channels, out, 3, padding=1),
            f"norm{number}": norm_layer("group", out),
            f"relu{number}": nn.ReLU(),
            f"pool{number}": nn.MaxPool2d(2),
        }
        channels = out
    features = channels * (shape.height // 8) * (shape.width // 8)
    return sequential(
        layers
        | {
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(features, channels),
            "relu4": nn.ReLU(),
            "fc2": nn.Linear(channels, shape.classes),
        }
    )


def narrow_lenet5(widths: tuple[int, int, int, int], shape: ImageShape) -> nn.Module:
    """Build LeNet-5 with these channels and hidden units, where it has 6, 16, 120 and 84."""
    first, second, third, fourth = widths
    side = (shape.height // 2 - 4) // 2
    return sequential(
        {
            "conv1": nn.Conv2d(shape.channels, first, 5, padding=2),
            "relu1": nn.ReLU(),
            "pool1": nn.MaxPool2d(2),
            "conv2": nn.Conv2d(first, second, 5),
            "relu2": nn.ReLU(),
            "pool2": nn.MaxPool2d(2),
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(second * side * side, third),
            "relu3": nn.ReLU(),
            "fc2": nn.Linear(third, fourth),
            "relu4": nn.ReLU(),
            "fc3": nn.Linear(fourth, shape.classes),
        }
    )


class LowRankHadamard(nn.Module):
    """A convolution or linear layer whose weight is the product, entry by entry, of two matrices of rank r.

    Hyeon-Woo, Ye-Bin, Oh, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", ICLR
    2022, arXiv 2108.06098, proposition 1, whose weight has a rank up to r^2. A convolution's weight is taken as a
    matrix [outputs, inputs x height x width]. The factors are normal, of that deviation which gives the weight the
    variance 2 / fan-in.

    Args:
        layer: the layer to replace.
        rank: r.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int) -> None:
        super().__init__()
        self._shape = layer.weight.shape
        self._padding = layer.padding if isinstance(layer, nn.Conv2d) else None
        rows, columns = self._shape[0], self._shape[1:].numel()
        deviation = (2 / (columns * rank**2)) ** (1 / 8)
        self.factors = nn.ParameterList(
            nn.Parameter(deviation * torch.randn(size, rank)) for size in (rows, columns, rows, columns)
        )
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        x1, y1, x2, y2 = self.factors
        weight = ((x1 @ y1.T) * (x2 @ y2.T)).view(self._shape)
        if self._padding is None:
            return functional.linear(inputs, weight, self.bias)
        return functional.conv2d(inputs, weight, self.bias, padding=self._padding)


def fedpara(name: str, rank: int, shape: ImageShape) -> nn.Module:
    """Build one of our models with factors of this rank for the weight of every convolution and linear layer."""
    model = build_model(name, shape)
    for part, layer in list(model.named_children()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            setattr(model, part, LowRankHadamard(layer, rank))
    return model


def _factory(build: Callable[[ImageShape], nn.Module]) -> Callable[..., nn.Module]:
    return lambda **sizes: build(ImageShape(**sizes))


cnn_9, cnn_4, cnn_3, cnn_2 = (_factory(partial(narrow_cnn, first)) for first in (9, 4, 3, 2))
lenet5_1, lenet5_2, lenet5_3, lenet5_4 = (
    _factory(partial(narrow_lenet5, widths)) for widths in ((1, 1, 4, 4), (1, 2, 6, 6), (1, 2, 16, 12), (2, 4, 32, 24))
)
fedpara_cnn_1, fedpara_cnn_4 = (_factory(partial(fedpara, "cnn", rank)) for rank in (1, 4))
fedpara_lenet5_1, fedpara_lenet5_2 = (_factory(partial(fedpara, "lenet5", rank)) for rank in (1, 2))
