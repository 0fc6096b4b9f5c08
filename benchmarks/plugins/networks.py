"""Networks that benchmarks use and runs do not."""

from collections import OrderedDict

from torch import nn

WIDTH = 128


def deep_cnn(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """Two convolutions, each halved, and four linear layers, ReLU between them."""
    sizes = [64 * (height // 4) * (width // 4), WIDTH, WIDTH, WIDTH, classes]
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(channels, 32, 3, padding=1), "relu1": nn.ReLU(), "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(32, 64, 3, padding=1), "relu2": nn.ReLU(), "pool2": nn.MaxPool2d(2), "flatten": nn.Flatten(),
    }  # fmt: skip
    for i in range(4):
        layers[f"fc{i + 1}"] = nn.Linear(sizes[i], sizes[i + 1])
        if i < 3:
            layers[f"act{i + 1}"] = nn.ReLU()
    return nn.Sequential(OrderedDict(layers))
