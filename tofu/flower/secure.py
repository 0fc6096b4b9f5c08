"""Secure sums for any Flower app: a mod for its `ClientApp` and a wrapper for its strategy.

    app = ClientApp(mods=[tofu.secure()])                                             # client
    strategy = tofu.SecureAggregation(FedAvg())                                       # server

The server receives masked arrays, of which only the sum can be read, weighted by the clients' numbers of examples. The
inner strategy gets one reply, with the mean of the arrays and of the metrics. docs/secure-aggregation.md says what is
guaranteed, and what is not. All stages of the protocol travel as train messages, because Flower calls mods only around
functions that the app has registered.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedMedian,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    MultiKrum,
    QFedAvg,
    Result,
    Strategy,
)
from torch import Tensor

from tofu.compression.error_feedback import NEVER, ErrorFeedback
from tofu.errors import PayloadError, RunError, SettingError
from tofu.flower.client_state import load_feedback, save_feedback
from tofu.flower.compress import Compressed
from tofu.flower.internals import content_reply
from tofu.flower.policy import Policy
from tofu.flower.secure_options import MIN_CLIENTS, VERSION, RangeTracker, SecureOptions
from tofu.flower.secure_session import answer_query, load_session, mask_once, participant_of, session_name
from tofu.flower.secure_stages import AbandonedError, SecureExchange, abandoning
from tofu.flower.transport import GridTransport
from tofu.flower.update_codec import ArrayNames, UpdateCodec, tensors_of
from tofu.flower.wrapper import StrategyWrapper, TrainMod, only_arrays, reasons_of, unwrapped, with_record, wrappers
from tofu.imports import code_digest
from tofu.privacy import Accountant
from tofu.rng import derive_bytes
from tofu.rounds.steps import (
    AddResidual,
    Clip,
    EncodeInRing,
    KeepResidual,
    Outgoing,
    UpdateStep,
    apply_steps,
    check_noise_grid,
)
from tofu.secagg.encoding import EncodingConfig, RingEncoder, SecureMean, purpose_of
from tofu.secagg.identities import read_known
from tofu.secagg.messages import Advert
from tofu.secagg.server import ServerSession, check_signature
from tofu.wire import FIELD, SecurePart, SecureQuery, run_name
from tofu.wire import RECORD as STAGE

LOG = logging.getLogger("tofu.flower")

RECORD = "tofu-secure"
"""Key of the `ConfigRecord` that the strategy adds to a train message, and the mod to its reply."""

INDIVIDUAL: tuple[type[Strategy], ...] = (
    Bulyan, Compressed, DifferentialPrivacyClientSideAdaptiveClipping, DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping, DifferentialPrivacyServerSideFixedClipping, FedMedian,
    FedTrimmedAvg, FedXgbBagging, FedXgbCyclic, MultiKrum, QFedAvg,
)  # fmt: skip
"""Strategies that look at every client's reply."""


def secure(**options: Any) -> "SecureMod":
    """A mod that masks what a client sends; the strategy must be wrapped in `SecureAggregation` with equal options.

    It should be the first of the app's mods, so that others see plain messages.

    Args:
        options: of `SecureOptions`.

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> app = ClientApp(mods=[secure()])
    """
    return SecureMod(SecureOptions(**options))


class SecureMod(TrainMod):
    """The client's half. The node config may have the entries that `tofu.flower.secure_session` lists."""

    name = "tofu.secure"

    def __init__(self, options: SecureOptions, codec: UpdateCodec | None = None) -> None:
        self._options, self._codec = options, codec

    def train(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer a stage of the protocol, or call the app and mask what it returns.

        Raises:
            PayloadError: the server's message is not one of `SecureAggregation`, or asks for something unsafe.
            PolicyError: the client's policy refuses such rounds.
        """
        options = self._options
        participant = participant_of(context, session_name(context), options.collusion)
        stage = message.content.config_records.get(STAGE)
        if stage is not None:
            answer = answer_query(SecureQuery.from_bytes(stage.get(FIELD)), context, participant)
            return Message(RecordDict({STAGE: ConfigRecord({FIELD: answer.to_bytes()})}), reply_to=message)
        policy = Policy.of(context)
        policy.check_round("secure", options.noise_multiplier)
        policy.check_identity(identified=participant.identity is not None)
        request = _SecureRequest.of(message, options, self._codec)
        encoder = request.encoder
        session = load_session(context, participant)
        if session.purpose != request.purpose:
            raise PayloadError(
                "this client was sent other arrays, records or ranges than all clients of this sum agreed on"
            )
        noise = options.noise_in_sum(session.topology, session.members, encoder)
        check_noise_grid(noise, encoder.levels, request.config.unit_weight, request.config.ranges)
        policy.check_sum_noise(noise, session, participant)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        trained = _Trained.of(reply, request, options)
        spec, kept = request.names.param_spec, bool(options.error_feedback)
        feedback, memory = load_feedback(context, spec) if kept else (ErrorFeedback(), b"")
        # A server that lies may not have the last vector sent again, next to others that it makes almost zero.
        acknowledged = request.acknowledged if participant.identity is None else feedback.sent_round
        steps: list[UpdateStep] = [AddResidual(acknowledged, options.error_feedback)]
        if noise:
            steps.append(Clip(options.clip_norm, spec))
        seed = derive_bytes(0, request.round, participant.name, "round")
        steps.append(EncodeInRing(encoder, trained.examples, 0.0, seed, options.metric_sums(trained.values), noise))
        steps.append(KeepResidual(request.round, options.error_feedback))
        outgoing = apply_steps(steps, Outgoing(trained.update, feedback, memory))
        assert outgoing.vector is not None
        try:
            masked = mask_once(context, session, participant, request.round, outgoing.vector, request.shares)
        except ValueError as error:
            raise PayloadError(f"this client's model differs from the server's: {error}") from error
        if kept:
            save_feedback(context, spec, outgoing.feedback, outgoing.memory)
        record = ConfigRecord({"masked": masked, "metrics": trained.names})
        return Message(RecordDict({RECORD: record}), reply_to=message)


@dataclass(frozen=True)
class _SecureRequest:
    """The strategy's record in a train message, which is removed from it, and what the reply is relative to."""

    round: int
    acknowledged: int
    weight_key: str
    base: dict[str, Tensor]
    names: ArrayNames
    config: EncodingConfig
    shares: bytes
    encoder: RingEncoder
    purpose: bytes

    @staticmethod
    def of(message: Message, options: SecureOptions, codec: UpdateCodec | None) -> "_SecureRequest":
        """Raises PayloadError if the server does not use `SecureAggregation`, or uses it with other options."""
        record = message.content.config_records.get(RECORD)
        if record is None:
            raise PayloadError(
                "this client sends masked updates only, but the server's strategy is not tofu.SecureAggregation"
            )
        if record.get("version") != VERSION or record.get("digest") != joint_digest(options, codec):
            raise PayloadError("tofu.secure and tofu.SecureAggregation have different options: pass the same to both")
        round_, acknowledged, key = record.get("round"), record.get("acknowledged"), record.get("weight-key")
        if not isinstance(round_, int) or not isinstance(acknowledged, int) or not isinstance(key, str):
            raise PayloadError("the server's record lacks round, acknowledged or weight-key")
        part = SecurePart.from_bytes(record.get("part"))
        del message.content[RECORD]
        _, arrays = only_arrays(message.content, "the server's train message")
        base, config = tensors_of(arrays), EncodingConfig.from_bytes(part.terms)
        if config.fraction < 1 or (config.nearest_rounding and options.error_feedback != 1):
            raise PayloadError("encoding config omits or rounds values that this client would not send later")
        names = codec.reference(base) if codec else ArrayNames.of(base)
        encoder = RingEncoder(names.param_spec, config, options.declared)
        purpose = purpose_of(config, base, content_digest(message.content, key), *meaning(round_, options, codec))
        return _SecureRequest(round_, acknowledged, key, base, names, config, part.shares, encoder, purpose)


@dataclass(frozen=True)
class _Trained:
    """What an app's train reply contributes to the sums.

    Attributes:
        update: returned minus received arrays, float32.
        examples: its weight, 1 with noise.
        values: metrics times examples, in the order of `names`.
        names: the metrics as JSON, [[name, length of the list or -1], ...]; "" if they cannot be summed.
    """

    update: dict[str, Tensor]
    examples: int
    values: list[float]
    names: str

    @staticmethod
    def of(reply: Message, request: _SecureRequest, options: SecureOptions) -> "_Trained":
        """Raises PayloadError if the reply cannot be averaged."""
        _, record = only_arrays(reply.content, "the app's train reply")
        update = request.names.update(request.base, tensors_of(record))
        metrics = {name: value for part in reply.content.metric_records.values() for name, value in part.items()}
        weight = metrics.pop(request.weight_key, None)
        if isinstance(weight, list) or weight is None or weight != int(weight) or weight < 1:
            raise PayloadError(f"metric {request.weight_key}={weight} is not usable: expected a whole number above 0")
        if options.noise_multiplier:
            return _Trained(update, 1, [], "[]")
        named, values = [], list[float]()
        for name in sorted(metrics):
            value = metrics[name]
            named.append([name, len(value) if isinstance(value, list) else -1])
            values += [float(part) * int(weight) for part in (value if isinstance(value, list) else [value])]
        if len(values) > options.metrics or not all(options.fits(value) for value in values):
            return _Trained(update, int(weight), [], "")
        return _Trained(update, int(weight), values, json.dumps(named))


@dataclass
class _OpenSum:
    """A secure round between its keys and its sum.

    Attributes:
        names: node -> name in the session.
        key: of the array record.
        metrics: name -> the names of its metrics, as it sent them.
    """

    session: ServerSession
    exchange: SecureExchange
    encoder: RingEncoder
    config: EncodingConfig
    names: dict[int, str]
    key: str
    base: dict[str, Tensor]
    arrays: ArrayNames
    metrics: dict[str, object] = field(default_factory=dict)
    masked_bytes: int = 0


class SecureAggregation(StrategyWrapper):
    """A strategy that receives one reply: the mean of the clients' arrays and metrics, from a secure sum.

    Args:
        inner: a strategy that averages (FedAvg, FedAvgM, FedProx, FedAdam, FedAdagrad, FedYogi, or your own).
        identities: file with the clients' public keys (`tofu deploy identities`), against a server that lies.
        stage_timeout: seconds that clients have for each stage of the protocol other than training.
        delta: of the differential privacy that `tofu-epsilon` in the metrics accounts for.
        codec: names what the model trains; without it all arrays are summed.
        options: of `SecureOptions`, the same as given to `secure`.

    Attributes:
        mod: name of the client's half, for messages.
        acknowledged: node -> last round whose sum its update is in.

    Raises:
        SettingError: the inner strategy needs the individual updates, or an option is out of range.

    Example:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> SecureAggregation(FedAvg(fraction_train=0.5)).fraction_train
        0.5
    """

    def __init__(
        self, inner: Strategy, *, identities: str | Path | None = None, stage_timeout: float = 300.0,
        delta: float = 1e-5, codec: UpdateCodec | None = None, **options: Any,
    ) -> None:  # fmt: skip
        core = unwrapped(inner)
        if any(isinstance(wrapper, SecureAggregation) for wrapper in wrappers(inner)):
            raise SettingError("strategy", "SecureAggregation", "a strategy that is not wrapped in it already")
        if isinstance(core, INDIVIDUAL) or isinstance(inner, INDIVIDUAL):
            accepted = "one that averages updates: a secure sum contains no individual ones"
            raise SettingError("strategy", type(inner if isinstance(inner, INDIVIDUAL) else core).__name__, accepted)
        super().__init__(inner)
        self.mod = "tofu.secure"
        self._options, self._codec = SecureOptions(**options), codec
        self._known = read_known(Path(identities)) if identities else None
        self._seconds = stage_timeout
        self._ranges = RangeTracker(self._options)
        self._accountant = Accountant(delta)
        self._adverts: dict[int, bytes] = {}
        self._owners: dict[str, int] = {}
        self.acknowledged: dict[int, int] = {}
        self._open: _OpenSum | None = None
        self._summed, self._abandoned = 0, ""

    def start(self, *arguments: Any, **options: Any) -> Result:
        """Run the inner strategy's own `start` with secure sums.

        Raises:
            RunError: every round was abandoned because too few clients remained.
        """
        self._summed, self._abandoned, self._owners = 0, "", {}
        result = super().start(*arguments, **options)
        if self._abandoned and not self._summed:
            raise RunError(f"no round could be summed: {self._abandoned}")
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages to the clients that exchanged keys and shares; none if the round is abandoned.

        Raises:
            RunError: no client sent keys, or the inner strategy sends different messages to different clients.
            SettingError: the ring has too few bits for the clients.
        """
        self._open = None
        messages = list(self._configure_train(server_round, arrays, config, grid))
        if not messages:
            return []
        _check_equal(messages, self.inner)
        nodes = [message.metadata.dst_node_id for message in messages]
        try:
            parts = self._exchange_keys(messages[0], nodes, server_round, GridTransport(grid))
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
                    "version": VERSION, "round": server_round, "acknowledged": self.acknowledged.get(node, NEVER),
                    "digest": joint_digest(self._options, self._codec), "weight-key": self._weight_key, "part": part,
                })  # fmt: skip
                requests.append(with_record(message, RECORD, record))
        return requests

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Sum the masked replies, remove the masks from the sum, and hand its mean to the inner strategy.

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
                self.acknowledged[node] = server_round
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
        """Run the stages before training -> session name -> what its train message carries.

        Raises:
            AbandonedError: too few clients take part.
            RunError: no client sent keys.
        """
        options = self._options
        names, adverts = self._collect_keys(message, nodes, round_, transport)
        clients = {name: node for node, name in names.items()}
        exchange = SecureExchange(
            transport, clients, round_, self._seconds, action=message.metadata.message_type
        )  # fmt: skip
        key, record = only_arrays(message.content, "the strategy's train message")
        base = tensors_of(record)
        arrays = self._codec.reference(base) if self._codec else ArrayNames.of(base)
        config, encoder = self._ranges.encoding(arrays.own(base), arrays.param_spec, max(len(names), MIN_CLIENTS))
        session = ServerSession(
            run_name(transport.run_id), round_, values=encoder.length, bits=config.bits, known=self._known,
            purpose=purpose_of(
                config, base, content_digest(message.content, self._weight_key),
                *meaning(round_, options, self._codec),
            ),
        )  # fmt: skip
        shares = exchange.share_keys(session, adverts, options.topology, min_clients=MIN_CLIENTS)
        self._open = _OpenSum(session, exchange, encoder, config, names, key, base, arrays)
        return {name: SecurePart(config.to_bytes(), part).to_bytes() for name, part in shares.items()}

    def _collect_keys(
        self, message: Message, nodes: list[int], round_: int, transport: GridTransport
    ) -> tuple[dict[int, str], dict[str, bytes]]:
        """The clients' names by node, and their keys by name; clients that sent none ahead are asked."""
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
                # Keys of an earlier round that another node sends again are signed, too.
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
        """Add the masked vectors to the sum -> one of the replies. Raises RunError if none can be used."""
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
        """The clients' mean metrics, and those of the secure round."""
        metrics = MetricRecord({
            self._weight_key: mean.examples,
            "tofu-clients": len(survivors),
            "tofu-clipped": mean.clipped,
            "tofu-payload-bytes": opened.masked_bytes,
        })  # fmt: skip
        if self._options.noise_multiplier:
            metrics["tofu-epsilon"] = self._accountant.spend(self._options.noise_multiplier, "secure")
        named = {opened.metrics.get(name) for name in survivors}
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


def joint_digest(options: SecureOptions, codec: UpdateCodec | None) -> bytes:
    """Identifies what both ends must have in common."""
    return options.digest + (codec.digest if codec else b"")


def meaning(round_: int, options: SecureOptions, codec: UpdateCodec | None) -> tuple[bytes, ...]:
    """What clients of one sum must have alike besides its encoding and the message: round, options and Tofu's code."""
    return round_.to_bytes(8, "little", signed=True), joint_digest(options, codec), code_digest("tofu")


def content_digest(content: RecordDict, weight_key: str) -> bytes:
    """Digest of the key of a message's arrays and of all its other records, 32 bytes."""
    digest = hashlib.sha256(repr(weight_key).encode())
    for key, record in sorted(content.items()):
        values = [] if isinstance(record, ArrayRecord) else sorted(record.items())
        digest.update(repr((key, type(record).__name__, values)).encode())
    return digest.digest()


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
                f"{type(inner).__name__} sends different messages to different clients, whose updates cannot be summed"
            )


def _mean_arrays(opened: _OpenSum, mean: SecureMean) -> ArrayRecord:
    """Base plus mean update, as FedAvg would average: in an array's own type, integers in float64."""
    new = {name: base if base.is_floating_point() else base.double() for name, base in opened.base.items()}
    for own, value in mean.update.items():
        base = new[opened.arrays.names[own]]
        new[opened.arrays.names[own]] = (base.double() + value.double()).to(base.dtype)
    return ArrayRecord({name: Array(value.numpy()) for name, value in new.items()})


def _layout(names: object, slots: int) -> list[tuple[str, int]] | None:
    """The metrics' names and lengths from a client's JSON; None if they do not fit the slots."""
    try:
        pairs = [(str(name), int(length)) for name, length in json.loads(str(names))]
    except (ValueError, TypeError):
        return None
    lengths = [1 if length < 0 else length for _, length in pairs]
    return pairs if sum(lengths) <= slots else None
