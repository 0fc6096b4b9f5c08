"""The client's state machine of one session, and its state between two messages as bytes.

Bonawitz et al., CCS 2017, figure 4, with shares among the neighbors of Bell et al., CCS 2020. For client u with
vector x_u, self-mask seed b_u, mask key s_u and neighbors v that sent it shares,

    y_u = x_u + PRG(b_u) + sum_(u < v) PRG(s_uv) - sum_(u > v) PRG(s_uv)    mod 2^b.

Each stage is answered once and in order. A message that is refused changes nothing and reveals nothing. An advert
serves one session only, because its keys are used for one roster and then erased.

A server that replays an old advert of a neighbor gains nothing: a client makes pair masks only with neighbors whose
ciphertexts it can decrypt, and encrypting these takes the secret key, which its owner has erased.

In a deployment each message is handled by a new process, so the state is stored in between. Its bytes contain secrets
in the clear. The caller must protect them, and must replace the old bytes before it sends the answer: a client restored
from an old state could answer a stage twice, and two vectors under the same masks reveal their difference.
"""

import struct
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tofu.bytes_io import fields, pack, split_fields
from tofu.errors import PayloadError
from tofu.secagg import shamir
from tofu.secagg.graph import Session, Stage, Topology
from tofu.secagg.identities import ADVERT, SURVIVORS
from tofu.secagg.masks import (
    NONCE_BYTES,
    SEED_BYTES,
    SHARE_KEY,
    RingVector,
    add_mask,
    agree,
    commitment,
    largest,
    new_seed,
    pair_seed,
    public_key,
)
from tofu.secagg.messages import Advert, Confirmation, Masked, Reveal, Roster, Shares, Survivors
from tofu.secagg.participant import Participant
from tofu.secagg.shamir import SHARE_BYTES

_MAGIC = b"tofu secagg client 1"
_FIELDS = 10
HELD_BYTES = 2 * SHARE_BYTES
_HELD = struct.Struct(f"<H{HELD_BYTES}s")


@dataclass
class ClientState:
    """The client's state of one session. Which fields are set depends on the stage.

    Attributes:
        stage: the next stage.
        advert: as sent, after AdvertiseKeys.
        roster: as accepted, after ShareKeys.
        mask_secret: X25519 key of the pair masks, until MaskedInputCollection is done.
        share_secret: X25519 key of the encryption of shares, until MaskedInputCollection is done.
        self_seed: seed of the self-mask, after ShareKeys until MaskedInputCollection is done.
        held: neighbor -> its shares (of its self-mask seed, then of its mask key), after MaskedInputCollection.
        confirmed: the bits of the survivors that the client signed, after ConsistencyCheck.
    """

    stage: Stage = Stage.ADVERTISE_KEYS
    advert: Advert | None = None
    roster: Roster | None = None
    mask_secret: bytearray = field(default_factory=bytearray)
    share_secret: bytearray = field(default_factory=bytearray)
    self_seed: bytearray = field(default_factory=bytearray)
    held: dict[int, bytearray] = field(default_factory=dict)
    confirmed: bytes = b""

    def erase_keys(self) -> None:
        """Erase the secrets that only masks and ciphertexts need."""
        for secret in (self.mask_secret, self.share_secret, self.self_seed):
            _wipe(secret)

    def erase(self) -> None:
        """Erase everything, except for copies that the interpreter made, which stay until it reuses their memory."""
        self.erase_keys()
        for share in self.held.values():
            _wipe(share)
        self.held.clear()
        self.advert, self.roster, self.confirmed = None, None, b""
        self.stage = Stage.DONE

    def to_bytes(self, run: bytes, name: str) -> bytes:
        """Serialize the state with the run and the name of the client, which `from_bytes` checks."""
        advert = self.advert.to_bytes() if self.advert else b""
        roster = self.roster.to_bytes() if self.roster else b""
        secrets = (bytes(self.mask_secret), bytes(self.share_secret), bytes(self.self_seed))
        held = b"".join(_HELD.pack(peer, bytes(share)) for peer, share in sorted(self.held.items()))
        own = fields(run, name.encode())
        return fields(_MAGIC, bytes([self.stage]), own, advert, roster, *secrets, held, self.confirmed)

    @staticmethod
    def from_bytes(data: object, run: bytes, name: str) -> "ClientState":
        """Raises PayloadError if the bytes are malformed, or are the state of another run or client."""
        parts = split_fields(data, "saved state") if isinstance(data, bytes) else []
        if len(parts) != _FIELDS or parts[0] != _MAGIC:
            raise PayloadError("saved state was not written by a secure aggregation client of this version")
        _, stage, own, advert, roster, mask_secret, share_secret, self_seed, held, confirmed = parts
        if own != fields(run, name.encode()):
            raise PayloadError(f"saved state is not of {name} in this run")
        if len(stage) != 1 or stage[0] > Stage.DONE:
            raise PayloadError(f"saved state has stage {stage.hex()}, expected 00 to 05")
        if any(len(secret) not in (0, SEED_BYTES) for secret in (mask_secret, share_secret, self_seed)):
            raise PayloadError(f"saved state has a secret of a size other than {SEED_BYTES} bytes")
        if len(held) % _HELD.size:
            raise PayloadError("saved state ends within a share")
        if Stage.MASKED_INPUT_COLLECTION <= stage[0] <= Stage.UNMASKING and not (advert and roster):
            raise PayloadError(f"saved state has no roster at stage {stage[0]}")
        return ClientState(
            Stage(stage[0]),
            Advert.from_bytes(advert) if advert else None,
            Roster.from_bytes(roster) if roster else None,
            bytearray(mask_secret),
            bytearray(share_secret),
            bytearray(self_seed),
            {peer: bytearray(share) for peer, share in _HELD.iter_unpack(held)},
            confirmed,
        )


def _wipe(secret: bytearray) -> None:
    secret[:] = bytes(len(secret))
    secret.clear()


class ClientSession:
    """A client in one session.

    Args:
        participant: the client's name and keys, and the terms that it accepts.
    """

    def __init__(self, participant: Participant) -> None:
        self._participant = participant
        self._state = ClientState()

    @property
    def stage(self) -> Stage:
        """The next stage."""
        return self._state.stage

    @property
    def topology(self) -> Topology:
        """Neighbors and threshold of the session, after ShareKeys."""
        return Topology(self._roster.terms.neighbors, self._roster.terms.threshold)

    @property
    def purpose(self) -> bytes:
        """Digest of the inputs that determine the vectors (`Terms.purpose`), after ShareKeys."""
        return self._roster.terms.purpose

    @property
    def round(self) -> int:
        """The round of the run that the session is for, after ShareKeys."""
        return self._roster.terms.session.round

    @property
    def members(self) -> int:
        """Number of clients in the session, after ShareKeys."""
        return len(self._roster.terms.members)

    def advertise_keys(self) -> bytes:
        """Generate the keys of the session -> `Advert`, to be sent with an earlier reply.

        Raises:
            PayloadError: the stage is repeated.
        """
        self._expect(Stage.ADVERTISE_KEYS)
        state, name = self._state, self._participant.name
        state.mask_secret, state.share_secret = bytearray(new_seed()), bytearray(new_seed())
        keys = public_key(bytes(state.mask_secret)), public_key(bytes(state.share_secret))
        state.advert = Advert(name, *keys, self._participant.signature(ADVERT, name.encode(), b"".join(keys)))
        state.stage = Stage.SHARE_KEYS
        return state.advert.to_bytes()

    def share_keys(self, data: bytes) -> bytes:
        """`Roster` -> encrypted `Shares` for the neighbors.

        Raises:
            PayloadError: the roster fails validation (`Participant.check_roster`).
        """
        self._expect(Stage.SHARE_KEYS)
        state, roster = self._state, Roster.from_bytes(data)
        assert state.advert is not None  # set by AdvertiseKeys
        self._participant.check_roster(roster, state.advert)
        # The roster is accepted: nothing below raises.
        state.roster = roster
        state.self_seed = bytearray(new_seed())
        peers, threshold = self._neighbors, roster.terms.threshold
        seeds = shamir.split(bytes(state.self_seed), threshold, len(peers))
        keys = shamir.split(bytes(state.mask_secret), threshold, len(peers))
        shares = zip(peers, seeds, keys, strict=True)
        sealed = {peer: self._seal(peer, seed + key) for peer, seed, key in shares}
        state.stage = Stage.MASKED_INPUT_COLLECTION
        return Shares(roster.terms.session, roster.client, sealed).to_bytes()

    def mask_input(self, vector: RingVector, data: bytes) -> bytes:
        """Mask the client's vector with the neighbors' `Shares` -> `Masked`, and erase the secret keys.

        Args:
            vector: [values] elements below 2^b.
            data: `Shares`.

        Raises:
            PayloadError: the shares are of another session, not from a neighbor, cannot be decrypted, or are too few.
            ValueError: the vector has another length, or an element outside the ring.
        """
        self._expect(Stage.MASKED_INPUT_COLLECTION)
        state, roster = self._state, self._roster
        terms, own, shares = roster.terms, roster.client, Shares.from_bytes(data)
        self._check_address("shares", shares.session, shares.client)
        if vector.shape != (terms.values,) or vector.dtype != np.uint64 or (vector > largest(terms.bits)).any():
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
        identified = self._participant.identity is not None
        state.stage = Stage.CONSISTENCY_CHECK if identified else Stage.UNMASKING
        return Masked(terms.session, own, pack(masked, terms.bits)).to_bytes()

    def check_consistency(self, data: bytes) -> bytes:
        """`Survivors` -> `Confirmation`, the client's signature of them. Only in a run with identities.

        Raises:
            PayloadError: the list of survivors fails validation, or the client has no identity.
        """
        self._expect(Stage.CONSISTENCY_CHECK)
        survivors = Survivors.from_bytes(data)
        self._check_survivors(survivors)
        signature = self._participant.signature(SURVIVORS, self._digest, survivors.signed)
        self._state.confirmed = survivors.signed
        self._state.stage = Stage.UNMASKING
        return Confirmation(survivors.session, self._roster.client, signature).to_bytes()

    def unmask(self, data: bytes) -> bytes:
        """`Survivors`, with identities also their signatures -> `Reveal`, after which all secrets are erased.

        Raises:
            PayloadError: the list of survivors fails validation, or fewer neighbors than the threshold signed it.
        """
        self._expect(Stage.UNMASKING)
        survivors = Survivors.from_bytes(data)
        self._check_survivors(survivors)
        if self._participant.identity is not None:
            self._check_signatures(survivors)
        # Never both shares: the self-mask seed's of a client in the sum, the mask key's of one that dropped out.
        present, half = survivors.present, shamir.SHARE_BYTES
        held = self._state.held.items()
        shares = {peer: (present[peer], bytes(both[:half] if present[peer] else both[half:])) for peer, both in held}
        reveal = Reveal(survivors.session, self._roster.client, shares).to_bytes()
        self.close()
        return reveal

    def close(self) -> None:
        """Erase all secrets and refuse all further messages; also for a session that failed."""
        self._state.erase()

    def to_bytes(self) -> bytes:
        """Serialize the state, with its secrets but without the identity's key (`tofu.secagg.client`)."""
        return self._state.to_bytes(self._participant.run, self._participant.name)

    @staticmethod
    def from_bytes(participant: Participant, data: object) -> "ClientSession":
        """Restore what `to_bytes` wrote. Raises PayloadError if it is malformed, or is of another client or run."""
        session = ClientSession(participant)
        session._state = ClientState.from_bytes(data, participant.run, participant.name)
        return session

    def _expect(self, stage: Stage) -> None:
        if self._state.stage is not stage:
            raise PayloadError(f"{self._participant.name} got a message of {stage}, expected {self._state.stage}")

    @property
    def _roster(self) -> Roster:
        if self._state.roster is None:
            raise PayloadError(f"{self._participant.name} has no roster before {self._state.stage}")
        return self._state.roster

    @property
    def _neighbors(self) -> tuple[int, ...]:
        return self._roster.terms.neighbors_of(self._roster.client)

    @property
    def _digest(self) -> bytes:
        return self._roster.terms.digest(self._participant.run)

    def _advert(self, peer: int) -> Advert:
        """Return the advert of a neighbor. Raises PayloadError if the client is not one."""
        if peer not in self._neighbors:
            raise PayloadError(f"client {peer} is not a neighbor of {self._participant.name}")
        return self._roster.adverts[self._neighbors.index(peer)]

    def _cipher(self, peer: int, sender: int, receiver: int) -> tuple[AESGCM, bytes]:
        """Return the cipher from sender to receiver, one of which is the peer, and its associated data.

        Raises:
            PayloadError: the peer is not a neighbor.
        """
        public = self._advert(peer).share_key
        members, digest = self._roster.terms.members, self._digest
        parties = members[sender], members[receiver]
        key = agree(bytes(self._state.share_secret), public, SHARE_KEY, digest, parties)
        return AESGCM(key), fields(digest, *parties)

    def _seal(self, peer: int, shares: bytes) -> bytes:
        cipher, bound = self._cipher(peer, self._roster.client, peer)
        # A client restored from an earlier state draws another self-mask seed, so that it uses no nonce twice.
        parties = self._participant.name, self._advert(peer).name
        nonce = commitment(bytes(self._state.self_seed), self._digest, *parties)
        return nonce + cipher.encrypt(nonce, shares, bound)

    def _open(self, peer: int, sealed: bytes) -> bytes:
        cipher, bound = self._cipher(peer, peer, self._roster.client)
        try:
            return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound)
        except InvalidTag as error:
            name = self._advert(peer).name
            raise PayloadError(f"shares of {name} cannot be decrypted: wrong client or session") from error

    def _check_address(self, what: str, session: Session, client: int) -> None:
        ours, number, name = self._roster.terms.session, self._roster.client, self._participant.name
        if session != ours:
            raise PayloadError(f"{what} are of another session than that of {name} in round {ours.round}")
        if client != number:
            raise PayloadError(f"{what} are for client {client}, and {name} is client {number}")

    def _check_survivors(self, survivors: Survivors) -> None:
        terms, present, own = self._roster.terms, survivors.present, self._participant.name
        self._check_address("survivors", survivors.session, self._roster.client)
        if len(present) != len(terms.members):
            raise PayloadError(f"survivors list {len(present)} members, expected {len(terms.members)}")
        if not present[self._roster.client]:
            raise PayloadError(f"survivors omit {own}, which sent its vector")
        alive = [peer for peer in self._neighbors if present[peer]]
        for peer in alive:
            if peer not in self._state.held:
                raise PayloadError(f"survivors include {self._advert(peer).name}, whose shares {own} did not receive")
        if len(alive) < terms.threshold:
            raise PayloadError(f"survivors include {len(alive)} neighbors, expected at least {terms.threshold}")

    def _check_signatures(self, survivors: Survivors) -> None:
        if survivors.signed != self._state.confirmed:
            raise PayloadError(f"survivors differ from those that {self._participant.name} signed")
        threshold = self._roster.terms.threshold
        for peer, signature in survivors.signatures.items():
            name = self._advert(peer).name
            if not survivors.present[peer]:
                raise PayloadError(f"survivors are signed by {name}, which is not one of them")
            self._participant.verify(name, signature, SURVIVORS, self._digest, survivors.signed)
        if len(survivors.signatures) < threshold:
            raise PayloadError(f"survivors are signed by {len(survivors.signatures)} neighbors, expected {threshold}")
