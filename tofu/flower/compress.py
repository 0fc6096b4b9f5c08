"""Compressed updates for any Flower app: a mod for its `ClientApp` and a wrapper for its strategy.

    app = ClientApp(mods=[tofu.compress(Net, (3, 32, 32), ratio=200)])                # client
    strategy = tofu.Compressed(FedAvg(), Net, (3, 32, 32), ratio=200)                 # server

The mod replaces the arrays of a train reply by one payload, and keeps error feedback in the client's context. The
wrapper decodes it and gives plain replies to the inner strategy, which needs no change.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from tofu.compression.error_feedback import NEVER
from tofu.errors import PayloadError, RunError
from tofu.flower.feedback import load_feedback, save_feedback
from tofu.flower.internals import error_reply
from tofu.flower.policy import check_policy
from tofu.flower.update_codec import RECORD, VERSION, ArrayModel, UpdateCodec, record_of, tensors_of
from tofu.flower.wrapper import StrategyWrapper, TrainMod, only_arrays, reasons_of, with_record
from tofu.rng import derive_generator
from tofu.rounds.steps import AddResidual, Compress, KeepResidual, Outgoing, apply_steps
from tofu.weights import explained_variance

LOG = logging.getLogger("tofu.flower")


def compress(*arguments: Any, **options: Any) -> "CompressMod":
    """A mod that compresses what a client sends; the strategy must be wrapped in `Compressed` with the same arguments.

    Args:
        arguments, options: of `UpdateCodec`.

    Example:
        >>> import torch
        >>> from flwr.clientapp import ClientApp
        >>> app = ClientApp(mods=[compress(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
        ...                                (1, 8, 8), ratio=20)])
    """
    return CompressMod(UpdateCodec(*arguments, **options))


class CompressMod(TrainMod):
    """The client's half; Flower calls it around the app's train function."""

    def __init__(self, codec: UpdateCodec) -> None:
        self._codec = codec

    def train(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Call the app and replace the arrays of its reply by one payload.

        Raises:
            PayloadError: the server's strategy is another one, or the app's reply cannot be compressed.
            DataError: the node config refuses such rounds.
        """
        check_policy("proxy", 0.0, context)
        codec, request = self._codec, _Request.of(message, self._codec)
        base = tensors_of(request.arrays)
        model = codec.reference(base)
        spec = model.reference.param_spec
        feedback, memory = load_feedback(context, spec)
        start = base
        if codec.step_ahead and codec.error_feedback:
            own = {name: base[array].float() for name, array in model.names.items() if name in spec.shapes}
            ahead = feedback.ahead(
                own, request.acknowledged, codec.step_ahead, spec.parameters, fraction=codec.error_feedback
            )  # fmt: skip
            start = base | {model.names[name]: ahead[name] for name in spec.parameters}
            message.content[request.key] = record_of(start, request.arrays)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        key, record = only_arrays(reply.content, "the app's train reply")
        del reply.content[key]
        compressor = codec.compressor(model.reference)
        generator = derive_generator(codec.seed, request.round, context.node_id, "encode")
        steps = (
            AddResidual(request.acknowledged, codec.error_feedback),
            Compress(compressor, model.reference, generator),
            KeepResidual(request.round, codec.error_feedback),
        )
        outgoing = apply_steps(steps, Outgoing(model.update(start, tensors_of(record)), feedback, memory))
        save_feedback(context, spec, outgoing.feedback, outgoing.memory)
        payload = codec.payload(compressor, model.reference, outgoing.body, request.round)
        reply.content[RECORD] = ConfigRecord({"payload": payload})
        target = {name: outgoing.update[name] for name in spec.parameters}
        for metrics in reply.content.metric_records.values():
            metrics["tofu-payload-bytes"] = len(payload)
            metrics["tofu-ratio"] = spec.float32_bytes / len(payload)
            metrics["tofu-explained-variance"] = explained_variance(target, outgoing.decoded)
        return reply


class _Request:
    """The strategy's record in a train message, and the arrays that the reply is relative to."""

    def __init__(self, round_: int, acknowledged: int, key: str, arrays: ArrayRecord) -> None:
        self.round, self.acknowledged, self.key, self.arrays = round_, acknowledged, key, arrays

    @staticmethod
    def of(message: Message, codec: UpdateCodec) -> "_Request":
        """Raises PayloadError if the server does not use `Compressed`, or uses it with other arguments."""
        record = message.content.config_records.get(RECORD)
        if record is None:
            raise PayloadError("this client compresses its updates, but the server's strategy is not tofu.Compressed")
        if record.get("version") != VERSION or record.get("digest") != codec.digest:
            raise PayloadError("tofu.compress and tofu.Compressed have different arguments: pass the same to both")
        round_, acknowledged = record.get("round"), record.get("acknowledged")
        if not isinstance(round_, int) or not isinstance(acknowledged, int):
            raise PayloadError("the server's record lacks round or acknowledged")
        key, arrays = only_arrays(message.content, "the server's train message")
        return _Request(round_, acknowledged, key, arrays)


@dataclass(frozen=True)
class SentArrays:
    """The arrays of a train message: their key, the record, its tensors by name, and the model that they belong to."""

    key: str
    record: ArrayRecord
    base: dict[str, Tensor]
    model: ArrayModel


class Compressed(StrategyWrapper):
    """A strategy whose train replies are compressed by `compress`; everything else is the inner strategy's.

    Args:
        inner: any strategy of Flower's Message API; it receives plain replies and is not changed.
        arguments, options: of `UpdateCodec`, the same as given to `compress`.
        codec: an `UpdateCodec`, instead of its arguments.

    Attributes:
        mod: name of the client's half, for messages.

    Example:
        >>> import torch
        >>> from flwr.serverapp.strategy import FedAvg
        >>> net = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> strategy = Compressed(FedAvg(fraction_train=0.5), net, (1, 8, 8), ratio=20)
        >>> strategy.fraction_train
        0.5
    """

    def __init__(self, inner: Strategy, *arguments: Any, codec: UpdateCodec | None = None, **options: Any) -> None:
        super().__init__(inner)
        self.mod = "tofu.compress"
        self._codec = codec or UpdateCodec(*arguments, **options)
        self.acknowledged: dict[int, int] = {}
        self._sent: dict[int, SentArrays] = {}

    @property
    def codec(self) -> UpdateCodec:
        """How updates are coded."""
        return self._codec

    def sent_to(self, node: int) -> "SentArrays | None":
        """What a node was sent in this round; None if it was not asked."""
        return self._sent.get(node)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages, each with a record that says what its reply is relative to.

        Raises:
            SettingError: the arrays are not those of the model, or the compressor does not reach the ratio for them.
        """
        self._codec.compressor(self._codec.reference(tensors_of(arrays)).reference)
        self._sent, models, messages = {}, {}, []
        for message in self._configure_train(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            key, record = only_arrays(message.content, "the strategy's train message")
            if id(record) not in models:  # FedAvg sends the same record to all nodes
                base = tensors_of(record)
                models[id(record)] = SentArrays(key, record, base, self._codec.reference(base))
            self._sent[node] = models[id(record)]
            acknowledged = self.acknowledged.get(node, NEVER)
            request = ConfigRecord(
                {"version": VERSION, "round": server_round, "acknowledged": acknowledged, "digest": self._codec.digest}
            )
            messages.append(with_record(message, RECORD, request))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode every reply and hand plain ones to the inner strategy.

        Raises:
            RunError: no reply can be used. Flower's strategies would go on and end without having learned anything.
        """
        decoded = [self._decoded(reply, server_round) for reply in replies]
        failed = [reply.error.reason for reply in decoded if reply.has_error()]
        if decoded and len(failed) == len(decoded):
            raise RunError(
                f"round {server_round}: no reply of {len(decoded)} clients can be used ({reasons_of(failed)})"
            )
        return self._aggregate_train(server_round, decoded)

    def _decoded(self, reply: Message, round_: int) -> Message:
        """The reply with arrays in the place of its payload, or an error reply if the payload cannot be trusted."""
        if reply.has_error():
            return reply
        node = reply.metadata.src_node_id
        record = reply.content.config_records.get(RECORD)
        if record is None:
            raise RunError(f"node {node} sent no compressed update: add {self.mod}(...) to the mods of its ClientApp")
        try:
            if node not in self._sent:
                raise PayloadError(f"node {node} was not asked in this round")
            sent = self._sent[node]
            update = self._codec.decode(sent.model.reference, record.get("payload"), round_)
        except PayloadError as error:
            LOG.warning("round %d: the reply of node %s is not usable: %s", round_, node, error)
            return error_reply(reply, str(error))
        del reply.content[RECORD]
        reply.content[sent.key] = record_of(sent.model.add(sent.base, update), sent.record)
        self.acknowledged[node] = round_
        return reply
