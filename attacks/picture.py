"""Originals and reconstructions side by side, as a PNG."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Images = npt.NDArray[np.float32]
"""[n, channels, height, width] in [-1, 1]."""

TILE = 56
GAP = 4
LABEL = 210
MAX_IMAGES = 8
"""Images of a row."""


def contact_sheet(originals: Images, rows: Sequence[tuple[str, Images]]) -> bytes:
    """One row of originals, then one for each message with its reconstructions below their originals.

    Args:
        rows: the row's text (its second line after a line end) and its images, in the originals' order.
    """
    count = min(MAX_IMAGES, len(originals))
    everything = [("original", originals), *rows]
    width = LABEL + count * (TILE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(everything) * (TILE + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for line, (text, images) in enumerate(everything):
        top = GAP + line * (TILE + GAP)
        draw.multiline_text((GAP, top + 10), text, fill="black", font=font, spacing=3)
        for column in range(min(count, len(images))):
            sheet.paste(_tile(images[column]), (LABEL + column * (TILE + GAP), top))
    return _png(sheet)


def contact_strip(images: Images) -> bytes:
    """The first `MAX_IMAGES` images in one row without text, with transparent gaps."""
    strip = Image.new("RGBA", (min(MAX_IMAGES, len(images)) * (TILE + GAP) - GAP, TILE))
    for column, image in enumerate(images[:MAX_IMAGES]):
        strip.paste(_tile(image), (column * (TILE + GAP), 0))
    return _png(strip)


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _tile(image: Images) -> Image.Image:
    values = (np.nan_to_num(image).clip(-1, 1) * 127.5 + 127.5).round().astype(np.uint8)
    picture = Image.fromarray(values[0]) if len(values) == 1 else Image.fromarray(values.transpose(1, 2, 0))
    return picture.convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
