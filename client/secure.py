"""A client's side of secure rounds: its session of `tofu.secagg`, kept in the Flower context between messages.

Node config, where the server may lie: `identity`, the file of this client's Ed25519 key, and `identities`, the file of
all clients' public keys, which came some other way than through the server (`deploy.identities` makes both).
`min-neighbors` and `max-colluding` say what this client insists on, whatever the server proposes.
"""

from pathlib import Path

from flwr.app import ConfigRecord, Context

from tofu.errors import PayloadError
from tofu.secagg.client import ClientSession
from tofu.secagg.identities import read_identity, read_known
from tofu.secagg.participant import Participant
from tofu.settings.deprecated import present_node_config
from tofu.wire import SecureAnswer, SecureQuery, run_name

_RECORD = "tofu-secure"
_SESSION = "session"


def participant_of(context: Context, name: str) -> Participant:
    """Who this client is in secure rounds. Raises SettingError for a node config that cannot be used."""
    config = present_node_config(context.node_config)
    key, known = config.get("identity"), config.get("identities")
    return Participant(
        run=run_name(context.run_id),
        name=name,
        identity=read_identity(Path(str(key)), name) if key is not None else None,
        known=read_known(Path(str(known))) if known is not None else None,
        min_neighbors=int(config.get("min-neighbors", 2)),
        max_colluding=int(config.get("max-colluding", 0)),
    )


def new_advert(context: Context, member: Participant) -> bytes:
    """Fresh keys for the next secure round; those of an earlier one are forgotten."""
    session = ClientSession(member)
    advert = session.advertise_keys()
    save_session(context, session)
    return advert


def answer_query(query: SecureQuery, context: Context, member: Participant) -> SecureAnswer:
    """Answer one stage. What was answered is in `context` before the answer leaves.

    Raises:
        PayloadError: a message that is not to be answered; nothing was revealed.
    """
    if query.stage == "advert":
        return SecureAnswer(b"", new_advert(context, member))
    session = load_session(context, member)
    stages = {"share": session.share_keys, "confirm": session.check_consistency, "reveal": session.unmask}
    message = stages[query.stage](query.message)
    save_session(context, session)
    return SecureAnswer(message, new_advert(context, member) if query.advert else b"")


def load_session(context: Context, member: Participant) -> ClientSession:
    """The session under way. Raises PayloadError where there is none."""
    record = context.state.config_records.get(_RECORD)
    if record is None:
        raise PayloadError(f"{member.name} has no secure session: it never sent keys, or lost its state")
    return ClientSession.from_bytes(member, record.get(_SESSION))


def save_session(context: Context, session: ClientSession) -> None:
    """Put the session in the place of the old one."""
    context.state[_RECORD] = ConfigRecord({_SESSION: session.to_bytes()})
