"""The Flower ClientApp: thin handlers that unpack, call and pack.

Node config: `partition-id` (the client's number; its images are that share of the run's dataset), or `data`, a folder
with this client's own images, and optionally `partition-id` as its name; `device`, where it trains and encodes. What a
client insists on, whatever a run asks for: `allowed-rounds`, the kinds of round that it takes part in ("secure" or
"proxy,secure"), and `min-noise-multiplier`, below which noise-multiplier may not be. For secure rounds see `client.secure`.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.downlink import ResyncError, receive_weights
from client.secure import answer_query, load_session, new_advert, participant_of, save_session
from client.state import KeptWeights, load_broadcast, load_plugins, load_state, save_state
from tofu.compression.error_feedback import ErrorFeedback
from tofu.data import ImageShape, LabeledImages, local_folder
from tofu.device import open_device
from tofu.errors import DataError, PayloadError, TofuError
from tofu.log import about, start_logging
from tofu.models import build_model
from tofu.payload import Payload
from tofu.plugins import MAX_STATE_BYTES, export_to_bytes
from tofu.privacy import check_param_spec, clip
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_bytes, derive_generator
from tofu.secagg.encoding import EncodingConfig, RingEncoder, flat, purpose_of
from tofu.settings import Settings
from tofu.settings.deprecated import present_node_config
from tofu.tasks import only_classes
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, cosine, difference, explained_variance, load_weights, weights_of
from tofu.wire import FIELD, RECORD, RESYNC, SECURE, SecurePart, SecureQuery, TrainReply, TrainRequest, broadcast_id

LOG = logging.getLogger("tofu.client")

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say who this client is: its name, and how many images it has."""
    with _answering("hello", message, context) as answer:
        settings = Settings.of(context.run_config)
        data = client_data(settings, context)
        examples = 1 if settings.noise_multiplier else len(data)
        answer.record = ConfigRecord({"client": client_name(context), "examples": examples})
    return answer.message


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: train locally, compress the update, reply with one payload."""
    with _answering("train", message, context) as answer:
        settings = Settings.of({**context.run_config, **_device_of(context)})
        torch.set_num_threads(settings.threads)
        request = TrainRequest.from_bytes(_content(message))
        answer.fields["kind"] = request.kind
        round_ = int(message.metadata.group_id)
        answer.record = ConfigRecord({FIELD: train_round(request, round_, settings, context)})
    return answer.message


@app.query(SECURE)
def secure(message: Message, context: Context) -> Message:
    """A stage of a secure round other than the training."""
    with _answering("secure", message, context) as answer:
        query = SecureQuery.from_bytes(_content(message))
        answer.fields["stage"] = query.stage
        made = answer_query(query, context, participant_of(context, client_name(context)))
        answer.record = ConfigRecord({FIELD: made.to_bytes()})
    return answer.message


@dataclass
class _Answer:
    """The reply to a message: `record`, unless an error is the `message`; and what the log says beside it."""

    to: Message
    record: ConfigRecord = field(default_factory=ConfigRecord)
    error: Error | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> Message:
        if self.error is not None:
            return Message(self.error, reply_to=self.to)
        return Message(RecordDict({RECORD: self.record}), reply_to=self.to)


@contextmanager
def _answering(what: str, message: Message, context: Context) -> Iterator[_Answer]:
    """Make an answer, and log how that went. An error that someone can act on becomes the answer."""
    began, answer, group = time.perf_counter(), _Answer(message), message.metadata.group_id
    round_ = int(group) if group.isdecimal() else None

    def log(level: int, event: str, **fields: Any) -> None:
        extra = about(
            run=context.run_id, round=round_, node=context.node_id, client=client_name(context), what=what,
            **answer.fields, seconds=round(time.perf_counter() - began, 3), **fields,
        )  # fmt: skip
        LOG.log(level, event, extra=extra, exc_info=level >= logging.ERROR)

    try:
        start_logging(str(context.run_config.get("log", "text")))
        yield answer
        sent = answer.record.get(FIELD)
        log(logging.INFO, "answered", bytes=len(sent) if isinstance(sent, bytes) else 0)
    except TofuError as error:
        answer.error = Error(code=RESYNC if isinstance(error, ResyncError) else 0, reason=str(error))
        log(logging.WARNING, "failed", reason=str(error))
    except Exception as error:
        log(logging.ERROR, "failed", reason=f"{type(error).__name__}: {error}")
        raise


def train_round(request: TrainRequest, round_: int, settings: Settings, context: Context) -> bytes:
    """Train, then compress or mask; error feedback and the codec's memory live in `context.state`.

    Returns:
        A `TrainReply`, or in a secure round a masked vector (`tofu.secagg.messages.Masked`).

    Raises:
        ResyncError: this client must be sent the weights whole.
        TofuError: the weights are not what they should be, the data does not fit, or training diverged.
    """
    check_terms(request.kind, settings, context)
    client = client_name(context)
    plugins = settings.make_plugins()
    about = settings.round_context(request.shape, round_, client, group=plugins.group_of(client))
    broadcast = load_broadcast(context) if request.kept else request.broadcast
    if request.kept and broadcast_id(broadcast) != request.kept:
        raise ResyncError("this client has not kept what the plugins broadcast")
    plugins.load(state=load_plugins(context), broadcast=broadcast, max_bytes=MAX_STATE_BYTES)
    built = build_model(settings.model, request.shape, norm=settings.norm, seed=settings.seed)
    network = ReferenceModel.of(built, request.shape, plugins, about)
    model = network.model
    initial = flat(weights_of(model)) if request.kind == "secure" else None
    state = load_state(context, network.param_spec)
    receive_weights(request, round_, network, state.kept, settings.make_downlink(network))
    base = weights_of(model)
    share = settings.residual_fraction
    feedback = state.feedback if share else ErrorFeedback()
    start = feedback.ahead(base, request.acknowledged, settings.step_ahead, network.param_spec.parameters, share=share)
    load_weights(model, start)

    stream = settings.task_stream(request.shape.classes)
    task = stream.number(about.task, client)
    data = client_data(settings, context)
    check_fit(data, request.shape)
    data = stream.images_of(data, task)
    how = LocalTrainingConfig(
        settings.local_epochs, settings.batch_size, settings.lr_of(round_), settings.momentum, settings.weight_decay
    )
    generator = derive_generator(settings.seed, round_, client, "train")
    with only_classes(model, stream.strata_of(task)) if settings.task_heads == "multi" else nullcontext():
        result = train_locally(
            model, data, how, generator=generator, plugins=plugins, final=about.final,
            device=open_device(settings.device),
        )  # fmt: skip
    exported = plugins.export(model)
    update = difference(weights_of(model), start)
    load_weights(model, base)  # the codec differentiates at the base weights
    model.eval()
    target = feedback.target(update, request.acknowledged, share=share)
    examples, loss = len(data), result.loss
    if settings.noise_multiplier:
        # Of a client nothing leaves that has no noise: neither its number of images nor its loss.
        examples, loss = 1, 0.0
        check_param_spec(network.param_spec)
        target, _ = clip(target, settings.clip_norm)

    if request.kind == "secure":
        seed = derive_bytes(settings.seed, round_, client, "round")
        part = SecurePart.from_bytes(request.secure)
        terms = EncodingConfig.from_bytes(part.terms)
        if terms.nearest_rounding and share != 1:
            raise PayloadError("encoding config has nearest_rounding, expected error-feedback 1 and no noise")
        moved = flat(base) - initial if terms.fraction < 1 and initial is not None else None
        code = RingEncoder(network.param_spec, terms, plugins.declare_sums(model), moved)
        if code.digest != terms.digest:
            raise ResyncError("the weights lead to other places than the server's")
        session = load_session(context, participant_of(context, client))
        if session.purpose != purpose_of(terms, base, broadcast):
            raise ResyncError("the weights or the terms are not those that all clients of this sum were told of")
        if noise := settings.noise_in_sum(session.topology, session.members, levels=code.levels, values=code.values):
            fit = noise.grid * code.levels
            if terms.unit_weight != 1 or any(not math.isclose(range_, fit, rel_tol=1e-6) for range_ in terms.ranges):
                raise PayloadError("secure terms have ranges that do not fit the noise of this run")
            target = noise.add(target)
        encoded = code.encode(target, examples, loss, seed, exported.sums, silent=bool(noise))
        masked = session.mask_input(encoded.vector, part.shares)
        save_session(context, session)
        sent = _Sent(masked, encoded.decoded)
    else:
        if noise := settings.noise():
            target = noise.add(target)
        generator = derive_generator(settings.seed, round_, client, "encode")
        compressor = settings.make_compressor(request.kind, network)
        began = time.perf_counter()
        made = compressor.compress(
            network, target, generator=generator, memory=state.memory if request.kind != "full" else b""
        )
        parameters = {name: target[name] for name in network.param_spec.parameters}
        reply = TrainReply(
            examples=examples,
            train_loss=loss,
            explained_variance=explained_variance(parameters, made.decoded),
            cosine=cosine(parameters, made.decoded),
            train_seconds=result.seconds,
            encode_seconds=time.perf_counter() - began,
            payload=Payload(compressor.code, round_, request.identity, made.body).to_bytes(),
            advert=new_advert(context, participant_of(context, client)) if request.advert else b"",
            exported=export_to_bytes(exported) if plugins else b"",
        )
        sent = _Sent(reply.to_bytes(), made.decoded, made.memory)
    save_state(
        context,
        network.param_spec,
        feedback=ErrorFeedback.after(target, sent.decoded, round_) if share else None,
        memory=sent.memory or state.memory,
        kept=KeptWeights(base, request.identity) if settings.downlink != "full" else None,
        plugins=plugins.state_bytes(max_bytes=MAX_STATE_BYTES),
        broadcast=broadcast,
    )
    return sent.reply


@dataclass(frozen=True)
class _Sent:
    """A reply, what of the update it delivers, and the codec's memory."""

    reply: bytes
    decoded: Weights
    memory: bytes = b""


def client_name(context: Context) -> str:
    """The client's name in ledger and logs: its partition, or its node's number where it has none."""
    return str(context.node_config.get("partition-id", context.node_id))


def _device_of(context: Context) -> dict[str, str]:
    """Where this client's node config says that it trains and encodes, whatever a run asks for."""
    device = context.node_config.get("device")
    return {} if device is None else {"device": str(device)}


def client_data(settings: Settings, context: Context) -> LabeledImages:
    """This client's images: its own folder where its node config names one, else its share of the run's dataset.

    Raises:
        DataError: neither is there.
    """
    folder = context.node_config.get("data")
    if folder is not None:
        return local_folder(str(folder), class_names=tuple(filter(None, settings.class_names.split(","))))
    partition = context.node_config.get("partition-id")
    if partition is None:
        raise DataError("node config has neither data (a folder of images) nor partition-id (a share of the dataset)")
    return settings.open_data().client(int(partition))


def check_terms(kind: str, settings: Settings, context: Context) -> None:
    """Raises DataError where this client's node config does not take part in such a round."""
    config = present_node_config(context.node_config)
    kinds = config.get("allowed-rounds")
    if kinds is not None and kind not in [name.strip() for name in str(kinds).split(",")]:
        raise DataError(f"this client takes part in rounds of kind {kinds}, not {kind}")
    least = config.get("min-noise-multiplier", 0.0)
    if isinstance(least, str) or settings.noise_multiplier < least:
        raise DataError(
            f"this client takes part with noise-multiplier {least} or more, not {settings.noise_multiplier:g}"
        )


def check_fit(data: LabeledImages, shape: ImageShape) -> None:
    """Raises DataError where the images or labels do not fit the run's network."""
    own = data.shape
    if (own.channels, own.height, own.width) != (shape.channels, shape.height, shape.width):
        raise DataError(
            f"images of {own.channels}x{own.height}x{own.width}, the run's network takes "
            f"{shape.channels}x{shape.height}x{shape.width}"
        )
    if len(data) and int(data.labels.max()) >= shape.classes:
        raise DataError(f"label {int(data.labels.max())}, the run's network has classes 0 to {shape.classes - 1}")


def _content(message: Message) -> object:
    record = message.content.config_records.get(RECORD)
    return record.get(FIELD) if record is not None else None
