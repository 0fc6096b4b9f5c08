"""Exact samples of the discrete Gaussian on the integers, from a cryptographic stream.

Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, algorithms 1 to 3: rejection
from a discrete Laplace distribution, whose every decision is a biased coin of probability exp(-gamma) with a rational
gamma. A coin compares a uniform number, of which the first 64 bits are drawn, with exp(-gamma) in float64. Where these
are closer than 2^-40, which float64 cannot decide, more bits are drawn and compared with as many digits as it takes.
The samples therefore have exactly the distribution of the paper's integer arithmetic, provided that float64's exp is
right to 2^-40. The time that sampling takes depends on the samples.
"""

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tofu.bytes_io import CHUNK
from tofu.secagg.masks import SignedVector, Stream

_DOUBT = 2.0**-40
_WORD = 64


def discrete_gaussian(deviation: float, count: int, stream: Stream) -> SignedVector:
    """Draw `count` integers x with probability proportional to exp(-x^2 / (2 deviation^2)).

    Args:
        deviation: above 0 and up to 2^50, taken as the rational number that the float is.
        count: number of samples.
        stream: used by nothing else.

    Example:
        >>> from tofu.secagg.masks import new_seed
        >>> samples = discrete_gaussian(3.0, 10_000, Stream(new_seed()))
        >>> bool(abs(samples.std() - 3.0) < 0.2)
        True
    """
    samples = np.empty(count, np.int64)
    filled, scale = 0, int(deviation) + 1
    exact = Fraction(deviation) ** 2

    def gamma(value: int) -> Fraction:
        return (abs(value) - exact / scale) ** 2 / (2 * exact)

    while filled < count:
        # A proposal is accepted with a probability of about 0.48.
        proposed = _discrete_laplace(scale, min(CHUNK, 2 * (count - filled) + 64), stream)
        relative = (np.abs(proposed) - deviation * (deviation / scale)) / deviation
        kept = proposed[_coins(relative**2 / 2, proposed, gamma, stream)]
        kept = kept[: count - filled]
        samples[filled : filled + kept.size] = kept
        filled += kept.size
    return samples


def _discrete_laplace(scale: int, proposals: int, stream: Stream) -> SignedVector:
    """Integers with probability proportional to exp(-|x| / scale), as many as remain of `proposals` (algorithm 2)."""
    rest = _below(scale, proposals, stream)
    rest = rest[_coins(rest / scale, rest, lambda value: Fraction(value, scale), stream)]
    whole, active = np.zeros(rest.size, np.int64), np.arange(rest.size)
    while active.size:
        active = active[_coins(np.ones(active.size), active, lambda _: Fraction(1), stream)]
        whole[active] += 1
    magnitude = rest + scale * whole
    negative = (stream.words(rest.size, 1) & 1).astype(bool)
    kept = ~(negative & (magnitude == 0))
    result: SignedVector = np.where(negative, -magnitude, magnitude)[kept]
    return result


def _below(limit: int, count: int, stream: Stream) -> SignedVector:
    """At most `count` uniform integers from 0 to below `limit`."""
    words = stream.words(count, _WORD // 8)
    last = 2**_WORD - 1 - 2**_WORD % limit
    found: SignedVector = (words[words <= np.uint64(last)] % np.uint64(limit)).astype(np.int64)
    return found


def _coins(
    gammas: npt.NDArray[np.float64], values: SignedVector, exact: Callable[[int], Fraction], stream: Stream
) -> npt.NDArray[np.bool_]:
    """Draw for each value true with probability exp(-gamma); `exact` is the gamma of a value as a fraction."""
    words = stream.words(gammas.size, _WORD // 8)
    distance = np.exp(-gammas) - words * 2.0**-_WORD
    result: npt.NDArray[np.bool_] = distance > 0
    for at in np.flatnonzero(np.abs(distance) <= _DOUBT).tolist():
        result[at] = _is_below(int(words[at]), exact(int(values[at])), stream)
    return result


def _is_below(word: int, gamma: Fraction, stream: Stream) -> bool:
    """Return whether a uniform number of [0, 1), which begins with the 64 bits of `word`, is below exp(-gamma)."""
    bits = _WORD
    with localcontext() as context:
        while True:
            context.prec = bits  # decimal digits, so at least three times as precise as the comparison
            limit = int((Decimal(-gamma.numerator) / gamma.denominator).exp() * 2**bits)
            if word < limit - 1:
                return True
            if word > limit + 1:
                return False
            word = word << _WORD | int(stream.words(1, _WORD // 8)[0])
            bits += _WORD
