"""Command lines: Flower's own parsers take them, and nothing in them weakens what they promise."""

from pathlib import PurePosixPath

import pytest
from flwr.common.config import parse_config_args
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from deploy.topology import Member, Trust, containers, identity_config, supernode

TRUST = Trust(*map(PurePosixPath, ("ca.crt", "server.pem", "server.key", "superexec")))


def _node(**config: int | str) -> Member:
    return supernode(
        TRUST, superlink="fl.example.org:8443", key=PurePosixPath("key"), config=config, host="127.0.0.1", port=9094
    )


def test_flower_reads_the_node_config_that_was_meant() -> None:
    known = identity_config(PurePosixPath("/my keys/3.identity"), PurePosixPath("/keys/identities.json"))
    config: dict[str, int | str] = {"data": "/my data/a", "partition-id": 3, **known}
    given = _parse_args_run_supernode().parse_args(_node(**config).arguments)
    assert parse_config_args([given.node_config]) == config
    assert given.superlink == "fl.example.org:8443"
    assert given.isolation == "process"
    assert not given.insecure


@pytest.mark.parametrize("name", list(containers(3)))
def test_no_member_listens_or_connects_without_tls(name: str) -> None:
    member = containers(3)[name]
    arguments = member.arguments
    assert "--insecure" not in arguments
    assert "--superexec-auth-secret-file" in arguments
    if member.command != "flower-superexec":
        assert {"--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile"} <= set(arguments)
    if member.command == "flower-superlink":
        assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(arguments)
    else:
        assert "--root-certificates" in arguments
    if member.command == "flower-supernode":
        assert "--auth-supernode-private-key" in arguments
