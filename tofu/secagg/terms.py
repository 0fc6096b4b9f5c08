"""What the members of one session must agree on, under one digest.

The digest enters every derived key and every signature, so that clients who were told different things cannot talk to
each other: a server that tells one client another threshold, round or membership gets no share through.
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property

from tofu.secagg.domain import fields
from tofu.secagg.graph import Graph

SESSION_BYTES = 16
DIGEST_BYTES = 16
PURPOSE_BYTES = 32
"""Of an advert. Who can make two adverts of one digest gains nothing: both are its own."""

_NUMBERS = struct.Struct("<IHBIH")


@dataclass(frozen=True)
class Session:
    """Which exchange a message belongs to.

    Attributes:
        round: of the run.
        id: 16 random bytes from the server, so that a repeated round is another session.
    """

    round: int
    id: bytes


@dataclass(frozen=True)
class Terms:
    """The session's terms.

    Attributes:
        session: which one.
        threshold: t, shares that give a secret back.
        bits: of the ring.
        values: elements of everybody's vector.
        neighbors: d, of every client.
        members: digests of all adverts in rising order. A client's number in this session is its place here.
        purpose: digest of all that gives the vectors their meaning. It goes into every key and mask, so clients that
            were told different ones share no masks, and a server cannot have all but one of them send next to nothing.
    """

    session: Session
    threshold: int
    bits: int
    values: int
    neighbors: int
    members: tuple[bytes, ...]
    purpose: bytes = bytes(PURPOSE_BYTES)

    def digest(self, run: bytes) -> bytes:
        """SHA-256 of the terms in a run.

        Args:
            run: identifies the run to all its clients.
        """
        numbers = _NUMBERS.pack(self.session.round, self.threshold, self.bits, self.values, self.neighbors)
        parts = (b"tofu secagg 1 terms", run, self.session.id, numbers, self.purpose, *self.members)
        return hashlib.sha256(fields(*parts)).digest()

    def neighbors_of(self, client: int) -> tuple[int, ...]:
        """A client's neighbors by number, rising. Raises SettingError where there is no such graph."""
        return self._graph.neighbors_of(client)

    @cached_property
    def _graph(self) -> Graph:
        return Graph(self.members, self.neighbors)


def advert_digest(advert: bytes) -> bytes:
    """Names an advert, and with it its client and keys."""
    return hashlib.sha256(fields(b"tofu secagg 1 advert digest", advert)).digest()[:DIGEST_BYTES]
