"""Measurements at the global weights with which a round began, which all clients share.

Sums that clients measure at these weights add up to those of one client with all images. At their own trained weights
they would be sums over different networks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tofu.data import LabeledImages
from tofu.weights import Weights, eval_mode, load_weights, weights_of


@contextmanager
def at_weights(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Within the block, the model has these weights, in eval mode and without gradients; then it is restored."""
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
