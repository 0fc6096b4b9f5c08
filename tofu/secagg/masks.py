"""Masks: seeds that two clients agree on, and the uniform ring elements that are generated from a seed.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, sections 3 and 4: key
agreement KA is X25519 (RFC 7748) with HKDF-SHA256 (RFC 5869), the generator PRG is AES-256 in counter mode starting
at zero. Each seed generates only one stream, so no nonce is needed.

An element of b bits is the lowest b bits of the stream's next little-endian word of 1, 2, 4 or 8 bytes, the smallest
size that holds b bits. This is uniform, needs no rejection sampling, and is as fast as the cipher.

Vectors are integers mod 2^b, 1 <= b <= 64, as uint64 below 2^b. uint64 arithmetic is mod 2^64, which 2^b divides, so a
sum of any length needs only one reduction at its end.
"""

import hashlib
import os
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tofu.bytes_io import CHUNK, MAX_BITS, fields
from tofu.errors import PayloadError, SettingError

RingVector = npt.NDArray[np.uint64]
"""Elements of the ring, each below 2^b."""

SignedVector = npt.NDArray[np.int64]


def check_bits(bits: int) -> None:
    """Raises SettingError unless the ring has 1 to 64 bits."""
    if not 1 <= bits <= MAX_BITS:
        raise SettingError("ring_bits", bits, f"1 to {MAX_BITS}")


def largest(bits: int) -> np.uint64:
    """2^b - 1: the largest element, and the bit mask that reduces mod 2^b."""
    return np.uint64((1 << bits) - 1)


def add(a: RingVector, b: RingVector, bits: int) -> RingVector:
    """a + b mod 2^b."""
    return (a + b) & largest(bits)


def from_signed(values: SignedVector, bits: int) -> RingVector:
    """Map signed integers to elements mod 2^b."""
    return values.view(np.uint64) & largest(bits)


def centered(values: RingVector, bits: int) -> SignedVector:
    """Map elements to the integers of [-2^(b-1), 2^(b-1)) that they represent."""
    shift = MAX_BITS - bits
    # The highest bit of the element becomes the sign bit, which the shift back extends.
    return (values << np.uint64(shift)).view(np.int64) >> np.int64(shift)


SEED_BYTES = 32
NONCE_BYTES = 12
KEY_BYTES = 32

PAIR_MASK = b"tofu secagg 1 pair mask"
SHARE_KEY = b"tofu secagg 1 share key"


def new_seed() -> bytes:
    """Draw 256 bits from the operating system's generator."""
    return os.urandom(SEED_BYTES)


def public_key(secret: bytes) -> bytes:
    """Return the X25519 public key of a secret key (32 bytes each)."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


@lru_cache(maxsize=4096)
def check_public_key(public: bytes) -> None:
    """Raises PayloadError for a key of low order, whose shared secret with any key is zero.

    Keys that passed are remembered: the same adverts come with every stage of a session.
    """
    _exchange(X25519PrivateKey.generate(), public)


def _exchange(secret: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise PayloadError(f"public key {public.hex()} is not usable: it has low order") from error


def agree(secret: bytes, public: bytes, purpose: bytes, terms: bytes, parties: tuple[bytes, ...]) -> bytes:
    """Derive the 32 bytes that the owners of two X25519 keys share for one purpose in one session.

    Args:
        secret: our secret key.
        public: the other's public key.
        purpose: what the bytes are used for.
        terms: digest of the session's terms, which include run and round (`tofu.secagg.graph`).
        parties: digests of the two adverts: sorted if both directions use the same bytes, otherwise sender first.

    Raises:
        PayloadError: as `check_public_key`.
    """
    shared = _exchange(X25519PrivateKey.from_private_bytes(secret), public)
    return HKDF(SHA256(), SEED_BYTES, salt=None, info=fields(purpose, terms, *parties)).derive(shared)


def pair_seed(secret: bytes, public: bytes, terms: bytes, one: bytes, other: bytes) -> bytes:
    """Derive the seed of the mask between two clients, the same on both sides. Raises as `agree`."""
    return agree(secret, public, PAIR_MASK, terms, (min(one, other), max(one, other)))


class Stream:
    """A stream of uniform words generated from a seed.

    Args:
        seed: 32 bytes, used for nothing else.
    """

    def __init__(self, seed: bytes) -> None:
        self._cipher = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int, width: int) -> npt.NDArray[np.unsignedinteger]:
        """Return the next `count` little-endian words of `width` bytes (1, 2, 4 or 8)."""
        return np.frombuffer(self._cipher.update(bytes(count * width)), dtype=f"<u{width}")


def add_mask(vector: RingVector, seed: bytes, bits: int, *, negative: bool = False) -> None:
    """Add the seed's stream to a ring vector in place, or subtract it, chunk by chunk."""
    stream = Stream(seed)
    width = word_bytes(bits)
    for start in range(0, vector.size, CHUNK):
        part = vector[start : start + CHUNK]
        words = stream.words(part.size, width)
        if negative:
            part -= words
        else:
            part += words
        part &= largest(bits)  # also removes the bits of a word beyond b


def word_bytes(bits: int) -> int:
    """Return the number of bytes of the smallest word that holds an element of b bits."""
    return next(width for width in (1, 2, 4, 8) if bits <= 8 * width)


def commitment(seed: bytes, digest: bytes, sender: str, receiver: str) -> bytes:
    """Commit to a self-mask seed -> the nonce (12 bytes) of the sender's message to one receiver.

    Each message is encrypted under a key of its own, so its nonce may be any value; a hash of the sender's seed costs
    no extra byte. The server compares a reconstructed seed with the nonces that its owner sent, and so detects wrong
    shares. A mask key needs no commitment, because its public key is one. The hashes do not reveal the seed, which has
    256 random bits.

    Args:
        digest: digest of the session's terms.
    """
    parts = fields(b"tofu secagg 1 commitment", digest, sender.encode(), receiver.encode(), seed)
    return hashlib.sha256(parts).digest()[:NONCE_BYTES]
