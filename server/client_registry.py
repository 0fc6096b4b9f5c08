"""The connected clients: node ids from the transport, names and numbers of images from the clients themselves."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from server.ledger import Ledger, client_order
from tofu.errors import PayloadError, RunError
from tofu.flower.transport import Transport, error_reason, make_message
from tofu.formatting import format_count, printable, shortened
from tofu.observers.base import Observer
from tofu.secagg.identities import HELLO, verify
from tofu.settings.fields import names_to_text
from tofu.wire import CLASSES, RECORD, SIGNATURE, class_names_from, class_names_to_text, hello_parts, run_name

_GRACE_SECONDS = 30.0
"""Time to wait for other clients if all that are connected have declined, and more are expected."""

_NAMED_REASON = re.compile(r"client ([^\s:]{1,64}): (.*)", re.DOTALL)
"""The reason of a client that says its name (`tofu.flower.policy.error_replies`)."""

_MAX_ADDED = 1000
"""Limit for the number of classes that clients add to a run."""

_MAX_NAMES = 1000
"""Limit for the letters of class names in an error message."""

MAX_EXAMPLES = 10**9
"""Limit for the number of images that a client may claim."""


@dataclass(frozen=True)
class Client:
    """A client.

    Attributes:
        name: its partition, or its node.
        examples: number of images that it reports.
        unreadable: number of further images that it reports as unreadable.
        classes: class names of a client with its own data, () if it does not send them; None for other clients.
    """

    node: int
    name: str
    examples: int
    unreadable: int = 0
    classes: tuple[str, ...] | None = None


class Clients:
    """Keeps track of the connected clients. A new node is asked once for its name and number of images.

    A name belongs to the node that introduced itself with it first, and of nodes that are asked at once to the one with
    the lowest id; another node never takes its place.

    Args:
        class_names: the classes of the run in order. They are sent to a client whose data have other classes or another
            order; it does not take part if it has a class that is not among them. With (), nothing is sent.
        identities: client name -> public key; a node must then sign the name under which it takes part.
        expected: number of nodes of the run. Once they are connected, nobody waits for others if too many declined.
    """

    def __init__(
        self, transport: Transport, ledger: Ledger, observer: Observer, class_names: tuple[str, ...] = (),
        identities: Mapping[str, bytes] | None = None, *, expected: int,
    ) -> None:  # fmt: skip
        self._transport, self._ledger, self._observer = transport, ledger, observer
        self.class_names, self._identities, self._growing = class_names, identities, False
        self._expected = expected
        self._known: dict[int, Client | None] = {}
        self._owners: dict[str, int] = {}
        self._declined: dict[int, str] = {}
        self._unreported: dict[int, tuple[str, str]] = {}

    def connected(self, *, min_clients: int, timeout: float, round_: int) -> list[Client]:
        """Return the clients connected now, in the order of their names; waits until there are `min_clients`.

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
                if (owner := self._owners[client.name]) == client.node:
                    found[client.name] = client
                else:
                    self._observer.on_note(
                        f"node {client.node} has the name of client {client.name}, as node {owner} does: ignored",
                        round=round_,
                        node=client.node,
                    )
            if len(found) >= min_clients:
                return sorted(found.values(), key=lambda client: client_order(client.name))
            declined = [self._declined[node] for node in nodes if node in self._declined]
            complete = len(nodes) >= self._expected and all(node in self._known for node in nodes)
            nobody = not found and time.monotonic() >= start + _GRACE_SECONDS
            if time.monotonic() >= end or (declined and (complete or nobody)):
                waited = time.monotonic() - start
                reasons = f" ({'; '.join(sorted(set(declined)))})" if declined else ""
                if declined and len(declined) == len(nodes):
                    nodes_text = "the only node" if len(nodes) == 1 else f"all {len(nodes)} nodes"
                    reasons = f"; {nodes_text} refused to take part{reasons}"
                raise RunError(f"round {round_}: {format_count(len(found), 'client')} connected after {waited:.0f} s, "
                               f"min-clients is {min_clients}{reasons}")  # fmt: skip
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def register(self, *, min_clients: int, timeout: float) -> None:
        """Before the first round: wait for clients, and add the classes that only clients have to those of the run.

        Names that differ from a class of the run in case or outer spaces only are not added: such a client is declined.

        Raises:
            RunError: fewer than `min_clients` are connected after `timeout` seconds.
        """
        end, self._growing = time.monotonic() + timeout, True
        try:
            self.connected(min_clients=min_clients, timeout=timeout, round_=1)
        finally:
            self._growing = False
        added: set[str] = set()
        for client in self.introduced:  # in the order of names, so that the classes do not depend on who came first
            own = set(client.classes or ()) - {*self.class_names, *added}
            spelled = {name.casefold().strip() for name in (*self.class_names, *added)}
            usable = all(name == name.strip() and name.casefold() not in spelled for name in own)
            if own and usable and self.class_names and len(added | own) <= _MAX_ADDED:
                added |= own
                self._observer.on_note(f"client {client.name} adds the classes {printable(shortened(sorted(own)))}")
        self.class_names += tuple(sorted(added))
        self._tell_classes(self.introduced, end, 1)

    @property
    def introduced(self) -> tuple[Client, ...]:
        """The clients that have introduced themselves, in the order of their names."""
        found = [client for client in self._known.values() if client is not None]
        return tuple(sorted(found, key=lambda client: client_order(client.name)))

    @property
    def unreadable(self) -> int:
        """Number of images that clients have left out because they cannot be read."""
        return sum(client.unreadable for client in self._known.values() if client is not None)

    @property
    def declined(self) -> int:
        """Number of clients that could not take part."""
        return sum(self._known.get(node) is None for node in self._declined)

    def take_declined(self) -> dict[int, tuple[str, str]]:
        """Return a mapping: node -> the name that it gave, or "", and why it takes no part, of the nodes for which this
        has not been returned before.
        """
        taken, self._unreported = self._unreported, {}
        return taken

    def state(self) -> list[list[object]]:
        """Return the known clients, for a checkpoint."""
        known = filter(None, self._known.values())
        return [[client.node, client.name, client.examples, client.unreadable] for client in known]

    def restore(self, state: list[list[Any]]) -> None:
        """Restore what `state` returned; only if the nodes are still the same."""
        for client in (Client(*fields) for fields in state):
            self._known[client.node] = client
            self._owners.setdefault(client.name, client.node)

    def _introduce(self, nodes: list[int], end: float, round_: int) -> None:
        if not nodes:
            return
        ttl = max(1.0, end - time.monotonic())
        messages = [Message(RecordDict(), node, "query", group_id=str(round_), ttl=ttl) for node in nodes]
        for node, reply in sorted(self._transport.exchange(messages, end), key=itemgetter(0)):
            if reply.has_error():
                self._decline(node, reply.error.reason or "error without a reason", reply, round_)
                continue
            try:
                client = _introduced(node, reply)
                if self._identities is not None:
                    signature = reply.content.config_records[RECORD].get(SIGNATURE)
                    parts = run_name(self._transport.run_id), *hello_parts(node, client.name)
                    given = signature if isinstance(signature, bytes) else b""
                    verify(self._identities, client.name, given, HELLO, *parts)
            except PayloadError as error:
                self._decline(node, str(error), reply, round_)
                continue
            self._known[node] = client
            self._owners.setdefault(client.name, node)
            self._ledger.add(reply, round_=round_, kind="hello", direction="uplink", client=client.name)
            if client.unreadable:
                total = client.examples + client.unreadable
                text = (
                    f"client {client.name} cannot read {client.unreadable} of its {total} examples and leaves them out"
                )
                self._observer.on_note(text, round=round_, node=node)
        for message in messages:
            known = self._known.get(message.metadata.dst_node_id)
            if known is not None:
                self._ledger.add(message, round_=round_, kind="hello", direction="downlink", client=known.name)

        if not self._growing:
            self._tell_classes([self._known[node] for node in nodes if self._known.get(node)], end, round_)

    def _tell_classes(self, clients: Sequence[Client | None], end: float, round_: int) -> None:
        """Send the run's class names to clients whose own data have other classes or another order."""
        self.tell_classes(
            [each for each in clients if each and each.classes is not None and each.classes != self.class_names],
            end,
            round_,
        )

    def tell_classes(self, clients: Sequence[Client], end: float, round_: int) -> None:
        """Send the run's class names to clients; `end` is the last moment (`time.monotonic`) to wait for an answer."""
        others = {client.node: client for client in clients}
        if not others or not self.class_names:
            return
        body = class_names_to_text(self.class_names)
        ttl, answered = max(1.0, end - time.monotonic()), set()
        messages = [make_message(body, node, f"query.{CLASSES}", round_=round_, ttl=ttl) for node in others]
        for message in messages:
            client = others[message.metadata.dst_node_id]
            self._ledger.add(message, round_=round_, kind="hello", direction="downlink", client=client.name)
        for node, reply in self._transport.exchange(messages, end):
            answered.add(node)
            if reply.has_error():
                self._decline(node, f"{error_reason(reply)} ({self._all_classes(others.values())})", reply, round_)
            else:
                self._ledger.add(reply, round_=round_, kind="hello", direction="uplink", client=others[node].name)
        for node in others.keys() - answered:
            del self._known[node]  # it introduces itself again in the next round

    def _all_classes(self, clients: Iterable[Client]) -> str:
        """Return the part of an error message that says with which class-names these clients could take part."""
        unknown = sorted({name for client in clients for name in client.classes or ()} - set(self.class_names))
        known = {name.casefold().strip(): name for name in self.class_names}
        for name in unknown:
            if same := known.get(name.casefold().strip()):
                return printable(f"{name!r} differs from the run's {same!r} in case or spaces only: rename it")
        names = printable(names_to_text((*self.class_names, *unknown)))
        if not unknown or len(names) > _MAX_NAMES:
            return "class-names can name all classes"
        return f"the run lacks {printable(shortened(unknown))}: class-names={names} has all classes"

    def _decline(self, node: int, reason: str, reply: Message, round_: int) -> None:
        """Note why a node takes no part. It is not asked again, unless Flower itself made the error."""
        named = _NAMED_REASON.match(reason)
        name, reason = (named[1], named[2]) if named else ("", reason)
        who = f"client {name}" if name else f"node {node}"
        self._observer.on_note(f"{who} cannot take part: {reason}", round=round_, node=node)
        self._declined[node], self._unreported[node] = reason, (name, reason)
        if reply.metadata.src_node_id == node:
            self._known[node] = None


def _introduced(node: int, reply: Message) -> Client:
    """Return the client that a reply to hello describes. Raises PayloadError if it is not valid."""
    record = reply.content.config_records.get(RECORD) or ConfigRecord()
    name, examples, unreadable = record.get("client"), record.get("examples"), record.get("unreadable", 0)
    if not isinstance(name, str) or not 0 < len(name) <= 100:
        raise PayloadError(f"it has the name {str(name)[:20]!r}, expected a text of 1 to 100 characters")
    if not isinstance(examples, int) or not 1 <= examples <= MAX_EXAMPLES:
        raise PayloadError(f"it claims {str(examples)[:20]} examples, expected 1 to {MAX_EXAMPLES}")
    classes = class_names_from(record[CLASSES]) if CLASSES in record else None
    if not isinstance(unreadable, int) or not 0 <= unreadable <= MAX_EXAMPLES:
        raise PayloadError(f"it claims {str(unreadable)[:20]} unreadable images, expected 0 to {MAX_EXAMPLES}")
    return Client(node, name, examples, unreadable, classes)
