"""A client's side of one session.

Bonawitz et al., CCS 2017, figure 4, with the shares among the neighbors of Bell et al., CCS 2020. For client u with
vector x_u, self-mask seed b_u, mask key s_u and neighbors v who shared with it,

    y_u = x_u + PRG(b_u) + sum_(u < v) PRG(s_uv) - sum_(u > v) PRG(s_uv)    mod 2^b.

Each stage is answered once, in order, and a message that is refused changes nothing and reveals nothing. What makes two
sessions of one advert impossible is that its keys are used for one roster and then erased.

An old advert of a neighbor, played again by a server, gains it nothing: pair masks are made only with neighbors whose
ciphertexts open, and to make one takes the secret key, which its owner has erased.
"""

import os

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tofu.errors import PayloadError
from tofu.secagg import ring, shamir
from tofu.secagg.domain import fields
from tofu.secagg.graph import Topology
from tofu.secagg.identities import ADVERT, SURVIVORS
from tofu.secagg.masks import SHARE_KEY, add_mask, agree, new_seed, pair_seed, public_key
from tofu.secagg.messages import Advert, Confirmation, Masked, Reveal, Roster, Shares, Survivors
from tofu.secagg.participant import Participant
from tofu.secagg.ring import RingVector
from tofu.secagg.state import ClientState, Stage
from tofu.secagg.terms import Session

_NONCE_BYTES = 12


class ClientSession:
    """One session, from its keys to its last answer.

    Args:
        member: who we are and what we accept.
    """

    def __init__(self, member: Participant) -> None:
        self._member = member
        self._state = ClientState()

    @property
    def stage(self) -> Stage:
        """What was done last."""
        return self._state.stage

    @property
    def topology(self) -> Topology:
        """Neighbors and threshold of the session, from SHARED on."""
        return Topology(self._roster.terms.neighbors, self._roster.terms.threshold)

    @property
    def purpose(self) -> bytes:
        """What all clients of the session were told that their vectors mean, from SHARED on."""
        return self._roster.terms.purpose

    @property
    def members(self) -> int:
        """Clients of the session, from SHARED on."""
        return len(self._roster.terms.members)

    def advertise(self) -> bytes:
        """Fresh keys for one session -> `Advert`, to be sent with an earlier reply. Raises PayloadError if repeated."""
        self._expect("advertise", Stage.NEW)
        state, name = self._state, self._member.name
        state.mask_secret, state.share_secret = bytearray(new_seed()), bytearray(new_seed())
        keys = public_key(bytes(state.mask_secret)), public_key(bytes(state.share_secret))
        state.advert = Advert(name, *keys, self._member.signature(ADVERT, name.encode(), b"".join(keys)))
        state.stage = Stage.ADVERTISED
        return state.advert.to_bytes()

    def share(self, data: bytes) -> bytes:
        """`Roster` -> `Shares` for the neighbors, sealed. Raises PayloadError for a roster not to be answered."""
        self._expect("share", Stage.ADVERTISED)
        state, roster = self._state, Roster.from_bytes(data)
        assert state.advert is not None  # since ADVERTISED
        self._member.check_roster(roster, state.advert)
        # From here on nothing is refused.
        state.roster = roster
        state.self_seed = bytearray(new_seed())
        peers, threshold = self._neighbors, roster.terms.threshold
        seeds = shamir.split(bytes(state.self_seed), threshold, len(peers))
        keys = shamir.split(bytes(state.mask_secret), threshold, len(peers))
        shares = zip(peers, seeds, keys, strict=True)
        sealed = {peer: self._seal(peer, seed + key) for peer, seed, key in shares}
        state.stage = Stage.SHARED
        return Shares(roster.terms.session, roster.client, sealed).to_bytes()

    def mask(self, vector: RingVector, data: bytes) -> bytes:
        """Our vector and the neighbors' `Shares` -> `Masked`, the last thing that needs our secret keys.

        Args:
            vector: [values] elements below 2^b.

        Raises:
            PayloadError: shares of another session, from strangers, that do not open, or from too few neighbors.
            ValueError: a vector of another length, or an element outside the ring.
        """
        self._expect("mask", Stage.SHARED)
        state, roster = self._state, self._roster
        terms, own, shares = roster.terms, roster.client, Shares.from_bytes(data)
        self._check_address("shares", shares.session, shares.client)
        if vector.shape != (terms.values,) or vector.dtype != np.uint64 or (vector > ring.largest(terms.bits)).any():
            raise ValueError(f"vector must be {terms.values} elements of uint64 below 2^{terms.bits}")
        held = {peer: bytearray(self._open(peer, sealed)) for peer, sealed in shares.sealed.items()}
        if len(held) < terms.threshold:
            raise PayloadError(f"shares came from {len(held)} neighbors, expected at least {terms.threshold}")
        masked = vector.copy()
        add_mask(masked, bytes(state.self_seed), terms.bits)
        for peer in held:
            public, digest = self._advert(peer).mask_key, self._digest
            seed = pair_seed(bytes(state.mask_secret), public, digest, terms.members[own], terms.members[peer])
            add_mask(masked, seed, terms.bits, negative=own > peer)
        state.held = held
        state.erase_keys()
        state.stage = Stage.MASKED
        return Masked(terms.session, own, ring.pack(masked, terms.bits)).to_bytes()

    def confirm(self, data: bytes) -> bytes:
        """`Survivors` -> `Confirmation`, our signature of them. Raises PayloadError for survivors not to be signed."""
        self._expect("confirm", Stage.MASKED)
        if self._member.identity is None:
            raise PayloadError(f"{self._member.name} has no identity to confirm survivors with")
        survivors = Survivors.from_bytes(data)
        self._check_survivors(survivors)
        signature = self._member.signature(SURVIVORS, self._digest, survivors.signed)
        self._state.confirmed = survivors.signed
        self._state.stage = Stage.CONFIRMED
        return Confirmation(survivors.session, self._roster.client, signature).to_bytes()

    def reveal(self, data: bytes) -> bytes:
        """`Survivors`, with identities also their signatures -> `Reveal`, after which everything is erased.

        Raises:
            PayloadError: survivors not to be answered, or ones that fewer neighbors than the threshold signed.
        """
        self._expect("reveal", Stage.MASKED if self._member.identity is None else Stage.CONFIRMED)
        survivors = Survivors.from_bytes(data)
        self._check_survivors(survivors)
        if self._member.identity is not None:
            self._check_signatures(survivors)
        # Exactly one of the two: the seed of who is in the sum, the key of who is not.
        present, half = survivors.present, shamir.SHARE_BYTES
        held = self._state.held.items()
        shares = {peer: (present[peer], bytes(both[:half] if present[peer] else both[half:])) for peer, both in held}
        reveal = Reveal(survivors.session, self._roster.client, shares).to_bytes()
        self.close()
        return reveal

    def close(self) -> None:
        """Erase all secrets and answer nothing any more; for a session that failed, too."""
        self._state.erase()

    def to_bytes(self) -> bytes:
        """The session's state, with its secrets but without the identity's key (`tofu.secagg.state`)."""
        return self._state.to_bytes(self._member.run, self._member.name)

    @staticmethod
    def from_bytes(member: Participant, data: object) -> "ClientSession":
        """The session that `to_bytes` wrote. Raises PayloadError for bytes that are none, or of another member."""
        session = ClientSession(member)
        session._state = ClientState.from_bytes(data, member.run, member.name)
        return session

    def _expect(self, action: str, stage: Stage) -> None:
        if self._state.stage is not stage:
            now, name = self._state.stage.name.lower(), self._member.name
            raise PayloadError(f"{name} was asked to {action} at stage {now}, expected {stage.name.lower()}")

    @property
    def _roster(self) -> Roster:
        if self._state.roster is None:
            raise PayloadError(f"{self._member.name} has no roster at stage {self._state.stage.name.lower()}")
        return self._state.roster

    @property
    def _neighbors(self) -> tuple[int, ...]:
        return self._roster.terms.neighbors_of(self._roster.client)

    @property
    def _digest(self) -> bytes:
        return self._roster.terms.digest(self._member.run)

    def _advert(self, peer: int) -> Advert:
        """Raises PayloadError for a client that is no neighbor."""
        if peer not in self._neighbors:
            raise PayloadError(f"client {peer} is no neighbor of {self._member.name}")
        return self._roster.adverts[self._neighbors.index(peer)]

    def _cipher(self, peer: int, sender: int, receiver: int) -> tuple[AESGCM, bytes]:
        """The cipher from sender to receiver, one of them the peer, and what its ciphertexts are bound to.

        Raises:
            PayloadError: the peer is no neighbor.
        """
        public = self._advert(peer).share_key
        members, digest = self._roster.terms.members, self._digest
        parties = members[sender], members[receiver]
        key = agree(bytes(self._state.share_secret), public, SHARE_KEY, digest, parties)
        return AESGCM(key), fields(digest, *parties)

    def _seal(self, peer: int, shares: bytes) -> bytes:
        cipher, bound = self._cipher(peer, self._roster.client, peer)
        # Random and not zero: a state that was restored from before this stage must not use one nonce twice.
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + cipher.encrypt(nonce, shares, bound)

    def _open(self, peer: int, sealed: bytes) -> bytes:
        cipher, bound = self._cipher(peer, peer, self._roster.client)
        try:
            return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound)
        except InvalidTag as error:
            name = self._advert(peer).name
            raise PayloadError(f"shares of {name} do not open: they are not from it, or of another session") from error

    def _check_address(self, what: str, session: Session, client: int) -> None:
        ours, number, name = self._roster.terms.session, self._roster.client, self._member.name
        if session != ours:
            raise PayloadError(f"{what} belong to another session than that of {name} in round {ours.round}")
        if client != number:
            raise PayloadError(f"{what} are for client {client}, and {name} is client {number}")

    def _check_survivors(self, survivors: Survivors) -> None:
        terms, present, own = self._roster.terms, survivors.present, self._member.name
        self._check_address("survivors", survivors.session, self._roster.client)
        if len(present) != len(terms.members):
            raise PayloadError(f"survivors are of {len(present)} members, expected {len(terms.members)}")
        if not present[self._roster.client]:
            raise PayloadError(f"survivors leave out {own}, which sent its vector")
        alive = [peer for peer in self._neighbors if present[peer]]
        for peer in alive:
            if peer not in self._state.held:
                raise PayloadError(f"survivors have {self._advert(peer).name}, whose shares {own} never got")
        if len(alive) < terms.threshold:
            raise PayloadError(f"survivors have {len(alive)} neighbors, expected at least {terms.threshold}")

    def _check_signatures(self, survivors: Survivors) -> None:
        if survivors.signed != self._state.confirmed:
            raise PayloadError(f"survivors are not those that {self._member.name} signed")
        threshold = self._roster.terms.threshold
        for peer, signature in survivors.signatures.items():
            name = self._advert(peer).name
            if not survivors.present[peer]:
                raise PayloadError(f"survivors are signed by {name}, which is not one of them")
            self._member.verify(name, signature, SURVIVORS, self._digest, survivors.signed)
        if len(survivors.signatures) < threshold:
            raise PayloadError(f"survivors are signed by {len(survivors.signatures)} neighbors, expected {threshold}")
