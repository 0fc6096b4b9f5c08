"""Bytes from the network, read from their start: every read is checked, so hostile bytes raise and never index."""

import struct
from typing import Any

from tofu.errors import PayloadError


class ByteReader:
    """Takes bytes apart from their start; every method raises PayloadError if the bytes do not fit.

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
        """The next `size` bytes; `field` names them in the error."""
        if size > self.left:
            raise PayloadError(f"{self._what} ends early: {self.left} bytes are left, expected {size} {field}".rstrip())
        self._at += size
        return self._data[self._at - size : self._at]

    def unpack(self, layout: struct.Struct, field: str = "") -> tuple[Any, ...]:
        """The next values of a layout."""
        return layout.unpack(self.take(layout.size, field))

    def prefixed(self, length: struct.Struct, field: str = "") -> bytes:
        """Bytes that follow their own length."""
        return self.take(self.unpack(length, field)[0], field)

    def rest(self) -> bytes:
        """All bytes that have not been read."""
        return self.take(self.left)

    def finish(self) -> None:
        """Check that all bytes have been read."""
        if self.left:
            raise PayloadError(f"{self._what} is followed by {self.left} bytes that belong to nothing")
