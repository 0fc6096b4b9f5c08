"""Compressed updates for any Flower app: a mod for its `ClientApp` and a wrapper for its strategy.

    app = ClientApp(mods=[tofu.compress(Net, (3, 32, 32), ratio=200)])                # client
    strategy = tofu.Compressed(FedAvg(), Net, (3, 32, 32), ratio=200)                 # server

The mod replaces the arrays of a train reply with one payload, and keeps error feedback in the client's context. The
wrapper decodes the payload and passes plain replies to the inner strategy, which needs no change.
"""

import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedAvgM, FedXgbBagging, FedXgbCyclic, Result, Strategy
from flwr.serverapp.strategy.fedopt import FedOpt
from torch import Tensor

from tofu.compression.error_feedback import NEVER
from tofu.errors import PayloadError, RunError, SettingError
from tofu.flower.agreement import named_differences
from tofu.flower.client_state import load_arrays, load_feedback, save_arrays, save_feedback
from tofu.flower.internals import error_reply
from tofu.flower.policy import Policy
from tofu.flower.robust import Robust
from tofu.flower.update_codec import RECORD, VERSION, ArrayModel, UpdateCodec, codec_of, record_of, tensors_of
from tofu.flower.wrapper import (
    CLIPPED_BY_CLIENTS,
    CLIPPED_BY_SERVER,
    INDIVIDUAL,
    StrategyWrapper,
    TrainMod,
    only_arrays,
    reasons_of,
    refuse_around,
    unwrapped,
    with_record,
    with_records,
    wrappers,
)
from tofu.rng import derive_generator
from tofu.rounds.aggregation import gradient_diversity
from tofu.rounds.downlink import KeptWeights, ResyncError, WeightSteps, follow_steps
from tofu.rounds.optimizers import automatic_step
from tofu.rounds.steps import AddResidual, Compress, KeepResidual, Outgoing, apply_steps
from tofu.settings import python_call
from tofu.weights import FINGERPRINT_BYTES, explained_variance, load_weights, norm, weights_of
from tofu.wire import RECORD as STAGE
from tofu.wire import RESYNC

LOG = logging.getLogger("tofu.flower")
_OTHER_STRATEGY = "this client compresses its updates, but the server's strategy is not tofu.Compressed"


@python_call
def compress(*arguments: Any, **options: Any) -> "CompressMod":
    """Return a mod that compresses what a client sends; the strategy must be wrapped
    in `Compressed` with the same arguments.

    Args:
        *arguments: of `UpdateCodec`.
        **options: of `UpdateCodec`.

    Example:
        >>> import torch
        >>> from flwr.clientapp import ClientApp
        >>> app = ClientApp(mods=[compress(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
        ...                                (1, 8, 8), ratio=20)])
    """
    return CompressMod(codec_of(compress, arguments, options))


class CompressMod(TrainMod):
    """The client's part; Flower calls it around the app's train function."""

    name = "tofu.compress"

    def __init__(self, codec: UpdateCodec) -> None:
        self._codec, self._passed_on = codec, False

    def train(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Call the app and replace the arrays of its reply with one payload.

        A message without arrays and without the strategy's record is passed on unchanged.

        Raises:
            PayloadError: the server's strategy is another one, or the app's reply cannot be compressed.
            SettingError: the model computes something else than the server's.
            PolicyError: the client's policy refuses such rounds.
        """
        Policy.of(context).check_round("compressed", 0.0)
        if RECORD not in message.content and not message.content.array_records:
            self._note_passed_on(message)
            return call_next(message, context)
        codec, request = self._codec, _Request.of(message, self._codec)
        base, model = request.received(codec, context)
        model.check_outputs(request.outputs)
        arrays = request.arrays
        if arrays is None:
            message.content[request.key] = arrays = record_of(base)
        spec = model.reference.param_spec
        feedback, memory = load_feedback(context, spec, request.training)
        start = base
        if codec.step_ahead and codec.error_feedback:
            own = {name: base[array].float() for name, array in model.names.items() if name in spec.shapes}
            ahead = feedback.ahead(
                own, request.acknowledged, codec.step_ahead, spec.parameters, fraction=codec.error_feedback
            )  # fmt: skip
            start = base | {model.names[name]: ahead[name] for name in spec.parameters}
            message.content[request.key] = record_of(start, arrays)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        key, record = only_arrays(reply.content, "the app's train reply", request.key)
        del reply.content[key]
        compressor = codec.compressor(model.reference)
        generator = derive_generator(codec.seed, request.round, context.node_id, "encode")
        steps = (
            AddResidual(request.acknowledged, codec.error_feedback),
            Compress(compressor, model.reference, generator),
            KeepResidual(request.round, codec.error_feedback),
        )
        returned = tensors_of(record)
        update = model.update(codec.origin(start, returned), returned)
        outgoing = apply_steps(steps, Outgoing(update, feedback, memory))
        save_feedback(context, spec, request.training, outgoing.feedback, outgoing.memory)
        payload = codec.payload(compressor, model.reference, outgoing.body, request.round, request.identity)
        if codec.downlink:
            save_arrays(context, request.training, base, request.identity)
        names = {"names": list(returned)} if len(returned) < len(base) else {}
        reply.content[RECORD] = ConfigRecord({"payload": payload, **names})
        target = {name: outgoing.update[name] for name in spec.parameters}
        for metrics in reply.content.metric_records.values():
            metrics["tofu-payload-bytes"], metrics["tofu-ratio"] = len(payload), spec.float32_bytes / len(payload)
            metrics["tofu-explained-variance"] = explained_variance(target, outgoing.decoded)
            if codec.downlink:
                metrics["tofu-downlink-bytes"] = sum(map(len, request.steps)) or spec.float32_bytes
        return reply

    def _note_passed_on(self, message: Message) -> None:
        """Log a warning for the first train message without arrays. Raises PayloadError for one of secure sums."""
        if STAGE in message.content:
            raise PayloadError(_OTHER_STRATEGY)
        noted, self._passed_on = self._passed_on, True  # before the line is logged: clients may share this mod
        if not noted:
            LOG.warning("a train message without arrays was passed on: tofu.compress sends nothing of it smaller")


@dataclass(frozen=True)
class _Request:
    """The strategy's record in a train message, which is removed from it, and the arrays that came with it.

    Attributes:
        key: the array record's key.
        arrays: None if the client has to apply `steps` to the arrays that it keeps.
        identity, sketch: the arrays' identity and sketch, with a compressed downlink (`tofu.weights`).
        outputs: `output_sketch` of the server's model (`tofu.models.behavior`).
        training: see `Compressed.training`.
    """

    round: int
    acknowledged: int
    key: str
    arrays: ArrayRecord | None
    steps: tuple[bytes, ...] = ()
    identity: bytes = b""
    sketch: bytes = b""
    outputs: object = b""
    training: bytes = b""

    @staticmethod
    def of(message: Message, codec: UpdateCodec) -> "_Request":
        """Raises PayloadError if the server does not use `Compressed`, or uses it with other arguments."""
        record = message.content.config_records.get(RECORD)
        if record is None:
            raise PayloadError(_OTHER_STRATEGY)
        if record.get("version") != VERSION or record.get("digest") != codec.digest:
            named = named_differences(codec.text, record.get("arguments"), codec.defaults())
            raise PayloadError(
                "tofu.compress and tofu.Compressed (or tofu.hybrid and tofu.Hybrid) have different arguments "
                f"({named}): pass the same to both"
            )
        round_, acknowledged = record.get("round"), record.get("acknowledged")
        if not isinstance(round_, int) or not isinstance(acknowledged, int):
            found = f"round={str(round_)[:20]} and acknowledged={str(acknowledged)[:20]}"
            raise PayloadError(f"the server's record has {found}, expected whole numbers: use one version of tofu-fl")
        del message.content[RECORD]
        key = record.get("key")
        steps, identity, sketch = record.get("steps", []), record.get("identity", b""), record.get("sketch", b"")
        outputs, training = record.get("outputs"), record.get("training")
        training = training if isinstance(training, bytes) else b""
        if not codec.downlink:
            key, arrays = only_arrays(message.content, "the server's train message", key)
            return _Request(round_, acknowledged, key, arrays, outputs=outputs, training=training)
        if not (isinstance(identity, bytes) and len(identity) == FINGERPRINT_BYTES and isinstance(sketch, bytes)):
            raise PayloadError("the server's record lacks the identity or the sketch of its arrays")
        if not isinstance(steps, list) or not all(isinstance(step, bytes) for step in steps):
            raise PayloadError("the server's record has steps that are not bytes")
        if message.content.array_records and not steps:
            key, arrays = only_arrays(message.content, "the server's train message", key)
            return _Request(round_, acknowledged, key, arrays, (), identity, sketch, outputs, training)
        sent: tuple[bytes, ...] = tuple(steps)  # type: ignore[arg-type]
        return _Request(round_, acknowledged, str(key), None, sent, identity, sketch, outputs, training)

    def received(self, codec: UpdateCodec, context: Context) -> tuple[dict[str, Tensor], ArrayModel]:
        """Return the round's arrays, and the model with them as its weights.

        Raises:
            ResyncError: this client cannot build the arrays from the steps.
            PayloadError: the message fails validation.
        """
        if self.arrays is not None:
            base = tensors_of(self.arrays)
            return base, codec.reference(base)
        kept = load_arrays(context, self.training)
        if kept is None:
            raise ResyncError("this client does not have the arrays that the server's steps start from")
        base, before = kept
        model = codec.reference(base)
        reference = model.reference
        start = KeptWeights(weights_of(reference.model), before)
        follow_steps(
            reference, start, self.steps, self.round, codec.step_compressor(reference),
            identity=self.identity, sketch=self.sketch,
        )  # fmt: skip
        return model.replaced(base, weights_of(reference.model)), model


@dataclass(frozen=True)
class SentArrays:
    """The arrays of a train message.

    Attributes:
        key: the array record's key.
        record: as the inner strategy made it.
        base: its tensors by name, to which decoded updates are added.
        held: the arrays that the clients have: `base`, or with a compressed downlink the result of its steps.
        model: the model with the held arrays as its weights.
        identity: the held arrays' identity, with a compressed downlink.
    """

    key: str
    record: ArrayRecord
    base: dict[str, Tensor]
    held: dict[str, Tensor]
    model: ArrayModel
    identity: bytes = b""


class Compressed(StrategyWrapper):
    """A strategy whose train replies are compressed by `compress`; everything else is the inner strategy's.

    Args:
        inner: any strategy of Flower's Message API; it receives plain replies and is not changed.
        *arguments: of `UpdateCodec`, the same as given to `compress`.
        codec: an `UpdateCodec`, instead of its arguments.
        server_step: factor of the mean update of the trainable parameters: 1, or "auto", where each round chooses it
            (docs/error-feedback.md, "The server's step"). `compress` does not take it.
        **options: of `UpdateCodec`, the same as given to `compress`.

    Raises:
        SettingError: an argument is out of range, or the strategy cannot be wrapped, or not with `server_step="auto"`.

    Attributes:
        mod: name of the client's mod, for error messages.
        training: identifies one call of `start`; with the next one, clients forget what earlier ones left out.
        told: what else each message tells its client.

    Example:
        >>> import torch
        >>> from flwr.serverapp.strategy import FedAvg
        >>> net = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> strategy = Compressed(FedAvg(fraction_train=0.5), net, (1, 8, 8), ratio=20)
        >>> strategy.fraction_train
        0.5
    """

    @python_call
    def __init__(
        self, inner: Strategy, *arguments: Any, codec: UpdateCodec | None = None, server_step: float | str = 1,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(inner)
        if isinstance(unwrapped(inner), FedXgbBagging | FedXgbCyclic):
            accepted = "a strategy that aggregates arrays of numbers: trees have no difference that could be compressed"
            raise SettingError("strategy", type(unwrapped(inner)).__name__, accepted)
        if isinstance(unwrapped(inner), CLIPPED_BY_CLIENTS):
            accepted = "its server-side counterpart: what error feedback adds to clipped updates is not clipped"
            raise SettingError("strategy", type(unwrapped(inner)).__name__, accepted)
        if any("mod" in vars(wrapper) for wrapper in wrappers(inner)):
            accepted = "a strategy that gets plain replies, or tofu.Hybrid in the place of two wrappers"
            raise SettingError("strategy", type(inner).__name__, accepted)
        self.mod = "tofu.compress"
        self._codec, self.training = codec or codec_of(type(self), arguments, options), secrets.token_bytes(8)
        self.acknowledged: dict[int, int] = {}
        self.told: dict[str, bool] = {}
        self._sent: dict[int, SentArrays] = {}
        self._plain: dict[int, Message] = {}
        self._grid: Grid | None = None
        self._timeout = 3600.0
        self._steps: WeightSteps | None = None
        if server_step not in (1, "auto"):
            raise SettingError("server_step", server_step, '1 or "auto"')
        if server_step == "auto" and not (_only_averages(inner) and self._codec.has_model):
            accepted = "1, or FedAvg or FedProx inside, and the argument model, which tells parameters from buffers"
            raise SettingError("server_step", server_step, accepted)
        self._automatic, self._rounds, self._squares = server_step == "auto", 0, dict[int, float]()

    @property
    def codec(self) -> UpdateCodec:
        """The codec of the updates."""
        return self._codec

    @property
    def plain_messages(self) -> list[Message]:
        """The inner strategy's messages of this round."""
        return list(self._plain.values())

    def sent_to(self, node: int) -> "SentArrays | None":
        """Return the arrays that a node received in this round; None if it was not asked."""
        return self._sent.get(node)

    @python_call
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the inner strategy's messages, each with a record that says what its reply is relative to.

        Raises:
            SettingError: the arrays are not those of the model, or the compressor does not reach the ratio for them.
            RunError: the strategy sends a client two messages.
        """
        refuse_around(self, (*CLIPPED_BY_CLIENTS, *CLIPPED_BY_SERVER))
        self._codec.compressor(self._codec.reference(tensors_of(arrays)).reference)
        self._grid, self._sent, models = grid, {}, dict[int, SentArrays]()
        self._plain = {}
        for message in self._configure_train(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            if node in self._plain:
                raise RunError(
                    f"{type(self.inner).__name__} sends node {node} two train messages: expected one a round"
                )
            self._plain[node] = message
        name = getattr(self.inner, "arrayrecord_key", None)
        for node, message in self._plain.items():
            key, record = only_arrays(message.content, "the strategy's train message", name)
            if id(record) not in models:  # FedAvg sends the same record to all nodes
                models[id(record)] = self._prepared(key, record, server_round, first=not models)
            self._sent[node] = models[id(record)]
        return [self._request(node, server_round) for node in self._plain]

    def _prepared(self, key: str, record: ArrayRecord, round_: int, *, first: bool) -> SentArrays:
        """Return the arrays that clients hold when they train from `record`.

        Raises:
            RunError: the strategy sends clients different arrays although the downlink is compressed.
        """
        base = tensors_of(record)
        if not self._codec.downlink:
            return SentArrays(key, record, base, base, self._codec.reference(base))
        if not first:
            raise RunError(f"{type(self.inner).__name__} sends clients different arrays: expected downlink=0")
        if self._steps is None:
            self._master = self._codec.reference(base)
            compressor = self._codec.step_compressor(self._master.reference)
            self._steps = WeightSteps(self._master.reference, compressor, self._codec.seed)
        master, steps = self._master, self._steps
        load_weights(master.reference.model, master.own(base))
        steps.begin(round_, whole=not steps.identity)
        held = master.replaced(base, weights_of(steps.reference.model))
        model = ArrayModel(master.param_spec, master.names, steps.reference, tied=master.tied)
        return SentArrays(key, record, base, held, model, steps.identity)

    def _request(self, node: int, round_: int, *, whole: bool = False) -> Message:
        """Return the message to a node: with full arrays, or with the steps from the arrays that it holds."""
        sent, message = self._sent[node], self._plain[node]
        record = ConfigRecord({
            "version": VERSION, "round": round_, "acknowledged": self.acknowledged.get(node, NEVER),
            "digest": self._codec.digest, "key": sent.key, "outputs": sent.model.outputs, "training": self.training,
            "arguments": self._codec.text, **self.told,
        })  # fmt: skip
        if self._steps is None:
            return with_record(message, RECORD, record)
        parts = self._steps.parts(str(node), whole=whole)
        record["identity"], record["sketch"] = self._steps.identity, self._steps.sketch
        records = {**message.content, RECORD: record}
        if parts.steps:
            record["steps"] = list(parts.steps)
            del records[sent.key]
        else:
            records[sent.key] = record_of(sent.held, sent.record)
        return with_records(message, records)

    def _resent(self, replies: list[Message], round_: int) -> list[Message]:
        """Send full arrays to clients that could not apply the steps; return the replies with their new ones."""
        lost = {reply.metadata.src_node_id for reply in replies if reply.has_error() and reply.error.code == RESYNC}
        lost &= self._sent.keys()
        if not lost or self._steps is None or self._grid is None:
            return replies
        LOG.warning("round %d: full arrays are sent to %d clients that cannot use the steps", round_, len(lost))
        again = [self._request(node, round_, whole=True) for node in sorted(lost)]
        answers = list(self._grid.send_and_receive(again, timeout=self._timeout))
        return [reply for reply in replies if reply.metadata.src_node_id not in lost] + answers

    def start(self, *arguments: Any, **options: Any) -> Result:
        """Run the inner strategy's own `start`, which calls this wrapper's configure and aggregate steps."""
        self._timeout = float(options.get("timeout", self._timeout))
        bound = signature(self.inner.start).bind(*arguments, **options)
        bound.apply_defaults()
        self._rounds = int(bound.arguments.get("num_rounds", 0))
        self.begin()
        return super().start(*arguments, **options)

    def begin(self) -> None:
        """Forget an earlier training, whose weights have nothing to do with those to come."""
        self.training, self._steps = secrets.token_bytes(8), None
        self.acknowledged.clear()

    @python_call
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode every reply and pass plain ones to the inner strategy.

        Raises:
            RunError: no reply can be used. (Flower's strategies would continue without an update.)
        """
        decoded = [self._decoded(reply, server_round) for reply in self._resent(list(replies), server_round)]
        failed = [reply.error.reason for reply in decoded if reply.has_error()]
        if decoded and len(failed) == len(decoded):
            raise RunError(
                f"round {server_round}: no reply of {len(decoded)} clients can be used ({reasons_of(failed)})"
            )
        decoded = self._consistent(decoded, server_round)
        arrays, metrics = self._aggregate_train(server_round, decoded)
        if self._automatic and arrays is not None and metrics is not None:
            return self._stepped(arrays, metrics, [reply for reply in decoded if not reply.has_error()], server_round)
        return arrays, metrics

    def _stepped(
        self, arrays: ArrayRecord, metrics: MetricRecord, replies: list[Message], round_: int
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Multiply the mean update of the trainable parameters by the server's automatic step.

        Raises:
            RunError: the number of rounds is not known, or the strategy sends clients different arrays.
        """
        nodes = [reply.metadata.src_node_id for reply in replies]
        sent, key = self._sent[nodes[0]], getattr(self.inner, "weighted_by_key", "")
        if not self._rounds or any(self._sent[node] is not sent for node in nodes):
            raise RunError('server_step="auto" needs start(num_rounds=...) and equal arrays for all: expected 1')
        base, spec = self._codec.origin(sent.base), sent.model.param_spec
        mean = sent.model.update(base, tensors_of(arrays))
        metric = [record[key] for reply in replies for record in reply.content.metric_records.values()]
        weights = [float(value) for value in metric if not isinstance(value, list)]
        diversity = gradient_diversity([self._squares[node] for node in nodes], weights, norm(mean, spec) ** 2)
        step = 1.0 if diversity is None else automatic_step(diversity, round_, self._rounds)
        metrics["tofu-server-step"] = step
        mean |= {name: step * mean[name] for name in spec.parameters}
        full = record_of(sent.model.add(base, mean), sent.record)
        return ArrayRecord({name: full[name] for name in arrays}), metrics

    def _decoded(self, reply: Message, round_: int) -> Message:
        """Return the reply with arrays in place of its payload, or an error reply if the payload is not valid."""
        if reply.has_error():
            return reply
        node = reply.metadata.src_node_id
        record = reply.content.config_records.get(RECORD)
        try:
            if record is None:
                raise PayloadError(f"it sent no compressed update: add {self.mod}(...) to the mods of its ClientApp")
            if node not in self._sent:
                raise PayloadError(f"node {node} was not asked in this round")
            sent = self._sent[node]
            names = record.get("names", list(sent.record))
            if not isinstance(names, list) or not names or not set(names) <= sent.record.keys():
                raise PayloadError("it names arrays that it was not sent")
            update = self._codec.decode(sent.model.reference, record.get("payload"), round_, sent.identity)
        except PayloadError as error:
            LOG.warning("round %d: the reply of node %s is not usable: %s", round_, node, error)
            return error_reply(reply, str(error))
        del reply.content[RECORD]
        self._squares[node] = norm(update, sent.model.param_spec) ** 2
        full = record_of(sent.model.add(self._codec.origin(sent.base), update), sent.record)
        reply.content[sent.key] = ArrayRecord({name: array for name, array in full.items() if name in names})
        self.acknowledged[node] = round_
        if self._steps is not None:
            self._steps.delivered(str(node))
        return reply


def _only_averages(strategy: Strategy) -> bool:
    """Say whether the mean of the clients' arrays is a strategy's whole step."""
    inside = unwrapped(strategy)
    robust = any(isinstance(wrapper, Robust) for wrapper in wrappers(strategy))
    return isinstance(inside, FedAvg) and not isinstance(inside, (*INDIVIDUAL, FedAvgM, FedOpt)) and not robust
