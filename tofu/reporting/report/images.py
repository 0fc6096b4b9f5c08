"""Lays out images in a grid, as a PNG inside a `data:` address."""

import base64
import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

MAX = 16
_GAP = 6
_SIDE = 64


def sheet(images: npt.NDArray[Any], columns: int = 4) -> str:
    """Lay out images [n, c, h, w] in rows of `columns` and return them as a `data:image/png` address.

    At most the first `MAX` are drawn, and of images larger than 64 pixels only every second, third, ... pixel.
    Each is stretched to its own full range over all channels. Three channels are color, any other number is averaged to
    gray. Pixels are repeated, never smoothed; the gaps between images are transparent.
    """
    images = images[:MAX]
    stride = math.ceil(max(images.shape[2:]) / _SIDE)
    images = images[:, :, ::stride, ::stride]
    count, _, height, width = images.shape
    scale = max(1, _SIDE // max(height, width))
    tall, wide = height * scale + _GAP, width * scale + _GAP
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * tall - _GAP, columns * wide - _GAP, 4), dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * tall, index % columns * wide
        pixels = np.repeat(np.repeat(_colors(image), scale, axis=0), scale, axis=1)
        canvas[top : top + height * scale, left : left + width * scale, :3] = pixels
        canvas[top : top + height * scale, left : left + width * scale, 3] = 255
    encoded = io.BytesIO()
    Image.fromarray(canvas).save(encoded, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def _colors(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return an image [c, h, w] of any range as uint8 [h, w, 3]; a constant one is mid-gray."""
    values = np.nan_to_num(image.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if len(values) != 3:
        values = values.mean(axis=0, keepdims=True).repeat(3, axis=0)
    low, high = values.min(), values.max()
    stretched = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    result: npt.NDArray[np.uint8] = np.round(255 * stretched).astype(np.uint8).transpose(1, 2, 0)
    return result
