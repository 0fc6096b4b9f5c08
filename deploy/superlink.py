"""A SuperLink whose Control API wants a token: `python -m deploy.superlink TOKEN_FILE flower-superlink …`

Flower's own Control API has no login: every local user who reaches its port can start runs as the operator. It has an
interface for one, `ControlAuthnPlugin`, of which the open edition brings only a plugin that accepts everybody. Ours
accepts who can read the token's file, which only its owner can. Flower's command line sends the token of a file of its
own, `$FLWR_HOME/credentials.yaml`, as it does after `flwr login`; `write_credentials` makes it.
"""

import base64
import hmac
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.files import write_new

_TOKEN_BYTES = 32
_ENTRIES = ("authn-type", "oidc-access-token", "oidc-refresh-token")
"""Of Flower's credentials. It knows two types, `noop` and `oidc`; the second sends the access token."""


def make_token(path: Path) -> None:
    """Write a new token, which its owner alone can read. Raises SettingError if the file cannot be written."""
    write_new(path, secrets.token_hex(_TOKEN_BYTES).encode(), 0o600)


def write_credentials(home: Path, address: str, token: Path) -> None:
    """Make Flower's command line send the token.

    Args:
        home: its FLWR_HOME.
        address: host:port of the SuperLink, as the command line's configuration has it.

    Raises:
        OSError: a file cannot be read or written.
    """
    text = token.read_text()
    entries = {f"flower.account-auth.{address}.{name}": text for name in _ENTRIES}
    entries[f"flower.account-auth.{address}.authn-type"] = "oidc"
    encoded = {name: base64.b64encode(value.encode()).decode() for name, value in entries.items()}
    with os.fdopen(os.open(home / "credentials.yaml", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(encoded, file)  # which is YAML, too


def guard(module: Any, token: str) -> None:
    """Make the module of `flower-superlink` load a plugin that accepts this token only.

    Args:
        module: `flwr.superlink.cli.flower_superlink`.
    """
    from flwr.common.constant import ACCESS_TOKEN_KEY
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin

    class TokenPlugin(NoOpControlAuthnPlugin):
        """Accepts requests with the token, as the one account of the open edition."""

        def validate_tokens_in_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> Any:
            given = [value for name, value in metadata if name == ACCESS_TOKEN_KEY]
            if len(given) != 1 or not hmac.compare_digest(str(given[0]).encode(), token.encode()):
                return False, None
            return super().validate_tokens_in_metadata(metadata)

        def refresh_tokens(self, metadata: Sequence[tuple[str, str | bytes]]) -> Any:
            return None, None

    if not hasattr(module, "load_control_authn_plugin"):
        raise RuntimeError("this version of Flower has no login for its Control API")
    module.load_control_authn_plugin = TokenPlugin


def main(command: Sequence[str]) -> None:
    """Become the SuperLink: the token's file, then the command line of `flower-superlink`."""
    from flwr.superlink.cli import flower_superlink

    module = sys.modules[flower_superlink.__module__]
    guard(module, Path(command[0]).read_text())
    sys.argv = list(command[1:])
    flower_superlink()


if __name__ == "__main__":
    main(sys.argv[1:])
