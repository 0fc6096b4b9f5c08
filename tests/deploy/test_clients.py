"""Keys of a further client: under the federation's CA, admitted, and nothing left behind where that fails."""

from pathlib import Path

import pytest
from cryptography import x509

from deploy.certificates import make_compose_secrets
from deploy.clients import NODE, add_client, main
from tofu.errors import RunError, SettingError
from tofu.secagg.identities import read_identity, read_known


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    make_compose_secrets(tmp_path / "secrets", ["fl.example.org"], ["node-0", "node-1"])
    return tmp_path / "secrets"


def names(certificate: Path) -> list[str]:
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    value = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in value]


def signed_by(ca: Path, certificate: Path) -> bool:
    authority, found = (x509.load_pem_x509_certificate(file.read_bytes()) for file in (ca, certificate))
    found.verify_directly_issued_by(authority)
    return True


def test_a_client_gets_all_that_its_machine_needs(secrets: Path) -> None:
    listed = secrets / "identities.json"
    mounted, admitted = secrets.parent / "mounted", []
    mounted.hardlink_to(listed)
    added = add_client(secrets, "hospital-d", "fl.example.org:8443", lambda key, name: admitted.append((key, name)))
    assert added.partition == 2
    assert not added.renewed
    assert admitted == [(added.folder / "node.pub", "hospital-d")]
    assert signed_by(secrets / "ca.crt", added.folder / "server.pem")
    assert NODE in names(added.folder / "server.pem")
    known = read_known(added.folder / "identities.json")
    assert known["2"] == read_identity(added.folder / "identity", "2").public
    # Containers have the list itself mounted: a new file in its place would not be seen.
    assert read_known(mounted) == known
    assert (added.folder / "client.env").read_text() == "TOFU_SUPERLINK=fl.example.org:8443\nTOFU_PARTITION=2\n"
    private = {file.name for file in added.folder.iterdir() if file.stat().st_mode & 0o077 == 0}
    assert private == {"node", "identity", "server.key", "superexec", "journal"}


def test_the_proxys_certificate_is_renewed_for_a_further_host_only(secrets: Path) -> None:
    proxy = secrets / "proxy" / "server.pem"
    before = names(proxy)
    assert add_client(secrets, "a", "192.0.2.7:8443", lambda *_: None).renewed
    assert names(proxy) == [*before, "192.0.2.7"]
    assert signed_by(secrets / "ca.crt", proxy)
    assert not add_client(secrets, "b", "192.0.2.7:8443", lambda *_: None).renewed


@pytest.mark.parametrize(
    ("name", "superlink", "field"),
    [("node-0", "a:1", "name"), ("../x", "a:1", "name"), ("", "a:1", "name"), ("x", "a", "superlink")],
)
def test_what_cannot_be_used_changes_nothing(secrets: Path, name: str, superlink: str, field: str) -> None:
    before = {file: file.read_bytes() for file in secrets.rglob("*") if file.is_file()}
    with pytest.raises(SettingError) as refused:
        add_client(secrets, name, superlink, lambda *_: None)
    assert refused.value.field == field
    assert {file: file.read_bytes() for file in secrets.rglob("*") if file.is_file()} == before


def test_a_refused_key_leaves_nothing_behind(secrets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(key: Path, name: str) -> None:
        raise RunError("flwr supernode failed")

    before = (secrets / "identities.json").read_bytes()
    arguments = ["--folder", str(secrets), "add-client", "x", "--superlink", "a:1"]
    assert main(arguments, refuse) == 2
    assert capsys.readouterr().err == "error: flwr supernode failed\n"
    assert not (secrets / "x").exists()
    assert (secrets / "identities.json").read_bytes() == before
    assert main(arguments, lambda *_: None) == 0
    assert "compose.client.yaml" in capsys.readouterr().out
