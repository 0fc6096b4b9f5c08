"""The server's state machine of one session.

Bonawitz et al., CCS 2017, figure 4, with the graph of Bell et al., CCS 2020. With U2 the clients that sent shares, U3
those of them whose masked vectors arrived (the survivors) and the signs of `tofu.secagg.client`,

    sum_(u in U3) x_u = sum_(u in U3) y_u - sum_(u in U3) PRG(b_u) - sum_(u in U3, v in U2 - U3) +-PRG(s_uv)    mod 2^b

over pairs u, v of neighbors. Masked vectors are added as they arrive; only their sum is stored.

Each stage accepts one message from each remaining client and ends when the caller asks for the messages of the next
stage; clients that have not answered by then have dropped out. A message that is late, repeated or from an unknown
client raises PayloadError, which names the client, and changes nothing. The caller gives the name of the sender, which
the transport must authenticate.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tofu.bytes_io import unpack
from tofu.errors import PayloadError, RunError
from tofu.secagg import masks
from tofu.secagg.graph import PURPOSE_BYTES, SESSION_BYTES, Session, Stage, Terms, Topology
from tofu.secagg.identities import ADVERT, SURVIVORS, check_known, verify
from tofu.secagg.masks import NONCE_BYTES, RingVector, add_mask, commitment, pair_seed, public_key
from tofu.secagg.messages import MAX_CLIENTS, Advert, Confirmation, Masked, Reveal, Roster, Shares, Survivors
from tofu.secagg.shamir import reconstruct


@dataclass(frozen=True)
class Total:
    """The result of a session.

    Attributes:
        vector: sum of the survivors' vectors, ring elements [values].
        survivors: their names.
        wrong: name of a client -> the reason, in one line, why a share that it revealed is wrong.
    """

    vector: RingVector
    survivors: tuple[str, ...]
    wrong: Mapping[str, str] = field(default_factory=dict)


def check_signature(known: Mapping[str, bytes], run: bytes, advert: Advert) -> None:
    """Raises PayloadError if an advert is not signed for the run by the client that it names."""
    verify(known, advert.name, advert.signature, ADVERT, run, advert.name.encode(), advert.signed)


class ServerSession:
    """The server in one session.

    Args:
        run: identifies the run to all its clients.
        round_: number of the round.
        values: elements of a vector.
        bits: bits of a ring element.
        known: name -> Ed25519 public key if clients have identities. Adds the stage ConsistencyCheck, and refuses
            messages without a valid signature before they reach the neighbors. The clients check independently.
        purpose: digest of the inputs that determine the vectors (`Terms.purpose`).

    Raises:
        SettingError: the ring or a public key is not usable.
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
        masks.check_bits(bits)
        check_known(known or {})
        self._run = run
        self._session = Session(round_, os.urandom(SESSION_BYTES))
        self._values = values
        self._bits = bits
        self._known, self._purpose = known, purpose
        self._stage = Stage.ADVERTISE_KEYS
        self._adverts: dict[str, Advert] = {}
        # From ShareKeys on, clients are identified by their number, the index in the terms.
        self._terms: Terms
        self._order: list[Advert] = []
        self._numbers: dict[str, int] = {}
        self._neighbors: list[tuple[int, ...]] = []
        self._digest = b""
        self._sealed: dict[int, Mapping[int, bytes]] = {}
        self._commitments: dict[int, dict[int, bytes]] = {}
        self._wrong: dict[str, str] = {}
        self._shared: set[int] = set()
        self._sum = np.zeros(values, dtype=np.uint64)
        self._masked: set[int] = set()
        self._confirmations: dict[int, bytes] = {}
        self._asked: set[int] = set()
        self._reveals: dict[int, Mapping[int, tuple[bool, bytes]]] = {}

    @property
    def stage(self) -> Stage:
        """The stage whose messages the server accepts."""
        return self._stage

    def add_advert(self, name: str, data: bytes) -> None:
        """Accept a client's `Advert`. Raises PayloadError if it fails validation."""
        self._expect(Stage.ADVERTISE_KEYS, name, "its advert")
        advert = Advert.from_bytes(data)
        if advert.name != name:
            raise PayloadError(f"{name} sent the advert of {advert.name}")
        if name in self._adverts:
            raise PayloadError(f"{name} sent its advert twice")
        keys = {key for other in self._adverts.values() for key in (other.mask_key, other.share_key)}
        if advert.mask_key in keys or advert.share_key in keys or advert.mask_key == advert.share_key:
            raise PayloadError(f"{name} sent a key that another client has")
        if self._known is not None:
            check_signature(self._known, self._run, advert)
        if len(self._adverts) == MAX_CLIENTS:
            raise PayloadError(f"{name} sent its advert to a session that is full with {MAX_CLIENTS} clients")
        self._adverts[name] = advert

    def rosters(self, topology: Topology) -> dict[str, bytes]:
        """Close AdvertiseKeys -> `Roster` for each client.

        Args:
            topology: for the number of clients that sent an advert (`tofu.secagg.graph.choose_topology`).

        Raises:
            RunError: there are fewer clients than the topology needs.
            SettingError: the topology is for another number of clients.
        """
        self._advance(Stage.ADVERTISE_KEYS, Stage.SHARE_KEYS)
        count, needed = len(self._adverts), topology.neighbors + 1
        if count < needed:
            raise RunError(f"{count} clients sent adverts, expected at least {needed}")
        self._order = sorted(self._adverts.values(), key=lambda advert: advert.digest)
        self._numbers = {advert.name: number for number, advert in enumerate(self._order)}
        members = tuple(advert.digest for advert in self._order)
        shape = (topology.threshold, self._bits, self._values, topology.neighbors)
        self._terms = Terms(self._session, *shape, members, self._purpose)
        self._neighbors = [self._terms.neighbors_of(number) for number in range(count)]
        self._digest = self._terms.digest(self._run)
        result = {}
        for number, advert in enumerate(self._order):
            adverts = tuple(self._order[peer] for peer in self._neighbors[number])
            result[advert.name] = Roster(number, self._terms, adverts).to_bytes()
        return result

    def add_shares(self, name: str, data: bytes) -> None:
        """Accept a client's `Shares`. Raises PayloadError if they fail validation."""
        shares = Shares.from_bytes(data)
        number = self._sender(Stage.SHARE_KEYS, name, "its shares", shares.session, shares.client)
        if number in self._sealed:
            raise PayloadError(f"{name} sent its shares twice")
        if tuple(shares.sealed) != self._neighbors[number]:
            raise PayloadError(
                f"{name} sent shares for clients that are not its {len(self._neighbors[number])} neighbors"
            )
        self._sealed[number] = shares.sealed
        self._commitments[number] = {peer: sealed[:NONCE_BYTES] for peer, sealed in shares.sealed.items()}

    def deliveries(self) -> dict[str, bytes]:
        """Close ShareKeys -> each client's `Shares` from its neighbors. Raises RunError below the threshold."""
        self._advance(Stage.SHARE_KEYS, Stage.MASKED_INPUT_COLLECTION)
        self._shared = set(self._sealed)
        self._check_enough(self._shared, "sent shares")
        result = {}
        for number in self._sealed:
            sealed = {peer: self._sealed[peer][number] for peer in self._neighbors[number] if peer in self._sealed}
            result[self._order[number].name] = Shares(self._session, number, sealed).to_bytes()
        self._sealed.clear()
        return result

    def add_masked(self, name: str, data: bytes) -> None:
        """Add a client's `Masked` vector to the sum. Raises PayloadError if it fails validation."""
        masked = Masked.from_bytes(data)
        number = self._sender(Stage.MASKED_INPUT_COLLECTION, name, "its masked vector", masked.session, masked.client)
        if number not in self._shared:
            raise PayloadError(f"{name} sent its masked vector without shares")
        if number in self._masked:
            raise PayloadError(f"{name} sent its masked vector twice")
        vector = unpack(masked.packed, self._values, self._bits, f"masked vector of {name}")
        self._sum += vector
        self._masked.add(number)

    @property
    def has_enough(self) -> bool:
        """Whether enough masked vectors have arrived to continue without the others."""
        return self._missing(self._masked) <= 0

    def survivors(self) -> dict[str, bytes]:
        """Close MaskedInputCollection -> `Survivors` for each survivor, which signs it, or unmasks without identities.

        Raises:
            RunError: too few clients are left for the threshold. No client has revealed anything.
        """
        without = self._known is None
        self._advance(Stage.MASKED_INPUT_COLLECTION, Stage.UNMASKING if without else Stage.CONSISTENCY_CHECK)
        self._check_enough(self._masked, "sent masked vectors")
        self._asked = set(self._masked) if without else set()
        message = Survivors(self._session, self._present).to_bytes()
        return {self._order[number].name: message for number in sorted(self._masked)}

    def add_confirmation(self, name: str, data: bytes) -> None:
        """Accept a survivor's `Confirmation`. Raises PayloadError if it fails validation."""
        confirmation = Confirmation.from_bytes(data)
        session, client = confirmation.session, confirmation.client
        number = self._sender(Stage.CONSISTENCY_CHECK, name, "its confirmation", session, client)
        if number not in self._masked:
            raise PayloadError(f"{name} sent its confirmation but is not a survivor")
        if number in self._confirmations:
            raise PayloadError(f"{name} sent its confirmation twice")
        assert self._known is not None  # otherwise this stage is skipped
        signed = Survivors(self._session, self._present).signed
        verify(self._known, name, confirmation.signature, SURVIVORS, self._run, self._digest, signed)
        self._confirmations[number] = confirmation.signature

    def reveal_requests(self) -> dict[str, bytes]:
        """Close ConsistencyCheck -> `Survivors` with the neighbors' signatures, for all clients that signed.

        Raises:
            RunError: too few clients are left for the threshold. No client has revealed anything.
        """
        self._advance(Stage.CONSISTENCY_CHECK, Stage.UNMASKING)
        self._check_enough(self._confirmations, "confirmed the survivors")
        self._asked = set(self._confirmations)
        result = {}
        for number in sorted(self._asked):
            signatures = {p: self._confirmations[p] for p in self._neighbors[number] if p in self._confirmations}
            message = Survivors(self._session, self._present, signatures, number)
            result[self._order[number].name] = message.to_bytes()
        return result

    def add_reveal(self, name: str, data: bytes) -> None:
        """Accept a client's `Reveal`. Raises PayloadError unless it has the one requested share of each neighbor."""
        reveal = Reveal.from_bytes(data)
        number = self._sender(Stage.UNMASKING, name, "its reveal", reveal.session, reveal.client)
        if number not in self._asked:
            raise PayloadError(f"{name} sent a reveal that was not requested")
        if number in self._reveals:
            raise PayloadError(f"{name} sent its reveal twice")
        expected = {peer: peer in self._masked for peer in self._neighbors[number] if peer in self._shared}
        if {peer: survived for peer, (survived, _) in reveal.shares.items()} != expected:
            raise PayloadError(f"{name} revealed other shares than the one requested for each neighbor")
        self._reveals[number] = reveal.shares

    def finish(self) -> Total:
        """Close Unmasking and remove the masks from the sum.

        Raises:
            RunError: there are fewer reveals than the threshold, or too many shares of one client are wrong.
        """
        self._advance(Stage.UNMASKING, Stage.DONE)
        self._check_enough(self._reveals, "revealed shares")
        for number in sorted(self._shared):
            secret = self._reconstructed(number)
            if number in self._masked:
                add_mask(self._sum, secret, self._bits, negative=True)
            else:
                self._remove_pair_masks(number, secret)
        self._reveals.clear()
        return Total(self._sum, tuple(self._order[number].name for number in sorted(self._masked)), self._wrong)

    @property
    def _present(self) -> tuple[bool, ...]:
        return tuple(number in self._masked for number in range(len(self._order)))

    def _expect(self, stage: Stage, name: str, what: str) -> None:
        if self._stage is not stage:
            when = "after its stage was closed" if self._stage > stage else "before its stage"
            raise PayloadError(f"{name} sent {what} {when}")

    def _advance(self, stage: Stage, following: Stage) -> None:
        """Raises RunError if the caller skips or repeats a stage."""
        if self._stage is not stage:
            raise RunError(f"session is at {self._stage}, expected {stage}")
        self._stage = following

    def _sender(self, stage: Stage, name: str, what: str, session: Session, client: int) -> int:
        """Return the client's number, if it may send this message now."""
        self._expect(stage, name, what)
        if name not in self._numbers:
            raise PayloadError(f"{name} sent {what} but is not in this session")
        if session != self._session:
            raise PayloadError(f"{name} sent {what} of another session")
        if client != self._numbers[name]:
            raise PayloadError(f"{name} sent {what} as client {client}, but is client {self._numbers[name]}")
        return self._numbers[name]

    def _check_enough(self, active: Iterable[int], did: str) -> None:
        """Raises RunError unless each client that sent shares has at least `threshold` active neighbors."""
        still = set(active)
        if (missing := self._missing(still)) > 0:
            self._stage = Stage.DONE
            raise RunError(f"{len(still)} of {len(self._order)} clients {did}: {missing} too few for the threshold")

    def _missing(self, still: set[int]) -> int:
        threshold = self._terms.threshold
        return max((threshold - len(still & set(self._neighbors[one])) for one in self._shared), default=threshold)

    def _reconstructed(self, number: int) -> bytes:
        """Reconstruct a client's secret from its neighbors' shares. Raises RunError if that fails."""
        # The index of a share is its holder's position among the neighbors.
        peers = dict(enumerate(self._neighbors[number], start=1))
        shares = {index: self._reveals[peer][number][1] for index, peer in peers.items() if peer in self._reveals}
        owner = self._order[number].name
        found = reconstruct(shares, self._terms.threshold, lambda secret: self._is_committed(number, secret))
        if found is None:
            raise RunError(
                f"shares of {owner}'s secret do not reconstruct it: {owner} sent wrong shares, or several of its "
                f"{len(shares)} neighbors revealed wrong ones"
            )
        for index in found[1]:
            holder = self._order[peers[index]].name
            self._wrong[holder] = (
                f"its share of {owner}'s secret is wrong: {holder} changed it, or {owner} sent a wrong one"
            )
        return found[0]

    def _is_committed(self, number: int, secret: bytes) -> bool:
        """Return whether a secret is the one that the client shared, by its public mask key or by its commitments."""
        if number not in self._masked:
            return public_key(secret) == self._order[number].mask_key
        name = self._order[number].name
        return all(
            commitment(secret, self._digest, name, self._order[peer].name) == nonce
            for peer, nonce in self._commitments[number].items()
        )

    def _remove_pair_masks(self, dropped: int, secret: bytes) -> None:
        """Remove the pair masks that a dropped-out client left in its neighbors' vectors."""
        members = self._terms.members
        for peer in self._neighbors[dropped]:
            if peer in self._masked:
                seed = pair_seed(secret, self._order[peer].mask_key, self._digest, members[dropped], members[peer])
                add_mask(self._sum, seed, self._bits, negative=peer < dropped)
