"""Secure rounds that cost less: some of an update's entries, the same for all clients, so that their codes still sum.

A client cannot choose its own largest entries, as top-k codecs do: a sum needs the same places from everybody. What all
know is how far the global weights have moved since the run began, and where they have moved furthest they move on, by
the row and column of an entry (`tofu.displacement`): that is most of a round's m places (`LED`). The others take turns for
the rest, in the order p s mod n, p = 0, 1, ..., with s coprime to n and near the golden section of it: each window of
that order is spread evenly over them, and both ends compute it without tables or generators. Which entries travel is no
secret, and says nothing of a single client.

What is not sent stays in error feedback's residual and goes with the next turn of its entries. Until then it is stale:
it was computed at weights that the others' steps have left since, by up to (d - LED m) / (m - LED m) rounds or so for
an entry that is not led (21 at a third); and what waits after a run's last round is never sent.

Both ends must hold the same weights to the bit, or else they take different places and the sum is of no use: the server
says which it took (`digest`), and a client that took others must not send its vector.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.displacement import Integers
from tofu.errors import SettingError

LED = 0.9
"""Of the places, for those that have moved furthest."""

MIN_LEVELS = 6
"""Steps on either side of zero, below which more entries were no better: 7 bits at 10 clients. So few do because most
values are far below the range, and what rounding loses stays in error feedback."""

DIGEST_BYTES = 8

_GOLDEN = (math.sqrt(5) - 1) / 2


def settings_for(ratio: float, clients: int) -> tuple[float, int]:
    """(share, bits): what of an update to send and in what ring, for a ratio of float32's bytes to the vector's.

    As many entries as fit with the fewest bits that will do; where all fit, as many bits as fit. The session's other
    messages are not counted: about 140 bytes up for each neighbor.

    Raises:
        SettingError: a ratio below 1 or clients below 1.
    """
    if not (math.isfinite(ratio) and ratio >= 1):
        raise SettingError("ratio", ratio, "a number of at least 1")
    if clients < 1:
        raise SettingError("clients", clients, "at least 1")
    least = (2 * clients * MIN_LEVELS).bit_length()
    if 32 / ratio >= least:
        return 1.0, math.floor(32 / ratio)
    return 32 / (ratio * least), least


def places(moved: Tensor, share: float, turn: int, *, levels: Integers | None = None, led: float = LED) -> Tensor:
    """The places that travel, int64 [m] rising, m = share d rounded up.

    Args:
        moved: the round's global weights less those that the run began with, float [d].
        share: above 0 and up to 1.
        turn: compact rounds that the run had before.
        levels: of the entries [d]; those of a higher one lead before those that moved further. None: of all the same.
        led: fraction of the places for those that have moved furthest.

    Raises:
        SettingError: another share.
    """
    if not 0 < share <= 1:
        raise SettingError("share", share, "a number above 0 and up to 1")
    count = math.ceil(share * moved.numel())
    if count == moved.numel():
        return torch.arange(count)
    distance = np.abs(moved.numpy())
    chosen = _leading(distance, levels, min(int(led * count), int(np.count_nonzero(distance))))
    others = np.flatnonzero(~chosen)
    chosen[others[_window(others.size, count - int(chosen.sum()), turn)]] = True
    return torch.from_numpy(np.flatnonzero(chosen))


def digest(places: Tensor) -> bytes:
    """Names the places, in 8 bytes."""
    return hashlib.sha256(places.numpy().astype("<i8").tobytes()).digest()[:DIGEST_BYTES]


def encode(update: Tensor, places: Tensor) -> Tensor:
    """float [d] -> its entries there [m], linear in the update."""
    return update[places]


def decode(vector: Tensor, places: Tensor, values: int) -> Tensor:
    """float [m] -> float [d] with zeros elsewhere: of a mean of codes the mean of what they decode to."""
    return torch.zeros(values, dtype=vector.dtype).index_copy_(0, places, vector)


def _leading(distance: npt.NDArray[np.float32], levels: Integers | None, count: int) -> npt.NDArray[np.bool_]:
    """Which are the `count` of the highest levels, and of the last of these levels the furthest."""
    if levels is None or not count:
        return _furthest(distance, count)
    border = np.partition(levels, levels.size - count)[levels.size - count]
    chosen: npt.NDArray[np.bool_] = levels > border
    last = np.flatnonzero(levels == border)
    chosen[last[_furthest(distance[last], count - int(chosen.sum()))]] = True
    return chosen


def _furthest(distance: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.bool_]:
    """Which are the `count` largest; of equal ones the first, so that every machine chooses the same."""
    if not count:
        return np.zeros(distance.size, dtype=bool)
    least = np.partition(distance, distance.size - count)[distance.size - count]
    chosen: npt.NDArray[np.bool_] = distance > least
    chosen[np.flatnonzero(distance == least)[: count - int(chosen.sum())]] = True
    return chosen


def _window(total: int, count: int, turn: int) -> npt.NDArray[np.int64]:
    """`count` of `total` places, for one turn."""
    stride = max(1, round(_GOLDEN * total))
    while math.gcd(stride, total) > 1:
        stride += 1
    start = turn * count % total
    return (np.arange(start, start + count) % total) * stride % total
