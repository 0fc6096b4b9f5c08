"""The Flower ClientApp: thin handlers that parse a message, call the implementation and build the reply.

Entries of the node config:

- `partition-id`: the client's partition of the run's dataset, and its name; or `data`, a folder with its own images.
- `device`: device for training and encoding; it overrides the run's setting.
- `policy`: file of the client's policy (`tofu.flower.policy`).
- `identity`, `identities` and `journal`: files for secure rounds (`tofu.flower.secure_session`).
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.local_round import client_data, train_round
from client.state import has_class_names, load_class_names, save_class_names
from tofu.errors import PayloadError, TofuError, described
from tofu.flower.policy import Policy, client_name, error_replies
from tofu.flower.secure_session import answer_query, participant_of
from tofu.flower.transport import body_of
from tofu.log import about, start_logging
from tofu.models.checks import eager_code
from tofu.rounds.downlink import ClassesLostError
from tofu.secagg.identities import HELLO
from tofu.settings import Settings
from tofu.wire import (
    CLASSES,
    FIELD,
    RECORD,
    SECURE,
    SIGNATURE,
    SecureQuery,
    TrainRequest,
    class_names_from,
    class_names_to_text,
    hello_parts,
)
from tofu.workload import Workload

LOG = logging.getLogger("tofu.client")


def hello(message: Message, context: Context, workload: Workload | None = None) -> Message:
    """Reply with this client's name and its numbers of images and of unreadable images.

    A client with an identity signs its name and node id, so that no other node can use the name. A client with its own
    data sends the names of its classes, so that the server can number the classes of the run. Under DP these values
    would carry no noise, so the number of images is sent as 1 and the others are not sent.
    """
    with _answering("hello", message, context) as answer:
        settings = _settings(context)
        policy = Policy.of(context)
        policy.check_noise(settings.privacy.client_multiplier)
        data = client_data(settings, context, workload)
        private = bool(settings.privacy.noise_multiplier)
        name = client_name(context)
        answer.record = ConfigRecord({"client": name, "examples": 1 if private else len(data)})
        member = participant_of(context, name, settings.secure.secagg_collusion_fraction)
        if member.identity is not None:
            answer.record[SIGNATURE] = member.signature(HELLO, *hello_parts(context.node_id, name))
        unreadable = len(getattr(data, "unreadable", ()))
        if unreadable and not private:
            answer.record["unreadable"] = unreadable
        if "data" in context.node_config and not settings.data.class_names:
            names = getattr(data, "class_names", ()) if policy.class_names and not private else ()
            answer.record[CLASSES] = class_names_to_text(names)
            save_class_names(context, load_class_names(context))  # a client that loses its state lacks this
    return answer.message


def classes(message: Message, context: Context) -> Message:
    """Use the server's order of the classes for this client's own data, in all following rounds."""
    with _answering("classes", message, context) as answer:
        save_class_names(context, class_names_from(body_of(message)))
        client_data(_settings(context), context)
    return answer.message


def train(message: Message, context: Context, workload: Workload | None = None) -> Message:
    """Handle one round: train locally, compress the update, reply with one payload."""
    with _answering("train", message, context) as answer:
        settings = _settings(context)
        torch.set_num_threads(settings.run.threads)
        request = TrainRequest.from_bytes(body_of(message))
        answer.fields["kind"] = request.kind
        if "data" in context.node_config and not settings.data.class_names and not has_class_names(context):
            raise ClassesLostError("this client has lost its state, and with it how the run's classes are numbered")
        if (round_ := _round_of(message)) is None:
            raise PayloadError(f"train request is for round {message.metadata.group_id[:20]!r}, expected a number")
        answer.record = ConfigRecord({FIELD: train_round(request, round_, settings, context, workload)})
    return answer.message


def secure(message: Message, context: Context) -> Message:
    """Answer a stage of a secure round; the masked input is the reply to a train message."""
    with _answering("secure", message, context) as answer:
        colluding = _settings(context).secure.secagg_collusion_fraction
        query = SecureQuery.from_bytes(body_of(message))
        answer.fields["stage"] = query.stage
        made = answer_query(query, context, participant_of(context, client_name(context), colluding))
        answer.record = ConfigRecord({FIELD: made.to_bytes()})
    return answer.message


def make_app(workload: Workload | None = None) -> ClientApp:
    """Make the client app. With `workload`, the clients run in this process and use its data and model."""
    made = ClientApp()
    made.query()(partial(hello, workload=workload))
    made.train()(partial(train, workload=workload))
    made.query(SECURE)(secure)
    made.query(CLASSES)(classes)
    return made


app = make_app()


@dataclass
class _Answer:
    """A reply under construction: its content `record`, and `fields` for the log line."""

    message: Message
    record: ConfigRecord = field(default_factory=ConfigRecord)
    fields: dict[str, Any] = field(default_factory=dict)


@contextmanager
def _answering(what: str, message: Message, context: Context) -> Iterator[_Answer]:
    """Build a reply and log the outcome. Exceptions become error replies (`tofu.flower.policy.error_replies`)."""
    began, answer, round_ = time.perf_counter(), _Answer(message), _round_of(message)

    def log(level: int, event: str, **fields: Any) -> None:
        extra = about(
            run=context.run_id, round=round_, node=context.node_id, client=client_name(context), what=what,
            **answer.fields, seconds=round(time.perf_counter() - began, 3), **fields,
        )  # fmt: skip
        LOG.log(level, event, extra=extra, exc_info=level >= logging.ERROR)

    with error_replies(message, context, named=what == "hello") as replies:
        try:
            start_logging(str(context.run_config.get("log", "text")))
            with eager_code():
                yield answer
            sent = answer.record.get(FIELD)
            log(logging.INFO, "answered", bytes=len(sent) if isinstance(sent, bytes) else 0)
        except TofuError as error:
            log(logging.WARNING, "failed", reason=str(error))
            raise
        except Exception as error:
            log(logging.ERROR, "failed", reason=described(error))
            raise
        replies.append(Message(RecordDict({RECORD: answer.record}), reply_to=message))
    answer.message = replies[0]


def _round_of(message: Message) -> int | None:
    """Return the round that a message is for; None if that is no number of at most nine digits."""
    group = message.metadata.group_id
    return int(group) if group.isdecimal() and len(group) < 10 else None


def _settings(context: Context) -> Settings:
    """Return the run's settings, checked by the client's policy, with the device of the node config.

    Raises:
        PolicyError: the policy refuses a setting.
        SettingError: a setting or the policy is not usable.
    """
    Policy.of(context).check_run(context.run_config, context.node_config)
    device = context.node_config.get("device")
    return _parsed(json.dumps(context.run_config if device is None else context.run_config | {"device": str(device)}))


@lru_cache(maxsize=4)
def _parsed(run_config: str) -> Settings:
    """Return the settings from a run config as JSON; those of a run are parsed once in a process."""
    return Settings.of(json.loads(run_config))
