"""Integers mod 2^b, 1 <= b <= 64, as vectors of uint64 below 2^b. `tofu.bytes_io` converts them to bytes.

uint64 arithmetic is mod 2^64, which 2^b divides, so a sum of any length needs only one reduction at its end.
"""

import numpy as np
import numpy.typing as npt

from tofu.bytes_io import MAX_BITS
from tofu.errors import SettingError

RingVector = npt.NDArray[np.uint64]
"""Elements of the ring, each below 2^b."""

SignedVector = npt.NDArray[np.int64]


def check_bits(bits: int) -> None:
    """Raises SettingError unless the ring has 1 to 64 bits."""
    if not 1 <= bits <= MAX_BITS:
        raise SettingError("ring_bits", bits, f"1 to {MAX_BITS}")


def largest(bits: int) -> np.uint64:
    """2^b - 1: the largest element, and the bit mask that reduces mod 2^b."""
    return np.uint64((1 << bits) - 1)


def add(a: RingVector, b: RingVector, bits: int) -> RingVector:
    """a + b mod 2^b."""
    return (a + b) & largest(bits)


def from_signed(values: SignedVector, bits: int) -> RingVector:
    """Map signed integers to elements mod 2^b."""
    return values.view(np.uint64) & largest(bits)


def centered(values: RingVector, bits: int) -> SignedVector:
    """Map elements to the integers of [-2^(b-1), 2^(b-1)) that they represent."""
    shift = MAX_BITS - bits
    # The highest bit of the element becomes the sign bit, which the shift back extends.
    return (values << np.uint64(shift)).view(np.int64) >> np.int64(shift)
