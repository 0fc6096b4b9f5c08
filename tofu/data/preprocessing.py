"""Preprocessing of images: resizing when they are read, augmentation in training, and normalization.

Images are resized and cropped when they are read. Normalization is a part of the model (`normalize_inputs`), so the
images and proxies that it is called with are in [-1, 1]. A run stores the settings of both in model.json, from which
`tofu predict` reads them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tofu.data.images import Pixels, RawPixels, to_8_bits
from tofu.errors import SettingError
from tofu.settings.fields import comma_list

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixels from 0 to 1."""

PLAIN: Statistics = (0.5,), (0.5,)
"""The statistics that keep images in [-1, 1]."""
IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Statistics of ImageNet's training images, which torchvision's pretrained models expect."""

_FORMS = "-1to1, imagenet, dataset, or MEAN/STD of pixels from 0 to 1, such as 0.13/0.31 or 0.5,0.5,0.4/0.2,0.2,0.2"
_CROP_MARGIN = 8
"""The crop augmentation shifts by up to 1/8 of a side: 4 pixels of 32."""


@dataclass(frozen=True)
class Preprocessing:
    """Size and gray values of the images that a model receives.

    Attributes:
        resize: "HEIGHTxWIDTH", or one number for the shorter side, which keeps the aspect ratio; "" does not resize.
        center_crop: "HEIGHTxWIDTH" cut out of the middle after the resize; one number is a square.
        gray_bits: significant bits of 16-bit gray values (`tofu.data.images.to_8_bits`).

    Raises:
        SettingError: a size is malformed, or the number of bits is out of range.
    """

    resize: str = ""
    center_crop: str = ""
    gray_bits: int = 0

    def __post_init__(self) -> None:
        if self.gray_bits and not 8 <= self.gray_bits <= 16:
            raise SettingError("gray_bits", self.gray_bits, "8 to 16, or 0 (found from the images)")
        for name in ("resize", "center_crop"):
            self._size(name)

    def __call__(self, raw: RawPixels) -> Pixels:
        """Scale one image to 8 bits, resize and crop it: uint8 [h, w] or [h, w, 3]. Bilinear, with antialiasing."""
        pixels = to_8_bits(raw, self.gray_bits)
        size, crop = self._size("resize"), self._size("center_crop")
        if not size and not crop:
            return pixels
        functional = _transforms()
        image = torch.from_numpy(pixels.copy())
        image = image[None] if image.dim() == 2 else image.permute(2, 0, 1)
        if size:
            image = functional.resize(image, size, antialias=True)
        if crop:
            image = functional.center_crop(image, crop * 2 if len(crop) == 1 else crop)
        result: Pixels = (image[0] if pixels.ndim == 2 else image.permute(1, 2, 0)).contiguous().numpy()
        return result

    def _size(self, name: str) -> list[int]:
        text = getattr(self, name)
        if text and not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})?", text):
            raise SettingError(name, text, "HEIGHTxWIDTH in pixels, such as 32x32, or one number")
        return [int(number) for number in text.split("x")] if text else []


def parse_normalization(text: str) -> Statistics | None:
    """Return the statistics that the setting `normalization` gives; None for "dataset".

    >>> parse_normalization("0.13/0.31")
    ((0.13,), (0.31,))

    Raises:
        SettingError: the text is malformed.
    """
    known: dict[str, Statistics | None] = {"-1to1": PLAIN, "imagenet": IMAGENET, "dataset": None}
    if text in known:
        return known[text]
    try:
        mean, std = (tuple(map(float, part.split(","))) for part in text.split("/"))
    except ValueError:
        raise SettingError("normalization", text, _FORMS) from None
    if len(mean) != len(std) or not all(0 <= m <= 1 for m in mean) or not all(0.001 <= s <= 1 for s in std):
        raise SettingError("normalization", text, _FORMS)
    return mean, std


def normalize_inputs(model: nn.Module, statistics: Statistics) -> None:
    """Let `model` normalize its inputs, float32 [n, channels, h, w] in [-1, 1], before its first layer.

    The model's parameters, buffers and their names stay as they are.
    """
    if not all(value == 0.5 for values in statistics for value in values):
        model.register_forward_pre_hook(InputNormalization(*statistics))


class InputNormalization:
    """A hook that maps inputs x in [-1, 1] to ((x + 1) / 2 - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        means, deviations = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self._scale, self._shift = 0.5 / deviations, (0.5 - means) / deviations

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        images, *others = inputs
        return (images * self._scale.to(images.device) + self._shift.to(images.device), *others)


def augment(images: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """Augmented copies of uint8 images [n, channels, h, w], each with its own draws from `generator`."""
    for name in names:
        images = AUGMENTATIONS[name](images, generator)
    return images


def split_augmentations(text: str) -> tuple[str, ...]:
    """Return the names in the setting `augmentation`. Raises SettingError if one is unknown."""
    names = comma_list(text)
    for name in names:
        if name not in AUGMENTATIONS:
            raise SettingError("augmentation", name, f"names from {', '.join(AUGMENTATIONS)}, separated by commas")
    return names


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror images horizontally, with probability 1/2."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), _transforms().horizontal_flip(images), images)


def _crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 1/8 of a side in each direction, and fill with black."""
    height, width = images.shape[2:]
    limits = [max(1, side // _CROP_MARGIN) for side in (height, width)]
    shifts = [torch.randint(-limit, limit + 1, (len(images),), generator=generator).tolist() for limit in limits]
    functional = _transforms()
    cropped = [functional.crop(image, *at, height, width) for image, *at in zip(images, *shifts, strict=True)]
    return torch.stack(cropped)


AUGMENTATIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {"flip": _flip, "crop": _crop}


def _transforms() -> Any:
    """Return the functions of torchvision.transforms.v2, which take a second to import."""
    from tofu.models.torchvision_compat import torchvision  # noqa: F401

    from torchvision.transforms.v2 import functional  # isort: skip

    return functional
