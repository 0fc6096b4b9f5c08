"""Arrays of b-bit integers as bytes, 1 <= b <= 64, lowest bit first and without padding between elements.

Eight elements take b whole bytes, so packing works on columns of eight elements and loops over bytes, not elements.
"""

import numpy as np
import numpy.typing as npt

from tofu.errors import PayloadError

Elements = npt.NDArray[np.uint64]

MAX_BITS = 64
CHUNK = 1 << 16
"""Elements handled at a time, a multiple of 8: their intermediate arrays stay in the processor's cache."""


def packed_bytes(count: int, bits: int) -> int:
    """Number of bytes of `count` packed elements."""
    return (count * bits + 7) // 8


def pack(values: Elements, bits: int) -> bytes:
    """Pack elements below 2^bits; the last byte is filled with zeros."""
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


def unpack(data: bytes, count: int, bits: int, what: str) -> Elements:
    """The inverse of `pack`; `what` names the field in errors.

    Raises:
        PayloadError: the length is wrong, or a bit is set after the last element.
    """
    if len(data) != packed_bytes(count, bits):
        raise PayloadError(f"{what} has {len(data)} bytes, expected {packed_bytes(count, bits)}")
    spare = 8 * len(data) - count * bits
    if spare and data[-1] >> (8 - spare):
        raise PayloadError(f"{what} has a bit set after its last element")
    result = np.empty(count, dtype=np.uint64)
    largest = np.uint64((1 << bits) - 1)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        octets = np.zeros((-(-size // 8), bits), dtype=np.uint8)
        piece = np.frombuffer(data, dtype=np.uint8, offset=start * bits // 8, count=packed_bytes(size, bits))
        octets.reshape(-1)[: piece.size] = piece
        lanes = np.zeros((len(octets), 8), dtype=np.uint64)
        for lane, octet, shift in _overlaps(bits):
            word = octets[:, octet].astype(np.uint64)
            lanes[:, lane] |= word << np.uint64(shift) if shift >= 0 else word >> np.uint64(-shift)
        result[start : start + size] = lanes.reshape(-1)[:size] & largest
    return result


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """Each (element, byte, start of the byte - start of the element, in bits) of eight elements that share a bit."""
    return [
        (lane, octet, 8 * octet - lane * bits)
        for lane in range(8)
        for octet in range(lane * bits // 8, (lane * bits + bits - 1) // 8 + 1)
    ]
