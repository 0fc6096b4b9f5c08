"""Positions of the entries that a sparse compressor sends, as gaps in Golomb-Rice code.

If each of d entries is sent with the same probability, the gaps are geometrically distributed, and Golomb's code (1966)
is optimal for them; Rice's special case (1979) divides by a power of two, 2^b. The quotient of a gap is coded in unary
and its remainder in b digits, about log2(d/k) + 1.5 bits per position. b is optimal for these gaps and precedes them.

This is our own because it codes whole arrays at once; a range coder would save about 1 % (measured).
"""

import numpy as np
import torch
from torch import Tensor

from tofu.compression.bitstream import MAX_DIGITS, BitReader, Bits, Integers, fixed, unary
from tofu.errors import PayloadError

PARAMETER_BITS = 8


def write_positions(positions: Integers) -> list[Bits]:
    """Encode increasing positions, from 0, as fields of a stream."""
    gaps = _gaps(positions)
    parameter, _ = _best(gaps)
    remainders = gaps & ((1 << parameter) - 1)
    return [fixed(np.array([parameter]), PARAMETER_BITS), unary(gaps >> parameter), fixed(remainders, parameter)]


def positions_length(positions: Integers) -> int:
    """Number of bits of `write_positions`.

    One more position never takes fewer bits: a gap g that is split into two gaps with a sum of g - 1 loses at most one
    from its quotient and gains a terminating bit. So the size can be searched by bisection.
    """
    return PARAMETER_BITS + _best(_gaps(positions))[1]


def read_positions(reader: BitReader, count: int, length: int) -> Integers:
    """Decode `count` increasing positions below `length`.

    Raises:
        PayloadError: there are more positions than entries, the stream ends early, or a position is out of range.
    """
    if count > length:
        raise PayloadError(f"{count} positions, the update has {length} entries")
    parameter = int(reader.fixed(1, PARAMETER_BITS)[0])
    if parameter > MAX_DIGITS:
        raise PayloadError(f"Rice parameter {parameter}, expected at most {MAX_DIGITS}")
    quotients = reader.unary(count)
    if int(quotients.sum()) > length >> parameter:  # before the shift below could overflow
        raise PayloadError(f"a position lies outside the update's {length} entries")
    gaps = (quotients << parameter) + reader.fixed(count, parameter)
    positions: Integers = np.cumsum(gaps + 1) - 1
    if count and int(positions[-1]) >= length:
        raise PayloadError(f"position {int(positions[-1])} lies outside the update's {length} entries")
    return positions


def by_magnitude(vector: Tensor, count: int) -> Integers:
    """Positions of the `count` largest entries in magnitude, in descending order, ties by position; without zeros."""
    magnitudes = vector.detach().abs()
    count = min(count, int(torch.count_nonzero(magnitudes)))
    if not count:
        return np.zeros(0, dtype=np.int64)
    threshold = magnitudes.kthvalue(magnitudes.numel() - count + 1).values
    among = (magnitudes >= threshold).nonzero().flatten()  # only these are sorted: a few of millions
    order: Integers = among[torch.sort(magnitudes[among], descending=True, stable=True).indices].numpy()
    return order[:count]


def max_fitting(order: Integers, *, value_bits: int, budget: int) -> int:
    """The largest k such that the first k of `order` fit into `budget` bits, with `value_bits` for each value."""
    limit = min(order.size, max(0, budget // (value_bits + 1)))  # a gap takes at least one bit
    by_position = np.argsort(order[:limit])
    candidates = order[by_position]

    def size(count: int) -> int:
        return positions_length(candidates[by_position < count]) + count * value_bits

    low, high, small, large = 0, limit, size(0), size(limit)
    if large <= budget:
        return limit
    interpolate = True
    while high - low > 1:  # `low` fits, `high` does not
        fraction = (budget - small) / (large - small) if interpolate else 0.5
        interpolate = not interpolate
        count = min(high - 1, low + max(1, int((high - low) * fraction)))
        bits = size(count)
        if bits <= budget:
            low, small = count, bits
        else:
            high, large = count, bits
    return low


def _gaps(positions: Integers) -> Integers:
    return np.diff(positions, prepend=-1) - 1


def _best(gaps: Integers) -> tuple[int, int]:
    """The Rice parameter that takes the fewest bits, and their number, which is convex in the parameter."""
    quotients = gaps
    best, min_size = 0, int(gaps.sum()) + gaps.size
    for parameter in range(1, MAX_DIGITS + 1):
        quotients = quotients >> 1
        size = int(quotients.sum()) + gaps.size * (parameter + 1)
        if size >= min_size:
            break
        best, min_size = parameter, size
    return best, min_size
