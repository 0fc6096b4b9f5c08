"""What the codecs' tests share."""

import torch
from torch import nn

from tofu.data import ImageShape
from tofu.reference_model import ReferenceModel
from tofu.weights import Weights


class Bare(nn.Module):
    """Parameters of given shapes and nothing to do with them."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])


def bare(*shapes: tuple[int, ...]) -> ReferenceModel:
    """A network of these parameters, for codecs that look at sizes only."""
    return ReferenceModel(Bare(*shapes), ImageShape(1, 8, 8, 10))


def update_of(network: ReferenceModel, *tensors: torch.Tensor) -> Weights:
    return dict(zip(network.param_spec.parameters, tensors, strict=True))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(weights: Weights, network: ReferenceModel) -> torch.Tensor:
    """All trainable parameters as one float64 vector."""
    return torch.cat([weights[name].double().flatten() for name in network.param_spec.parameters])


def missed(true: Weights, decoded: Weights, network: ReferenceModel) -> float:
    """|x - C(x)|^2 / |x|^2 over the parameters."""
    x = flat(true, network)
    return float((x - flat(decoded, network)).square().sum() / x.square().sum())
