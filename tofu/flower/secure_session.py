"""The client side of secure rounds: its `tofu.secagg` session, stored in the Flower context between messages.

Entries of the node config against a dishonest server: `identity`, the file of this client's Ed25519 key, and
`identities`, the file of all clients' public keys, which must not come through the server (`tofu deploy identities`
creates both). The rules `min-neighbors` and `max-colluding` of the client's policy are limits that it enforces,
whatever the server proposes.
"""

from pathlib import Path

from flwr.app import ConfigRecord, Context

from tofu.errors import PayloadError
from tofu.flower.policy import Policy, client_name
from tofu.secagg.client import ClientSession
from tofu.secagg.identities import read_identity, read_known
from tofu.secagg.participant import Participant
from tofu.wire import SecureAnswer, SecureQuery, run_name

_RECORD = "tofu-secure"
_SESSION = "session"


def session_name(context: Context) -> str:
    """The name in the secure sessions of a Flower app: with an identity, the partition id; else the unique node id."""
    return client_name(context) if "identity" in context.node_config else str(context.node_id)


def participant_of(context: Context, name: str) -> Participant:
    """This client as a participant of secure rounds.

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
    )


def new_advert(context: Context, member: Participant) -> bytes:
    """Create keys for the next secure round; they replace those of an earlier one."""
    session = ClientSession(member)
    advert = session.advertise_keys()
    save_session(context, session)
    return advert


def answer_query(query: SecureQuery, context: Context, member: Participant) -> SecureAnswer:
    """Answer one stage. The session's new state is in `context` before the answer is sent.

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


def load_session(context: Context, member: Participant) -> ClientSession:
    """The stored session. Raises PayloadError if there is none."""
    record = context.state.config_records.get(_RECORD)
    if record is None:
        raise PayloadError(f"{member.name} has no secure session: it never sent keys, or lost its state")
    return ClientSession.from_bytes(member, record.get(_SESSION))


def save_session(context: Context, session: ClientSession) -> None:
    """Store the session in place of the previous one."""
    context.state[_RECORD] = ConfigRecord({_SESSION: session.to_bytes()})
