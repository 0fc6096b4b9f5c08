"""Selection of the entries of an update that a secure round sends; the same for all clients, so that they add up.

A client cannot choose its own largest entries, as top-k compressors do, because a sum needs the same coordinates from
every client. All clients know the displacement of each global weight since the run began, and weights with a large
displacement tend to keep changing. Most of a round's m coordinates (`LEADING_FRACTION`) are therefore those with the
largest displacement, compared by row and column (`tofu.weights.displacement_levels`). All other entries take turns, in
the order p s mod n for p = 0, 1, ... with s coprime to n and close to the golden section of n: every window of this
order is spread evenly over the entries, and both ends compute it without tables or random generators. The selection is
not secret and reveals nothing about a client.

Entries that are not sent stay in the residual of error feedback until their next turn, so they are up to about (d -
LEADING_FRACTION m) / ((1 - LEADING_FRACTION) m) rounds old when they are sent (21 rounds at a third of the entries).
Residuals that remain after the last round are never sent.

Both ends must hold bit-identical weights, or else they select different coordinates. The server therefore sends the
digest of its selection, and a client with another selection must not send its vector.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.errors import SettingError
from tofu.weights import Integers

LEADING_FRACTION = 0.9
"""Fraction of the coordinates for the entries with the largest displacement."""

MIN_LEVELS = 6
"""Minimum number of steps on each side of zero, 7 bits for 10 clients. With fewer steps, sending more entries did not
help. Rounding this coarse is acceptable because error feedback keeps the rounding error."""

DIGEST_BYTES = 8

_GOLDEN = (math.sqrt(5) - 1) / 2


def settings_for(ratio: float, clients: int) -> tuple[float, int]:
    """Return the fraction of an update to send and the bits of the ring,
    for a ratio of float32 bytes to the vector's bytes.

    Sends as many entries as fit with the minimum number of bits; if all fit, uses as many bits as fit. The session's
    other messages are not counted: about 140 bytes of uplink per neighbor.

    Raises:
        SettingError: the ratio or the number of clients is below 1.
    """
    if not (math.isfinite(ratio) and ratio >= 1):
        raise SettingError("ratio", ratio, "a number of at least 1")
    if clients < 1:
        raise SettingError("clients", clients, "at least 1")
    min_bits = (2 * clients * MIN_LEVELS).bit_length()
    if 32 / ratio >= min_bits:
        return 1.0, math.floor(32 / ratio)
    return 32 / (ratio * min_bits), min_bits


def select(
    displacement: Tensor,
    fraction: float,
    turn: int,
    *,
    levels: Integers | None = None,
    leading_fraction: float = LEADING_FRACTION,
) -> Tensor:
    """Select the coordinates that are sent -> int64 [m] in rising order, m = ceil(fraction d).

    Args:
        displacement: the round's global weights minus the initial ones, float [d].
        fraction: above 0 and up to 1.
        turn: number of secure rounds before this one.
        levels: level of each entry [d]. A higher level takes precedence over a larger displacement. None: all equal.
        leading_fraction: fraction of the coordinates for the entries with the largest displacement.

    Raises:
        SettingError: the fraction is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise SettingError("fraction", fraction, "a number above 0 and up to 1")
    count = math.ceil(fraction * displacement.numel())
    if count == displacement.numel():
        return torch.arange(count)
    distance = np.abs(displacement.numpy())
    chosen = _leading(distance, levels, min(int(leading_fraction * count), int(np.count_nonzero(distance))))
    others = np.flatnonzero(~chosen)
    chosen[others[_window(others.size, count - int(chosen.sum()), turn)]] = True
    return torch.from_numpy(np.flatnonzero(chosen))


def digest(selected: Tensor) -> bytes:
    """Return a digest of selected coordinates, 8 bytes."""
    return hashlib.sha256(selected.numpy().astype("<i8").tobytes()).digest()[:DIGEST_BYTES]


def encode(update: Tensor, selected: Tensor) -> Tensor:
    """Return a vector's (float [d]) entries at the selected coordinates [m]; linear in the update."""
    return update[selected]


def decode(vector: Tensor, selected: Tensor, values: int) -> Tensor:
    """Map float [m] to float [d = values] with zeros elsewhere; linear, so it decodes a mean of vectors to the mean."""
    return torch.zeros(values, dtype=vector.dtype).index_copy_(0, selected, vector)


def _leading(distance: npt.NDArray[np.float32], levels: Integers | None, count: int) -> npt.NDArray[np.bool_]:
    """Return a mask of `count` entries, of the highest levels first and of the largest displacement within a level."""
    if levels is None or not count:
        return _largest_mask(distance, count)
    border = np.partition(levels, levels.size - count)[levels.size - count]
    chosen: npt.NDArray[np.bool_] = levels > border
    last = np.flatnonzero(levels == border)
    chosen[last[_largest_mask(distance[last], count - int(chosen.sum()))]] = True
    return chosen


def _largest_mask(distance: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the `count` largest values. The first of equal values is taken, so that all machines agree."""
    if not count:
        return np.zeros(distance.size, dtype=bool)
    border = np.partition(distance, distance.size - count)[distance.size - count]
    chosen: npt.NDArray[np.bool_] = distance > border
    chosen[np.flatnonzero(distance == border)[: count - int(chosen.sum())]] = True
    return chosen


def _window(total: int, count: int, turn: int) -> npt.NDArray[np.int64]:
    """Return `count` of `total` indices, for one turn."""
    stride = max(1, round(_GOLDEN * total))
    while math.gcd(stride, total) > 1:
        stride += 1
    start = turn * count % total
    return (np.arange(start, start + count) % total) * stride % total
