"""Reading of untrusted bytes, with a check of every length, and packed arrays of b-bit integers.

Integers of 1 <= b <= 64 bits are packed lowest bit first and without padding between elements. Eight elements take b
whole bytes, so packing works on columns of eight elements and loops over bytes, not elements.
"""

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from tofu.errors import PayloadError

_LENGTH = struct.Struct("<I")


class ByteReader:
    """Reads bytes from their start; every method raises PayloadError if the bytes are malformed.

    Args:
        data: what arrived, expected to be bytes.
        what: names the message in errors.
        min_bytes, max_bytes: accepted lengths of `data`.

    Raises:
        PayloadError: `data` is not bytes, or its length is out of range.
    """

    def __init__(self, data: object, what: str, *, min_bytes: int = 0, max_bytes: int | None = None) -> None:
        if not isinstance(data, bytes):
            raise PayloadError(f"{what} is {type(data).__name__}, expected bytes")
        if len(data) < min_bytes or (max_bytes is not None and len(data) > max_bytes):
            expected = f"at least {min_bytes}" if max_bytes is None else f"{min_bytes} to {max_bytes}"
            raise PayloadError(f"{what} has {len(data)} bytes, expected {expected}")
        self._data, self._at, self._what = data, 0, what

    @property
    def left(self) -> int:
        """Number of bytes that have not been read."""
        return len(self._data) - self._at

    def take(self, size: int, field: str = "") -> bytes:
        """Return the next `size` bytes; `field` names them in the error."""
        if size > self.left:
            raise PayloadError(f"{self._what} ends early: {self.left} bytes are left, expected {size} {field}".rstrip())
        self._at += size
        return self._data[self._at - size : self._at]

    def unpack(self, layout: struct.Struct, field: str = "") -> tuple[Any, ...]:
        """Return the next values of a layout."""
        return layout.unpack(self.take(layout.size, field))

    def prefixed(self, length: struct.Struct, field: str = "") -> bytes:
        """Return bytes that follow their own length."""
        return self.take(self.unpack(length, field)[0], field)

    def rest(self) -> bytes:
        """Return all bytes that have not been read."""
        return self.take(self.left)

    def finish(self) -> None:
        """Check that all bytes have been read."""
        if self.left:
            raise PayloadError(f"{self._what} is followed by {self.left} unexpected bytes")


Elements = npt.NDArray[np.uint64]

MAX_BITS = 64
CHUNK = 1 << 16
"""Elements handled at a time, a multiple of 8: their intermediate arrays stay in the processor's cache."""


def packed_bytes(count: int, bits: int) -> int:
    """Return the number of bytes of `count` packed elements."""
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
    """Invert `pack`; `what` names the field in errors.

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
    """Return each (element, byte, start of the byte - start of the element,
    in bits) of eight elements that share a bit.
    """
    return [
        (lane, octet, 8 * octet - lane * bits)
        for lane in range(8)
        for octet in range(lane * bits // 8, (lane * bits + bits - 1) // 8 + 1)
    ]


def fields(*parts: bytes) -> bytes:
    """Concatenate the parts, each preceded by its length (4 bytes), so that different parts give different bytes.

    For hashes, signatures, key derivation and saved states. The first part always names the purpose, so that a
    signature or key of one purpose is not valid for another.
    """
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def split_fields(data: bytes, what: str) -> list[bytes]:
    """Invert `fields`; `what` names the data in errors.

    Raises:
        PayloadError: a field exceeds the end of the data.
    """
    parts = []
    at = 0
    while at < len(data):
        head = data[at : at + _LENGTH.size]
        size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else len(data)
        at += _LENGTH.size
        if size > len(data) - at:
            raise PayloadError(f"{what} ends within a field")
        parts.append(data[at : at + size])
        at += size
    return parts
