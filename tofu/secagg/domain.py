"""Unambiguous bytes to hash, to sign, to derive keys from and to keep: each field behind its length.

The first field always says what the bytes are for, so that no signature or key of one purpose serves another.
"""

import struct

from tofu.errors import PayloadError

_LENGTH = struct.Struct("<I")


def fields(*parts: bytes) -> bytes:
    """The parts, each behind its length as 4 bytes: different parts give different bytes."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def split_fields(data: bytes, what: str) -> list[bytes]:
    """The inverse of `fields`; `what` names the data in errors.

    Raises:
        PayloadError: a field that goes past the end.
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
