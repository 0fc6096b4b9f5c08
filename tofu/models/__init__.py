"""Models by name, fitted to the images: channels, height, width and classes.

The small ones are built here, so that importing this module (as every message of a deployment does) stays quick;
torchvision is imported for its own models only. None of them has dropout: an update is a function of data and weights.
"""

import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tofu.data import ImageShape
from tofu.errors import SettingError

NORMS = ("group", "batch", "none")

_ONE_AT_A_TIME = threading.Lock()
"""Layers draw their weights from torch's one generator, which clients that are threads of one process share."""

_CHANNELS_PER_GROUP = 16  # Wu & He 2018, "Group Normalization", table 3


def model_names() -> tuple[str, ...]:
    """The names that `build_model` accepts beside `package.module:factory`."""
    return tuple(_BUILDERS)


def build_model(name: str, shape: ImageShape, *, norm: str = "group", seed: int = 0) -> nn.Module:
    """Build a model that maps float32 [n, channels, height, width] to logits [n, classes], in training mode on the CPU.

    Images smaller than a model can take are scaled up by a first layer. The weights are a function of the arguments;
    the global generator of torch is left as it was.

    Args:
        name: one of `model_names()`, or `package.module:factory` for a callable of your own, called as
            `factory(channels=, height=, width=, classes=)`.
        shape: of the images.
        norm: "group" (16 channels a group), "batch" or "none", where the model has normalization layers to choose:
            cnn, resnet18 and the vggs.
        seed: of the initial weights.

    Raises:
        SettingError: no such model or norm, a factory that cannot be imported or called, or one whose model does not
            map [2, channels, height, width] to [2, classes].
    """
    if norm not in NORMS:
        raise SettingError("norm", norm, f"one of {', '.join(NORMS)}")
    if name not in _BUILDERS and ":" not in name:
        raise SettingError("model", name, f"one of {', '.join(model_names())}, or package.module:factory")
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators' generators too, which the fork does not restore.
        torch.default_generator.manual_seed(seed)
        model = _BUILDERS[name](shape, norm) if name in _BUILDERS else _from_factory(name, shape)
        _check_output(model, name, shape)
    return model


def _from_factory(name: str, shape: ImageShape) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    expected = "package.module:factory, a callable that takes channels, height, width and classes"
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        model = factory(channels=shape.channels, height=shape.height, width=shape.width, classes=shape.classes)
    except Exception as error:
        # The user's own code may raise anything; its text is what helps.
        raise SettingError("model", name, f"{expected} ({type(error).__name__}: {error})") from error
    if not isinstance(model, nn.Module):
        raise SettingError("model", name, f"{expected} and returns a torch.nn.Module, not {type(model).__name__}")
    return model


def _check_output(model: nn.Module, name: str, shape: ImageShape) -> None:
    expected = [2, shape.classes]
    takes = [2, shape.channels, shape.height, shape.width]
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(takes))
        found = f"{list(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    if found != str(expected):
        raise SettingError("model", name, f"a model that maps {takes} to {expected} (found {found})")
    model.train()


def _norm(norm: str, channels: int) -> nn.Module:
    if norm == "group":
        return nn.GroupNorm(max(1, channels // _CHANNELS_PER_GROUP), channels)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def _at_least(shape: ImageShape, side: int) -> tuple[dict[str, nn.Module], int, int]:
    """The layer that scales smaller images up to `side` pixels, if they are smaller; height and width after it."""
    return _resized(shape, max(shape.height, side), max(shape.width, side))


def _resized(shape: ImageShape, height: int, width: int) -> tuple[dict[str, nn.Module], int, int]:
    if (height, width) == (shape.height, shape.width):
        return {}, height, width
    return {"resize": nn.Upsample(size=(height, width), mode="bilinear", align_corners=False)}, height, width


class ChannelsLast(nn.Module):
    """Lays images out with their channels last, as convolutions on CPUs prefer: a third less time in the small cnn.

    A layer of our own models, because layers that follow must not rely on the layout, as `Tensor.view` does.
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)


def _sequential(layers: Mapping[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _lenet5(shape: ImageShape, norm: str) -> nn.Module:
    """LeCun et al. 1998, with ReLU and max-pooling: 61,706 parameters for 10 classes of 1x28x28."""
    resize, height, width = _at_least(shape, 28)
    padding = 2 if min(height, width) < 32 else 0
    height, width = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
    return _sequential(
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


def _mlp(shape: ImageShape, norm: str) -> nn.Module:
    return _sequential(
        {
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(shape.channels * shape.height * shape.width, 200),
            "relu1": nn.ReLU(),
            "fc2": nn.Linear(200, 100),
            "relu2": nn.ReLU(),
            "fc3": nn.Linear(100, shape.classes),
        }
    )


def _cnn(shape: ImageShape, norm: str) -> nn.Module:
    """Three blocks of convolution, norm, ReLU and max-pool, and two linear layers.: 357,258 parameters on CIFAR-10."""
    resize, height, width = _at_least(shape, 8)
    layers, channels = resize | {"layout": ChannelsLast()}, shape.channels
    for i, out in enumerate((32, 64, 128), start=1):
        layers |= {
            f"conv{i}": nn.Conv2d(channels, out, 3, padding=1),
            f"norm{i}": _norm(norm, out),
            f"relu{i}": nn.ReLU(),
            f"pool{i}": nn.MaxPool2d(2),
        }
        channels = out
    height, width = height // 8, width // 8
    if max(height, width) > 4:
        # The first linear layer of a large image would otherwise outweigh all else.
        height, width = min(height, 4), min(width, 4)
        layers["pool"] = nn.AdaptiveAvgPool2d((height, width))
    layers |= {
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(channels * height * width, 128),
        "relu4": nn.ReLU(),
        "fc2": nn.Linear(128, shape.classes),
    }
    return _sequential(layers)


def _resnet18(shape: ImageShape, norm: str) -> nn.Module:
    """He et al. 2016; images of 64 pixels or less get a 3x3 stem of stride 1 and keep their size through it."""
    from tofu.models.torchvision_compat import torchvision

    model: nn.Module = torchvision.models.resnet18(num_classes=shape.classes, norm_layer=partial(_norm, norm))
    small = max(shape.height, shape.width) <= 64
    if small or shape.channels != 3:
        kernel, stride = (3, 1) if small else (7, 2)
        model.conv1 = nn.Conv2d(shape.channels, 64, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small:
        model.maxpool = nn.Identity()
    return model


def _vgg(configuration: str, shape: ImageShape, norm: str) -> nn.Module:
    """Simonyan & Zisserman 2015, with one linear layer on globally averaged features in place of the three."""
    from tofu.models.torchvision_compat import torchvision

    resize, _, _ = _at_least(shape, 32)
    layers: list[nn.Module] = []
    channels = shape.channels
    for out in torchvision.models.vgg.cfgs[configuration]:
        if out == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        conv = nn.Conv2d(channels, out, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.ReLU()] if norm == "none" else [conv, _norm(norm, out), nn.ReLU()]
        channels = out
    return _sequential(
        resize
        | {
            "layout": ChannelsLast(),
            "features": nn.Sequential(*layers),
            "avgpool": nn.AdaptiveAvgPool2d(1),
            "flatten": nn.Flatten(),
            "classifier": nn.Linear(channels, shape.classes),
        }
    )


def _vit(layers: int, heads: int, dim: int, mlp: int, shape: ImageShape, norm: str, *, patch: int = 0) -> nn.Module:
    """Dosovitskiy et al. 2021; patches of 4 pixels up to 32 pixels, else 16; sides are scaled up to whole patches."""
    from tofu.models.torchvision_compat import torchvision

    side = max(shape.height, shape.width)
    patch = patch or (4 if side <= 32 else 16)
    side = -(-side // patch) * patch
    resize, _, _ = _resized(shape, side, side)
    vit = torchvision.models.vision_transformer.VisionTransformer(
        image_size=side,
        patch_size=patch,
        num_layers=layers,
        num_heads=heads,
        hidden_dim=dim,
        mlp_dim=mlp,
        num_classes=shape.classes,
    )
    if shape.channels != 3:
        vit.conv_proj = nn.Conv2d(shape.channels, dim, patch, stride=patch)
        nn.init.trunc_normal_(vit.conv_proj.weight, std=(shape.channels * patch * patch) ** -0.5)
        nn.init.zeros_(vit.conv_proj.bias)
    # torchvision's head of zeros lets no gradient through to the rest of a fresh model.
    nn.init.trunc_normal_(vit.heads.head.weight, std=0.02)
    return _sequential(resize | {"vit": vit}) if resize else vit


_BUILDERS: Mapping[str, Callable[[ImageShape, str], nn.Module]] = {
    "lenet5": _lenet5,
    "mlp": _mlp,
    "cnn": _cnn,
    "resnet18": _resnet18,
    "vgg11": partial(_vgg, "A"),
    "vgg13": partial(_vgg, "B"),
    "vgg16": partial(_vgg, "D"),
    "vit_b_16": partial(_vit, 12, 12, 768, 3072),
    "vit_tiny": partial(_vit, 4, 4, 64, 128, patch=4),
}
