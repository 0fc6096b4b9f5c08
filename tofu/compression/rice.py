"""Positions of the entries that a sparse codec sends, as Golomb-Rice-coded gaps.

Where each of d entries is kept with the same chance, the gaps between kept ones are geometric, and Golomb's code (1966)
is the best for them; Rice's special case (1979) divides by a power of two, 2^b. A gap's quotient goes in unary, its
remainder in b digits, some log2(d/k) + 1.5 bits a position. b is the best for the gaps at hand and goes ahead of them.
"""

import numpy as np
import torch
from torch import Tensor

from tofu.compression.bitstream import WIDEST, BitReader, Bits, Integers, fixed, unary
from tofu.errors import PayloadError

PARAMETER_BITS = 8


def write_positions(positions: Integers) -> list[Bits]:
    """Rising positions from 0 as fields of a stream."""
    gaps = _gaps(positions)
    parameter, _ = _best(gaps)
    remainders = gaps & ((1 << parameter) - 1)
    return [fixed(np.array([parameter]), PARAMETER_BITS), unary(gaps >> parameter), fixed(remainders, parameter)]


def positions_length(positions: Integers) -> int:
    """Bits that `write_positions` makes.

    One position more never makes it less: a gap g that is split in two gaps with g - 1 in all loses at most one from
    its quotient and gains a terminating bit. So the size can be searched by bisection.
    """
    return PARAMETER_BITS + _best(_gaps(positions))[1]


def read_positions(reader: BitReader, count: int, length: int) -> Integers:
    """`count` rising positions below `length`.

    Raises:
        PayloadError: more positions than entries, a stream that ends early, or a position outside.
    """
    if count > length:
        raise PayloadError(f"{count} positions, the update has {length} entries")
    parameter = int(reader.fixed(1, PARAMETER_BITS)[0])
    if parameter > WIDEST:
        raise PayloadError(f"Rice parameter {parameter}, expected at most {WIDEST}")
    quotients = reader.unary(count)
    if int(quotients.sum()) > length >> parameter:  # before the shift below could overflow
        raise PayloadError(f"a position lies outside the update's {length} entries")
    gaps = (quotients << parameter) + reader.fixed(count, parameter)
    positions: Integers = np.cumsum(gaps + 1) - 1
    if count and int(positions[-1]) >= length:
        raise PayloadError(f"position {int(positions[-1])} lies outside the update's {length} entries")
    return positions


def by_magnitude(vector: Tensor, most: int) -> Integers:
    """Positions of the `most` largest entries in magnitude, the largest first, of equals the first; no zeros."""
    magnitudes = vector.detach().abs()
    most = min(most, int(torch.count_nonzero(magnitudes)))
    if not most:
        return np.zeros(0, dtype=np.int64)
    least = magnitudes.kthvalue(magnitudes.numel() - most + 1).values
    among = (magnitudes >= least).nonzero().flatten()  # these alone are sorted: a few of millions
    order: Integers = among[torch.sort(magnitudes[among], descending=True, stable=True).indices].numpy()
    return order[:most]


def most_that_fit(order: Integers, *, value_bits: int, room: int) -> int:
    """The largest k for which the first k of `order` fit into `room` bits, with `value_bits` beside each position."""
    limit = min(order.size, max(0, room // (value_bits + 1)))  # a gap takes a bit at least
    by_position = np.argsort(order[:limit])
    candidates = order[by_position]

    def size(count: int) -> int:
        return positions_length(candidates[by_position < count]) + count * value_bits

    low, high, small, large = 0, limit, size(0), size(limit)
    if large <= room:
        return limit
    interpolate = True
    while high - low > 1:  # `low` fits, `high` does not
        share = (room - small) / (large - small) if interpolate else 0.5
        interpolate = not interpolate
        count = min(high - 1, low + max(1, int((high - low) * share)))
        bits = size(count)
        if bits <= room:
            low, small = count, bits
        else:
            high, large = count, bits
    return low


def _gaps(positions: Integers) -> Integers:
    return np.diff(positions, prepend=-1) - 1


def _best(gaps: Integers) -> tuple[int, int]:
    """The Rice parameter that takes the fewest bits, and how many; their number is convex in the parameter."""
    quotients = gaps
    best, least = 0, int(gaps.sum()) + gaps.size
    for parameter in range(1, WIDEST + 1):
        quotients = quotients >> 1
        size = int(quotients.sum()) + gaps.size * (parameter + 1)
        if size >= least:
            break
        best, least = parameter, size
    return best, least
