"""Identities of clients for secure rounds: an Ed25519 key for each client, and the list of all public keys.

    tofu deploy identities --folder keys 0 1 2

writes keys/0.identity, keys/1.identity and keys/2.identity, each for one client only (mode 0600), and
keys/identities.json. All clients and the server need this list, and must receive it over a channel that the server
does not control. A client's node config names both files (`identity`, `identities`); the run's setting
`secure-identities` names the list.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from deploy.files import refuse_to_overwrite, write_new
from tofu.errors import SettingError

LIST = "identities.json"
_MAX_NAME_BYTES = 64


def make_identities(folder: Path, names: Sequence[str]) -> Path:
    """Generate a key for each client, and write the keys and the list of public keys.

    Returns:
        The path of the list.

    Raises:
        SettingError: a name is not usable or occurs twice, a file exists already, or the folder is not writable.
    """
    for name in names:
        if not (1 <= len(name.encode()) <= _MAX_NAME_BYTES and name.isprintable()):
            raise SettingError("name", name, f"1 to {_MAX_NAME_BYTES} printable bytes")
        if name != Path(name).name or name.startswith("."):
            raise SettingError("name", name, "a plain file name")
    if len(set(names)) < max(len(names), 1):
        raise SettingError("names", ", ".join(names), "at least one name, and none twice")
    files = [folder / f"{name}.identity" for name in names]
    refuse_to_overwrite(*files, folder / LIST)
    public = {name: make_identity(file) for name, file in zip(names, files, strict=True)}
    write_new(folder / LIST, _listed(public), 0o644)
    return folder / LIST


def make_identity(file: Path) -> str:
    """Generate a key and write it -> its public key in hexadecimal. Raises SettingError if the file is not writable."""
    key = Ed25519PrivateKey.generate()
    write_new(file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    return key.public_key().public_bytes_raw().hex()


def read_list(file: Path) -> dict[str, str]:
    """Public keys by client, in hexadecimal. Raises SettingError if the file is not such a list."""
    try:
        listed = json.loads(file.read_text())
        return {str(name): str(key) for name, key in listed.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise SettingError("identities", str(file), "a readable JSON object from names to public keys") from error


def add_to_list(file: Path, name: str, public: str) -> None:
    """Add a client's public key. The file is written in place, as containers have this very file mounted."""
    file.write_bytes(_listed(read_list(file) | {name: public}))


def _listed(public: dict[str, str]) -> bytes:
    return (json.dumps(public, indent=1) + "\n").encode()
