"""Integers mod 2^b, 1 <= b <= 64: vectors of uint64 below 2^b, and their bytes with no bit between two of them.

Addition mod 2^64 wraps by itself and 2^b divides 2^64, so a sum of any length is reduced once, at its end.
"""

import numpy as np
import numpy.typing as npt

from tofu.errors import PayloadError, SettingError

RingVector = npt.NDArray[np.uint64]
"""Elements of the ring, each below 2^b."""

SignedVector = npt.NDArray[np.int64]

MAX_BITS = 64
CHUNK = 1 << 16
"""Elements handled at a time, a multiple of 8: what is made of them stays in the processor's cache."""


def check_bits(bits: int) -> None:
    """Raises SettingError for a ring that this module cannot compute in."""
    if not 1 <= bits <= MAX_BITS:
        raise SettingError("ring_bits", bits, f"1 to {MAX_BITS}")


def largest(bits: int) -> np.uint64:
    """2^b - 1, the largest element, which is also the mask that reduces mod 2^b."""
    return np.uint64((1 << bits) - 1)


def add(a: RingVector, b: RingVector, bits: int) -> RingVector:
    """a + b mod 2^b."""
    return (a + b) & largest(bits)


def subtract(a: RingVector, b: RingVector, bits: int) -> RingVector:
    """a - b mod 2^b."""
    return (a - b) & largest(bits)


def from_signed(values: SignedVector, bits: int) -> RingVector:
    """Integers mod 2^b."""
    return values.view(np.uint64) & largest(bits)


def centred(values: RingVector, bits: int) -> SignedVector:
    """The integers of [-2^(b-1), 2^(b-1)) that the elements stand for."""
    shift = MAX_BITS - bits
    # The element's highest bit becomes the sign, and the shift back copies it.
    return (values << np.uint64(shift)).view(np.int64) >> np.int64(shift)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed elements."""
    return (count * bits + 7) // 8


def pack(values: RingVector, bits: int) -> bytes:
    """b bits an element, lowest bit first, the last byte filled with zeros. Elements must be below 2^b."""
    pieces = []
    for start in range(0, values.size, CHUNK):
        part = values[start : start + CHUNK]
        lanes = np.zeros((-(-part.size // 8), 8), dtype=np.uint64)
        lanes.reshape(-1)[: part.size] = part
        octets = np.zeros((len(lanes), bits), dtype=np.uint8)
        for lane, octet, shift in _overlaps(bits):
            piece = lanes[:, lane] >> np.uint64(shift) if shift >= 0 else lanes[:, lane] << np.uint64(-shift)
            octets[:, octet] |= piece.astype(np.uint8)  # the lowest 8 bits
        pieces.append(octets.tobytes()[: packed_bytes(part.size, bits)])
    return b"".join(pieces)


def unpack(data: bytes, count: int, bits: int, what: str) -> RingVector:
    """The inverse of `pack`; `what` names the field in errors.

    Raises:
        PayloadError: wrong length, or a bit set after the last element.
    """
    if len(data) != packed_bytes(count, bits):
        raise PayloadError(f"{what} has {len(data)} bytes, expected {packed_bytes(count, bits)}")
    spare = 8 * len(data) - count * bits
    if spare and data[-1] >> (8 - spare):
        raise PayloadError(f"{what} has a bit set after its last element")
    result = np.empty(count, dtype=np.uint64)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        octets = np.zeros((-(-size // 8), bits), dtype=np.uint8)
        at = start * bits // 8
        piece = np.frombuffer(data, dtype=np.uint8, offset=at, count=packed_bytes(size, bits))
        octets.reshape(-1)[: piece.size] = piece
        lanes = np.zeros((len(octets), 8), dtype=np.uint64)
        for lane, octet, shift in _overlaps(bits):
            word = octets[:, octet].astype(np.uint64)
            lanes[:, lane] |= word << np.uint64(shift) if shift >= 0 else word >> np.uint64(-shift)
        result[start : start + size] = lanes.reshape(-1)[:size] & largest(bits)
    return result


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """Eight elements take `bits` whole bytes: each (element, byte) that share a bit, and byte's start - element's."""
    return [
        (lane, octet, 8 * octet - lane * bits)
        for lane in range(8)
        for octet in range(lane * bits // 8, (lane * bits + bits - 1) // 8 + 1)
    ]
