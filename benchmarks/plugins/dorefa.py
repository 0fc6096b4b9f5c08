"""Networks with quantized weights or activations, which the benchmark of `trend` compares.

Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients", arXiv
1606.06160, sections 2.2 to 2.4. Gradients pass straight through the rounding. The first layer's and the last one's
weights, and the outputs, stay in full precision, as there. The paper's weights reach from -1 to 1 and need batch
normalization after them; our networks have none, so a quantized weight keeps the range that it has.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def round_to(values: Tensor, bits: int) -> Tensor:
    """Values in [0, 1] rounded to multiples of 1 / (2^bits - 1); the gradient is that of the identity."""
    steps = 2**bits - 1
    rounded: Tensor = torch.round(values.detach() * steps) / steps
    return rounded + (values - values.detach())


class QuantizedWeight(nn.Module):
    """A weight with 2^bits values, evenly spaced; with one bit, its sign times the mean of the magnitudes."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        if self.bits == 1:
            binary: Tensor = torch.where(weight.detach() >= 0, 1.0, -1.0) * weight.detach().abs().mean()
            return binary + (weight - weight.detach())
        squashed = torch.tanh(weight)
        largest = squashed.detach().abs().max().clamp(min=torch.finfo(weight.dtype).tiny)
        return largest * (2 * round_to(squashed / (2 * largest) + 0.5, self.bits) - 1)


class QuantizedReLU(nn.Module):
    """An activation clipped to [0, 1], with 2^bits values."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, values: Tensor) -> Tensor:
        return round_to(values.clamp(0, 1), self.bits)


def quantize_weights(model: nn.Module, bits: int) -> None:
    """Quantize the weights of all convolutions and linear layers but the first and the last, in place."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in layers[1:-1]:
        parametrize.register_parametrization(layer, "weight", QuantizedWeight(bits))


def quantize_activations(model: nn.Module, bits: int) -> None:
    """Replace every ReLU by a `QuantizedReLU`, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, QuantizedReLU(bits))
