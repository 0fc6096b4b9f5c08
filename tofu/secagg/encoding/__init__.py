"""A client's update as the vector of ring elements that a secure round sums, and the mean update from that sum.

Each tensor has its own range, agreed for the round: its values are divided by it, so that one fixed-point code of range
1 (`tofu.secagg.fixed_point`) serves weights, biases and BatchNorm statistics. A few more elements follow the update, so
that everything else the server needs from the clients is a sum, too: the loss, and for each tensor how far the client's
values exceeded the range. The sums of plugins come last, in digits that add up exactly, to 2^-39 of each bound.

With many levels the range is wide enough that almost nothing is clipped, and rounding is stochastic and unbiased. With
few levels that would round almost all values to zero. If error feedback keeps what a client could not send, values are
then rounded to the nearest step instead (`EncodingConfig.nearest_rounding`), and the range is `nearest_range` times
their root mean square, of which the clients sum the square. The largest values are clipped, counted, and sent later.
"""

from tofu.secagg.encoding.config import EncodingConfig, purpose_of
from tofu.secagg.encoding.encoder import Encoded, RingEncoder, SecureMean, flat
from tofu.secagg.encoding.ranges import FEW_LEVELS, FIRST_RANGE, first_ranges, nearest_range, next_range

__all__ = [
    "FEW_LEVELS",
    "FIRST_RANGE",
    "Encoded",
    "EncodingConfig",
    "RingEncoder",
    "SecureMean",
    "first_ranges",
    "flat",
    "nearest_range",
    "next_range",
    "purpose_of",
]
