"""The server's side of one session.

Bonawitz et al., CCS 2017, figure 4, with the graph of Bell et al., CCS 2020. With U2 the clients that shared, U3 those
of them whose masked vectors came (the survivors) and the signs of `tofu.secagg.client`,

    sum_(u in U3) x_u = sum_(u in U3) y_u - sum_(u in U3) PRG(b_u) - sum_(u in U3, v in U2 - U3) +-PRG(s_uv)    mod 2^b

over pairs u, v of neighbors. Masked vectors are added as they come; only their sum is kept.

Each stage takes one message of each client that is still in and ends when the caller asks for the next; who has not
answered by then is out. A message that is late, repeated or of a stranger raises PayloadError, names the client and
changes nothing. The caller says who sent a message, as the transport knows it.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from tofu.errors import PayloadError, RunError
from tofu.secagg import ring, shamir
from tofu.secagg.graph import Topology
from tofu.secagg.identities import ADVERT, SURVIVORS, check_known, verify
from tofu.secagg.masks import add_mask, pair_seed, public_key
from tofu.secagg.messages import Advert, Confirmation, Masked, Reveal, Roster, Shares, Survivors
from tofu.secagg.ring import RingVector
from tofu.secagg.terms import PURPOSE_BYTES, SESSION_BYTES, Session, Terms
from tofu.secagg.wire import MAX_CLIENTS


class Phase(IntEnum):
    """What the server waits for."""

    ADVERTS = 0
    SHARES = 1
    MASKED = 2
    CONFIRMATIONS = 3
    REVEALS = 4
    DONE = 5


@dataclass(frozen=True)
class Total:
    """A session's result.

    Attributes:
        vector: sum of the survivors' vectors, ring elements [values].
        survivors: their names.
    """

    vector: RingVector
    survivors: tuple[str, ...]


class ServerSession:
    """One session, from the adverts to the sum.

    Args:
        run: identifies the run to all its clients.
        round_: of the run.
        values: elements of a vector.
        bits: of the ring.
        known: name -> Ed25519 public key where clients have identities: asks for the consistency round, and refuses
            what is not signed before it reaches the neighbors. The clients check by themselves.
        purpose: digest of what the vectors mean (`Terms.purpose`).
    """

    def __init__(
        self,
        run: bytes,
        round_: int,
        *,
        values: int,
        bits: int,
        known: Mapping[str, bytes] | None = None,
        purpose: bytes = bytes(PURPOSE_BYTES),
    ) -> None:
        ring.check_bits(bits)
        check_known(known or {})
        self._run = run
        self._session = Session(round_, os.urandom(SESSION_BYTES))
        self._values = values
        self._bits = bits
        self._known, self._purpose = known, purpose
        self._phase = Phase.ADVERTS
        self._adverts: dict[str, Advert] = {}
        # From the rosters on clients go by number, their place in the terms.
        self._terms: Terms
        self._order: list[Advert] = []
        self._numbers: dict[str, int] = {}
        self._neighbors: list[tuple[int, ...]] = []
        self._digest = b""
        self._sealed: dict[int, Mapping[int, bytes]] = {}
        self._shared: set[int] = set()
        self._sum = np.zeros(values, dtype=np.uint64)
        self._masked: set[int] = set()
        self._confirmations: dict[int, bytes] = {}
        self._asked: set[int] = set()
        self._reveals: dict[int, Mapping[int, tuple[bool, bytes]]] = {}

    @property
    def phase(self) -> Phase:
        """What the server waits for."""
        return self._phase

    def add_advert(self, name: str, data: bytes) -> None:
        """Take a client's `Advert`. Raises PayloadError."""
        self._expect(Phase.ADVERTS, name, "its advert")
        advert = Advert.from_bytes(data)
        if advert.name != name:
            raise PayloadError(f"{name} sent the advert of {advert.name}")
        if name in self._adverts:
            raise PayloadError(f"{name} sent its advert twice")
        keys = {key for other in self._adverts.values() for key in (other.mask_key, other.share_key)}
        if advert.mask_key in keys or advert.share_key in keys or advert.mask_key == advert.share_key:
            raise PayloadError(f"{name} sent a key that another has")
        if self._known is not None:
            verify(self._known, name, advert.signature, ADVERT, self._run, name.encode(), advert.signed)
        if len(self._adverts) == MAX_CLIENTS:
            raise PayloadError(f"{name} sent its advert to a session that is full with {MAX_CLIENTS} clients")
        self._adverts[name] = advert

    def rosters(self, topology: Topology) -> dict[str, bytes]:
        """Close the adverts -> `Roster` for each client.

        Args:
            topology: for as many clients as sent an advert (`tofu.secagg.graph.choose_topology`).

        Raises:
            RunError: fewer clients than the topology needs.
            SettingError: a topology for another number of clients.
        """
        self._advance(Phase.ADVERTS, Phase.SHARES)
        came, needed = len(self._adverts), topology.neighbors + 1
        if came < needed:
            raise RunError(f"{came} clients sent adverts: {needed - came} are missing to {needed}")
        self._order = sorted(self._adverts.values(), key=lambda advert: advert.digest)
        self._numbers = {advert.name: number for number, advert in enumerate(self._order)}
        members = tuple(advert.digest for advert in self._order)
        shape = (topology.threshold, self._bits, self._values, topology.neighbors)
        self._terms = Terms(self._session, *shape, members, self._purpose)
        self._neighbors = [self._terms.neighbors_of(number) for number in range(came)]
        self._digest = self._terms.digest(self._run)
        result = {}
        for number, advert in enumerate(self._order):
            adverts = tuple(self._order[peer] for peer in self._neighbors[number])
            result[advert.name] = Roster(number, self._terms, adverts).to_bytes()
        return result

    def add_shares(self, name: str, data: bytes) -> None:
        """Take a client's `Shares`. Raises PayloadError."""
        shares = Shares.from_bytes(data)
        number = self._sender(Phase.SHARES, name, "its shares", shares.session, shares.client)
        if number in self._sealed:
            raise PayloadError(f"{name} sent its shares twice")
        if tuple(shares.sealed) != self._neighbors[number]:
            raise PayloadError(
                f"{name} sent shares for clients that are not its {len(self._neighbors[number])} neighbors"
            )
        self._sealed[number] = shares.sealed

    def deliveries(self) -> dict[str, bytes]:
        """Close the shares -> each client's `Shares` from its neighbors. Raises RunError below the threshold."""
        self._advance(Phase.SHARES, Phase.MASKED)
        self._shared = set(self._sealed)
        self._check_enough(self._shared, "sent shares")
        result = {}
        for number in self._sealed:
            sealed = {peer: self._sealed[peer][number] for peer in self._neighbors[number] if peer in self._sealed}
            result[self._order[number].name] = Shares(self._session, number, sealed).to_bytes()
        self._sealed.clear()
        return result

    def add_masked(self, name: str, data: bytes) -> None:
        """Add a client's `Masked` vector to the sum. Raises PayloadError."""
        masked = Masked.from_bytes(data)
        number = self._sender(Phase.MASKED, name, "its masked vector", masked.session, masked.client)
        if number not in self._shared:
            raise PayloadError(f"{name} sent its masked vector without shares")
        if number in self._masked:
            raise PayloadError(f"{name} sent its masked vector twice")
        vector = ring.unpack(masked.packed, self._values, self._bits, f"masked vector of {name}")
        self._sum += vector
        self._masked.add(number)

    def survivors(self) -> dict[str, bytes]:
        """Close the masked vectors -> `Survivors` for each of them, to confirm or, without identities, to reveal for.

        Raises:
            RunError: below the threshold; nobody has revealed anything, nor is asked to.
        """
        without = self._known is None
        self._advance(Phase.MASKED, Phase.REVEALS if without else Phase.CONFIRMATIONS)
        self._check_enough(self._masked, "sent masked vectors")
        self._asked = set(self._masked) if without else set()
        message = Survivors(self._session, self._present).to_bytes()
        return {self._order[number].name: message for number in sorted(self._masked)}

    def add_confirmation(self, name: str, data: bytes) -> None:
        """Take a survivor's `Confirmation`. Raises PayloadError."""
        confirmation = Confirmation.from_bytes(data)
        session, client = confirmation.session, confirmation.client
        number = self._sender(Phase.CONFIRMATIONS, name, "its confirmation", session, client)
        if number not in self._masked:
            raise PayloadError(f"{name} sent its confirmation and is no survivor")
        if number in self._confirmations:
            raise PayloadError(f"{name} sent its confirmation twice")
        assert self._known is not None  # or this phase is skipped
        signed = Survivors(self._session, self._present).signed
        verify(self._known, name, confirmation.signature, SURVIVORS, self._run, self._digest, signed)
        self._confirmations[number] = confirmation.signature

    def reveal_requests(self) -> dict[str, bytes]:
        """Close the confirmations -> `Survivors` with the neighbors' signatures, for all that confirmed.

        Raises:
            RunError: below the threshold; nobody has revealed anything, nor is asked to.
        """
        self._advance(Phase.CONFIRMATIONS, Phase.REVEALS)
        self._check_enough(self._confirmations, "confirmed the survivors")
        self._asked = set(self._confirmations)
        result = {}
        for number in sorted(self._asked):
            signatures = {p: self._confirmations[p] for p in self._neighbors[number] if p in self._confirmations}
            message = Survivors(self._session, self._present, signatures, number)
            result[self._order[number].name] = message.to_bytes()
        return result

    def add_reveal(self, name: str, data: bytes) -> None:
        """Take a client's `Reveal`. Raises PayloadError, also where it is not the one share of each that was asked."""
        reveal = Reveal.from_bytes(data)
        number = self._sender(Phase.REVEALS, name, "its reveal", reveal.session, reveal.client)
        if number not in self._asked:
            raise PayloadError(f"{name} sent a reveal that it was not asked for")
        if number in self._reveals:
            raise PayloadError(f"{name} sent its reveal twice")
        expected = {peer: peer in self._masked for peer in self._neighbors[number] if peer in self._shared}
        if {peer: survived for peer, (survived, _) in reveal.shares.items()} != expected:
            raise PayloadError(f"{name} revealed other shares than one for each neighbor that shared with it")
        self._reveals[number] = reveal.shares

    def finish(self) -> Total:
        """Close the reveals and take the masks off the sum.

        Raises:
            RunError: fewer reveals than the threshold, or shares that do not give back a client's key.
        """
        self._advance(Phase.REVEALS, Phase.DONE)
        self._check_enough(self._reveals, "revealed shares")
        for number in sorted(self._shared):
            secret = self._reconstructed(number)
            if number in self._masked:
                add_mask(self._sum, secret, self._bits, negative=True)
            else:
                self._remove_pair_masks(number, secret)
        self._reveals.clear()
        return Total(self._sum, tuple(self._order[number].name for number in sorted(self._masked)))

    @property
    def _present(self) -> tuple[bool, ...]:
        return tuple(number in self._masked for number in range(len(self._order)))

    def _expect(self, phase: Phase, name: str, what: str) -> None:
        if self._phase is not phase:
            when = "after they were closed" if self._phase > phase else "before it was asked for"
            raise PayloadError(f"{name} sent {what} {when}")

    def _advance(self, phase: Phase, following: Phase) -> None:
        """Raises RunError where the caller skips or repeats a stage."""
        if self._phase is not phase:
            raise RunError(f"session is at {self._phase.name.lower()}, expected {phase.name.lower()}")
        self._phase = following

    def _sender(self, phase: Phase, name: str, what: str, session: Session, client: int) -> int:
        """The client's number, where it may send this now."""
        self._expect(phase, name, what)
        if name not in self._numbers:
            raise PayloadError(f"{name} sent {what} and is not in this session")
        if session != self._session:
            raise PayloadError(f"{name} sent {what} of another session")
        if client != self._numbers[name]:
            raise PayloadError(f"{name} sent {what} as client {client}, and is client {self._numbers[name]}")
        return self._numbers[name]

    def _check_enough(self, active: Iterable[int], did: str) -> None:
        """Every client that shared must have a threshold of neighbors that are still there to reveal for it."""
        still, threshold = set(active), self._terms.threshold
        most = max((threshold - len(still & set(self._neighbors[one])) for one in self._shared), default=threshold)
        if most > 0:
            self._phase = Phase.DONE
            raise RunError(f"{len(still)} of {len(self._order)} clients {did}: {most} are missing to the threshold")

    def _reconstructed(self, number: int) -> bytes:
        """The one secret of a client that its neighbors revealed."""
        # A share's index is the holder's place among the neighbors.
        peers = enumerate(self._neighbors[number], start=1)
        shares = {index: self._reveals[peer][number][1] for index, peer in peers if peer in self._reveals}
        return shamir.combine(shares, self._terms.threshold)

    def _remove_pair_masks(self, gone: int, secret: bytes) -> None:
        """What a client that dropped out left in its neighbors' vectors."""
        advert, members = self._order[gone], self._terms.members
        if public_key(secret) != advert.mask_key:
            raise RunError(f"shares of {advert.name}'s key do not give it back: a neighbor revealed a false one")
        for peer in self._neighbors[gone]:
            if peer in self._masked:
                seed = pair_seed(secret, self._order[peer].mask_key, self._digest, members[gone], members[peer])
                add_mask(self._sum, seed, self._bits, negative=peer < gone)
