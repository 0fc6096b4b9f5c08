"""The range of each tensor: |value * weight| up to which nothing is clipped. The same sums give the same next range."""

import math
from collections.abc import Mapping

from tofu.secagg.fixed_point import HEADROOM
from tofu.weights import ParamSpec

FIRST_RANGE = 0.25
"""Range of every tensor while nothing is known about the updates: wide for any usual update."""

FEW_LEVELS = 64
"""Number of levels below which values are rounded to the nearest step, if error feedback allows it."""

MAX_GROWTH = 8.0
"""Maximum factor by which one round widens a range, whatever clients report."""

MIN_RANGE, MAX_RANGE = 1e-12, 1e12

_TAILS = 1.5
"""Correction of `nearest_range`: an update's values have heavier tails than a Laplace distribution (benchmarks)."""


def first_ranges(param_spec: ParamSpec, known: Mapping[str, float]) -> tuple[float, ...]:
    """Ranges of the first secure round: those known from earlier rounds' updates, or else `FIRST_RANGE`."""
    usable = {name: range_ for name, range_ in known.items() if range_ > 0 and math.isfinite(range_)}
    return tuple(min(max(usable.get(name, FIRST_RANGE), MIN_RANGE), MAX_RANGE) for name in param_spec.shapes)


def next_range(range_: float, excess: float, peak: float) -> float:
    """A tensor's range for the next round.

    If a value exceeded the range, it is widened by the excess, by a factor of 2 to 8. Otherwise it stays above
    `HEADROOM` times the peak and shrinks towards it by at most half per round.

    Args:
        range_: of this round.
        excess: sum over the clients of how far their largest value exceeded the range, in units of it; 0.0 for none.
        peak: largest |sum of weighted values| / clients in the sum, in units of the values.
    """
    if excess > 0:
        return min(range_ * min(max(1.0 + excess, 2.0), MAX_GROWTH), MAX_RANGE)
    return max(min(range_, max(range_ / 2, HEADROOM * peak)), MIN_RANGE)


def nearest_range(levels: int) -> float:
    """The range for nearest rounding, in units of the values' root mean square, with M `levels` on each side of zero.

    For Laplace-distributed values of variance 1, a range R has a mean squared error of R^2 / (12 M^2) from rounding
    and exp(-sqrt(2) R) from clipping. The sum is minimal at R = W(12 M^2) / sqrt(2), where W is Lambert's function.
    """
    from scipy.special import lambertw  # only the server needs it; a client should start quickly

    return _TAILS * float(lambertw(12 * levels**2).real) / math.sqrt(2)
