"""Small models."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tofu.data import ImageShape

_CHANNELS_PER_GROUP = 16  # Wu & He 2018, "Group Normalization", table 3


class ChannelsLast(nn.Module):
    """Converts images to the memory format channels_last, in which the small cnn takes a third less time on CPUs.

    Only our own models have this layer: later layers must not depend on the memory format, as `Tensor.view` does.
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)


def norm_layer(norm: str, channels: int) -> nn.Module:
    """Return the normalization layer for "group" (16 channels per group), "batch" or "none"."""
    if norm == "group":
        return nn.GroupNorm(max(1, channels // _CHANNELS_PER_GROUP), channels)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def enlarge_to(shape: ImageShape, side: int) -> tuple[dict[str, nn.Module], int, int]:
    """Return a layer that scales smaller images up to `side` pixels, or none -> (layers, height, width after them)."""
    return resize(shape, max(shape.height, side), max(shape.width, side))


def resize(shape: ImageShape, height: int, width: int) -> tuple[dict[str, nn.Module], int, int]:
    """Return a layer that scales images to this size, or none if they have it -> (layers, height, width)."""
    if (height, width) == (shape.height, shape.width):
        return {}, height, width
    return {"resize": nn.Upsample(size=(height, width), mode="bilinear", align_corners=False)}, height, width


def sequential(layers: Mapping[str, nn.Module]) -> nn.Sequential:
    """Return a model of named layers in their order."""
    return nn.Sequential(OrderedDict(layers))


def lenet5(shape: ImageShape, norm: str) -> nn.Module:
    """LeCun et al. 1998, with ReLU and max-pooling: 61,706 parameters for 10 classes of 1x28x28."""
    resize, height, width = enlarge_to(shape, 28)
    padding = 2 if min(height, width) < 32 else 0
    height, width = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
    return sequential(
        resize
        | {
            "conv1": nn.Conv2d(shape.channels, 6, 5, padding=padding),
            "relu1": nn.ReLU(),
            "pool1": nn.MaxPool2d(2),
            "conv2": nn.Conv2d(6, 16, 5),
            "relu2": nn.ReLU(),
            "pool2": nn.MaxPool2d(2),
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(16 * height * width, 120),
            "relu3": nn.ReLU(),
            "fc2": nn.Linear(120, 84),
            "relu4": nn.ReLU(),
            "fc3": nn.Linear(84, shape.classes),
        }
    )


def mlp(shape: ImageShape, norm: str) -> nn.Module:
    """Build an MLP with two hidden layers of 200 and 100 units: 178,110 parameters for 10 classes of 1x28x28."""
    return sequential(
        {
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(shape.channels * shape.height * shape.width, 200),
            "relu1": nn.ReLU(),
            "fc2": nn.Linear(200, 100),
            "relu2": nn.ReLU(),
            "fc3": nn.Linear(100, shape.classes),
        }
    )


def cnn(shape: ImageShape, norm: str) -> nn.Module:
    """Build three blocks of convolution, norm, ReLU and max-pooling, two linear layers:
    357,258 parameters (CIFAR-10).
    """
    resize, height, width = enlarge_to(shape, 8)
    layers, channels = resize | {"layout": ChannelsLast()}, shape.channels
    for i, out in enumerate((32, 64, 128), start=1):
        layers |= {
            f"conv{i}": nn.Conv2d(channels, out, 3, padding=1),
            f"norm{i}": norm_layer(norm, out),
            f"relu{i}": nn.ReLU(),
            f"pool{i}": nn.MaxPool2d(2),
        }
        channels = out
    height, width = height // 8, width // 8
    if max(height, width) > 4:
        # Otherwise the first linear layer would have most of the parameters for large images.
        height, width = min(height, 4), min(width, 4)
        layers["pool"] = nn.AdaptiveAvgPool2d((height, width))
    layers |= {
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(channels * height * width, 128),
        "relu4": nn.ReLU(),
        "fc2": nn.Linear(128, shape.classes),
    }
    return sequential(layers)


class BagOfWords(nn.Module):
    """Embeddings of token ids int64 [n, tokens], summed and divided by the root of tokens; one hidden layer; logits.

    Padding (id 0) has the embedding 0.
    """

    def __init__(self, vocabulary: int, classes: int, dim: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.hidden = nn.Linear(dim, 32)
        self.head = nn.Linear(32, classes)

    def forward(self, ids: Tensor) -> Tensor:
        summed = self.embedding(ids).sum(1) / ids.shape[1] ** 0.5
        logits: Tensor = self.head(torch.relu(self.hidden(summed)))
        return logits
