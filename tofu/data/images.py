"""Labeled images in memory, and the reader of image files for training and prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tofu.errors import DataError, first_line

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]
"""One image: uint8 [height, width] if it is gray, [height, width, 3] if it is in color."""

RawPixels = NDArray[np.uint8] | NDArray[np.uint16]
"""An image as its file has it: `Pixels`, or uint16 [height, width] for gray values of more than 8 bits."""

IMAGE_SUFFIXES = frozenset((
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm",
    ".pbm", ".tga", ".heic", ".heif", ".jxl",
))  # fmt: skip

MAX_12_BIT = (1 << 12) - 1
_FIRST_IS_MAIN = ("MPO", "ICO", "ICNS")
"""Formats whose further images are smaller ones, or depths: many phones write them as .jpg."""


@dataclass(frozen=True)
class ImageShape:
    """The input and output size of a model.

    Attributes:
        channels: 1 for gray images, 3 for color images.
        height: in pixels.
        width: in pixels.
        classes: number of classes.
    """

    channels: int
    height: int
    width: int
    classes: int

    @property
    def chw(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class LabeledImages:
    """Images with their labels. Instances are cached and shared, so their tensors must not be modified.

    Attributes:
        images: uint8 [n, channels, height, width].
        labels: int64 [n], each in 0..classes-1.
        classes: number of classes of the dataset, including those without an image here.
        unreadable: for each image that was left out because it cannot be read, its origin and the reason.
        class_names: names of the dataset's labels in their order, if it has any.

    Raises:
        ValueError: a tensor has another type or shape.
    """

    images: Tensor
    labels: Tensor
    classes: int
    unreadable: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images must be uint8 [n, c, h, w], not {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 [n], not {self.labels.dtype} {list(self.labels.shape)}")

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def shape(self) -> ImageShape:
        channels, height, width = self.images.shape[1:]
        return ImageShape(channels, height, width, self.classes)

    def subset(self, indices: Tensor | Sequence[int]) -> "LabeledImages":
        """Copy the images at `indices` (int [k]), in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return LabeledImages(self.images[chosen], self.labels[chosen], self.classes)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1].

    The scale is fixed because a dataset's mean and standard deviation would be statistics of the clients' data.

    Raises:
        TypeError: the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"to_float takes uint8 images, not {images.dtype}")
    return (images.to(torch.float32) / 255 - 0.5) / 0.5


def read_image(source: bytes | Path) -> RawPixels:
    """Decode one image file, and apply its EXIF orientation. `to_8_bits` scales 16-bit gray values.

    Args:
        source: the encoded bytes, or the path of the file.

    Raises:
        DataError: the image cannot be decoded, has 32 bits per pixel and channel, or is one of several pages of a TIFF
            or frames of a GIF, PNG or WebP.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise OSError("it is no file")  # a pipe would never end
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as opened:
            if getattr(opened, "is_animated", False) and opened.format not in _FIRST_IS_MAIN:
                raise ValueError("it has several pages or frames, expected one")
            return _to_pixels(_upright(opened))
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose message repeats the path
        raise DataError(f"cannot be read as an image: {'unknown format' if unknown else first_line(error)}") from error


def to_8_bits(pixels: RawPixels, gray_bits: int = 0) -> Pixels:
    """Scale 16-bit gray values to 8 bits; other pixels stay as they are.

    Many cameras and scanners store 12-bit values in 16-bit files.

    Args:
        gray_bits: number of significant bits of 16-bit gray values, 8 to 16; larger values become white. 0: 12 if all
            of this image's values fit in 12 bits, else 16.

    >>> to_8_bits(np.array([[0, 2048, 4095]], dtype=np.uint16)).tolist()
    [[0, 128, 255]]
    """
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    bits = gray_bits or (12 if pixels.max(initial=0) <= MAX_12_BIT else 16)
    scaled: Pixels = np.minimum(pixels >> (bits - 8), 255).astype(np.uint8)
    return scaled


def fit_image(pixels: Pixels, shape: ImageShape) -> Pixels:
    """Convert an image to uint8 [channels, height, width]; a gray image fills all three channels of a color shape.

    Raises:
        DataError: the image has another size, or is in color where the shape is gray.
    """
    if pixels.shape[:2] != (shape.height, shape.width):
        size = f"{pixels.shape[0]}x{pixels.shape[1]}"
        raise DataError(f"has {size} pixels, expected {shape.height}x{shape.width} (height x width)")
    if pixels.ndim == 3 and shape.channels == 1:
        raise DataError("is in color, expected gray")
    channels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.broadcast_to(channels, shape.chw)


def _upright(image: "Image.Image") -> "Image.Image":
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # A damaged EXIF block raises many types of errors; the orientation is then unknown. Errors of the pixels are
        # raised again when these are read.
        return image


def _to_pixels(image: "Image.Image") -> RawPixels:
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16, copy=False)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32-bit pixels) is not supported")
    if image.mode in ("1", "LA", "La"):
        return np.asarray(image.convert("L"))
    return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
