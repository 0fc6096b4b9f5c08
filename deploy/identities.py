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

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from deploy.files import refuse_to_overwrite, write_new
from tofu.errors import PayloadError, SettingError
from tofu.secagg.identities import Identity
from tofu.secagg.messages import check_name

LIST = "identities.json"


def make_identities(folder: Path, names: Sequence[str]) -> Path:
    """Generate a key for each client, and write the keys and the list of public keys.

    Returns:
        The path of the list.

    Raises:
        SettingError: a name is not usable or occurs twice, a file exists already, or the folder is not writable.
    """
    for name in names:
        try:
            check_name(name)
        except PayloadError as error:
            raise SettingError("name", name, "1 to 64 printable bytes") from error
        if name != Path(name).name or name.startswith("."):
            raise SettingError("name", name, "a plain file name")
    if len(set(names)) < max(len(names), 1):
        raise SettingError("names", ", ".join(names), "at least one name, and none twice")
    files = [folder / f"{name}.identity" for name in names]
    refuse_to_overwrite(*files, folder / LIST)
    identities = [Identity.generate(name) for name in names]
    for file, identity in zip(files, identities, strict=True):
        write_new(file, identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    public = {identity.name: identity.public.hex() for identity in identities}
    write_new(folder / LIST, (json.dumps(public, indent=1) + "\n").encode(), 0o644)
    return folder / LIST
