"""How much of every layer is used, as a picture: one pair of bars for each layer, its inputs above its outputs."""

from collections.abc import Mapping
from html import escape

from client.plugins.utilized_rank import LayerRank

_BAR, _GAP, _LEFT, _FULL, _RIGHT = 9, 10, 210, 360, 110  # pixels
_COLORS = ("#2b6cb0", "#c05621")


def rank_picture(ranks: Mapping[str, LayerRank]) -> str:
    """An SVG. A bar's whole length is the dimension of a layer's inputs, or outputs; its filled part is k_S, or k_T.

    Args:
        ranks: weight's name -> what its layer uses (`UtilizedRank.ranks`).
    """
    parts = [_text(_LEFT, 14, "k_S of the inputs", _COLORS[0])]
    parts.append(_text(_LEFT + 130, 14, "k_T of the outputs", _COLORS[1]))
    top = 26
    for name, rank in ranks.items():
        parts.append(_text(_LEFT - 8, top + _BAR + 4, name.removesuffix(".weight"), "#222", anchor="end"))
        for used, full, color in ((rank.inputs, rank.columns, _COLORS[0]), (rank.outputs, rank.rows, _COLORS[1])):
            parts.append(f'<rect x="{_LEFT}" y="{top}" width="{_FULL}" height="{_BAR}" fill="#e2e8f0"/>')
            width = _FULL * used / full
            parts.append(f'<rect x="{_LEFT}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{color}"/>')
            parts.append(_text(_LEFT + _FULL + 6, top + _BAR - 1, f"{used} of {full}", "#222"))
            top += _BAR + 1
        top += _GAP
    size = f'width="{_LEFT + _FULL + _RIGHT}" height="{top}" font-family="sans-serif" font-size="10"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def _text(x: float, y: float, text: str, color: str, *, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" fill="{color}" text-anchor="{anchor}">{escape(text)}</text>'
