"""A client's state between two messages of a session, as bytes: in a deployment each message is a separate process.

The bytes contain secrets in the clear. The caller must protect them, and must replace the old bytes before it sends the
answer: a client restored from an old state could answer a stage twice, and two vectors under the same masks reveal
their difference.
"""

import struct
from dataclasses import dataclass, field

from tofu.errors import PayloadError
from tofu.secagg.domain import fields, split_fields
from tofu.secagg.masks import SEED_BYTES
from tofu.secagg.messages import Advert, Roster
from tofu.secagg.shamir import SHARE_BYTES
from tofu.secagg.terms import Stage

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
        self_seed: of the self-mask, after ShareKeys until MaskedInputCollection is done.
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
