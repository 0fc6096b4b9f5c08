"""The Flower ClientApp: thin handlers that parse a message, call the implementation and build the reply.

Entries of the node config:

- `partition-id`: the client's partition of the run's dataset, and its name; or `data`, a folder with its own images.
- `device`: where it trains and encodes, whatever the run's setting.
- `allowed-rounds` ("secure" or "proxy,secure") and `min-noise-multiplier`: the client refuses other rounds
  (`tofu.flower.policy`). `tofu.flower.secure_session` has those for secure rounds.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.local_round import train_round
from client.policy import client_data, without_paths
from client.state import save_class_names
from tofu.errors import TofuError
from tofu.flower.policy import client_name
from tofu.flower.secure_session import answer_query, participant_of
from tofu.log import about, start_logging
from tofu.rounds.downlink import ResyncError
from tofu.settings import Settings
from tofu.wire import (
    CLASSES,
    FIELD,
    RECORD,
    RESYNC,
    SECURE,
    SecureQuery,
    TrainRequest,
    class_names_from,
    class_names_to_text,
)
from tofu.workload import Workload

LOG = logging.getLogger("tofu.client")


def hello(message: Message, context: Context, workload: Workload | None = None) -> Message:
    """Reply with this client's name, its number of images and how many more cannot be read.

    A client with data of its own adds the names of its classes, so that the server can say how the run numbers them.
    Under DP, all this would not be noised: the number is 1, and the rest is not sent.
    """
    with _answering("hello", message, context) as answer:
        settings = Settings.of(context.run_config)
        data = client_data(settings, context, workload)
        private = bool(settings.privacy.noise_multiplier)
        answer.record = ConfigRecord({"client": client_name(context), "examples": 1 if private else len(data)})
        unreadable = len(getattr(data, "unreadable", ()))
        if unreadable and not private:
            answer.record["unreadable"] = unreadable
        if "data" in context.node_config and not settings.data.class_names:
            names = () if private else getattr(data, "class_names", ())
            answer.record[CLASSES] = class_names_to_text(names)
    return answer.message


def classes(message: Message, context: Context) -> Message:
    """Number the classes of this client's own data as the server says, in all rounds that follow."""
    with _answering("classes", message, context) as answer:
        save_class_names(context, class_names_from(_content(message)))
        client_data(Settings.of(context.run_config), context)
    return answer.message


def train(message: Message, context: Context, workload: Workload | None = None) -> Message:
    """One round: train locally, compress the update, reply with one payload."""
    with _answering("train", message, context) as answer:
        settings = Settings.of({**context.run_config, **_device_of(context)})
        torch.set_num_threads(settings.run.threads)
        request = TrainRequest.from_bytes(_content(message))
        answer.fields["kind"] = request.kind
        round_ = int(message.metadata.group_id)
        answer.record = ConfigRecord({FIELD: train_round(request, round_, settings, context, workload)})
    return answer.message


def secure(message: Message, context: Context) -> Message:
    """Answer one stage of a secure round other than the masked input."""
    with _answering("secure", message, context) as answer:
        query = SecureQuery.from_bytes(_content(message))
        answer.fields["stage"] = query.stage
        made = answer_query(query, context, participant_of(context, client_name(context)))
        answer.record = ConfigRecord({FIELD: made.to_bytes()})
    return answer.message


def make_app(workload: Workload | None = None) -> ClientApp:
    """The client app; with `workload`, for clients that train its data and model in this process."""
    made = ClientApp()
    made.query()(partial(hello, workload=workload))
    made.train()(partial(train, workload=workload))
    made.query(SECURE)(secure)
    made.query(CLASSES)(classes)
    return made


app = make_app()


@dataclass
class _Answer:
    """The reply to a message: `record`, or `error` if there is one; `fields` are added to the log line."""

    to: Message
    record: ConfigRecord = field(default_factory=ConfigRecord)
    error: Error | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> Message:
        if self.error is not None:
            return Message(self.error, reply_to=self.to)
        return Message(RecordDict({RECORD: self.record}), reply_to=self.to)


@contextmanager
def _answering(what: str, message: Message, context: Context) -> Iterator[_Answer]:
    """Build a reply and log the outcome. A `TofuError` becomes an error reply; other exceptions are raised."""
    began, answer, group = time.perf_counter(), _Answer(message), message.metadata.group_id
    round_ = int(group) if group.isdecimal() else None

    def log(level: int, event: str, **fields: Any) -> None:
        extra = about(
            run=context.run_id, round=round_, node=context.node_id, client=client_name(context), what=what,
            **answer.fields, seconds=round(time.perf_counter() - began, 3), **fields,
        )  # fmt: skip
        LOG.log(level, event, extra=extra, exc_info=level >= logging.ERROR)

    try:
        start_logging(str(context.run_config.get("log", "text")))
        yield answer
        sent = answer.record.get(FIELD)
        log(logging.INFO, "answered", bytes=len(sent) if isinstance(sent, bytes) else 0)
    except TofuError as error:
        answer.error = Error(
            code=RESYNC if isinstance(error, ResyncError) else 0, reason=without_paths(str(error), context)
        )
        log(logging.WARNING, "failed", reason=str(error))
    except Exception as error:
        log(logging.ERROR, "failed", reason=f"{type(error).__name__}: {error}")
        raise


def _device_of(context: Context) -> dict[str, str]:
    """The device of the node config, which overrides the run's setting."""
    device = context.node_config.get("device")
    return {} if device is None else {"device": str(device)}


def _content(message: Message) -> object:
    record = message.content.config_records.get(RECORD)
    return record.get(FIELD) if record is not None else None
