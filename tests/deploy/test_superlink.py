"""The login of the Control API, on both sides."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.cli.auth_plugin import OidcCliPlugin
from flwr.common.constant import ACCESS_TOKEN_KEY
from flwr.supercore.credential_store.file_credential_store import FileCredentialStore

from deploy.superlink import guard, make_token, write_credentials

ADDRESS = "127.0.0.1:12345"


def plugin(token: str) -> Any:
    module = SimpleNamespace(load_control_authn_plugin=None)
    guard(module, token)
    return module.load_control_authn_plugin()


def test_flowers_command_line_sends_the_token_that_the_superlink_wants(tmp_path: Path) -> None:
    make_token(tmp_path / "token")
    write_credentials(tmp_path, ADDRESS, tmp_path / "token")
    sender: Any = OidcCliPlugin(ADDRESS)
    sender.store = FileCredentialStore(tmp_path / "credentials.yaml")
    sender.load_tokens()
    valid, account = plugin((tmp_path / "token").read_text()).validate_tokens_in_metadata(
        sender.write_tokens_to_metadata([])
    )
    assert valid
    assert account is not None
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("token", "credentials.yaml")} == {0o600}


@pytest.mark.parametrize("given", [[], [""], ["x"], ["secret", "secret"], ["secre"], ["secret\n"]])
def test_another_token_or_none_is_refused(given: list[str]) -> None:
    metadata = [(ACCESS_TOKEN_KEY, value) for value in given]
    assert plugin("secret").validate_tokens_in_metadata(metadata) == (False, None)
    assert plugin("secret").refresh_tokens([("flwr-oidc-refresh-token", "secret")]) == (None, None)


def test_a_superlink_without_such_an_interface_does_not_start() -> None:
    with pytest.raises(RuntimeError, match="no login for its Control API"):
        guard(SimpleNamespace(), "secret")
