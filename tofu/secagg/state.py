"""What a client keeps between two messages of a session, as bytes: in a deployment each is a process of its own.

The bytes hold secrets in the clear. Whoever keeps them lets nobody read them, and puts the new ones in the place of the
old before the answer is sent: from an old state a stage could be answered twice, and two masked vectors under the same
masks show their difference.
"""

import struct
from dataclasses import dataclass, field
from enum import IntEnum

from tofu.errors import PayloadError
from tofu.secagg.domain import fields, split_fields
from tofu.secagg.masks import SEED_BYTES
from tofu.secagg.messages import Advert, Roster
from tofu.secagg.shamir import SHARE_BYTES

_MAGIC = b"tofu secagg client 1"
_FIELDS = 10
HELD_BYTES = 2 * SHARE_BYTES
_HELD = struct.Struct(f"<H{HELD_BYTES}s")


class Stage(IntEnum):
    """What the client has done last."""

    NEW = 0
    ADVERTISED = 1
    SHARED = 2
    MASKED = 3
    CONFIRMED = 4
    CLOSED = 5


@dataclass
class ClientState:
    """One session as a client sees it.

    Attributes:
        stage: what it has done last.
        advert: what it sent, from ADVERTISED on.
        roster: what it accepted, from SHARED on.
        mask_secret: X25519 key of the pair masks, until MASKED.
        share_secret: X25519 key of the shares' encryption, until MASKED.
        self_seed: of its self-mask, from SHARED until MASKED.
        held: neighbor -> its shares, of its self-mask seed and then of its mask key, from MASKED on.
        confirmed: the survivors' bits that it signed, from CONFIRMED on.
    """

    stage: Stage = Stage.NEW
    advert: Advert | None = None
    roster: Roster | None = None
    mask_secret: bytearray = field(default_factory=bytearray)
    share_secret: bytearray = field(default_factory=bytearray)
    self_seed: bytearray = field(default_factory=bytearray)
    held: dict[int, bytearray] = field(default_factory=dict)
    confirmed: bytes = b""

    def erase_keys(self) -> None:
        """Forget what only the masks and the ciphertexts needed."""
        for secret in (self.mask_secret, self.share_secret, self.self_seed):
            _wipe(secret)

    def erase(self) -> None:
        """Forget everything. Copies that the interpreter made on the way are beyond us until it reuses their memory."""
        self.erase_keys()
        for share in self.held.values():
            _wipe(share)
        self.held.clear()
        self.advert, self.roster, self.confirmed = None, None, b""
        self.stage = Stage.CLOSED

    def to_bytes(self, run: bytes, name: str) -> bytes:
        """Args: run and name are the client's, checked by `from_bytes`."""
        advert = self.advert.to_bytes() if self.advert else b""
        roster = self.roster.to_bytes() if self.roster else b""
        secrets = (bytes(self.mask_secret), bytes(self.share_secret), bytes(self.self_seed))
        held = b"".join(_HELD.pack(peer, bytes(share)) for peer, share in sorted(self.held.items()))
        own = fields(run, name.encode())
        return fields(_MAGIC, bytes([self.stage]), own, advert, roster, *secrets, held, self.confirmed)

    @staticmethod
    def from_bytes(data: object, run: bytes, name: str) -> "ClientState":
        """Raises PayloadError for bytes that are no state, or that of another run or client."""
        parts = split_fields(data, "saved state") if isinstance(data, bytes) else []
        if len(parts) != _FIELDS or parts[0] != _MAGIC:
            raise PayloadError("saved state is not one of a secure aggregation client of this version")
        _, stage, own, advert, roster, mask_secret, share_secret, self_seed, held, confirmed = parts
        if own != fields(run, name.encode()):
            raise PayloadError(f"saved state is not that of {name} in this run")
        if len(stage) != 1 or stage[0] > Stage.CLOSED:
            raise PayloadError(f"saved state has stage {stage.hex()}, expected 00 to 05")
        if any(len(secret) not in (0, SEED_BYTES) for secret in (mask_secret, share_secret, self_seed)):
            raise PayloadError(f"saved state has a secret that is not of {SEED_BYTES} bytes")
        if len(held) % _HELD.size:
            raise PayloadError("saved state ends within a share")
        if Stage.SHARED <= stage[0] <= Stage.CONFIRMED and not (advert and roster):
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
