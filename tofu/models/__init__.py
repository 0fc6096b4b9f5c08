"""Models by name, adapted to the images: channels, height, width and classes.

Importing this package does not import torchvision, because every message of a deployment imports it. No built-in model
has dropout.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from tofu.data import ImageShape
from tofu.errors import SettingError
from tofu.imports import import_object
from tofu.models.small import cnn, lenet5, mlp
from tofu.models.spiking import spiking_model
from tofu.models.torchvision_models import resnet18, vgg, vit

NORMS = ("group", "batch", "none")

_BUILDERS: Mapping[str, Callable[[ImageShape, str], nn.Module]] = {
    "lenet5": lenet5,
    "mlp": mlp,
    "cnn": cnn,
    "resnet18": resnet18,
    "vgg11": partial(vgg, "A"),
    "vgg13": partial(vgg, "B"),
    "vgg16": partial(vgg, "D"),
    "vit_b_16": partial(vit, 12, 12, 768, 3072),
    "vit_tiny": partial(vit, 4, 4, 64, 128, patch=4),
    "snn-small": partial(spiking_model, "small"),
    "vgg5-snn": partial(spiking_model, "vgg5"),
    "vgg9-snn": partial(spiking_model, "vgg9"),
}

_BUILD_LOCK = threading.RLock()
"""Layers draw their initial weights from torch's global generator, which the client threads of a process share."""

_FACTORY = "package.module:factory, a callable that takes channels, height, width and classes"


def model_names() -> tuple[str, ...]:
    """The names that `build_model` accepts in addition to `package.module:factory`."""
    return tuple(_BUILDERS)


def build_model(name: str, shape: ImageShape, *, norm: str = "group", seed: int = 0) -> nn.Module:
    """Build a model that maps float32 [n, channels, height, width] to logits [n, classes], in training mode on the CPU.

    A first layer scales up images that are too small for a model. The weights are a function of the arguments;
    the state of torch's global generator is restored.

    Args:
        name: one of `model_names()`, or `package.module:factory`, called as
            `factory(channels=, height=, width=, classes=)`. The module is found in the current folder, too.
        shape: of the images.
        norm: "group" (16 channels per group), "batch" or "none"; for the models that have normalization layers
            (cnn, resnet18 and the VGGs).
        seed: of the initial weights.

    Raises:
        SettingError: the model or norm is unknown, or a factory cannot be imported or called, or its model does not map
            [2, channels, height, width] to [2, classes].

    Example:
        >>> from tofu.data import ImageShape
        >>> model = build_model("lenet5", ImageShape(channels=1, height=28, width=28, classes=10), seed=1)
        >>> sum(parameter.numel() for parameter in model.parameters())
        61706
    """
    if norm not in NORMS:
        raise SettingError("norm", norm, f"one of {', '.join(NORMS)}")
    build: Callable[[], nn.Module]
    if name in _BUILDERS:
        build = partial(_BUILDERS[name], shape, norm)
    elif ":" in name:
        build = _factory(name, shape)  # imports the user's module, which may draw numbers, before the seed is set
    else:
        raise SettingError("model", name, f"one of {', '.join(model_names())}, or package.module:factory")
    model = build_seeded(build, seed)
    _check_output(model, name, shape)
    return model


def build_seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The model that `build` makes when torch's global generator has this seed; the generator's state is restored."""
    with _BUILD_LOCK, torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the generators of accelerators, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        return build()


def _factory(name: str, shape: ImageShape) -> Callable[[], nn.Module]:
    """Import the user's factory -> a function that calls it. Both raise SettingError."""
    try:
        factory = import_object(name)
    except Exception as error:
        # The user's code may raise any type of error.
        raise SettingError("model", name, f"{_FACTORY} ({type(error).__name__}: {error})") from error

    def build() -> nn.Module:
        try:
            model = factory(channels=shape.channels, height=shape.height, width=shape.width, classes=shape.classes)
        except Exception as error:
            raise SettingError("model", name, f"{_FACTORY} ({type(error).__name__}: {error})") from error
        if not isinstance(model, nn.Module):
            accepted = f"{_FACTORY} and returns a torch.nn.Module, not {type(model).__name__}"
            raise SettingError("model", name, accepted)
        return model

    return build


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
