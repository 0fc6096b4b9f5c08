"""A SuperLink whose Control API requires a token: `python -m deploy.superlink TOKEN_FILE flower-superlink …`

Flower's Control API has no login: every local user who reaches its port can start runs as the operator. Flower has an
interface for logins, `ControlAuthnPlugin`, but only a plugin that accepts everybody comes with its open edition. The
plugin of this module accepts requests with a token, whose file only its owner can read. Flower's command line sends the
token that it finds in `$FLWR_HOME/credentials.yaml`, where `flwr login` stores one; `write_credentials` writes it.

Flower's SuperLink gives a reply to the server's app before it has all of it, and the app then waits for the rest and
for no other client. Here it gets complete replies (`replace_state`).
"""

import base64
import hmac
import json
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from deploy.files import write_new
from deploy.patience import extend_tokens

CONTROL_TOKEN = "control-token"
"""File beside the keys that has the token."""

_TOKEN_BYTES = 32
_LAST_ANSWERS_SECONDS = 5
_ENTRIES = ("authn-type", "oidc-access-token", "oidc-refresh-token")
"""Entries of Flower's credentials. Of its two types, `noop` and `oidc`, only the second sends the access token."""


def make_token(path: Path) -> None:
    """Write a new token that only its owner can read. Raises SettingError if the file cannot be written."""
    write_new(path, secrets.token_hex(_TOKEN_BYTES).encode(), 0o600)


def write_credentials(home: Path, address: str, token: Path) -> None:
    """Make Flower's command line send the token.

    Args:
        home: its FLWR_HOME.
        address: host:port of the SuperLink, as the command line's configuration has it.

    Raises:
        OSError: a file cannot be read or written.
    """
    text = token.read_text().strip()
    entries = {f"flower.account-auth.{address}.{name}": text for name in _ENTRIES}
    entries[f"flower.account-auth.{address}.authn-type"] = "oidc"
    encoded = {name: base64.b64encode(value.encode()).decode() for name, value in entries.items()}
    with os.fdopen(os.open(home / "credentials.yaml", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(encoded, file)  # JSON is valid YAML


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


def replace_state(module: ModuleType) -> None:
    """Make the SuperLink's state give out a reply once it has all objects of it, or the push of the rest has expired.

    A client that dies while it sends its reply, or sends it slowly, then costs a round no more than one that is silent.
    The state also accepts an object that it has: where the SuperLink is killed before it has confirmed an object, the
    sender sends it again, and the server's app would end its run if it were refused.

    Args:
        module: `flwr.server.superlink.linkstate.linkstate_factory`.
    """
    from flwr.supercore.date import now
    from flwr.supercore.state.schema.corestate_models import ObjectPushSession, ObjectPushSessionRoot
    from flwr.supercore.state.schema.linkstate_models import MessageRes
    from sqlalchemy import select

    class CompleteReplyState(module.SqlLinkState):  # type: ignore[name-defined,misc]
        def get_message_res(self, message_ids: set[str], run_id: int) -> Any:
            query = (
                select(MessageRes.reply_to_message_id)
                .join(ObjectPushSessionRoot, ObjectPushSessionRoot.root_object_id == MessageRes.message_id)
                .join(ObjectPushSession, ObjectPushSession.session_id == ObjectPushSessionRoot.session_id)
                .where(MessageRes.reply_to_message_id.in_(message_ids))
                .where(ObjectPushSession.pending_count > 0, ObjectPushSession.expires_at > now())
            )
            with self.session() as session:
                incomplete = set(session.scalars(query).all())
            return super().get_message_res(message_ids - incomplete, run_id)

        def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
            stored = super().store_object(run_id, session_id, object_id, object_content)
            return bool(stored or self.object_store.get(object_id) == object_content)

    module.SqlLinkState = CompleteReplyState  # type: ignore[attr-defined]


def main(command: Sequence[str]) -> None:
    """Run the SuperLink in this process. `command`: the token's file, then the command line of `flower-superlink`."""
    # Its web server ends in order on this signal, and then sends it again to whatever handled it before.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    import uvicorn
    from flwr.server.superlink.linkstate import linkstate_factory
    from flwr.supercore.corestate import sql_corestate
    from flwr.superlink.cli import flower_superlink

    # Without a limit it waits for who follows a run's log.
    uvicorn.run = partial(uvicorn.run, timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS)
    extend_tokens(sql_corestate, sql_corestate.SqlCoreState)
    replace_state(linkstate_factory)
    module = sys.modules[flower_superlink.__module__]
    guard(module, Path(command[0]).read_text().strip())
    sys.argv = list(command[1:])
    flower_superlink()


if __name__ == "__main__":
    main(sys.argv[1:])
