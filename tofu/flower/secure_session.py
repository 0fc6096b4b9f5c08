"""The client side of secure rounds: its `tofu.secagg` session, stored in the Flower context between messages.

Entries of the node config against a dishonest server: `identity`, the file of this client's Ed25519 key, and
`identities`, the file of all clients' public keys, which must not come through the server (`tofu deploy identities`
creates both). The rules `min-neighbors` and `max-colluding` of the client's policy are limits that it enforces,
whatever the server proposes.

The entry `journal` is a file in which the client records a round before it masks a vector for it. It then never sends
two masked vectors in one round, even if Flower loses its state in a crash. With two, a server could form two sums that
differ in one client, whose vector is their difference. Without the entry, the record is only in Flower's state.
"""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from flwr.app import ConfigRecord, Context

from tofu.errors import PayloadError, SettingError
from tofu.flower.policy import Policy, client_name
from tofu.secagg.client import ClientSession
from tofu.secagg.identities import read_identity, read_known
from tofu.secagg.masks import RingVector
from tofu.secagg.participant import Participant
from tofu.wire import SecureAnswer, SecureQuery, run_name

_RECORD = "tofu-secure"
_SESSION = "session"
_ANSWERED, _ROUND = "tofu-answered", "round"
_NOTE = """
    INSERT INTO answered VALUES (?, ?, ?)
    ON CONFLICT (run, client) DO UPDATE SET round = excluded.round WHERE excluded.round > answered.round
"""


def session_name(context: Context) -> str:
    """Return the name in the secure sessions of a Flower app: with an identity, the partition id;
    else the unique node id.
    """
    return client_name(context) if "identity" in context.node_config else str(context.node_id)


def participant_of(context: Context, name: str, colluding: float) -> Participant:
    """This client as a participant of secure rounds.

    Args:
        colluding: fraction of the clients that may collude with the server, by the run's settings.

    Raises:
        SettingError: an entry of the node config is not usable.
    """
    config, policy = context.node_config, Policy.of(context)
    key, known = config.get("identity"), config.get("identities")
    return Participant(
        run=run_name(context.run_id),
        name=name,
        identity=read_identity(Path(str(key)), name) if key is not None else None,
        known=read_known(Path(str(known))) if known is not None else None,
        min_neighbors=policy.min_neighbors,
        max_colluding=policy.max_colluding,
        colluding=colluding,
    )


def new_advert(context: Context, member: Participant) -> bytes:
    """Create keys for the next secure round, which replace earlier ones; return the message with the public keys."""
    session = ClientSession(member)
    advert = session.advertise_keys()
    save_session(context, session)
    return advert


def answer_query(query: SecureQuery, context: Context, member: Participant) -> SecureAnswer:
    """Answer one stage. The session's new state is stored in `context` before the answer is sent.

    Raises:
        PayloadError: the message fails validation; nothing is revealed.
    """
    if query.stage == "advert":
        return SecureAnswer(b"", new_advert(context, member))
    session = load_session(context, member)
    stages = {"share": session.share_keys, "confirm": session.check_consistency, "reveal": session.unmask}
    message = stages[query.stage](query.message)
    save_session(context, session)
    return SecureAnswer(message, new_advert(context, member) if query.advert else b"")


def mask_once(
    context: Context, session: ClientSession, member: Participant, round_: int, vector: RingVector, shares: bytes
) -> bytes:
    """Mask the only vector of this client in this round (`ClientSession.mask_input`), and store the session.

    Raises:
        PayloadError: the session is for another round, this client has answered this round or a later one of this run,
            or the shares fail validation.
        SettingError: the journal cannot be written.
        ValueError: as `mask_input`.
    """
    if session.round != round_:
        raise PayloadError(f"the keys are for round {session.round}, the weights for round {round_}")
    _note_answer(context, member, round_)
    masked = session.mask_input(vector, shares)
    save_session(context, session)
    return masked


def _note_answer(context: Context, member: Participant, round_: int) -> None:
    """Record that a round is answered, in the journal if there is one. Raises PayloadError if it was before."""
    record = context.state.config_records.get(_ANSWERED)
    last = record.get(_ROUND) if record is not None else None
    journal = context.node_config.get("journal")
    fresh = not isinstance(last, int) or last < round_
    if journal is not None:
        fresh &= _note_in_file(Path(str(journal)), member, round_)
    if not fresh:
        raise PayloadError(f"{member.name} has answered round {round_} or a later one of this run already")
    context.state[_ANSWERED] = ConfigRecord({_ROUND: round_})


def _note_in_file(journal: Path, member: Participant, round_: int) -> bool:
    """Record a round on disk; return whether it is later than all that the client has answered in this run."""
    try:
        os.close(os.open(journal, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(sqlite3.connect(journal, timeout=60, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous=EXTRA")  # flushes the folder, too, before a statement returns
            database.execute(
                "CREATE TABLE IF NOT EXISTS answered "
                "(run BLOB, client TEXT, round INTEGER NOT NULL, PRIMARY KEY (run, client))"
            )
            return database.execute(_NOTE, (member.run, member.name, round_)).rowcount == 1
    except (OSError, sqlite3.Error) as error:
        raise SettingError("journal", str(journal), f"a file that this client can write ({error})") from error


def load_session(context: Context, member: Participant) -> ClientSession:
    """Return the stored session. Raises PayloadError if there is none."""
    record = context.state.config_records.get(_RECORD)
    if record is None:
        raise PayloadError(f"{member.name} has no secure session: it never sent keys, or lost its state")
    return ClientSession.from_bytes(member, record.get(_SESSION))


def save_session(context: Context, session: ClientSession) -> None:
    """Store the session in place of the previous one."""
    context.state[_RECORD] = ConfigRecord({_SESSION: session.to_bytes()})
