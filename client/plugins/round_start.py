"""A model at the weights with which the round began, which all clients have in common.

What clients measure there adds up to what one client with all their images would measure; at their own trained weights
it would be a sum over different networks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tofu.data import LabeledImages
from tofu.weights import Weights, load_weights, weights_of


@contextmanager
def at_weights(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Inside, the model is in eval mode with these weights and without gradients; afterwards it is as it was."""
    now, modes = weights_of(model), {module: module.training for module in model.modules()}
    load_weights(model, weights)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        load_weights(model, now)
        for module, training in modes.items():
            module.training = training


def subsample(data: LabeledImages, most: int) -> Tensor:
    """At most so many of the images, evenly spread: uint8 [n, channels, height, width]."""
    count = min(most, len(data))
    return data.images[torch.arange(count) * len(data) // max(1, count)]
