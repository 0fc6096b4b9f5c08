"""Real vectors as ring elements whose sum is a mean weighted by examples.

A client with n_i examples sends y_i = round(x_i n_i / u / step) and, in a few more elements, n_i itself, so that

    mean = sum y_i step / sum (n_i / u)

is weighted by examples while the server learns only the sums. u (`unit_weight`), the number of examples that counts as
weight 1, is the same for all clients: a typical number of examples, such as the mean of the last round.

Values are multiplied by the weight before rounding. Rounding first and multiplying by an integer weight of 1..W in the
ring would cost log2 W more bits per element, or multiply the rounding error at equal bits. Here every client's error is
below one step for any weight, and its weight is exact.

With M levels on each side, |y_i| <= M and step = clip / M. N clients cannot overflow b bits while 2 N M < 2^b, and M is
the largest that fits: at 12 bits and 10 clients 204 levels, where a whole number of value bits would give only 127.

Rounding is stochastic (up with probability of the fraction, drawn from AES-256 in counter mode with a fresh seed), so
within the range the mean is unbiased up to the draw's resolution of 2^-32 step. Each client's error is below one step,
with variance at most step^2 / 4. With S = sum n_i / u, the mean's error is below N step / S and its standard deviation
is at most sqrt(N) step / (2 S).

With few levels this error exceeds most values, which are small compared with the range. If error feedback keeps the
rounding error, values may be rounded to the nearest step instead: the sum of one round is then biased, the sum over
rounds is not, and the error never exceeds the values.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tofu.bytes_io import CHUNK
from tofu.errors import PayloadError, RunError, SettingError
from tofu.secagg.masks import RingVector, SignedVector, Stream, centered, check_bits, from_signed, largest, new_seed

RealVector = npt.NDArray[np.floating]

COUNT_BITS = 32
"""Bits of one client's number of examples, and of its number of clipped values; sums may be larger."""

DRAW_BYTES = 4
_DRAWS = 2.0 ** (8 * DRAW_BYTES)

HEADROOM = 4.0
"""Ratio of the range to the largest mean value, because the values of single clients exceed their mean."""


@dataclass(frozen=True)
class Clipped:
    """The values of one client that exceeded the range.

    Attributes:
        count: their number.
        largest: the largest |value * weight| in units of the range, or 1.0 if none exceeded it.
    """

    count: int
    largest: float


@dataclass(frozen=True)
class Decoded:
    """What the server learns from a sum.

    Attributes:
        mean: float64 [n], weighted by examples.
        examples: number of examples of all clients in the sum.
        clipped: number of clipped values of all clients in the sum.
    """

    mean: npt.NDArray[np.float64]
    examples: int
    clipped: int


@dataclass(frozen=True)
class FixedPoint:
    """A fixed-point code that all clients and the server agree on.

    Attributes:
        clients: N, the maximum number of clients in one sum.
        bits: b, of the ring.
        clip: |value * weight| up to which nothing is clipped; above 0.
        unit_weight: number of examples that counts as weight 1. Use 1 for an unweighted mean, in which every client
            reports 1 example.

    Raises:
        SettingError: a field is not usable, or the ring is too small for one level.

    Example:
        >>> code = FixedPoint(clients=2, bits=32, clip=1.0)
        >>> vectors = [code.encode(np.array([0.5, -0.25]), examples)[0] for examples in (1, 1)]
        >>> decoded = code.decode((vectors[0] + vectors[1]) & largest(32))
        >>> decoded.mean.round(3).tolist(), decoded.examples
        ([0.5, -0.25], 2)
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
        """M: steps on each side of zero, at most 2^53, up to which float64 is exact."""
        return min(int(largest(self.bits)) // (2 * self.clients), 2**53)

    @property
    def step(self) -> float:
        """Distance between two levels, in units of the values."""
        return self.clip / self.levels

    @property
    def digit_bits(self) -> int:
        """Bits of one digit of a count: the sum of N such digits cannot overflow the ring."""
        return (int(largest(self.bits)) // self.clients + 1).bit_length() - 1

    @property
    def digits(self) -> int:
        """Ring elements of one count."""
        return -(-COUNT_BITS // self.digit_bits)

    def length(self, values: int) -> int:
        """Ring elements of a vector of `values` values, including the counts of examples and of clipped values."""
        return values + 2 * self.digits

    def encode(
        self, values: RealVector, examples: int, seed: bytes = b"", *, nearest: int = 0
    ) -> tuple[RingVector, Clipped]:
        """Encode values [n] -> ring vector [length(n)], and what was clipped.

        Args:
            values: finite.
            examples: 1 to 2^32 - 1.
            seed: 32 bytes that seed the rounding, so that a run can be repeated; b"" draws a seed. Privacy does not
                depend on it: the masks use fresh randomness.
            nearest: number of leading values that are rounded to the nearest step; all others are rounded
                stochastically.

        Raises:
            RunError: a value is not finite, or the number of examples is out of range.
        """
        if not 1 <= examples < 2**COUNT_BITS:
            raise RunError(f"a client has {examples} examples, expected 1 to {2**COUNT_BITS - 1}")
        result = np.empty(self.length(values.size), dtype=np.uint64)
        weight = examples / self.unit_weight
        draws = Stream(seed or new_seed())
        count, largest = 0, 1.0
        for start in range(0, values.size, CHUNK):
            # In units of the range, so that float64 rounding does not move a value at the end of the range out of it.
            relative = values[start : start + CHUNK].astype(np.float64) / self.clip * weight
            if not np.isfinite(relative).all():
                raise RunError("a client's update contains a value that is not finite")
            magnitude = np.abs(relative)
            count += int((magnitude > 1).sum())
            largest = max(largest, float(magnitude.max()))
            rounded = self._rounded(relative, draws)
            whole = max(0, min(nearest - start, relative.size))
            rounded[:whole] = np.rint(np.clip(relative[:whole], -1, 1) * self.levels)
            result[start : start + relative.size] = from_signed(rounded, self.bits)
        result[values.size :] = [*self._digits_of(examples), *self._digits_of(min(count, 2**COUNT_BITS - 1))]
        return result, Clipped(count, largest)

    def decode(self, total: RingVector) -> Decoded:
        """Decode the mean from the sum of encoded vectors [length(n)].

        Raises:
            PayloadError: the vector is too short.
            RunError: the sum has 0 examples.
        """
        count = total.size - 2 * self.digits
        if count < 0:
            raise PayloadError(f"sum has {total.size} elements, expected at least {2 * self.digits}")
        examples = self._count_from(total[count : count + self.digits])
        if not examples:
            raise RunError("the clients of this round have 0 examples in total, expected at least 1")
        summed = centered(total[:count], self.bits).astype(np.float64) * self.step
        return Decoded(summed / (examples / self.unit_weight), examples, self._count_from(total[-self.digits :]))

    def _rounded(self, relative: npt.NDArray[np.float64], draws: Stream) -> SignedVector:
        """Clip values in units of the range, and round them stochastically to whole steps."""
        inside = np.clip(relative, -1, 1) * self.levels
        down = np.floor(inside)
        up = draws.words(inside.size, DRAW_BYTES) < (inside - down) * _DRAWS
        return down.astype(np.int64) + up

    def _digits_of(self, count: int) -> list[int]:
        """Return the digits of a count, lowest first. Each digit is summed separately, so the summed count is exact."""
        return [count >> (self.digit_bits * place) & (1 << self.digit_bits) - 1 for place in range(self.digits)]

    def _count_from(self, sums: RingVector) -> int:
        return sum(int(digit) << (self.digit_bits * place) for place, digit in enumerate(sums))
