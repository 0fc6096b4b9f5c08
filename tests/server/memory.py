"""An in-memory transport with the real client app, for tests of the server's rounds without a grid."""

import time
from collections.abc import Callable, Iterator, Sequence

from flwr.app import Context, Message, RecordDict

from client.app import app as client_app
from tofu.flower.policy import NO_POLICY
from tofu.flower.transport import never
from tofu.settings import Settings

Behavior = Callable[[Message, Callable[[], Message]], Message | None]
"""Message to a client, and a function that lets the real client answer -> the reply; None for none."""

FIRST_NODE = 1 << 63


class MemoryTransport:
    """Delivers messages to the client app in this thread.

    Args:
        behaviors: client name -> what it does instead of replying.
    """

    def __init__(self, settings: Settings, behaviors: dict[str, Behavior] | None = None) -> None:
        self.behaviors = behaviors or {}
        self.absent: set[str] = set()
        self.late: set[str] = set()  # their replies come after those of the others
        self.sent: list[Message] = []
        self.contexts = {
            FIRST_NODE + number: Context(
                FIRST_NODE,
                FIRST_NODE + number,
                {"partition-id": number, "policy": NO_POLICY},
                RecordDict(),
                dict(settings.to_config()),
            )
            for number in range(settings.data.clients)
        }

    @property
    def run_id(self) -> int:
        return FIRST_NODE

    def nodes(self) -> Sequence[int]:
        return [node for node in self.contexts if str(node - FIRST_NODE) not in self.absent]

    def exchange(
        self, messages: Sequence[Message], deadline: float, enough: Callable[[], bool] = never
    ) -> Iterator[tuple[int, Message]]:
        for message in sorted(messages, key=lambda one: str(one.metadata.dst_node_id - FIRST_NODE) in self.late):
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"{len(self.sent):064}"
            self.sent.append(message)
            behavior = self.behaviors.get(str(node - FIRST_NODE))
            reply = behavior(message, lambda m=message: self._answer(m)) if behavior else self._answer(message)
            if reply is not None and time.monotonic() < deadline:
                yield node, reply

    def _answer(self, message: Message) -> Message:
        reply: Message = client_app(message=message, context=self.contexts[message.metadata.dst_node_id])
        return reply

    def trained(self) -> list[str]:
        """Names of the clients that were sent train requests, in that order."""
        return [
            str(message.metadata.dst_node_id - FIRST_NODE)
            for message in self.sent
            if message.metadata.message_type == "train"
        ]
