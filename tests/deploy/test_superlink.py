"""The login of the Control API, on both sides."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord
from flwr.cli.auth_plugin import OidcCliPlugin
from flwr.common.constant import ACCESS_TOKEN_KEY
from flwr.supercore.credential_store.file_credential_store import FileCredentialStore

from deploy.superlink import guard, make_token, replace_state, write_credentials
from deploy.topology import ENVIRONMENT
from tests.processes import free_port, wait_for

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


def test_a_stop_does_not_wait_for_a_request_that_never_ends(tmp_path: Path) -> None:
    make_token(tmp_path / "token")
    address, log = ("127.0.0.1", free_port()), tmp_path / "log"
    options = ["--insecure", "--host", address[0], "--port", str(address[1]), "--isolation", "process"]
    command = [sys.executable, "-m", "deploy.superlink", str(tmp_path / "token"), "flower-superlink", *options]
    environment = os.environ | ENVIRONMENT | {"FLWR_HOME": str(tmp_path)}
    with log.open("wb") as output:
        superlink = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        wait_for(lambda: "Uvicorn running" in log.read_text())
        with socket.create_connection(address) as connection:
            head = "POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\n"
            connection.sendall(f"{head}Content-Length: 9\r\nExpect: 100-continue\r\n\r\n".encode())
            assert connection.recv(64).startswith(b"HTTP/1.1 100")  # the server reads the body, which never comes
            superlink.terminate()
            assert superlink.wait(120) == 0
    finally:
        superlink.kill()
        superlink.wait()


def test_an_object_that_is_sent_again_is_accepted() -> None:
    """As by an app whose SuperLink was killed after it had stored the object and before it had said so."""
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
    from flwr.supercore.object_store import ObjectStoreFactory

    module: Any = SimpleNamespace(SqlLinkState=SqlLinkState)
    replace_state(module)
    federations: Any = SimpleNamespace()  # the state sets an attribute of it
    state = module.SqlLinkState(":memory:", federations, ObjectStoreFactory().store())
    state.initialize()
    record = ConfigRecord({"value": 1})
    session = state.start_session(7)
    [missing] = state.preregister_object_tree(get_object_tree(record), session)
    content = get_all_nested_objects(record)[missing].deflate()
    assert [state.store_object(7, session, missing, content) for _ in range(2)] == [True, True]
    assert not state.store_object(7, session, missing, content + b"x")
    assert not state.store_object(7, session, "0" * 64, content)
