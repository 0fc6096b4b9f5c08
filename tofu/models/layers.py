"""Layers that several models share."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tofu.data import ImageShape

_CHANNELS_PER_GROUP = 16  # Wu & He 2018, "Group Normalization", table 3


class ChannelsLast(nn.Module):
    """Convert images to channels_last memory format, in which the small cnn takes a third less time on CPUs.

    This is a layer of our own models only, because the layers that follow must not depend on the memory format, as
    `Tensor.view` does.
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)


def norm_layer(norm: str, channels: int) -> nn.Module:
    """The normalization layer for "group" (16 channels per group), "batch" or "none"."""
    if norm == "group":
        return nn.GroupNorm(max(1, channels // _CHANNELS_PER_GROUP), channels)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def enlarge_to(shape: ImageShape, side: int) -> tuple[dict[str, nn.Module], int, int]:
    """A layer that scales smaller images up to `side` pixels, or none -> (layers, height, width after them)."""
    return resize(shape, max(shape.height, side), max(shape.width, side))


def resize(shape: ImageShape, height: int, width: int) -> tuple[dict[str, nn.Module], int, int]:
    """A layer that scales images to this size, or none if they have it -> (layers, height, width)."""
    if (height, width) == (shape.height, shape.width):
        return {}, height, width
    return {"resize": nn.Upsample(size=(height, width), mode="bilinear", align_corners=False)}, height, width


def sequential(layers: Mapping[str, nn.Module]) -> nn.Sequential:
    """A model of named layers in their order."""
    return nn.Sequential(OrderedDict(layers))
