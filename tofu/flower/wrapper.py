"""Base classes of the mods and strategy wrappers for Flower apps, and helpers for their messages."""

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import Result, Strategy

from tofu.errors import PayloadError, SettingError, python_names
from tofu.flower.internals import OLDER_API, error_reply, filtered_checks
from tofu.flower.log_filter import show_errors_in_one_line
from tofu.flower.policy import error_replies
from tofu.flower.update_codec import array_shape
from tofu.formatting import bounded_line
from tofu.settings import FIELDS, python_call

LOG = logging.getLogger("tofu.flower")
show_errors_in_one_line()

CLIPPED_BY_CLIENTS: tuple[type[Strategy], ...] = (
    strategies.DifferentialPrivacyClientSideAdaptiveClipping, strategies.DifferentialPrivacyClientSideFixedClipping,
)  # fmt: skip
CLIPPED_BY_SERVER: tuple[type[Strategy], ...] = (
    strategies.DifferentialPrivacyServerSideAdaptiveClipping, strategies.DifferentialPrivacyServerSideFixedClipping,
)  # fmt: skip

INDIVIDUAL: tuple[type[Strategy], ...] = (
    *CLIPPED_BY_CLIENTS, *CLIPPED_BY_SERVER, strategies.Bulyan, strategies.FedMedian, strategies.FedTrimmedAvg,
    strategies.FedXgbBagging, strategies.FedXgbCyclic, strategies.MultiKrum, strategies.QFedAvg,
)  # fmt: skip
"""Strategies that need the reply of every client, so that they cannot work with an aggregate."""

_OLDER_SERVER = (
    "the server's strategy is of Flower's older API (flwr.server.strategy), which no mod of tofu works with: use one "
    "of flwr.serverapp.strategy"
)
_OLDER_CLIENT = (
    "the ClientApp is of Flower's older API (client_fn), which answers no message of flwr.serverapp.strategy: register "
    "its training with @app.train()"
)

_ENTERED: ContextVar[tuple[str, ...]] = ContextVar("entered", default=())


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Mark a block as running inside the mod `name`, to detect mods in an order that cannot work.

    Raises:
        PayloadError: the mod is in the list twice, after `tofu.keep_local`, or with another one that sends updates.
    """
    outer = _ENTERED.get()
    if name in outer:
        raise PayloadError(f"{name} is in the list of mods twice: give it once")
    if "tofu.keep_local" in outer:
        raise PayloadError(f"{name} comes after tofu.keep_local in the list of mods: put tofu.keep_local last")
    if outer and name != "tofu.keep_local":
        raise PayloadError(f"{outer[-1]} and {name} cannot both send the updates: use tofu.hybrid instead")
    token = _ENTERED.set((*outer, name))
    try:
        yield
    finally:
        _ENTERED.reset(token)


def _refuse_local_dp_before(name: str) -> None:
    """Raises PayloadError if Flower's LocalDpMod calls this mod: it would get a reply without arrays to clip."""
    frame = sys._getframe()
    while caller := frame.f_back:
        frame = caller
        if frame.f_code is LocalDpMod.__call__.__code__:
            raise PayloadError(f"LocalDpMod comes before {name} in the list of mods: put {name} first")


class TrainMod:
    """A mod that handles train messages; Flower calls it around the app's train function.

    Attributes:
        name: name of the function that makes it, for error messages.
    """

    name: str

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.split(".")[0] != "train":
            return call_next(message, context)
        with error_replies(message, context) as replies, python_names(FIELDS), inside(self.name):
            _refuse_local_dp_before(self.name)
            if any(key.startswith(OLDER_API) for key in message.content):
                LOG.error("%s: %s", self.name, _OLDER_SERVER)  # a strategy of that API does not show error replies
                raise PayloadError(_OLDER_SERVER)
            replies.append(self.train(message, context, call_next))
        return replies[0]

    def train(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Return the reply to a train message. An exception becomes an error reply (`tofu.flower.policy`)."""
        raise NotImplementedError


class StrategyWrapper(Strategy):
    """A strategy that changes the train messages of another one; everything else is the inner strategy's.

    Args:
        inner: any strategy of Flower's Message API; it is not changed.

    Raises:
        SettingError: `inner` is none, such as one of Flower's older API, or a class.
    """

    def __init__(self, inner: Strategy) -> None:
        if not isinstance(inner, Strategy):
            kind = inner if isinstance(inner, type) else type(inner)
            found = f"{kind.__module__}.{kind.__name__}" + (" (a class)" if inner is kind else "")
            raise SettingError("strategy", found, "an object of a strategy in flwr.serverapp.strategy, or of your own")
        self.inner = inner
        # `start` replaces the inner strategy's methods for its duration; these are the originals.
        self._originals = inner.configure_train, inner.aggregate_train, inner.aggregate_evaluate
        self._asked: dict[int, object] = {}

    def _configure_train(self, round_: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Call the inner strategy, and keep the layouts of the arrays that it sends to the nodes."""
        messages = list(self._originals[0](round_, arrays, config, grid))
        contents = {id(message.content): message.content for message in messages}
        layouts = {at: _arrays_of(content) for at, content in contents.items()}
        self._asked = {message.metadata.dst_node_id: layouts[id(message.content)] for message in messages}
        return messages

    def _aggregate_train(
        self, round_: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Call the inner strategy with the replies that it can aggregate (`consistent`)."""
        with filtered_checks(self.inner, lambda some: consistent(some, self.inner, round_, self._asked)):
            return self._originals[1](round_, self._consistent(replies, round_))

    def _consistent(self, replies: Iterable[Message], round_: int) -> list[Message]:
        """Return `consistent` train replies. A strategy with an `aggregate_train` of its own may leave out those with
        unusual metrics itself, as of clients that did not train; only their arrays are compared before.
        """
        own = not type(self.inner).aggregate_train.__module__.startswith("flwr.")
        return consistent(replies, self.inner, round_, self._asked, metrics=not own)

    def _aggregate_evaluate(self, round_: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Call the inner strategy with the replies that it can aggregate (`consistent`)."""
        own = not type(self.inner).aggregate_evaluate.__module__.startswith("flwr.")
        with filtered_checks(self.inner, lambda some: consistent(some, self.inner, round_, {})):
            return self._originals[2](round_, consistent(replies, self.inner, round_, {}, metrics=not own))

    def __getattr__(self, name: str) -> Any:
        """Attributes that are not the wrapper's own are the inner strategy's."""
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @python_call
    def start(self, *arguments: Any, **options: Any) -> Result:
        """Run the inner strategy's own `start`, which calls this wrapper's configure and aggregate steps."""
        own = {name: getattr(self, name) for name in ("configure_train", "aggregate_train", "aggregate_evaluate")}
        vars(self.inner).update(own)
        try:
            return self.inner.start(*arguments, **options)
        finally:
            for name in own:
                del vars(self.inner)[name]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Call the inner strategy."""
        return self._configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Call the inner strategy."""
        return self._aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Call the inner strategy."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Call the inner strategy."""
        return self._aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Call the inner strategy."""
        self.inner.summary()


def wrappers(strategy: Strategy) -> list[StrategyWrapper]:
    """Return the wrappers around a strategy, the outermost first."""
    return [strategy, *wrappers(strategy.inner)] if isinstance(strategy, StrategyWrapper) else []


def refuse_around(wrapper: StrategyWrapper, private: tuple[type[Strategy], ...]) -> None:
    """Check that no strategy of differential privacy that cannot do its part is around a wrapper.

    One that clips the arrays of the replies finds none in those to this wrapper, and would add noise for a norm that no
    update keeps to. It calls the wrapper's methods and leaves no other trace, so this looks for it among the callers.

    Raises:
        SettingError: there is one.
    """
    frame = sys._getframe()
    while caller := frame.f_back:
        frame, outer = caller, caller.f_locals.get("self")
        if isinstance(outer, private) and wrapper in wrappers(vars(outer)["strategy"]):
            accepted = f"one that is not around tofu.{type(wrapper).__name__}: it would clip nothing"
            raise SettingError("strategy", type(outer).__name__, accepted)


def unwrapped(strategy: Strategy) -> Strategy:
    """Return the strategy inside all wrappers."""
    return unwrapped(strategy.inner) if isinstance(strategy, StrategyWrapper) else strategy


def consistent(
    replies: Iterable[Message], strategy: Strategy, round_: int, asked: Mapping[int, object], *, metrics: bool = True
) -> list[Message]:
    """Put error replies in place of those that differ from most in the names of arrays and metrics, or in shapes.

    FedAvg and the strategies that extend it end the run if one reply has others, arrays that cannot be read, or an
    unusable weight, which one client could do. The replies to other strategies are not changed.

    Args:
        asked: node -> layout of the arrays that it was sent; only replies to the same layout are compared. (Some
            strategies send parts of the model.)
        metrics: whether metrics and weights are compared, too.
    """
    replies = list(replies)
    if not isinstance(strategy, strategies.FedAvg):
        return replies
    usable = {at: reply for at, reply in enumerate(replies) if not reply.has_error()}
    layouts = {at: _metrics_of(reply.content) if metrics else () for at, reply in usable.items()}
    arrays = {at: (asked.get(reply.metadata.src_node_id), _arrays_of(reply.content)) for at, reply in usable.items()}
    usual = Counter(layouts.values()).most_common(1)
    usual_arrays = {sent: found for (sent, found), _ in reversed(Counter(arrays.values()).most_common())}
    for at, reply in usable.items():
        sent, found = arrays[at]
        if layouts[at] != usual[0][0] or found != usual_arrays[sent]:
            problem = "its arrays or metrics have other names or shapes than those of most clients"
        elif metrics and not _has_weight(reply.content, strategy.weighted_by_key):
            problem = f"its metric {strategy.weighted_by_key} is not usable: expected one number of at least 0"
        else:
            continue
        node = reply.metadata.src_node_id
        LOG.warning("round %d: the reply of node %s is not usable: %s", round_, node, problem)
        replies[at] = error_reply(reply, problem)
    return replies


def _arrays_of(content: RecordDict) -> tuple[object, ...]:
    """Return the names and shapes of the arrays, by the keys of their records."""
    return tuple(
        (key, tuple(sorted((name, str(_shape_of(array))) for name, array in record.items())))
        for key, record in sorted(content.array_records.items())
    )


def _metrics_of(content: RecordDict) -> tuple[object, ...]:
    """Return the names and lengths of the metrics, by the keys of their records."""
    return tuple(
        (key, tuple(sorted((name, len(value) if isinstance(value, list) else -1) for name, value in record.items())))
        for key, record in sorted(content.metric_records.items())
    )


def _shape_of(array: Array) -> tuple[int, ...] | None:
    """Return the array's shape; None if it cannot be read."""
    try:
        return array_shape(array)
    except PayloadError:
        return None


def _has_weight(content: RecordDict, key: str) -> bool:
    """Say whether the metric by which a strategy weights a reply is one number, if it is there."""
    found = [record[key] for record in content.metric_records.values() if key in record]
    return all(not isinstance(value, list) and 0 <= value < math.inf for value in found)


def with_record(message: Message, key: str, record: ConfigRecord) -> Message:
    """Return a copy of the message with one more record. (Flower's strategies share one content between messages.)"""
    return with_records(message, {**message.content, key: record})


def with_records(message: Message, records: Mapping[str, ArrayRecord | ConfigRecord | MetricRecord]) -> Message:
    """Return a copy of the message with other content."""
    content = RecordDict(dict(records))
    to = message.metadata
    return Message(content, to.dst_node_id, to.message_type, ttl=to.ttl, group_id=to.group_id)


def only_arrays(content: RecordDict, what: str, key: object = None) -> tuple[str, ArrayRecord]:
    """Return the array record `key` of a message, or its only one. Raises PayloadError if there is neither."""
    records = list(content.array_records.items())
    if isinstance(key, str) and key in content.array_records:
        return key, content.array_records[key]
    if len(records) != 1:
        named = ", or one with the strategy's arrayrecord_key" if isinstance(key, str) else ""
        raise PayloadError(f"{what} has {len(records)} array records, expected 1{named}")
    return records[0]


def reasons_of(errors: Iterable[str | None]) -> str:
    """Different reasons in one line of bounded length."""
    lines = {bounded_line(error or "no reason") for error in errors}
    lines = {_OLDER_CLIENT if "KeyError" in line and f"'{OLDER_API}" in line else line for line in lines}
    return "; ".join(sorted(lines))[:900]
