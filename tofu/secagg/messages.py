"""The byte formats of the messages between clients and server. Little-endian; every field is checked when it is read.

Every message except the advert, which is made before its session, starts with a head and continues as documented in
its class; "each" means a list, preceded by its length (2 bytes). The head:

    bytes  field
    1      version of the format
    1      kind of message
    4      round
    16     session id
    2      number of the client that sends or receives it; 65535 for all clients

Nothing is read beyond the received bytes, and no count allocates more memory than they hold.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from tofu.bytes_io import MAX_BITS, ByteReader
from tofu.errors import PayloadError
from tofu.secagg.graph import DIGEST_BYTES, PURPOSE_BYTES, SESSION_BYTES, Session, Terms, advert_digest
from tofu.secagg.identities import SIGNATURE_BYTES
from tofu.secagg.masks import KEY_BYTES, check_public_key
from tofu.secagg.shamir import SHARE_BYTES

VERSION = 1
ADVERT, ROSTER, SHARES, MASKED, SURVIVORS, CONFIRMATION, REVEAL = range(7)
NAMES = ("advert", "roster", "shares", "masked vector", "survivors", "confirmation", "reveal")
"""Names by kind of message."""

ALL = 0xFFFF
MAX_CLIENTS = ALL

KIND = struct.Struct("<BB")
HEAD = struct.Struct(f"<BBI{SESSION_BYTES}sH")
COUNT = struct.Struct("<H")


def head(kind: int, session: Session, client: int) -> bytes:
    """Write the head of a message."""
    return HEAD.pack(VERSION, kind, session.round, session.id, client)


def entries(values: Mapping[int, bytes]) -> bytes:
    """Write client -> bytes: the number of entries, then each client with its bytes, in rising order."""
    return COUNT.pack(len(values)) + b"".join(COUNT.pack(peer) + value for peer, value in sorted(values.items()))


class Reader(ByteReader):
    """Reads a message from its start; every method raises PayloadError if the bytes are malformed.

    Args:
        data: as received.
        kind: expected kind of message.
    """

    def __init__(self, data: object, kind: int) -> None:
        super().__init__(data, NAMES[kind])
        self._kind = kind

    def kind(self, version: int, kind: int) -> None:
        if version != VERSION:
            raise PayloadError(f"{self._what} has version {version}, expected version {VERSION}")
        if kind != self._kind:
            raise PayloadError(f"message is of kind {kind}, expected {self._kind} ({self._what})")

    def head(self) -> tuple[Session, int]:
        version, kind, round_, id_, client = self.unpack(HEAD)
        self.kind(version, kind)
        return Session(round_, id_), client

    def entries(self, size: int) -> dict[int, bytes]:
        """Read what `entries` wrote, with `size` bytes per entry, in strictly rising order of the clients."""
        result: dict[int, bytes] = {}
        (count,) = self.unpack(COUNT)
        before = -1
        for _ in range(count):
            (peer,) = self.unpack(COUNT)
            if peer <= before:
                raise PayloadError(f"{self._what} has client {peer} after {before}, expected rising order")
            before = peer
            result[peer] = self.take(size)
        return result


MAX_NAME_BYTES = 64
SEALED_BYTES = 12 + 2 * SHARE_BYTES + 16
"""A nonce, a share of each of two secrets, and a tag."""

_ROSTER = struct.Struct("<HBIHHH")
_BYTE = struct.Struct("<B")


@dataclass(frozen=True)
class Advert:
    """AdvertiseKeys, client to server: the client's keys for one session. After version and kind:

        1   length of the name
        -   name, UTF-8, 1 to 64 bytes
        32  X25519 public key of the pair masks
        32  X25519 public key of the encryption of shares
        0 or 64  Ed25519 signature of run, name and keys

    Attributes:
        signature: b"" in a run without identities.
    """

    name: str
    mask_key: bytes
    share_key: bytes
    signature: bytes = b""

    def to_bytes(self) -> bytes:
        name = self.name.encode()
        return KIND.pack(VERSION, ADVERT) + _BYTE.pack(len(name)) + name + self.signed + self.signature

    @property
    def signed(self) -> bytes:
        """Both public keys."""
        return self.mask_key + self.share_key

    @property
    def digest(self) -> bytes:
        return advert_digest(self.to_bytes())

    @staticmethod
    def from_bytes(data: object) -> "Advert":
        """Raises PayloadError if the bytes are malformed, or a key has low order."""
        reader = Reader(data, ADVERT)
        reader.kind(*reader.unpack(KIND))
        name, mask_key, share_key = reader.prefixed(_BYTE), reader.take(KEY_BYTES), reader.take(KEY_BYTES)
        signature = reader.take(SIGNATURE_BYTES) if reader.left else b""
        reader.finish()
        try:
            text = name.decode()
        except UnicodeDecodeError as error:
            raise PayloadError("advert has a name that is not UTF-8") from error
        check_name(text)
        check_public_key(mask_key)
        check_public_key(share_key)
        return Advert(text, mask_key, share_key, signature)


def check_name(name: str) -> None:
    """Raises PayloadError unless the name has 1 to 64 printable bytes."""
    if not (1 <= len(name.encode()) <= MAX_NAME_BYTES and name.isprintable()):
        raise PayloadError(f"advert has the name {name[:MAX_NAME_BYTES]!r}, expected 1 to 64 printable bytes")


@dataclass(frozen=True)
class Roster:
    """ShareKeys, server to client: the session's terms and the neighbors' adverts. After the head:

        2   threshold
        1   bits of the ring
        4   elements of a vector
        2   neighbors
        2   adverts
        2   members
        32  purpose
        16 for each member: its advert's digest, rising
        -   adverts in order of number, each preceded by its length (1 byte)

    Attributes:
        client: number of the receiver.
        adverts: its neighbors' adverts.
    """

    client: int
    terms: Terms
    adverts: tuple[Advert, ...]

    def to_bytes(self) -> bytes:
        t = self.terms
        numbers = (t.threshold, t.bits, t.values, t.neighbors, len(self.adverts), len(t.members))
        adverts = [advert.to_bytes() for advert in self.adverts]
        written = b"".join(_BYTE.pack(len(advert)) + advert for advert in adverts)
        return head(ROSTER, t.session, self.client) + _ROSTER.pack(*numbers) + t.purpose + b"".join(t.members) + written

    @staticmethod
    def from_bytes(data: object) -> "Roster":
        """Raises PayloadError if the bytes are malformed, or a number is out of range."""
        reader = Reader(data, ROSTER)
        session, client = reader.head()
        threshold, bits, values, neighbors, count, members = reader.unpack(_ROSTER)
        purpose = reader.take(PURPOSE_BYTES)
        digests = tuple(reader.take(DIGEST_BYTES) for _ in range(members))
        adverts = tuple(Advert.from_bytes(reader.prefixed(_BYTE)) for _ in range(count))
        reader.finish()
        if not 1 <= bits <= MAX_BITS:
            raise PayloadError(f"roster has a ring of {bits} bits, expected 1 to {MAX_BITS}")
        if any(one >= other for one, other in pairwise(digests)):
            raise PayloadError("roster has members that are not in rising order")
        return Roster(client, Terms(session, threshold, bits, values, neighbors, digests, purpose), adverts)


@dataclass(frozen=True)
class Shares:
    """ShareKeys, client to server, and MaskedInputCollection, server to client: encrypted shares. After the head, each

        2   the other client: the receiver on the way up, the sender on the way down
        92  nonce, ciphertext and tag

    Attributes:
        client: number of the sender (up) or receiver (down).
        sealed: the other client -> 92 bytes.
    """

    session: Session
    client: int
    sealed: Mapping[int, bytes]

    def to_bytes(self) -> bytes:
        return head(SHARES, self.session, self.client) + entries(self.sealed)

    @staticmethod
    def from_bytes(data: object) -> "Shares":
        """Raises PayloadError if the bytes are malformed."""
        reader = Reader(data, SHARES)
        session, client = reader.head()
        sealed = reader.entries(SEALED_BYTES)
        reader.finish()
        return Shares(session, client, sealed)


@dataclass(frozen=True)
class Masked:
    """MaskedInputCollection, client to server: after the head the packed masked vector (`tofu.bytes_io.pack`)."""

    session: Session
    client: int
    packed: bytes

    def to_bytes(self) -> bytes:
        return head(MASKED, self.session, self.client) + self.packed

    @staticmethod
    def from_bytes(data: object) -> "Masked":
        """Raises PayloadError if the bytes are malformed. The terms determine the length of `packed`."""
        reader = Reader(data, MASKED)
        session, client = reader.head()
        return Masked(session, client, reader.rest())


@dataclass(frozen=True)
class Survivors:
    """Server to clients: the clients in the sum; for Unmasking with identities also the signatures. After the head:

        2   members of the session
        -   one bit for each, lowest first, set for a survivor
        each a client's number (2) and its Ed25519 signature (64) of run, terms and bits

    Attributes:
        present: one bool for each member.
        signatures: client -> signature.
    """

    session: Session
    present: tuple[bool, ...]
    signatures: Mapping[int, bytes] = field(default_factory=dict)
    client: int = ALL

    def to_bytes(self) -> bytes:
        members = COUNT.pack(len(self.present)) + self.signed
        return head(SURVIVORS, self.session, self.client) + members + entries(self.signatures)

    @property
    def signed(self) -> bytes:
        """The bits."""
        number = sum(1 << place for place, present in enumerate(self.present) if present)
        return number.to_bytes((len(self.present) + 7) // 8, "little")

    @staticmethod
    def from_bytes(data: object) -> "Survivors":
        """Raises PayloadError if the bytes are malformed."""
        reader = Reader(data, SURVIVORS)
        session, client = reader.head()
        (members,) = reader.unpack(COUNT)
        number = int.from_bytes(reader.take((members + 7) // 8), "little")
        if number >> members:
            raise PayloadError(f"survivors have a bit set beyond their {members} members")
        signatures = reader.entries(SIGNATURE_BYTES)
        reader.finish()
        present = tuple(bool(number >> place & 1) for place in range(members))
        return Survivors(session, present, signatures, client)


@dataclass(frozen=True)
class Confirmation:
    """ConsistencyCheck, client to server: after the head its signature (64 bytes) of the survivors."""

    session: Session
    client: int
    signature: bytes

    def to_bytes(self) -> bytes:
        return head(CONFIRMATION, self.session, self.client) + self.signature

    @staticmethod
    def from_bytes(data: object) -> "Confirmation":
        """Raises PayloadError if the bytes are malformed."""
        reader = Reader(data, CONFIRMATION)
        session, client = reader.head()
        signature = reader.take(SIGNATURE_BYTES)
        reader.finish()
        return Confirmation(session, client, signature)


@dataclass(frozen=True)
class Reveal:
    """Unmasking, client to server: one share for each neighbor. After the head, each

        2   the neighbor
        1   1 for its self-mask seed, because it survived; 0 for its mask key, because it dropped out
        32  share

    Attributes:
        shares: neighbor -> (of its self-mask seed, share).
    """

    session: Session
    client: int
    shares: Mapping[int, tuple[bool, bytes]]

    def to_bytes(self) -> bytes:
        written = {peer: bytes([survived]) + share for peer, (survived, share) in self.shares.items()}
        return head(REVEAL, self.session, self.client) + entries(written)

    @staticmethod
    def from_bytes(data: object) -> "Reveal":
        """Raises PayloadError if the bytes are malformed."""
        reader = Reader(data, REVEAL)
        session, client = reader.head()
        shares: dict[int, tuple[bool, bytes]] = {}
        for peer, entry in reader.entries(1 + SHARE_BYTES).items():
            if entry[0] > 1:
                raise PayloadError(f"reveal has a share of kind {entry[0]}, expected 0 or 1")
            shares[peer] = (bool(entry[0]), entry[1:])
        reader.finish()
        return Reveal(session, client, shares)
