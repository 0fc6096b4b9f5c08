"""Unambiguous bytes for hashes, signatures, key derivation and saved states: each field is preceded by its length.

The first field always names the purpose, so that a signature or key of one purpose is not valid for another.
"""

import struct

from tofu.errors import PayloadError

_LENGTH = struct.Struct("<I")


def fields(*parts: bytes) -> bytes:
    """Concatenate the parts, each preceded by its length in 4 bytes: different parts give different bytes."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def split_fields(data: bytes, what: str) -> list[bytes]:
    """The inverse of `fields`; `what` names the data in errors.

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
