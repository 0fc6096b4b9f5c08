"""Integers as bits and back, a whole array at a time.

A stream is a sequence of fields, each an array of integers in one of the codes below. A variable-length code stores its
lengths (unary) separately from its digits, so that the reader finds all lengths in one pass and all digits in another,
without a loop over entries. The reader never allocates more than its own bits justify, whatever the bytes claim.
"""

import numpy as np
import numpy.typing as npt

from tofu.errors import PayloadError

Bits = npt.NDArray[np.uint8]
"""One bit per element, 0 or 1."""

Integers = npt.NDArray[np.int64]

MAX_DIGITS = 31
"""Maximum digits of one integer: enough for any position and level, and sums cannot overflow 64 bits."""


def unary(values: Integers) -> Bits:
    """n >= 0 as n zeros and a one."""
    bits = np.zeros(int(values.sum()) + values.size, dtype=np.uint8)
    bits[np.cumsum(values + 1) - 1] = 1
    return bits


def fixed(values: Integers, width: int) -> Bits:
    """0 <= n < 2^width as `width` binary digits, lowest first."""
    octets = values.astype("<i8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, count=width, bitorder="little").ravel()


def gamma(values: Integers) -> Bits:
    """n >= 1 in Elias' gamma code (1975): the number of digits after the leading one, in unary, then those digits."""
    widths = _widths(values)
    entry, place = _places(widths)
    return np.concatenate([unary(widths), ((values[entry] >> place) & 1).astype(np.uint8)])


def gamma_length(values: Integers) -> int:
    """Number of bits of `gamma(values)`."""
    return 2 * int(_widths(values).sum()) + values.size


def packed(*fields: Bits) -> bytes:
    """Concatenate fields; the last byte is filled with zeros."""
    return np.packbits(np.concatenate(fields), bitorder="little").tobytes()


class BitReader:
    """Reads the fields of a stream in the order in which they were packed.

    Args:
        what: names the stream in errors.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._bits: Bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
        self._at = 0
        self._what = what

    def unary(self, count: int) -> Integers:
        """Raises PayloadError if the stream ends before `count` integers."""
        ones = np.flatnonzero(self._bits[self._at :])[:count]
        if ones.size < count:
            raise PayloadError(f"{self._what} end after {ones.size} of {count} entries")
        self._at += int(ones[-1]) + 1 if count else 0
        return np.diff(ones, prepend=-1) - 1

    def fixed(self, count: int, width: int) -> Integers:
        """Raises PayloadError if the stream ends before `count` integers."""
        digits = self._take(count * width).reshape(count, width)
        octets = np.zeros((count, 8), dtype=np.uint8)
        octets[:, : (width + 7) // 8] = np.packbits(digits, axis=1, bitorder="little")
        return octets.view("<i8").ravel().astype(np.int64)

    def gamma(self, count: int) -> Integers:
        """Raises PayloadError if the stream ends early, or an integer has too many digits."""
        widths = self.unary(count)
        if count and int(widths.max()) > MAX_DIGITS:
            raise PayloadError(f"{self._what} hold an integer of {int(widths.max()) + 1} digits")
        entry, place = _places(widths)
        low = np.zeros(count, dtype=np.int64)
        np.add.at(low, entry, self._take(entry.size).astype(np.int64) << place)
        return (np.int64(1) << widths) + low

    def finish(self) -> None:
        """Raises PayloadError if more is left than the zeros that fill the last byte."""
        rest = self._bits[self._at :]
        if rest.size >= 8 or rest.any():
            raise PayloadError(f"{self._what} are followed by {rest.size} bits that belong to nothing")

    def _take(self, count: int) -> Bits:
        left = self._bits.size - self._at
        if count > left:
            raise PayloadError(f"{self._what} end early: {left} bits are left of {count}")
        self._at += count
        return self._bits[self._at - count : self._at]


def _widths(values: Integers) -> Integers:
    """floor(log2 n), exactly."""
    return np.frexp(values)[1].astype(np.int64) - 1


def _places(widths: Integers) -> tuple[Integers, Integers]:
    """For each digit of all entries in order: the index of its entry, and its place value in it."""
    entry = np.repeat(np.arange(widths.size), widths)
    return entry, np.arange(entry.size) - np.repeat(np.cumsum(widths) - widths, widths)
