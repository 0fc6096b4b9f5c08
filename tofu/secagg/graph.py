"""The graph of neighbors, the threshold of neighbors that must complete the session, and the terms of a session.

Bell, Bonawitz, Gascon, Lepoint, Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020,
section 3: few clients form a complete graph; many are arranged in random order on a ring, each with its k/2 nearest on
either side (a Harary graph on a random permutation), which keeps every client's work at O(k) keys and shares.

The order is by SHA-256 of a seed and a client's advert, and the seed is the hash of all adverts, so every client draws
the graph independently, and a server cannot place a client among colluding ones. A malicious server can still try many
adverts of its colluding clients, each of which is another draw: 2^20 tries turn a bound of 2^-40 into 2^-20.

The threshold is t > d/2 + c for d neighbors, of which at most c collude with the server. Then c colluding clients have
fewer than t shares of either secret of a client, and the server cannot obtain both secrets, regardless of its messages:
t shares of each come from 2(t - c) > d honest neighbors, and an honest neighbor reveals only one.

With a server that follows the protocol, the honest clients in the sum form a connected graph, so only their sum is
unmasked: on one side of a client are at most d/2 neighbors, so of the t that remain, an honest one is on either side,
and steps of at most d/2 around the ring reach every client.

With a malicious server, signed lists of survivors and the complete graph, there is one sum, of at least t - c honest
clients: two lists would take 2(t - c) > d honest signers, an honest client reveals only if it has masks with all
survivors, and at least one of those that revealed for it also has a mask with it. On a sparse graph only this last
step holds, so no single vector is ever unmasked but a sum may be of few clients: if the server may be malicious, choose
the complete graph.

The digest of the terms enters every derived key and every signature, so clients with different terms cannot decrypt
each other's shares: a server gains nothing by sending one client another threshold, round or list of members.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from tofu.bytes_io import fields
from tofu.errors import SettingError
from tofu.secagg.shamir import MAX_SHARES
from tofu.settings.groups import SecureSettings

COMPLETE_UP_TO = 32
"""Maximum number of clients of a complete graph; below it a sparse graph would save almost nothing."""

_COMPLETE_WITH_IDENTITIES = 256
"""The same with identities, that is, against a malicious server, where a sparse graph guarantees less."""


SECURITY_BITS = 40
"""P[a client has too many colluding neighbors for the threshold] <= 2^-40."""

CORRECTNESS_BITS = 30
"""P[too many of a client's neighbors drop out] <= 2^-30."""


@dataclass(frozen=True)
class Topology:
    """The number of neighbors of each client, and how many of them must complete the session.

    Attributes:
        neighbors: d, of every client; even, or the number of all other clients.
        threshold: t, number of shares that reconstruct a secret.
    """

    neighbors: int
    threshold: int

    @staticmethod
    def of(secure: SecureSettings, clients: int) -> "Topology":
        """Return the topology of a secure round with this number of clients. Raises SettingError if none is secure."""
        complete = _COMPLETE_WITH_IDENTITIES if secure.secure_identities else COMPLETE_UP_TO
        dropout, corrupted = secure.secagg_dropout_fraction, secure.secagg_collusion_fraction
        return choose_topology(clients, dropout=dropout, corrupted=corrupted, complete_up_to=complete)

    def honest(self, clients: int, corrupted: float) -> int:
        """Return the minimum number of honest clients in any sum,
        if a fraction of the clients colludes with the server.
        """
        return max(1, self.threshold - math.floor(corrupted * clients))


class Graph:
    """The neighbors of each client.

    Args:
        adverts: digest of each client's advert, in the session's order.
        neighbors: d; n - 1 for a complete graph, otherwise an even number below it.

    Raises:
        SettingError: no such graph exists.
    """

    def __init__(self, adverts: Sequence[bytes], neighbors: int) -> None:
        count = len(adverts)
        self._complete = neighbors == count - 1
        if not self._complete and (not 2 <= neighbors < count - 1 or neighbors % 2):
            raise SettingError("neighbors", neighbors, f"{count - 1}, or an even number from 2 below it")
        seed = hashlib.sha256(b"tofu secagg 1 graph" + b"".join(adverts)).digest()
        self._ring = sorted(range(count), key=lambda one: hashlib.sha256(seed + adverts[one]).digest())
        self._reach = neighbors // 2
        self._known: dict[int, tuple[int, ...]] = {}

    def neighbors_of(self, one: int) -> tuple[int, ...]:
        """Return a client's neighbors in rising order, as indices into the adverts."""
        if one not in self._known:  # a client asks for its own once for each of them
            self._known[one] = self._neighbors_of(one)
        return self._known[one]

    def _neighbors_of(self, one: int) -> tuple[int, ...]:
        if self._complete:
            return tuple(other for other in range(len(self._ring)) if other != one)
        place, steps = self._ring.index(one), range(-self._reach, self._reach + 1)
        return tuple(sorted(self._ring[(place + step) % len(self._ring)] for step in steps if step))


def choose_topology(
    clients: int,
    *,
    dropout: float,
    corrupted: float,
    complete_up_to: int = COMPLETE_UP_TO,
) -> Topology:
    """Choose the smallest graph that is secure and that completes.

    Bell et al., section 3.3: around the random ring a client's neighbors are a draw without replacement, so the number
    of colluding clients (or dropouts) among them is hypergeometric. c and l are the numbers of colluding clients and of
    dropouts that no client's neighbors exceed, except with probabilities of 2^-40 and 2^-30 (by the union bound). The
    result has t = floor(d/2) + c + 1 and the smallest d with d - l >= t. In a complete graph c and l count all clients.

    Args:
        clients: n.
        dropout: fraction of the clients that may drop out anywhere in the session.
        corrupted: fraction of the clients that may collude with the server.
        complete_up_to: clients up to which the graph is complete.

    Raises:
        SettingError: there are fewer than 2 clients, a fraction is outside [0, 1), or no threshold allows that many
            dropouts and colluding clients.
    """
    if clients < 2:
        raise SettingError("clients", clients, "at least 2 for secure aggregation")
    for name, fraction in (("dropout", dropout), ("corrupted", corrupted)):
        if not 0 <= fraction < 1:
            raise SettingError(name, fraction, "a fraction from 0 to below 1")
    lost = math.floor(dropout * clients)
    for neighbors in range(2, min(clients - 1, MAX_SHARES + 1), 2) if clients > complete_up_to else ():
        dropped = _exceeded(clients - 1, lost, neighbors, clients, CORRECTNESS_BITS)
        threshold = min_threshold(clients, neighbors, corrupted)
        if threshold <= neighbors - dropped:
            return Topology(neighbors, threshold)
    others = clients - 1
    threshold = min_threshold(clients, others, corrupted)
    if threshold > others - lost or others > MAX_SHARES:
        accepted = f"a smaller fraction: no threshold allows it if a fraction {corrupted:g} of {clients} may collude"
        raise SettingError("dropout", dropout, accepted)
    return Topology(others, threshold)


def min_threshold(clients: int, neighbors: int, corrupted: float) -> int:
    """Smallest secure threshold of a graph, t = floor(d/2) + c + 1, if a fraction of the clients colludes.

    c is the number of colluding neighbors that no client exceeds, except with probability 2^-40; in the
    complete graph all colluding clients are neighbors.

    Example:
        >>> min_threshold(32, 31, corrupted=0.1)
        19
    """
    bad = math.floor(corrupted * clients)
    worst = bad if neighbors == clients - 1 else _exceeded(clients - 1, bad, neighbors, clients, SECURITY_BITS)
    return neighbors // 2 + worst + 1


def _exceeded(population: int, marked: int, draws: int, tries: int, bits: int) -> int:
    """Return the smallest c with tries * P[more than c of the draws are marked] <= 2^-bits, by exact sums."""
    total = math.comb(population, draws)
    tail = 0
    for count in range(min(marked, draws), 0, -1):
        tail += math.comb(marked, count) * math.comb(population - marked, draws - count)
        if tries * tail << bits > total:
            return count
    return 0


SESSION_BYTES = 16
DIGEST_BYTES = 16
"""Size of an advert's digest. A collision is of no use to the client that finds it: both adverts are its own."""

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
        """Return the name as in the paper, such as ShareKeys."""
        return self.name.title().replace("_", "")


@dataclass(frozen=True)
class Session:
    """Identifies a session.

    Attributes:
        round: number of the round.
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
        bits: bits of a ring element.
        values: elements of each client's vector.
        neighbors: d, of every client.
        members: digests of all adverts in rising order. A client's number in this session is its index here.
        purpose: digest of the inputs that determine the vectors, such as settings and global weights. It enters every
            key and mask, so that a server cannot send one client other inputs and single out its vector.
    """

    session: Session
    threshold: int
    bits: int
    values: int
    neighbors: int
    members: tuple[bytes, ...]
    purpose: bytes = bytes(PURPOSE_BYTES)

    def digest(self, run: bytes) -> bytes:
        """Return the SHA-256 of the terms in a run.

        Args:
            run: identifies the run to all its clients.
        """
        if run not in self._digests:  # each key and share of a session needs it
            numbers = _NUMBERS.pack(self.session.round, self.threshold, self.bits, self.values, self.neighbors)
            parts = (b"tofu secagg 1 terms", run, self.session.id, numbers, self.purpose, *self.members)
            self._digests[run] = hashlib.sha256(fields(*parts)).digest()
        return self._digests[run]

    @cached_property
    def _digests(self) -> dict[bytes, bytes]:
        """Run -> the digest of these terms in it, of those that were asked for."""
        return {}

    def neighbors_of(self, client: int) -> tuple[int, ...]:
        """Return a client's neighbors by number, rising. Raises SettingError if no such graph exists."""
        return self._graph.neighbors_of(client)

    @cached_property
    def _graph(self) -> Graph:
        return Graph(self.members, self.neighbors)


def advert_digest(advert: bytes) -> bytes:
    """Identify an advert, and with it its client and keys, by 16 bytes."""
    return hashlib.sha256(fields(b"tofu secagg 1 advert digest", advert)).digest()[:DIGEST_BYTES]
