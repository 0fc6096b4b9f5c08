"""The stages of a session, and the terms that its members must agree on.

The digest of the terms enters every derived key and every signature, so clients with different terms cannot decrypt
each other's shares: a server gains nothing by sending one client another threshold, round or list of members.
"""

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from tofu.secagg.domain import fields
from tofu.secagg.graph import Graph

SESSION_BYTES = 16
DIGEST_BYTES = 16
"""Of an advert. Two adverts with one digest are useless to the client that found them, because both are its own."""

PURPOSE_BYTES = 32

_NUMBERS = struct.Struct("<IHBIH")


class Stage(IntEnum):
    """The stages of Bonawitz et al., CCS 2017, figure 4 (there "rounds" 0 to 4)."""

    ADVERTISE_KEYS = 0
    SHARE_KEYS = 1
    MASKED_INPUT_COLLECTION = 2
    CONSISTENCY_CHECK = 3
    UNMASKING = 4
    DONE = 5

    def __str__(self) -> str:
        """The name as in the paper, such as ShareKeys."""
        return self.name.title().replace("_", "")


@dataclass(frozen=True)
class Session:
    """Identifies a session.

    Attributes:
        round: of the run.
        id: 16 random bytes from the server, so that a repeated round is a new session.
    """

    round: int
    id: bytes


@dataclass(frozen=True)
class Terms:
    """The terms of a session.

    Attributes:
        session: identifies the session.
        threshold: t, number of shares that reconstruct a secret.
        bits: of the ring.
        values: elements of each client's vector.
        neighbors: d, of every client.
        members: digests of all adverts in rising order. A client's number in this session is its index here.
        purpose: digest of what gives the vectors their meaning. It enters every key and mask, so that a server cannot
            give all clients but one a purpose for which their vectors are almost zero.
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
        """A client's neighbors by number, rising. Raises SettingError if no such graph exists."""
        return self._graph.neighbors_of(client)

    @cached_property
    def _graph(self) -> Graph:
        return Graph(self.members, self.neighbors)


def advert_digest(advert: bytes) -> bytes:
    """Identify an advert, and with it its client and keys, by 16 bytes."""
    return hashlib.sha256(fields(b"tofu secagg 1 advert digest", advert)).digest()[:DIGEST_BYTES]
