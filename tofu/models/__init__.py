"""Models by name, for images of a given shape and number of classes.

This package does not import torchvision, because client processes import it for every message. No built-in model has
dropout.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from tofu.data import ImageShape, normalization_of
from tofu.data.preprocessing import normalize_inputs
from tofu.errors import SettingError, described, user_code
from tofu.imports import import_object
from tofu.models.checks import (
    check_memory,
    check_stateless,
    check_training,
    drop_constant_buffers,
    eager_code,
    without_wrappers,
)
from tofu.models.initial_weights import fill
from tofu.models.small import BagOfWords, cnn, lenet5, mlp
from tofu.models.spiking import dct_model, spiking_model
from tofu.models.torchvision_models import resnet18, vgg, vit
from tofu.rng import GlobalGenerators
from tofu.settings import Settings
from tofu.settings.groups import ModelSettings

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
    "dct-snn-small": partial(dct_model, "small", 4),
    "dct-snn-vgg5": partial(dct_model, "vgg5", 2),
    "dct-snn-vgg9": partial(dct_model, "vgg9", 2),
}


_SIZES = {
    "images": ("channels", "height", "width", "classes"),
    "table": ("features", "classes"),
    "text": ("vocabulary", "tokens", "classes"),
}
"""Kind of data -> the arguments of a user's factory."""


def model_names() -> tuple[str, ...]:
    """Return the names that `build_model` accepts in addition to `package.module:factory`."""
    return tuple(_BUILDERS)


def build_model(name: str, shape: ImageShape, *, norm: str = "group", seed: int = 0) -> nn.Module:
    """Build a model that maps float32 [n, channels, height, width] to logits [n, classes], in training mode on the CPU.

    A first layer scales up images that are too small for a model. The weights are a function of the arguments, even if
    a factory draws them from the global generators of torch, numpy or Python, whose state is restored. Buffers that
    training does not change (masks, position tables) become non-persistent: they are neither sent nor averaged.

    Args:
        name: one of `model_names()`, or `package.module:factory`, called as
            `factory(channels=, height=, width=, classes=)`. The module is found in the current folder, too.
        shape: of the images.
        norm: "group" (16 channels per group), "batch" or "none"; for the models that have normalization layers
            (cnn, resnet18 and the VGGs).
        seed: of the initial weights.

    Raises:
        SettingError: the model or norm is unknown, or a factory cannot be imported or called, or its model does not map
            [2, channels, height, width] to [2, classes], in training mode and in evaluation mode.

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
        sizes = {name: getattr(shape, name) for name in _SIZES["images"]}
        build = _factory(name, sizes)  # imports the user's module, which may draw numbers, before the seed is set
    else:
        raise SettingError("model", name, f"one of {', '.join(model_names())}, or package.module:factory")
    zeros = torch.zeros(2, *shape.chw)
    return build_seeded(lambda: _checked(build(), name, zeros, shape.classes), seed)


def initial_model(settings: ModelSettings, shape: ImageShape, seed: int) -> nn.Module:
    """Return the model of a run at its initial weights, as `build_model` returns it.

    Raises:
        SettingError: the model or `initial_weights` cannot be used.
    """
    model = build_model(settings.model, shape, norm=settings.norm, seed=seed)
    if settings.initial_weights:
        fill(model, settings.initial_weights)
    return model


def run_model(settings: Settings, shape: ImageShape) -> nn.Module:
    """Return the model of a run at its initial weights, which normalizes images in [-1, 1] by the run's settings.

    Raises:
        SettingError: the model, its initial weights or the normalization cannot be used.
        DataError: the dataset, whose statistics are asked for, cannot be read.
    """
    model = initial_model(settings.model, shape, settings.run.seed)
    normalize_inputs(model, normalization_of(settings.data, shape.channels, settings.run.seed))
    return model


def build_row_model(name: str, width: int, classes: int, *, vocabulary: int = 0, seed: int = 0) -> nn.Module:
    """Build a model of rows, in training mode on the CPU: features [n, width] or token ids [n, width] -> logits.

    Args:
        name: "mlp" for features, "bag_of_words" for token ids, or `package.module:factory`, called as
            `factory(features=, classes=)` or `factory(vocabulary=, tokens=, classes=)`.
        width: number of features or tokens.
        vocabulary: number of token ids; 0 for features.
        seed: of the initial weights.

    Raises:
        SettingError: the model is unknown, cannot be built, or does not map [2, width] to [2, classes].

    Example:
        >>> build_row_model("mlp", 30, 2)(torch.zeros(5, 30)).shape
        torch.Size([5, 2])
    """
    sizes = {"vocabulary": vocabulary, "tokens": width} if vocabulary else {"features": width}
    own = "bag_of_words" if vocabulary else "mlp"
    build: Callable[[], nn.Module]
    if name == own:
        build = (
            partial(BagOfWords, vocabulary, classes)
            if vocabulary
            else partial(mlp, ImageShape(1, 1, width, classes), "")
        )
    elif ":" in name:
        build = _factory(name, sizes | {"classes": classes})
    else:
        raise SettingError("model", name, f"{own} or package.module:factory for rows of {', '.join(sizes)}")
    zeros = torch.zeros(2, width, dtype=torch.int64 if vocabulary else torch.float32)
    return build_seeded(lambda: _checked(build(), name, zeros, classes), seed)


def build_seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Call `build` with the global generators at a seed, and restore their state and torch's default type."""
    dtype = torch.get_default_dtype()
    try:
        # A user's function may change the default type, or turn gradients off, for the whole thread.
        with GlobalGenerators(seed), eager_code(), torch.set_grad_enabled(torch.is_grad_enabled()):
            return build()
    finally:
        torch.set_default_dtype(dtype)


def check_factory(name: str, kind: str) -> None:
    """Check a user's factory before data are read. It is imported, and not called.

    Args:
        name: `package.module:factory`.
        kind: of the data: "images", "table" or "text".

    Raises:
        SettingError: it cannot be imported, or does not take the sizes of such data by name.
    """
    sizes = _SIZES[kind]
    factory = _imported(name, sizes)
    with user_code("model", name, _expected(sizes)):
        try:
            signature = inspect.signature(factory)
        except ValueError:  # some functions in C have none
            return
        signature.bind(**dict.fromkeys(sizes, 1))


def _expected(sizes: Iterable[str]) -> str:
    return f"package.module:factory, a callable that takes {', '.join(sizes)} by name"


def _imported(name: str, sizes: Iterable[str]) -> Any:
    # Numbers that a module draws when it is imported are the same in every process.
    with user_code("model", name, _expected(sizes)), GlobalGenerators(0):
        return import_object(name)


def _factory(name: str, sizes: Mapping[str, int]) -> Callable[[], nn.Module]:
    """Import the user's factory -> a function that calls it. Both raise SettingError."""
    expected, factory = _expected(sizes), _imported(name, sizes)

    def build() -> nn.Module:
        with user_code("model", name, expected):
            model = factory(**sizes)
        if not isinstance(model, nn.Module):
            accepted = f"{expected} and returns a torch.nn.Module, not {type(model).__name__}"
            raise SettingError("model", name, accepted)
        bare = without_wrappers(model)
        if any(isinstance(module, torch.jit.ScriptModule) for module in bare.modules()):
            raise SettingError("model", name, f"{expected}, of Python modules: not compiled by torch.jit")
        return bare

    return build


def _checked(model: nn.Module, name: str, inputs: torch.Tensor, classes: int) -> nn.Module:
    """Check a model by two forward passes, of which the first initializes lazy layers -> the model in training mode."""
    expected = [2, classes]
    takes = list(inputs.shape)
    model.eval()
    try:
        with torch.no_grad():
            output = model(inputs)
        found = f"{list(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
    except Exception as error:
        found = described(error)
    if found != str(expected):
        raise SettingError("model", name, f"a model that maps {takes} to {expected} (found {found})")
    drop_constant_buffers(model, check_training(model, name, inputs, classes))
    if ":" in name:  # our own models have no such state
        check_memory(model)
        check_stateless(model, lambda: model(torch.randn(takes) if inputs.is_floating_point() else inputs))
    return model
