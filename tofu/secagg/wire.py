"""The common parts of all messages of a session. Little-endian. The head:

    bytes  field
    1      version of the format
    1      kind of message
    4      round
    16     session id
    2      number of the client that sends or receives it; 65535 for all clients

Nothing is read beyond the received bytes, and no count allocates more memory than they hold.
"""

import struct
from collections.abc import Mapping

from tofu.errors import PayloadError
from tofu.secagg.terms import SESSION_BYTES, Session

VERSION = 1
ADVERT, ROSTER, SHARES, MASKED, SURVIVORS, CONFIRMATION, REVEAL = range(7)
NAMES = ("advert", "roster", "shares", "masked vector", "survivors", "confirmation", "reveal")
"""Names by kind of message."""

ALL = 0xFFFF
MAX_CLIENTS = ALL

KIND = struct.Struct("<BB")
HEAD = struct.Struct(f"<BBI{SESSION_BYTES}sH")
COUNT = struct.Struct("<H")


def head(kind: int, session: Session, client: int) -> bytes:
    """Write the head of a message."""
    return HEAD.pack(VERSION, kind, session.round, session.id, client)


def entries(values: Mapping[int, bytes]) -> bytes:
    """Write client -> bytes: the number of entries, then each client with its bytes, in rising order."""
    return COUNT.pack(len(values)) + b"".join(COUNT.pack(peer) + value for peer, value in sorted(values.items()))


class Reader:
    """Reads a message from its start; every method raises PayloadError if the bytes are malformed.

    Args:
        data: as received.
        kind: expected kind of message.
    """

    def __init__(self, data: object, kind: int) -> None:
        if not isinstance(data, bytes):
            raise PayloadError(f"{NAMES[kind]} is {type(data).__name__}, expected bytes")
        self._data = data
        self._at = 0
        self._kind = kind

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise PayloadError(f"{NAMES[self._kind]} ends early: {self.left} bytes are left, expected {size}")
        self._at += size
        return self._data[self._at - size : self._at]

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def kind(self, version: int, kind: int) -> None:
        if version != VERSION:
            raise PayloadError(f"{NAMES[self._kind]} has version {version}, expected version {VERSION}")
        if kind != self._kind:
            raise PayloadError(f"message is of kind {kind}, expected {self._kind} ({NAMES[self._kind]})")

    def head(self) -> tuple[Session, int]:
        version, kind, round_, id_, client = HEAD.unpack(self.take(HEAD.size))
        self.kind(version, kind)
        return Session(round_, id_), client

    def entries(self, size: int) -> dict[int, bytes]:
        """Read what `entries` wrote, with `size` bytes per entry, in strictly rising order of the clients."""
        result: dict[int, bytes] = {}
        (count,) = self.unpack(COUNT)
        before = -1
        for _ in range(count):
            (peer,) = self.unpack(COUNT)
            if peer <= before:
                raise PayloadError(f"{NAMES[self._kind]} has client {peer} after {before}, expected rising order")
            before = peer
            result[peer] = self.take(size)
        return result

    def finish(self) -> None:
        if self.left:
            raise PayloadError(f"{NAMES[self._kind]} is followed by {self.left} unexpected bytes")
