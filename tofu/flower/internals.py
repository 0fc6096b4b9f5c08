"""All uses of Flower's private modules, so that an upgrade of Flower changes this file only."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.user_config import UserConfigValue as ConfigValue
from flwr.common.constant import SUPERLINK_NODE_ID as SERVER_NODE
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.server.utils.validator import validate_message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from tofu.errors import RunError

__all__ = [
    "CLIENT_ERROR",
    "LOST",
    "OLDER_API",
    "SERVER_NODE",
    "ConfigValue",
    "Run",
    "content_reply",
    "context_bytes",
    "copy_context",
    "error_reply",
    "filtered_checks",
    "inflate",
    "is_simulation",
    "message_bytes",
    "message_errors",
    "restore_state",
    "serialize",
    "task_identity",
    "unavailable_reply",
]

CLIENT_ERROR = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
OLDER_API = "fitins."
"""Beginning of the names of the records that train messages of Flower's older API have."""

LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
"""Codes of Flower's own error replies for a message that expired or got lost on the way."""


@contextmanager
def filtered_checks(strategy: Strategy, keep: Callable[[list[Message]], list[Message]]) -> Iterator[None]:
    """Within the block, let FedAvg's own check of replies see what `keep` returns for them.

    A strategy that overrides `aggregate_train` and calls FedAvg's for some of the replies gets all of them first.
    """
    name = "_check_and_log_replies"
    check = getattr(strategy, name, None)
    if check is None:
        yield
        return

    def filtered(replies: Iterable[Message], *arguments: Any, **options: Any) -> Any:
        return check(keep(list(replies)), *arguments, **options)

    before = {key: value for key, value in vars(strategy).items() if key == name}
    vars(strategy)[name] = filtered
    try:
        yield
    finally:
        del vars(strategy)[name]
        vars(strategy).update(before)


def message_bytes(message: Message) -> int:
    """Exact size of a message in bytes: its serialized objects with headers, and the tree of their content addresses.

    Objects with equal content are sent and counted once. The HTTP headers and protobuf envelopes of the requests that
    carry the objects are not included.
    """
    with no_object_id_recompute():
        objects = get_all_nested_objects(message)
        return sum(len(item.deflate()) for item in objects.values()) + int(get_object_tree(message).ByteSize())


def is_simulation(grid: Grid) -> bool:
    """Return whether the grid is that of Flower's simulation engine,
    all of whose nodes are registered before a run starts.
    """
    from flwr.superlink.grid.inmemory_grid import InMemoryGrid  # imports a database, which plans do not need

    return isinstance(grid, InMemoryGrid)


def unavailable_reply(message_id: str, run_id: int) -> Message:
    """Return the SuperLink's error reply for a message that has expired or is not known."""
    from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_ins_message

    reply: Message = create_message_error_unavailable_ins_message(message_id, run_id)
    return reply


def error_reply(reply: Message, reason: str) -> Message:
    """Return an error reply with the metadata of a reply that cannot be used."""
    error: Message = make_message(reply.metadata, error=Error(code=0, reason=reason))
    return error


def content_reply(reply: Message, content: RecordDict) -> Message:
    """Return a reply with the metadata of `reply` and other content."""
    made: Message = make_message(reply.metadata, content=content)
    return made


def serialize(message: Message, shared: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
    """Return a message's id, and content address -> bytes of its objects; sets `metadata.message_id`.

    Objects in `shared` are taken from it, and others are added to it, so that messages share their memory.
    """
    with no_object_id_recompute():
        objects = get_all_nested_objects(message)
        for identity, item in objects.items():
            if identity not in shared:
                shared[identity] = item.deflate()
        _set_message_id(message, message.object_id)
        return message.object_id, {identity: shared[identity] for identity in objects}


def inflate(identity: str, contents: dict[str, bytes]) -> Message:
    """Invert `serialize`; it empties `contents`."""
    message = inflate_object_from_contents(identity, contents)
    assert isinstance(message, Message)
    _set_message_id(message, identity)
    return message


def _set_message_id(message: Message, identity: str) -> None:
    """Set an attribute that has no public setter."""
    message.metadata.__dict__["_message_id"] = identity


def message_errors(message: Message, *, reply: bool) -> list[str]:
    """Return why a SuperLink would refuse a message; empty if it would not."""
    with no_object_id_recompute():
        return list(validate_message(message, is_reply_message=reply))


def copy_context(context: Context) -> Context:
    """Return a context after serialization and deserialization."""
    return context_from_proto(context_to_proto(context))


def context_bytes(context: Context) -> bytes:
    """Return a context as Flower serializes it."""
    return bytes(context_to_proto(context).SerializeToString())


def restore_state(context: Context, data: bytes, name: str) -> None:
    """Restore `context.state` from `context_bytes`. Raises RunError, with the client's name, for invalid bytes."""
    try:
        if not data:
            raise ValueError("there is none")
        context.state = context_from_proto(ContextProto.FromString(data)).state
    except (DecodeError, ValueError) as error:
        raise RunError(f"checkpoint has no usable state of client {name}: {error}") from error


@contextmanager
def task_identity(run_id: int = 1 << 63, task_id: int = 1 << 63) -> Iterator[None]:
    """Set the run, node and task that Flower's Message constructor reads from a global."""
    before = TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SERVER_NODE, task_id
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before
