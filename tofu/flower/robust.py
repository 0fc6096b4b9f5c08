"""Robust aggregation for any Flower app: a wrapper of its strategy that bounds what malicious clients can do."""

import logging
from collections.abc import Iterable
from statistics import median

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from tofu.errors import PayloadError, RunError, SettingError
from tofu.flower.internals import error_reply
from tofu.flower.update_codec import ArrayNames, record_of, tensors_of
from tofu.flower.wrapper import INDIVIDUAL, StrategyWrapper, only_arrays, reasons_of
from tofu.rounds import aggregators
from tofu.rounds.aggregation import example_cap, limit_norm
from tofu.settings import python_call

LOG = logging.getLogger("tofu.flower")


class Robust(StrategyWrapper):
    """A strategy that gets the aggregate of a robust rule in the place of every client's arrays.

    The inner strategy averages equal arrays, so its result is the rule's; what it does with that mean (FedAdam's step,
    say) and with the metrics is unchanged. It goes inside of other wrappers: `Compressed(Robust(FedAvg()), ...)`. A
    secure sum has no individual updates, so `SecureAggregation` refuses it.

    Args:
        inner: a strategy that averages the arrays of replies to one train message.
        rule: of the setting `aggregator` (docs/robust-aggregation.md), or `package.module:Class`.
        malicious_fraction: fraction of malicious clients that `trimmed-mean` and `multi-krum` tolerate, below 0.5.
        max_example_ratio: a client's weight is at most so many times the median number of examples; 0 disables it.
        max_norm: longer updates are scaled down to this L2 norm; 0 disables it.

    Raises:
        SettingError: the inner strategy is a wrapper or needs the individual replies, or an argument is out of range.

    Example:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> Robust(FedAvg(fraction_train=0.5), rule="median").fraction_train
        0.5
    """

    @python_call
    def __init__(
        self, inner: Strategy, rule: str, *, malicious_fraction: float = 0.2, max_example_ratio: float = 10.0,
        max_norm: float = 0.0,
    ) -> None:  # fmt: skip
        if isinstance(inner, StrategyWrapper):
            raise SettingError("strategy", type(inner).__name__, "one that is not wrapped: put Robust inside of it")
        if isinstance(inner, INDIVIDUAL):
            raise SettingError("strategy", type(inner).__name__, "one that averages the arrays of its clients")
        if not 0 <= malicious_fraction < 0.5:
            raise SettingError("malicious_fraction", malicious_fraction, "a number of at least 0 and below 0.5")
        for name, value in (("max_example_ratio", max_example_ratio), ("max_norm", max_norm)):
            if not value >= 0:
                raise SettingError(name, value, "a number of at least 0")
        super().__init__(inner)
        self._rule, self._malicious = aggregators.get(rule), malicious_fraction
        self._ratio, self._max_norm = max_example_ratio, max_norm
        self._sent = ArrayRecord()
        self._base: dict[str, Tensor] = {}

    @python_call
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the inner strategy's messages; the replies' updates are relative to `arrays`."""
        self._sent, self._base = arrays, tensors_of(arrays)
        return self._configure_train(server_round, arrays, config, grid)

    @python_call
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Pass the replies to the inner strategy, each with the rule's aggregate as its arrays.

        Raises:
            RunError: no reply can be used.
        """
        names, replies = ArrayNames.of(self._base), list(replies)
        updates: dict[int, tuple[str, dict[str, Tensor], float]] = {}
        for at, reply in enumerate(replies):
            if reply.has_error():
                continue
            try:
                key, record = only_arrays(reply.content, "the app's train reply")
                updates[at] = (key, names.update(self._base, tensors_of(record)), self._weight(reply))
            except PayloadError as error:
                replies[at] = self._unusable(reply, error, server_round)
        examples = _whole({at: weight for at, (*_, weight) in updates.items()})
        cap = example_cap(list(examples.values()) or [1], self._ratio)
        rule = self._rule(names.param_spec, self._malicious)
        for at, (_, update, _) in list(updates.items()):
            try:
                rule.add(limit_norm(update, names.param_spec, self._max_norm), min(examples[at], cap))
            except PayloadError as error:
                replies[at] = self._unusable(replies[at], error, server_round)
                del updates[at]
        if replies and not updates:
            failed = reasons_of(reply.error.reason for reply in replies)
            raise RunError(f"round {server_round}: no reply of {len(replies)} clients can be used ({failed})")
        new = record_of(names.add(self._base, rule.mean()), self._sent) if updates else ArrayRecord()
        for at, (key, *_) in updates.items():
            replies[at].content[key] = new
        return self._aggregate_train(server_round, replies)

    def _weight(self, reply: Message) -> float:
        """Return a reply's number of examples, or other weight. Raises PayloadError if it is no positive number."""
        key = str(getattr(self.inner, "weighted_by_key", "num-examples"))
        found = [metrics[key] for metrics in reply.content.metric_records.values() if key in metrics]
        weight = found[0] if len(found) == 1 else None
        if isinstance(weight, list) or weight is None or not 0 < weight < 2**62:
            raise PayloadError(f"metric {key}={weight} is not usable: expected a number above 0, below 2^62")
        return weight

    def _unusable(self, reply: Message, error: PayloadError, round_: int) -> Message:
        LOG.warning("round %d: the reply of node %s is not usable: %s", round_, reply.metadata.src_node_id, error)
        return error_reply(reply, str(error))


def _whole(weights: dict[int, float]) -> dict[int, int]:
    """Return the weights as whole numbers; if some are fractions, in units of 2^-20 of their median."""
    scale = 1.0 if all(weight == int(weight) for weight in weights.values()) else 2**20 / median(weights.values())
    return {at: min(max(1, round(weight * scale)), 2**62) for at, weight in weights.items()}
