"""The server's connection to the clients, as an interface that tests implement without a Flower grid."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from tofu.formatting import bounded_line
from tofu.wire import FIELD, RECORD

_MIN_POLL_SECONDS, _MAX_POLL_SECONDS = 0.005, 0.25


def never() -> bool:
    """Let an exchange wait for all replies or its deadline."""
    return False


class Transport(Protocol):
    """Sends messages to nodes and yields their replies."""

    @property
    def run_id(self) -> int: ...

    def nodes(self) -> Sequence[int]:
        """Ids of the nodes that are connected now."""

    def exchange(
        self, messages: Sequence[Message], deadline: float, enough: Callable[[], bool] = never
    ) -> Iterator[tuple[int, Message]]:
        """Send messages, at most one per node, and yield (node, reply) in the order of arrival.

        Ends when all have replied, at the deadline (`time.monotonic`), or as soon as `enough` says so.
        """


class GridTransport:
    """A Flower grid as a transport. Flower's own `send_and_receive` returns replies only when all have arrived."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    @property
    def run_id(self) -> int:
        return int(self._grid.run.run_id)

    def nodes(self) -> Sequence[int]:
        return sorted(self._grid.get_node_ids())

    def exchange(
        self, messages: Sequence[Message], deadline: float, enough: Callable[[], bool] = never
    ) -> Iterator[tuple[int, Message]]:
        """See `Transport.exchange`. Flower's error replies do not name the node, so it is found by the message id."""
        waiting: dict[str, int] = {}
        for message, identity in zip(messages, self._grid.push_messages(messages), strict=True):
            if identity:
                waiting[identity] = message.metadata.dst_node_id
        pause = _MIN_POLL_SECONDS
        while waiting:
            replies = list(self._grid.pull_messages(list(waiting)))
            for reply in replies:
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, reply
            if not waiting or time.monotonic() >= deadline or enough():
                return
            pause = _MIN_POLL_SECONDS if replies else min(2 * pause, _MAX_POLL_SECONDS)
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))


def make_message(body: bytes | str, node: int, action: str, *, round_: int, ttl: float) -> Message:
    """Return a message whose only content is `body`."""
    content = RecordDict({RECORD: ConfigRecord({FIELD: body})})
    return Message(content, node, action, group_id=str(round_), ttl=ttl)


def body_of(message: Message) -> object:
    """Return the body of a reply; None if it has none. It is not validated."""
    record = message.content.config_records.get(RECORD)
    return record.get(FIELD) if record is not None else None


def error_reason(message: Message) -> str:
    """Return the reason of an error reply, as one line of bounded length."""
    return bounded_line(message.error.reason or "") or "error without a reason"
