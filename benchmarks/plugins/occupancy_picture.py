"""Occupancy of the columns of a layer's tiles as a picture: a small square for every column, darker when fuller."""

from collections.abc import Mapping
from html import escape

from torch import Tensor

_SIDE, _GAP, _LEFT, _HEAD = 8, 3, 8, 18  # pixels
_LIGHT, _DARK = (247, 251, 255), (8, 48, 107)


def occupancy_picture(panels: Mapping[str, Tensor], tile: int) -> str:
    """An SVG with a panel for each title, one below the other.

    Args:
        panels: title -> occupancy in [0, 1], [input blocks, outputs]: a row for each row of tiles.
        tile: columns of a tile; tiles are set apart.
    """
    parts, top, right = [], 4, 0
    for title, occupancy in panels.items():
        parts.append(f'<text x="{_LEFT}" y="{top + 12}" fill="#222">{escape(title)}</text>')
        top += _HEAD
        for row in occupancy.tolist():
            for i, value in enumerate(row):
                x = _LEFT + i * _SIDE + i // tile * _GAP
                parts.append(f'<rect x="{x}" y="{top}" width="{_SIDE}" height="{_SIDE}" fill="{_color(value)}"/>')
                right = max(right, x + _SIDE)
            top += _SIDE + _GAP
        top += 6
    for i in range(11):
        parts.append(f'<rect x="{_LEFT + 18 * i}" y="{top}" width="18" height="10" fill="{_color(i / 10)}"/>')
    parts.append(f'<text x="{_LEFT + 206}" y="{top + 9}" fill="#222">empty to full column</text>')
    size = f'width="{right + _LEFT}" height="{top + 18}" font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def _color(value: float) -> str:
    return "#" + "".join(f"{round(a + (b - a) * value):02x}" for a, b in zip(_LIGHT, _DARK, strict=True))
