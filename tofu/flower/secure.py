"""Secure sums for any Flower app: a mod for its `ClientApp` and a wrapper for its strategy.

    app = ClientApp(mods=[tofu.secure()])                                             # client
    strategy = tofu.SecureAggregation(FedAvg())                                       # server

The server receives masked arrays, of which only the sum can be read, weighted by the clients' numbers of examples. The
inner strategy gets one reply, with the mean of the arrays and of the metrics. docs/secure-aggregation.md says what is
guaranteed, and what is not. This module has the server's part, `tofu.flower.secure_mod` the client's.
"""

import json
import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from tofu.arguments import check_options
from tofu.compression.error_feedback import NEVER
from tofu.errors import PayloadError, RunError, SettingError
from tofu.flower.compress import Compressed
from tofu.flower.internals import content_reply
from tofu.flower.robust import Robust
from tofu.flower.secure_mod import RECORD, content_digest, joint_digest, joint_text, meaning
from tofu.flower.secure_options import VERSION, RangeTracker, SecureOptions
from tofu.flower.secure_stages import AbandonedError, SecureExchange, abandoning
from tofu.flower.transport import GridTransport
from tofu.flower.update_codec import ArrayNames, UpdateCodec, tensors_of
from tofu.flower.wrapper import (
    CLIPPED_BY_SERVER,
    INDIVIDUAL,
    StrategyWrapper,
    only_arrays,
    reasons_of,
    refuse_around,
    unwrapped,
    with_record,
    wrappers,
)
from tofu.privacy import Accountant, check_delta
from tofu.secagg.encoding import EncodingConfig, RingEncoder, SecureMean, purpose_of
from tofu.secagg.identities import read_known
from tofu.secagg.messages import Advert
from tofu.secagg.server import ServerSession, check_signature
from tofu.settings import MIN_SECURE, python_call
from tofu.wire import SecurePart, run_name

LOG = logging.getLogger("tofu.flower")

_ROUNDS: WeakKeyDictionary[Grid, int] = WeakKeyDictionary()
"""Grid -> last round of secure sums. Clients answer a number once, and a strategy may start several trainings."""


@dataclass
class _OpenSum:
    """State of a secure round between the exchange of keys and the sum.

    Attributes:
        names: node -> name in the session.
        key: the array record's key.
        clip_norm: to which clients clip their updates, with noise.
        metrics: client name -> names of its metrics, as JSON that it sent.
    """

    session: ServerSession
    exchange: SecureExchange
    encoder: RingEncoder
    config: EncodingConfig
    names: dict[int, str]
    key: str
    base: dict[str, Tensor]
    arrays: ArrayNames
    clip_norm: float
    metrics: dict[str, object] = field(default_factory=dict)
    masked_bytes: int = 0


class SecureAggregation(StrategyWrapper):
    """A strategy that receives one reply: the mean of the clients' arrays and metrics, from a secure sum.

    Args:
        inner: a strategy that averages (FedAvg, FedAvgM, FedProx, FedAdam, FedAdagrad, FedYogi, or your own).
        identities: file with the clients' public keys (`tofu deploy identities`), against a server that lies.
        stage_timeout: seconds that clients have for each stage of the protocol other than training.
        delta: delta of the differential privacy that `tofu-epsilon` in the metrics accounts for.
        codec: selects the arrays that the model trains; without it all arrays are summed.
        options: of `SecureOptions`, the same as given to `secure`.

    Attributes:
        mod: name of the client's mod, for error messages.
        acknowledged: node -> last round whose sum its update is in.
        training: as of `Compressed`.

    Raises:
        SettingError: the inner strategy needs the individual updates, or an option is out of range.

    Example:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> SecureAggregation(FedAvg(fraction_train=0.5)).fraction_train
        0.5
    """

    @python_call
    def __init__(
        self, inner: Strategy, *, identities: str | Path | None = None, stage_timeout: float = 300.0,
        delta: float = 1e-5, codec: UpdateCodec | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if any(isinstance(wrapper, SecureAggregation) for wrapper in wrappers(inner)):
            raise SettingError("strategy", "SecureAggregation", "a strategy that is not wrapped in it already")
        for part in (*wrappers(inner), unwrapped(inner)):
            if isinstance(part, (Compressed, Robust, *INDIVIDUAL)):
                accepted = "one that averages updates: a secure sum contains no individual ones"
                raise SettingError("strategy", type(part).__name__, accepted)
        super().__init__(inner)
        self.mod = "tofu.secure"
        check_options(options, SecureOptions, type(self))
        self._options, self._codec = SecureOptions(**options), codec
        self._known = read_known(Path(identities)) if identities else None
        self._seconds = stage_timeout
        self._ranges = RangeTracker(self._options)
        check_delta(delta)
        self._accountant = Accountant(delta) if self._options.noise_multiplier else None
        self._adverts: dict[int, bytes] = {}
        self._owners: dict[str, int] = {}
        self.acknowledged: dict[int, int] = {}
        self._open: _OpenSum | None = None
        self._summed, self._abandoned = 0, ""
        self._round, self.training = 0, secrets.token_bytes(8)

    def start(self, *arguments: Any, **options: Any) -> Result:
        """Run the inner strategy's own `start` with secure sums.

        Raises:
            RunError: every round was abandoned because too few clients remained.
        """
        self.begin(secrets.token_bytes(8))
        result = super().start(*arguments, **options)
        self.check_summed()
        return result

    def begin(self, training: bytes) -> None:
        """Forget an earlier training, whose weights have nothing to do with those to come."""
        self.training, self._owners, self._ranges = training, {}, RangeTracker(self._options)
        self._summed, self._abandoned = 0, ""
        self.acknowledged.clear()

    def check_summed(self) -> None:
        """Raises RunError if rounds of this training were abandoned and none was summed."""
        if self._abandoned and not self._summed:
            raise RunError(f"no round could be summed: {self._abandoned}")

    @property
    def identified(self) -> bool:
        """Whether the clients need identities."""
        return self._known is not None

    def check_messages(self, messages: list[Message]) -> None:
        """Check the inner strategy's messages of an earlier round, whose clients would be those of a secure sum.

        Raises:
            RunError: they differ, or are too few.
            SettingError: the ring has too few bits for the clients, or no graph allows the dropouts.
            PayloadError: they have no arrays, or several array records.
        """
        if not messages:
            return
        _check_equal(messages, self.inner)
        if len(messages) < MIN_SECURE:
            raise RunError(
                f"{type(self.inner).__name__} asks {len(messages)} clients, a secure round takes at least {MIN_SECURE}"
            )
        base = tensors_of(only_arrays(messages[0].content, "the strategy's train message")[1])
        arrays = self._codec.reference(base) if self._codec else ArrayNames.of(base)
        self._options.topology(len(messages))
        self._ranges.encoding(arrays.own(base), arrays.param_spec, len(messages))

    @python_call
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the inner strategy's messages to the clients that exchanged keys and shares;
        none if the round is abandoned.

        Raises:
            RunError: no client sent keys, or the inner strategy sends different messages to different clients.
            SettingError: the ring has too few bits for the clients, or a strategy that clips is around this one.
        """
        refuse_around(self, CLIPPED_BY_SERVER)
        self._open = None
        messages = list(self._configure_train(server_round, arrays, config, grid))
        if not messages:
            return []
        _check_equal(messages, self.inner)
        nodes = [message.metadata.dst_node_id for message in messages]
        own = getattr(grid, "_grid", grid)  # that of `FirstReplies` is made anew for each training
        previous = _ROUNDS.get(own, 0)
        if previous != self._round:  # another strategy has had a round since, for which the clients made other keys
            self._adverts.clear()
        self._round = _ROUNDS[own] = max(server_round, previous + 1)
        try:
            parts = self._exchange_keys(messages[0], nodes, self._round, GridTransport(grid))
        except AbandonedError as error:
            self._abandon(server_round, error)
            return []
        assert self._open is not None
        requests = []
        for message in messages:
            node = message.metadata.dst_node_id
            part = parts.get(self._open.names.get(node, ""))
            if part is not None:
                record = ConfigRecord({
                    "version": VERSION, "round": self._round, "acknowledged": self.acknowledged.get(node, NEVER),
                    "digest": joint_digest(self._options, self._codec), "weight-key": self._weight_key, "part": part,
                    "arguments": joint_text(self._options, self._codec),
                    "clip-norm": self._ranges.norm, "training": self.training,
                })  # fmt: skip
                requests.append(with_record(message, RECORD, record))
        if self._accountant is not None:  # also if the round is abandoned, as its sum may be known by then
            self._accountant.spend(self._options.noise_multiplier, "secure")
        return requests

    @python_call
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Sum the masked replies, remove the masks from the sum, and pass its mean to the inner strategy.

        Raises:
            RunError: no reply can be used.
        """
        opened, self._open = self._open, None
        replies = list(replies)
        if opened is None:
            return None, None
        sample = self._add_masked(opened, replies, server_round)
        try:
            with abandoning():
                adverts: dict[str, bytes] = {}
                total = opened.exchange.unmask(
                    opened.session, adverts, identified=self._known is not None, request_keys=True
                )
                mean = opened.encoder.decode(total.vector, len(total.survivors))
        except AbandonedError as error:
            self._abandon(server_round, error)
            return None, None
        for name, reason in opened.exchange.failures.items():
            LOG.warning("round %d: client %s: %s", server_round, name, reason)
        self._summed += 1
        self._ranges.advance(mean, opened.config, len(total.survivors))
        for node, name in opened.names.items():
            if name in total.survivors:
                self.acknowledged[node] = self._round
            if name in adverts:
                self._adverts[node] = adverts[name]
        content = RecordDict({
            opened.key: _mean_arrays(opened, mean),
            "metrics": self._mean_metrics(opened, mean, total.survivors),
        })  # fmt: skip
        return self._aggregate_train(server_round, [content_reply(sample, content)])

    @property
    def _weight_key(self) -> str:
        return str(getattr(self.inner, "weighted_by_key", "num-examples"))

    def _exchange_keys(
        self, message: Message, nodes: list[int], round_: int, transport: GridTransport
    ) -> dict[str, bytes]:
        """Run the stages before training; return session name -> content of the client's train message.

        Raises:
            AbandonedError: too few clients take part.
            RunError: no client sent keys.
            SettingError: the strategy sends no array.
        """
        options = self._options
        names, adverts = self._collect_keys(message, nodes, round_, transport)
        clients = {name: node for node, name in names.items()}
        exchange = SecureExchange(
            transport, clients, round_, self._seconds, action=message.metadata.message_type
        )  # fmt: skip
        key, record = only_arrays(message.content, "the strategy's train message")
        base = tensors_of(record)
        if not base:
            raise SettingError("arrays", "none", "at least one: an empty model has no sum")
        arrays = self._codec.reference(base) if self._codec else ArrayNames.of(base)
        config, encoder = self._ranges.encoding(arrays.own(base), arrays.param_spec, max(len(names), MIN_SECURE))
        session = ServerSession(
            run_name(transport.run_id), round_, values=encoder.length, bits=config.bits, known=self._known,
            purpose=purpose_of(
                config, base, content_digest(message.content, self._weight_key),
                *meaning(round_, options, self._codec, self._ranges.norm),
            ),
        )  # fmt: skip
        shares = exchange.share_keys(session, adverts, options.topology, min_clients=MIN_SECURE)
        self._open = _OpenSum(session, exchange, encoder, config, names, key, base, arrays, self._ranges.norm)
        return {name: SecurePart(config.to_bytes(), part).to_bytes() for name, part in shares.items()}

    def _collect_keys(
        self, message: Message, nodes: list[int], round_: int, transport: GridTransport
    ) -> tuple[dict[int, str], dict[str, bytes]]:
        """Return the clients' names by node, and their keys by name; clients that sent none ahead are asked."""
        exchange = SecureExchange(
            transport, {str(node): node for node in nodes}, round_, self._seconds,
            action=message.metadata.message_type,
        )  # fmt: skip
        keys = {str(node): self._adverts.pop(node) for node in nodes if node in self._adverts}
        exchange.collect_keys(keys)
        names, adverts = dict[int, str](), dict[str, bytes]()
        for node in nodes:
            if str(node) not in keys:
                continue
            with exchange.blaming(str(node)):
                name = Advert.from_bytes(keys[str(node)]).name
                if self._known is None and name != str(node):
                    raise PayloadError(f"it has an identity ({name}): pass identities= to SecureAggregation")
                if self._known is not None:
                    check_signature(self._known, run_name(transport.run_id), Advert.from_bytes(keys[str(node)]))
                # Another node could replay the signed keys of an earlier round.
                if self._owners.setdefault(name, node) != node:
                    raise PayloadError(f"another node has sent keys of {name}")
                names[node], adverts[name] = name, keys[str(node)]
        if not names:
            raise RunError(
                f"round {round_}: no client sent keys: add {self.mod}(...) to the mods of the ClientApp "
                f"({reasons_of(exchange.failures.values())})"
            )
        for name, reason in exchange.failures.items():
            LOG.warning("round %d: node %s: %s", round_, name, reason)
        return names, adverts

    def _add_masked(self, opened: _OpenSum, replies: list[Message], round_: int) -> Message:
        """Add the masked vectors to the sum, and return one of the replies. Raises RunError if none can be used."""
        failed, sample = list[str](), None
        for reply in replies:
            if reply.has_error():
                failed.append(reply.error.reason or "")
                continue
            node = reply.metadata.src_node_id
            name, record = opened.names.get(node, ""), reply.content.config_records.get(RECORD)
            try:
                if record is None or not isinstance(masked := record.get("masked"), bytes):
                    raise PayloadError(f"node {node} sent no masked vector")
                opened.session.add_masked(name, masked)
                opened.metrics[name], opened.masked_bytes, sample = record.get("metrics"), len(masked), reply
            except PayloadError as error:
                failed.append(str(error))
        if sample is None:
            raise RunError(f"round {round_}: no reply of {len(replies)} clients can be used ({reasons_of(failed)})")
        if failed:
            LOG.warning("round %d: %d replies are not usable: %s", round_, len(failed), reasons_of(failed))
        return sample

    def _mean_metrics(self, opened: _OpenSum, mean: SecureMean, survivors: tuple[str, ...]) -> MetricRecord:
        """Return the clients' mean metrics, and those of the secure round."""
        metrics = MetricRecord({
            self._weight_key: mean.examples if self._options.unit == 1 else mean.examples / self._options.unit,
            "tofu-clients": len(survivors),
            "tofu-clipped": mean.clipped,
            "tofu-payload-bytes": opened.masked_bytes,
        })  # fmt: skip
        if self._accountant is not None:
            metrics["tofu-epsilon"] = self._accountant.epsilon
        if self._options.clip_quantile:
            metrics["tofu-clip-norm"] = opened.clip_norm
        named = {str(opened.metrics.get(name)) for name in survivors}
        layout = _layout(named.pop(), self._options.metrics) if len(named) == 1 else None
        if layout is None:
            LOG.warning("metrics were not summed: clients report different ones, too many, or values out of range")
            return metrics
        values = ((mean.sums["coarse"] + mean.sums["fine"]) / mean.examples).tolist()
        for name, length in layout:
            metrics[name] = values.pop(0) if length < 0 else [values.pop(0) for _ in range(length)]
        return metrics

    def _abandon(self, round_: int, error: AbandonedError) -> None:
        self._abandoned = str(error)
        LOG.warning("round %d is abandoned: %s", round_, error)


def _check_equal(messages: list[Message], inner: Strategy) -> None:
    """Raises RunError if a message differs from the others in more than its receiver."""
    first = messages[0]
    for message in messages[1:]:
        same = message.content is first.content or (
            content_digest(message.content, "") == content_digest(first.content, "")
            and {k: v.object_id for k, v in message.content.array_records.items()}
            == {k: v.object_id for k, v in first.content.array_records.items()}
        )
        if not same or message.metadata.message_type != first.metadata.message_type:
            raise RunError(
                f"{type(inner).__name__} sends clients different messages ({_difference(first, message)}), whose "
                "updates cannot be summed: clients refuse what other clients did not receive, too. What differs "
                "between clients can come from their own context (node_config, state)"
            )


def _difference(one: Message, other: Message) -> str:
    """Say in which record or entry two messages differ."""
    contents = one.content, other.content
    for key in sorted(one.content.keys() | other.content.keys()):
        first, second = ({**content[key]} if key in content else None for content in contents)
        if first is None or second is None:
            return f"record {key!r} is in some of them only"
        for name in sorted(first.keys() | second.keys()):
            values = first.get(name), second.get(name)
            if isinstance(values[0], Array) or isinstance(values[1], Array):
                if getattr(values[0], "object_id", "") != getattr(values[1], "object_id", ""):
                    return f"array {name!r} of record {key!r}"
            elif values[0] != values[1]:
                return f"{name!r} of record {key!r} is {values[0]!r:.40} and {values[1]!r:.40}"
    return f"their types are {one.metadata.message_type!r} and {other.metadata.message_type!r}"


def _mean_arrays(opened: _OpenSum, mean: SecureMean) -> ArrayRecord:
    """Base plus mean update, as FedAvg would average: in an array's own type, integers in float64."""
    new = {name: base if base.is_floating_point() else base.double() for name, base in opened.base.items()}
    for own, value in mean.update.items():
        base = new[opened.arrays.names[own]]
        new[opened.arrays.names[own]] = (base.double() + value.double()).to(base.dtype)
    return ArrayRecord({name: Array(value.numpy()) for name, value in new.items()})


def _layout(names: object, slots: int) -> list[tuple[str, int]] | None:
    """Return the metrics' names and lengths from a client's JSON; None if they do not fit the slots."""
    try:
        pairs = [(str(name), int(length)) for name, length in json.loads(str(names))]
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    lengths = [1 if length < 0 else length for _, length in pairs]
    return pairs if sum(lengths) <= slots else None
