"""Real vectors as ring elements that can be summed, weights included.

A client with n_i examples sends y_i = round(x_i n_i / u / step) and, in a few more elements, n_i itself, so that

    mean = sum y_i step / sum (n_i / u)

weights by examples while the server learns only the sums. u (`unit_weight`) is the number of examples that counts as
weight 1, agreed by all: a typical client's number, such as the mean of the last round's sum.

The weight multiplies before rounding. Rounding first and multiplying by an integer weight of 1..W inside the ring would
cost log2 W more bits an element, or at equal bits a step W times as wide, whose rounding error the weight then
multiplies; here every client's error is below one step whatever its weight, and its weight is exact.

With M levels on either side, |y_i| <= M and step = clip / M; N clients cannot overflow b bits while 2 N M < 2^b, and M
is the largest that fits: at 12 bits and 10 clients 204 levels, where whole value bits would have stopped at 127.

Rounding is stochastic (up with probability of the fraction, from AES-256 in counter mode under a fresh seed), so for
what lies within the range the mean is unbiased but for the draw's resolution of 2^-32 step. Each client's error is
below step with variance at most step^2 / 4: with S = sum n_i / u, the mean's error is below N step / S and its standard
deviation at most sqrt(N) step / (2 S).

With few levels that is far more than most values, which are small against the range. Where error feedback keeps what
rounding loses, values may be rounded to the nearest step instead: the sum is biased in one round, not over several, and
its error is never larger than the values.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tofu.errors import PayloadError, RunError, SettingError
from tofu.secagg.masks import Stream, new_seed
from tofu.secagg.ring import CHUNK, MAX_BITS, RingVector, SignedVector, centred, check_bits, from_signed, largest

RealVector = npt.NDArray[np.floating]

COUNT_BITS = 32
"""Of the number of examples and of the number of clipped values; their sums may be larger."""

DRAW_BYTES = 4
_DRAWS = 2.0 ** (8 * DRAW_BYTES)

HEADROOM = 4.0
"""How far above the largest mean entry the range stays: single clients' entries are larger than their mean's."""

TOLERATED = 1e-4
"""Fraction of clipped values up to which a range is wide enough."""

LARGEST_GROWTH = 8.0
"""Most that one round widens the range by, however far out a client says that its values were."""


@dataclass(frozen=True)
class Clipped:
    """What did not fit the range.

    Attributes:
        count: values out of range.
        largest: the largest |value * weight| in units of the range, or 1.0 where all fit.
    """

    count: int
    largest: float


@dataclass(frozen=True)
class Decoded:
    """What the server learns.

    Attributes:
        mean: float64 [n], weighted by examples.
        examples: of all clients in the sum.
        clipped: values out of range, of all clients in the sum.
        peak: largest |sum of weighted values| / clients in the sum, in units of the values.
    """

    mean: npt.NDArray[np.float64]
    examples: int
    clipped: int
    peak: float


def ring_bits(clients: int, value_bits: int) -> int:
    """The smallest b in which `clients` values of `value_bits` bits, -(2^(v-1) - 1) to 2^(v-1) - 1, cannot overflow.

    Raises:
        SettingError: fewer than 1 client or 2 value bits, or more than 64 bits in all.
    """
    if clients < 1:
        raise SettingError("clients", clients, "at least 1")
    top = 2 ** (value_bits - 1) - 1 if 2 <= value_bits <= MAX_BITS else 0
    bits = (2 * clients * top).bit_length()
    if not 1 <= bits <= MAX_BITS:
        raise SettingError("value_bits", value_bits, f"at least 2, and few enough for {clients} clients in 64 bits")
    return bits


@dataclass(frozen=True)
class FixedPoint:
    """What all clients and the server agree on.

    Attributes:
        clients: most clients in one sum, N.
        bits: of the ring, b.
        clip: |value * weight| up to which nothing is clipped; above 0.
        unit_weight: examples that count as weight 1; 1 for a mean without weights where every client says 1 example.

    Raises:
        SettingError: a field that cannot be used, or a ring too small for one level.
    """

    clients: int
    bits: int
    clip: float
    unit_weight: float = 1.0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for name, value in (("clip", self.clip), ("unit_weight", self.unit_weight)):
            if not (math.isfinite(value) and value > 0):
                raise SettingError(name, value, "a finite number above 0")
        if self.clients < 1 or self.levels < 1:
            raise SettingError("clients", self.clients, f"at least 1, and few enough for one level in {self.bits} bits")

    @property
    def levels(self) -> int:
        """M: steps on either side of zero. At most 2^53, which float64 still counts exactly."""
        return min(int(largest(self.bits)) // (2 * self.clients), 2**53)

    @property
    def step(self) -> float:
        return self.clip / self.levels

    @property
    def digit_bits(self) -> int:
        """Bits of a count that one element carries: N digits of so many cannot overflow."""
        return (int(largest(self.bits)) // self.clients + 1).bit_length() - 1

    @property
    def digits(self) -> int:
        """Elements that one count takes."""
        return -(-COUNT_BITS // self.digit_bits)

    def length(self, values: int) -> int:
        """Ring elements of a vector of so many values: itself, the examples and the count of clipped values."""
        return values + 2 * self.digits

    def encode(
        self, values: RealVector, examples: int, seed: bytes = b"", *, nearest: int = 0
    ) -> tuple[RingVector, Clipped]:
        """values [n] -> ring vector [length(n)], and what had to be clipped.

        Args:
            nearest: so many of the first values are rounded to the nearest step, the others stochastically.
            seed: 32 bytes that the rounding's draws follow from, so that a run can be repeated; b"" draws one. Rounding
                hides nothing: that is the masks' part, which are never repeatable.

        Raises:
            RunError: a value that is not finite, or a number of examples outside 1 to 2^32 - 1.
        """
        if not 1 <= examples < 2**COUNT_BITS:
            raise RunError(f"a client has {examples} examples, expected 1 to {2**COUNT_BITS - 1}")
        result = np.empty(self.length(values.size), dtype=np.uint64)
        weight = examples / self.unit_weight
        draws = Stream(seed or new_seed())
        count, furthest = 0, 1.0
        for start in range(0, values.size, CHUNK):
            # In units of the range, so that a value at its very end is not moved out by a rounding of float64.
            relative = values[start : start + CHUNK].astype(np.float64) / self.clip * weight
            if not np.isfinite(relative).all():
                raise RunError("a client's update holds a value that is not finite")
            magnitude = np.abs(relative)
            count += int((magnitude > 1).sum())
            furthest = max(furthest, float(magnitude.max()))
            rounded = self._rounded(relative, draws)
            whole = max(0, min(nearest - start, relative.size))
            rounded[:whole] = np.rint(np.clip(relative[:whole], -1, 1) * self.levels)
            result[start : start + relative.size] = from_signed(rounded, self.bits)
        result[values.size :] = [*self._digits_of(examples), *self._digits_of(min(count, 2**COUNT_BITS - 1))]
        return result, Clipped(count, furthest)

    def decode(self, total: RingVector, clients: int) -> Decoded:
        """The mean from the sum of encoded vectors [length(n)] of so many clients.

        Raises:
            PayloadError: too short a vector.
            RunError: a sum that says 0 examples.
        """
        count = total.size - 2 * self.digits
        if count < 0:
            raise PayloadError(f"sum has {total.size} elements, expected at least {2 * self.digits}")
        examples = self._count_from(total[count : count + self.digits])
        if not examples:
            raise RunError("the clients of this round have 0 examples together, expected at least 1")
        summed = centred(total[:count], self.bits).astype(np.float64) * self.step
        peak = float(np.abs(summed).max(initial=0.0)) / clients
        return Decoded(summed / (examples / self.unit_weight), examples, self._count_from(total[-self.digits :]), peak)

    def _rounded(self, relative: npt.NDArray[np.float64], draws: Stream) -> SignedVector:
        """Values in units of the range -> steps, up with probability of the fraction, and clipped."""
        inside = np.clip(relative, -1, 1) * self.levels
        down = np.floor(inside)
        up = draws.words(inside.size, DRAW_BYTES) < (inside - down) * _DRAWS
        return down.astype(np.int64) + up

    def _digits_of(self, count: int) -> list[int]:
        """A count as its digits, lowest first. Each is summed by itself, so the sum of the count is exact."""
        return [count >> (self.digit_bits * place) & (1 << self.digit_bits) - 1 for place in range(self.digits)]

    def _count_from(self, sums: RingVector) -> int:
        return sum(int(digit) << (self.digit_bits * place) for place, digit in enumerate(sums))


def adaptive_range(clip: float, clipped: Clipped, values: int, peak: float) -> float:
    """Next round's range from last round's statistics; the same numbers give the same range.

    - More than `TOLERATED` of the values were clipped: as much wider as the furthest of them was out, within 2 to 8.
    - Otherwise the range stays above `HEADROOM` times the peak, and shrinks to it by at most half a round.

    Args:
        clip: last round's range.
        clipped: `Decoded.clipped`, and the largest factor of any client (1.0 where clients do not say).
        values: how many values were encoded: those of all clients in the sum.
        peak: `Decoded.peak`.
    """
    if clipped.count > TOLERATED * values:
        return clip * min(max(clipped.largest, 2.0), LARGEST_GROWTH)
    return min(clip, max(clip / 2, HEADROOM * peak))
