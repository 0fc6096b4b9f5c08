"""A client masks one vector in a round of a run, also when Flower has lost its state."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from tofu.errors import PayloadError, SettingError
from tofu.flower.secure_mod import meaning
from tofu.flower.secure_options import SecureOptions
from tofu.flower.secure_session import load_session, mask_once, new_advert, participant_of, save_session
from tofu.imports import code_digest
from tofu.secagg.graph import Topology
from tofu.secagg.participant import Participant
from tofu.secagg.server import ServerSession
from tofu.wire import run_name

NAMES = ("0", "1", "2")
VALUES, BITS = 4, 16
VECTOR = np.arange(VALUES, dtype=np.uint64)


def contexts(journal: Path | None, run: int = 7) -> dict[str, Context]:
    """The clients' contexts as a SuperNode makes them for a run that it knows nothing of."""
    own: dict[str, Any] = {} if journal is None else {"journal": str(journal)}
    return {name: Context(run, int(name), {"partition-id": int(name), **own}, RecordDict(), {}) for name in NAMES}


def answer(
    states: dict[str, Context], round_: int, *, asked: int | None = None, clients: tuple[str, ...] = NAMES
) -> None:
    """Run a session of a round with these clients up to the masked vectors."""
    members = {name: participant_of(states[name], name, 0.0) for name in clients}
    server = ServerSession(run_name(states["0"].run_id), round_, values=VALUES, bits=BITS)
    for name in clients:
        server.add_advert(name, new_advert(states[name], members[name]))
    for name, roster in server.rosters(Topology(len(clients) - 1, len(clients) - 1)).items():
        session = load_session(states[name], members[name])
        server.add_shares(name, session.share_keys(roster))
        save_session(states[name], session)
    for name, shares in server.deliveries().items():
        session = load_session(states[name], members[name])
        masked = mask_once(states[name], session, members[name], asked or round_, VECTOR, shares)
        server.add_masked(name, masked)


def test_the_sums_of_two_sessions_of_a_round_would_differ_by_one_clients_vector(tmp_path: Path) -> None:
    states = contexts(None)
    answer(states, 3)
    with pytest.raises(PayloadError, match=r"\d has answered round 3 or a later one of this run already"):
        answer(states, 3)


@pytest.mark.parametrize("kept", [True, False], ids=["state kept", "state lost in a crash"])
def test_a_round_is_answered_once_also_after_a_crash(kept: bool, tmp_path: Path) -> None:
    journal = tmp_path / "journal.db"
    states = contexts(journal)
    answer(states, 3)
    after = states if kept else contexts(journal)
    for round_ in (3, 2):
        with pytest.raises(PayloadError, match=rf"\d has answered round {round_} or a later one"):
            answer(after, round_)
    answer(after, 4)
    answer(contexts(journal, run=8), 3)  # another run
    assert journal.stat().st_mode & 0o777 == 0o600


def test_the_note_is_on_disk_before_the_vector_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that dies while it masks has not answered, and does not answer again."""
    from tofu.secagg.client import ClientSession

    def die(self: ClientSession, vector: object, data: bytes) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ClientSession, "mask_input", die)
        with pytest.raises(KeyboardInterrupt):
            answer(contexts(tmp_path / "journal.db"), 3)
    with pytest.raises(PayloadError, match=r"\d has answered round 3"):
        answer(contexts(tmp_path / "journal.db"), 3)


def test_keys_for_one_round_do_not_mask_the_vector_of_another() -> None:
    with pytest.raises(PayloadError, match="the keys are for round 3, the weights for round 4"):
        answer(contexts(None), 3, asked=4)


def test_a_journal_that_cannot_be_written_refuses_the_round(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database, and not empty" * 100)
    for journal in (tmp_path / "journal.db", tmp_path / "missing" / "journal.db"):
        with pytest.raises(
            SettingError, match=r"journal='.*' is not usable: expected a file that this client can write"
        ):
            answer(contexts(journal), 1)


def test_the_threshold_follows_the_runs_colluding_clients() -> None:
    """With 32 clients and a limit of 0, 3 that collude reach the threshold of 16 for both secrets of a client."""
    states = {str(name): Context(7, name, {"partition-id": name}, RecordDict(), {}) for name in range(32)}
    server = ServerSession(run_name(7), 1, values=VALUES, bits=BITS)
    members = {name: participant_of(states[name], name, 0.1) for name in states}
    for name in states:
        server.add_advert(name, new_advert(states[name], members[name]))
    roster = server.rosters(Topology(31, 16))["0"]
    with pytest.raises(PayloadError, match="roster has threshold 16, expected 19 to 31"):
        load_session(states["0"], members["0"]).share_keys(roster)


def test_a_member_without_a_limit_of_its_own_takes_the_policys() -> None:
    context = Context(7, 1, {"partition-id": 1, "max-colluding": 2}, RecordDict(), {})
    found: Participant = participant_of(context, "1", 0.1)
    assert (found.max_colluding, found.colluding) == (2, 0.1)


def test_the_code_of_an_app_is_part_of_what_clients_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / "compared_app" / "train.py"
    code.parent.mkdir()
    (code.parent / "__init__.py").touch()

    def compared(text: str, **options: str) -> tuple[bytes, ...]:
        code.write_text(text)
        code_digest.cache_clear()
        return meaning(1, SecureOptions(**options), None, 1.0)  # type: ignore[arg-type]

    honest, other = (compared(text, app="compared_app") for text in ("scale = 1", "scale = 1e-30"))
    assert honest != other
    assert compared("scale = 1", app="compared_app") == honest
    assert compared("scale = 1") == compared("scale = 1e-30")
    for wrong in ("no_such_package", "tofu.flower", "pathlib"):
        with pytest.raises(SettingError, match=f"app='?{wrong}"):
            SecureOptions(app=wrong)
