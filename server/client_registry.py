"""The connected clients: node ids from the transport, names and numbers of images from the clients themselves."""

import time
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict

from server.ledger import Ledger, client_order
from tofu.errors import RunError
from tofu.flower.transport import Transport
from tofu.observers.base import Observer
from tofu.wire import RECORD

_GRACE_SECONDS = 30.0
"""Time to wait for other clients if all that are connected have declined."""

MAX_EXAMPLES = 10**9
"""Limit for the number of images that a client may claim."""


@dataclass(frozen=True)
class Client:
    """A client: its node, its name (its partition), and the number of images that it reports."""

    node: int
    name: str
    examples: int


class Clients:
    """Keeps track of the connected clients. A new node is asked once for its name and number of images."""

    def __init__(self, transport: Transport, ledger: Ledger, observer: Observer) -> None:
        self._transport, self._ledger, self._observer = transport, ledger, observer
        self._known: dict[int, Client | None] = {}
        self._declined: dict[int, str] = {}

    def connected(self, *, min_clients: int, timeout: float, round_: int) -> list[Client]:
        """The clients connected now, in the order of their names; waits until there are `min_clients`.

        Raises:
            RunError: fewer than `min_clients` are connected after `timeout` seconds.
        """
        start = time.monotonic()
        end = start + timeout
        while True:
            nodes = self._transport.nodes()
            self._introduce([node for node in nodes if node not in self._known], end, round_)
            found: dict[str, Client] = {}
            for client in filter(None, (self._known.get(node) for node in nodes)):
                if client.name in found:
                    other = found[client.name].node
                    self._observer.on_note(
                        f"node {client.node} has the name of client {client.name}, as node {other} does: ignored",
                        round=round_,
                        node=client.node,
                    )
                else:
                    found[client.name] = client
            if len(found) >= min_clients:
                return sorted(found.values(), key=lambda client: client_order(client.name))
            declined = [self._declined[node] for node in nodes if node in self._declined]
            hopeless = declined and not found and time.monotonic() >= start + _GRACE_SECONDS
            if time.monotonic() >= end or hopeless:
                waited = time.monotonic() - start
                reasons = f" ({'; '.join(sorted(set(declined)))})" if declined else ""
                raise RunError(f"round {round_}: {len(found)} clients connected after {waited:.0f} s, "
                               f"min-clients is {min_clients}{reasons}")  # fmt: skip
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def state(self) -> list[list[object]]:
        """The known clients, for a checkpoint."""
        known = filter(None, self._known.values())
        return [[client.node, client.name, client.examples] for client in known]

    def restore(self, state: list[list[Any]]) -> None:
        """Restore what `state` returned; only if the nodes are still the same."""
        self._known = {node: Client(node, name, examples) for node, name, examples in state}

    def _introduce(self, nodes: list[int], end: float, round_: int) -> None:
        if not nodes:
            return
        ttl = max(1.0, end - time.monotonic())
        messages = [Message(RecordDict(), node, "query", group_id=str(round_), ttl=ttl) for node in nodes]
        for node, reply in self._transport.exchange(messages, end):
            if reply.has_error():
                self._decline(node, reply.error.reason or "error without a reason", reply, round_)
                continue
            record = reply.content.config_records.get(RECORD)
            name, examples = (record.get("client"), record.get("examples")) if record is not None else (None, None)
            if not isinstance(name, str) or not 0 < len(name) <= 100 or not isinstance(examples, int) or examples < 1:
                self._decline(node, "its introduction is not valid", reply, round_)
                continue
            if examples > MAX_EXAMPLES:
                self._decline(node, f"it claims {examples} examples, expected at most {MAX_EXAMPLES}", reply, round_)
                continue
            self._known[node] = Client(node, name, examples)
            self._ledger.add(reply, round_=round_, kind="hello", direction="uplink", client=name)
        for message in messages:
            client = self._known.get(message.metadata.dst_node_id)
            if client is not None:
                self._ledger.add(message, round_=round_, kind="hello", direction="downlink", client=client.name)

    def _decline(self, node: int, reason: str, reply: Message, round_: int) -> None:
        """Note why a node takes no part. It is not asked again, unless Flower itself made the error."""
        self._observer.on_note(f"node {node} cannot take part: {reason}", round=round_, node=node)
        self._declined[node] = reason
        if reply.metadata.src_node_id == node:
            self._known[node] = None
