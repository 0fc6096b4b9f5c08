"""A model at the weights with which the round began, which all clients have in common.

What clients measure there adds up to what one client with all their images would measure; at their own trained weights
it would be a sum over different networks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tofu.data import LabeledImages
from tofu.weights import Weights, eval_mode, load_weights, weights_of


@contextmanager
def at_weights(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Inside, the model is in eval mode with these weights and without gradients; afterwards it is as it was."""
    now = weights_of(model)
    load_weights(model, weights)
    try:
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        load_weights(model, now)


def subsample(data: LabeledImages, limit: int) -> Tensor:
    """At most `limit` images, evenly spread: uint8 [n, channels, height, width]."""
    return data.images[subsample_rows(len(data), limit)]


def subsample_rows(count: int, limit: int) -> Tensor:
    """At most `limit` of the rows 0 to count - 1, evenly spread: int64 [n]."""
    n = min(limit, count)
    return torch.arange(n) * count // max(1, n)
