"""Further parts for Flower apps: layers that stay on the client, and rounds that end early."""

import math
import time
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from flwr.app import ArrayRecord, Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from tofu.errors import PayloadError, SettingError, TofuError
from tofu.flower.transport import GridTransport
from tofu.flower.wrapper import StrategyWrapper, inside, only_arrays

_STATE = "tofu.keep_local"


def keep_local(*patterns: str) -> "KeepLocal":
    """Return a mod that keeps some arrays on the client: normalization layers (FedBN)
    or the last layer (a personal head).

    The app trains and evaluates with this client's own values of them; the server receives those that it sent. It
    works with any strategy. With other mods it must be the last one, next to the app.

    Args:
        patterns: shell-style patterns of array names, such as "*.bn*" or "head.*".

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> app = ClientApp(mods=[keep_local("bn*", "fc.*")])
    """
    return KeepLocal(patterns)


class KeepLocal:
    """See `keep_local`; Flower calls it around the app's train and evaluate functions."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = tuple(patterns)
        if not self._patterns or not all(isinstance(pattern, str) and pattern for pattern in self._patterns):
            raise SettingError("patterns", self._patterns, 'patterns of array names, such as "*.bn*"')

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        kind = message.metadata.message_type.split(".")[0]
        if kind not in ("train", "evaluate"):
            return call_next(message, context)
        try:
            with inside("tofu.keep_local"):
                return self._answer(kind, message, context, call_next)
        except TofuError as error:
            return Message(Error(code=0, reason=str(error)), reply_to=message)

    def _answer(self, kind: str, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        key, received = only_arrays(message.content, f"the server's {kind} message")
        names = [name for name in received if any(fnmatchcase(name, pattern) for pattern in self._patterns)]
        if not names:
            shown = ", ".join(list(received)[:8])
            raise SettingError("patterns", self._patterns, f"a pattern that matches one of the arrays {shown}, ...")
        own = context.state.array_records.get(_STATE)
        if own is not None and all(name in own and own[name].shape == received[name].shape for name in names):
            message.content[key] = ArrayRecord(
                {name: own[name] if name in names else received[name] for name in received}
            )
        reply = call_next(message, context)
        if kind == "train" and not reply.has_error():
            key, trained = only_arrays(reply.content, "the app's train reply", key)
            if trained.keys() != received.keys():
                raise PayloadError("the app returned arrays of other names than it received")
            context.state[_STATE] = ArrayRecord({name: trained[name] for name in names})
            reply.content[key] = ArrayRecord(
                {name: received[name] if name in names else trained[name] for name in trained}
            )
        return reply


class FirstReplies(StrategyWrapper):
    """A strategy whose train rounds end once a fraction of the clients has replied; later replies are left out.

    Ask more clients than a round needs (`FedAvg(fraction_train=...)`), and a few slow ones no longer hold it up. An
    error reply does not count. Which replies are first depends on the network, so such a run does not repeat.

    Args:
        inner: any strategy of Flower's Message API; it is not changed.
        fraction: fraction of the requests whose replies a round waits for, above 0 and at most 1.

    Example:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> strategy = FirstReplies(FedAvg(fraction_train=0.5), fraction=0.8)
        >>> strategy.fraction_train
        0.5
    """

    def __init__(self, inner: Strategy, *, fraction: float) -> None:
        if not 0 < fraction <= 1:
            raise SettingError("fraction", fraction, "a number above 0, at most 1")
        super().__init__(inner)
        self._fraction = fraction

    def start(self, grid: Grid, *arguments: Any, **options: Any) -> Result:
        """Run the inner strategy's own `start` on a grid that does not wait for late replies."""
        return super().start(_ImpatientGrid(grid, self._fraction), *arguments, **options)


class _ImpatientGrid(Grid):
    """A grid whose `send_and_receive` returns once enough train replies have arrived."""

    def __init__(self, grid: Grid, fraction: float) -> None:
        self._grid, self._fraction = grid, fraction

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        return self._grid.create_message(*arguments, **options)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait at most `timeout` seconds for replies; for train messages, only for the first ones."""
        messages = list(messages)
        if not messages or messages[0].metadata.message_type.split(".")[0] != "train":
            return self._grid.send_and_receive(messages, timeout=timeout)
        wanted = max(1, math.ceil(self._fraction * len(messages) - 1e-9))
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        found: list[Message] = []

        def enough() -> bool:
            return sum(not reply.has_error() for reply in found) >= wanted

        found.extend(reply for _, reply in GridTransport(self._grid).exchange(messages, end, enough))
        return found
