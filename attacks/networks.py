"""Networks that are known to leak: an attack that fails on these proves nothing when it fails on others.

Zhu et al. 2019 invert a LeNet with sigmoids in place of ReLUs and strides in place of pooling, because their search
needs second derivatives. Ours has softplus, which is also trainable, and twice as many channels: their network has
fewer weights than a batch of four 32x32 color images has pixels, so its gradient could not determine them.
"""

from collections import OrderedDict

from torch import nn

from tofu.data import ImageShape
from tofu.models import build_model

NAMES = {
    "lenet-smooth": "attacks.networks:lenet_smooth",
    "lenet-smooth-batch": "attacks.networks:lenet_smooth_batch",
}
"""Short names for our own factories."""

CHANNELS = 24


def lenet_smooth(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """Build three 5x5 convolutions with softplus and one linear layer; images above 16 pixels are halved twice."""
    return _lenet(channels, height, width, classes, batch=False)


def lenet_smooth_batch(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """Build the same with BatchNorm after each convolution."""
    return _lenet(channels, height, width, classes, batch=True)


def _lenet(channels: int, height: int, width: int, classes: int, *, batch: bool) -> nn.Module:
    strides = (2 if min(height, width) > 16 else 1, 2, 1)
    layers: dict[str, nn.Module] = {}
    for i, stride in enumerate(strides, start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, CHANNELS, 5, stride=stride, padding=2)
        if batch:
            layers[f"norm{i}"] = nn.BatchNorm2d(CHANNELS)
        layers[f"act{i}"] = nn.Softplus()
        channels, height, width = CHANNELS, -(-height // stride), -(-width // stride)
    layers |= {"flatten": nn.Flatten(), "fc": nn.Linear(channels * height * width, classes)}
    return nn.Sequential(OrderedDict(layers))


def attacked_model(name: str, shape: ImageShape, *, norm: str = "group", seed: int = 0) -> nn.Module:
    """`tofu.models.build_model`, which also knows `NAMES`.

    Raises:
        SettingError: no such model.
    """
    return build_model(NAMES.get(name, name), shape, norm=norm, seed=seed)
