"""Identities of clients for secure rounds: an Ed25519 key for each, and the list of all public keys.

    python -m deploy.identities --folder keys 0 1 2

writes keys/0.identity and so on, each for one client and nobody else (mode 0600), and keys/identities.json, which every
client and the server get by a way that the server has no hand in. A client's node config names both files (`identity`,
`identities`); the run's setting `secure-identities` names the list.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from deploy.files import refuse_to_overwrite, write_new
from tofu.errors import PayloadError, SettingError, TofuError
from tofu.secagg.identities import Identity
from tofu.secagg.messages import check_name

LIST = "identities.json"


def make_identities(folder: Path, names: Sequence[str]) -> Path:
    """Make a key for each name, and the list of them.

    Returns:
        The list.

    Raises:
        SettingError: a name that cannot be one, a file that would be overwritten, or a folder that cannot be written.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when all was made, 2 with one line on standard error when something was refused."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.identities", description="Keys of clients for secure rounds."
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the keys go")
    parser.add_argument("names", nargs="+", help="the clients: their partition-id, or the name they go by")
    options = parser.parse_args(arguments)
    try:
        print(make_identities(options.folder, options.names))
    except TofuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
