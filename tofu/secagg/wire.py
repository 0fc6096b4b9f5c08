"""The parts that all messages of a session are written with. Little-endian. The head:

    bytes  field
    1      version of the layouts
    1      kind of message
    4      round
    16     session
    2      number of the client that sends it or that it is for; 65535 where it is for all

Nothing is read beyond the bytes that came, and no count makes room for more than they hold.
"""

import struct
from collections.abc import Mapping

from tofu.errors import PayloadError
from tofu.secagg.terms import SESSION_BYTES, Session

VERSION = 1
ADVERT, ROSTER, SHARES, MASKED, SURVIVORS, CONFIRMATION, REVEAL = range(7)
NAMES = ("advert", "roster", "shares", "masked vector", "survivors", "confirmation", "reveal")
"""The position is the kind on the wire."""

ALL = 0xFFFF
MAX_CLIENTS = ALL

KIND = struct.Struct("<BB")
HEAD = struct.Struct(f"<BBI{SESSION_BYTES}sH")
COUNT = struct.Struct("<H")


def head(kind: int, session: Session, client: int) -> bytes:
    """What a message of a session starts with."""
    return HEAD.pack(VERSION, kind, session.round, session.id, client)


def entries(values: Mapping[int, bytes]) -> bytes:
    """Client -> bytes as their number and then each client with its bytes."""
    return COUNT.pack(len(values)) + b"".join(COUNT.pack(peer) + value for peer, value in sorted(values.items()))


class Reader:
    """Takes a message apart from its start; every method raises PayloadError where the bytes do not fit.

    Args:
        data: what came.
        kind: what it must be.
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

    def unpack(self, param_spec: struct.Struct) -> tuple[int, ...]:
        return param_spec.unpack(self.take(param_spec.size))

    def kind(self, version: int, kind: int) -> None:
        if version != VERSION:
            raise PayloadError(f"{NAMES[self._kind]} has version {version}, this program reads version {VERSION}")
        if kind != self._kind:
            raise PayloadError(f"message is of kind {kind}, expected {self._kind} ({NAMES[self._kind]})")

    def head(self) -> tuple[Session, int]:
        version, kind, round_, id_, client = HEAD.unpack(self.take(HEAD.size))
        self.kind(version, kind)
        return Session(round_, id_), client

    def entries(self, size: int) -> dict[int, bytes]:
        """The inverse of `entries`, each of `size` bytes, in rising order: one way to write them, and none twice."""
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
            raise PayloadError(f"{NAMES[self._kind]} is followed by {self.left} bytes that belong to nothing")
