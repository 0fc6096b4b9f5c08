"""Long-term identities: Ed25519 keys (RFC 8032) that sign a client's messages, so that a server cannot forge them.

Bonawitz et al., CCS 2017, section 6.2: signatures protect from a malicious server, if every client has a list of all
public keys by name that did not come from that server.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tofu.bytes_io import fields
from tofu.errors import PayloadError, SettingError

SIGNATURE_BYTES = 64
PUBLIC_BYTES = 32

ADVERT = b"tofu secagg 1 advert"
SURVIVORS = b"tofu secagg 1 survivors"
HELLO = b"tofu secagg 1 name"
"""Purpose of the signature by which a node proves its client's name."""


@dataclass(frozen=True)
class Identity:
    """A client's name and its signing key.

    Attributes:
        name: the client's name in the list of known public keys.
        key: secret; it is never in a message or in a session's saved state.
    """

    name: str
    key: Ed25519PrivateKey

    @staticmethod
    def generate(name: str) -> "Identity":
        return Identity(name, Ed25519PrivateKey.generate())

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self.key.public_key().public_bytes_raw()

    def sign(self, purpose: bytes, *parts: bytes) -> bytes:
        """Sign the parts for one purpose -> signature, 64 bytes."""
        return self.key.sign(fields(purpose, *parts))


def read_identity(path: Path, name: str) -> Identity:
    """Read a client's identity from its key file (PEM, PKCS8). Raises SettingError if that fails."""
    wanted = "a readable file with an Ed25519 key in PEM"
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SettingError("identity", str(path), wanted) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingError("identity", str(path), wanted)
    return Identity(name, key)


def read_known(path: Path) -> dict[str, bytes]:
    """Read public keys by name from a JSON object of hexadecimal strings. Raises SettingError if that fails."""
    try:
        table = json.loads(path.read_text())
        known = {str(name): bytes.fromhex(public) for name, public in table.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        wanted = "a readable JSON object from names to public keys in hexadecimal"
        raise SettingError("identities", str(path), wanted) from error
    check_known(known)
    return known


def check_known(known: Mapping[str, bytes]) -> None:
    """Raises SettingError if a public key (name -> key) does not have 32 bytes."""
    for name, public in known.items():
        if len(public) != PUBLIC_BYTES:
            raise SettingError("secure_identities", name, f"a public key of {PUBLIC_BYTES} bytes, not {len(public)}")


def verify(known: Mapping[str, bytes], name: str, signature: bytes, purpose: bytes, *parts: bytes) -> None:
    """Verify a signature made by `Identity.sign` of the same purpose and parts.

    Args:
        known: name -> Ed25519 public key.

    Raises:
        PayloadError: the client is unknown, or the signature is invalid.
    """
    if name not in known:
        raise PayloadError(f"{name} is not among the {len(known)} known identities")
    what = purpose.decode().rpartition(" ")[2]
    try:
        Ed25519PublicKey.from_public_bytes(known[name]).verify(signature, fields(purpose, *parts))
    except InvalidSignature as error:
        raise PayloadError(f"{name} did not sign this {what}: the signature is invalid") from error
