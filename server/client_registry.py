"""Which clients there are: node ids from the grid, names and image counts from the clients themselves."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from server.ledger import Ledger, client_order
from tofu.errors import RunError
from tofu.observers.terminal import Progress
from tofu.wire import RECORD

_POLL_SECONDS = (0.005, 1.0)
_GRACE_SECONDS = 30.0
"""How long to wait for other clients where all that are connected cannot take part."""


@dataclass(frozen=True)
class Client:
    """A client as the server knows it: its node, its name (its partition), and how many images it says it has."""

    node: int
    name: str
    examples: int


class Clients:
    """Keeps track of who is connected. Nodes that were never heard of are asked who they are, once."""

    def __init__(self, grid: Grid, ledger: Ledger, progress: Progress) -> None:
        self._grid, self._ledger, self._progress = grid, ledger, progress
        self._known: dict[int, Client | None] = {}
        self._declined: dict[int, str] = {}

    def connected(self, *, least: int, timeout: float, round_: int) -> list[Client]:
        """The clients connected now, in the order of their names; waits until there are `least`.

        Raises:
            RunError: fewer than `least` after `timeout` seconds.
        """
        start = time.monotonic()
        end = start + timeout
        while True:
            nodes = sorted(self._grid.get_node_ids())
            self._introduce([node for node in nodes if node not in self._known], end, round_)
            found: dict[str, Client] = {}
            for client in filter(None, (self._known.get(node) for node in nodes)):
                if client.name in found:
                    other = found[client.name].node
                    self._progress.note(
                        f"node {client.node} calls itself client {client.name}, as node {other} does: ignored",
                        round=round_,
                        node=client.node,
                    )
                else:
                    found[client.name] = client
            if len(found) >= least:
                return sorted(found.values(), key=lambda client: client_order(client.name))
            declined = [self._declined[node] for node in nodes if node in self._declined]
            hopeless = declined and not found and time.monotonic() >= start + _GRACE_SECONDS
            if time.monotonic() >= end or hopeless:
                waited = time.monotonic() - start
                reasons = f" ({'; '.join(sorted(set(declined)))})" if declined else ""
                raise RunError(f"round {round_}: {len(found)} clients connected after {waited:.0f} s, "
                               f"min-clients is {least}{reasons}")  # fmt: skip
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def state(self) -> list[list[object]]:
        """Who is known, for a checkpoint of a run whose nodes go on with it."""
        known = filter(None, self._known.values())
        return [[client.node, client.name, client.examples] for client in known]

    def restore(self, state: list[list[Any]]) -> None:
        """The inverse of `state`."""
        self._known = {node: Client(node, name, examples) for node, name, examples in state}

    def _introduce(self, nodes: list[int], end: float, round_: int) -> None:
        if not nodes:
            return
        ttl = max(1.0, end - time.monotonic())
        messages = [Message(RecordDict(), node, "query", group_id=str(round_), ttl=ttl) for node in nodes]
        for node, reply in exchange(self._grid, messages, end):
            if reply.has_error():
                self._decline(node, reply.error.reason or "error without a reason", reply, round_)
                continue
            record = reply.content.config_records.get(RECORD)
            name, examples = (record.get("client"), record.get("examples")) if record is not None else (None, None)
            if not isinstance(name, str) or not 0 < len(name) <= 100 or not isinstance(examples, int) or examples < 1:
                self._decline(node, "its introduction is not valid", reply, round_)
                continue
            self._known[node] = Client(node, name, examples)
            self._ledger.add(reply, round_=round_, kind="hello", direction="uplink", client=name)
        for message in messages:
            client = self._known.get(message.metadata.dst_node_id)
            if client is not None:
                self._ledger.add(message, round_=round_, kind="hello", direction="downlink", client=client.name)

    def _decline(self, node: int, reason: str, reply: Message, round_: int) -> None:
        """Note why a node takes no part. It is not asked again, unless the error is not its own but the network's."""
        self._progress.note(f"node {node} cannot take part: {reason}", round=round_, node=node)
        self._declined[node] = reason
        if reply.metadata.src_node_id == node:
            self._known[node] = None


def exchange(grid: Grid, messages: list[Message], end: float) -> Iterator[tuple[int, Message]]:
    """Send the messages and yield (node, reply) as replies arrive, until all have or the clock passes `end`.

    Flower's error replies do not tell the node that failed, so the node is found by the message that was answered.
    """
    waiting: dict[str, int] = {}
    for message, identity in zip(messages, grid.push_messages(messages), strict=True):
        if identity:
            waiting[identity] = message.metadata.dst_node_id
    pause = _POLL_SECONDS[0]
    while waiting:
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                yield node, reply
        if not waiting or time.monotonic() >= end:
            return
        pause = _POLL_SECONDS[0] if replies else min(2 * pause, _POLL_SECONDS[1])
        time.sleep(min(pause, max(0.0, end - time.monotonic())))


def one_line(reason: str | None) -> str:
    """The reason of an error reply, as one line of bounded length."""
    return " ".join((reason or "").split())[:300] or "error without a reason"
