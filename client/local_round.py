"""One round of a client: receive the global weights, train, and send the update through the chain of steps."""

import math
import time
from collections.abc import Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from flwr.app import Context
from torch.utils.data import Subset

from client.state import (
    SavedState,
    load_bytes,
    load_class_names,
    load_local,
    load_state,
    save_local,
    save_state,
)
from tofu.compression import downlink_compressor, uplink_compressor
from tofu.compression.base import Compressor
from tofu.compression.error_feedback import ErrorFeedback
from tofu.data import ImageShape, LabeledImages, LabeledRows, local_folder, local_rows
from tofu.device import open_device
from tofu.errors import DataError, PayloadError
from tofu.flower.policy import Policy, client_name
from tofu.flower.secure_session import load_session, mask_once, new_advert, participant_of
from tofu.local_layers import LocalLayers
from tofu.models.behavior import check_outputs
from tofu.plugins import MAX_STATE_BYTES, Export, Plugins, RoundContext, export_to_bytes
from tofu.privacy import Noise
from tofu.privacy.adaptive import clip_norm, clip_of, plugins_of
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_bytes, derive_generator
from tofu.rounds.downlink import KeptWeights, ResyncError, receive_weights
from tofu.rounds.steps import (
    AddNoise,
    AddResidual,
    Clip,
    Compress,
    EncodeInRing,
    KeepDirection,
    KeepResidual,
    Outgoing,
    SubtractDirection,
    UpdateStep,
    apply_steps,
    check_noise_grid,
)
from tofu.secagg.encoding import EncodingConfig, RingEncoder, flat, purpose_of
from tofu.secagg.participant import Participant
from tofu.settings import FULL_WEIGHTS, Settings
from tofu.settings.fields import names_of
from tofu.tasks import TaskStream, only_classes, round_context
from tofu.training import LocalTrainingConfig, TrainingContext
from tofu.weights import (
    Weights,
    check_constant_buffers,
    check_finite,
    check_frozen,
    constant_buffers,
    cosine,
    difference,
    explained_variance,
    frozen_parameters,
    load_weights,
    weights_of,
)
from tofu.wire import CLIENT_ACCURACY, Payload, SecurePart, TrainReply, TrainRequest, broadcast_id
from tofu.workload import Workload, workload_of


def client_data(settings: Settings, context: Context, workload: Workload | None = None) -> Sized:
    """Return the client's data: the folder `data` of its node config, or its partition of the workload's data.

    The classes of a folder are in the order of the settings or, without one, of the server. The workload is by default
    that of the settings.

    Raises:
        DataError: the node config has neither `data` nor `partition-id`, or the data cannot be used.
    """
    folder, data = context.node_config.get("data"), settings.data
    if folder is None:
        names: tuple[str, ...] = ()
    elif data.class_names:
        names = names_of(data.class_names)
    else:
        names = load_class_names(context)
    if folder is not None and data.kind != "images":
        return local_rows(str(folder), data, names)
    if folder is not None:
        if data.normalization == "dataset":
            why = "a client with its own folder does not send its statistics"
            raise DataError(f"normalization=dataset is not usable: {why}; expected numbers, as MEAN/STD")
        return local_folder(str(folder), data, class_names=names)
    partition = context.node_config.get("partition-id")
    if partition is None:
        raise DataError("node config has neither data (a folder of images) nor partition-id (a part of the dataset)")
    return (workload or workload_of(settings)).client(int(partition))


def check_fit(data: LabeledImages | LabeledRows, shape: ImageShape) -> None:
    """Raises DataError if inputs or labels do not fit the input and output of the run's model."""
    if isinstance(data, LabeledRows):
        if data.width != shape.width:
            raise DataError(f"rows of {data.width} features or tokens, the run's network takes {shape.width}")
    else:
        own = data.shape
        if own.chw != shape.chw:
            raise DataError(
                f"images of {own.channels}x{own.height}x{own.width}, the run's network takes "
                f"{shape.channels}x{shape.height}x{shape.width}"
                + (
                    f"; --resize {shape.height}x{shape.width} for the run gives all clients' images this size"
                    if own.chw[1:] != shape.chw[1:]
                    else ""
                )
            )
    if len(data) and int(data.labels.max()) >= shape.classes:
        raise DataError(f"label {int(data.labels.max())}, the run's network has classes 0 to {shape.classes - 1}")


def hold_out(data: Any, settings: Settings, client: str) -> tuple[Any, Any]:
    """Split the client's data into training and test data, in the same way in every round."""
    fraction = settings.training.client_test_fraction
    count = min(len(data) - 1, math.ceil(fraction * len(data)))
    if not fraction or not count:
        return data, ()
    generator = derive_generator(settings.run.seed, client, "client test")
    rows = torch.randperm(len(data), generator=generator)
    kept, held = rows[count:].sort().values, rows[:count].sort().values
    if isinstance(data, LabeledImages | LabeledRows):
        return data.subset(kept), data.subset(held)
    return Subset(data, kept.tolist()), Subset(data, held.tolist())


def train_round(
    request: TrainRequest, round_: int, settings: Settings, context: Context, workload: Workload | None = None
) -> bytes:
    """Train, then compress or mask the update; error feedback and the codec's memory are kept in `context.state`.

    Args:
        workload: data and model; by default those that the settings name.

    Returns:
        A `TrainReply`, or in a secure round a masked vector (`tofu.secagg.messages.Masked`).

    Raises:
        ResyncError: the server must send this client the full weights.
        TofuError: the client does not take part, the weights or the data are not usable, or training diverged.
    """
    policy = Policy.of(context)
    policy.check_round(request.kind, settings.privacy.client_multiplier)
    if request.kind == "secure":
        policy.check_identity(identified="identity" in context.node_config)
    policy.check_shape(request.shape)
    local = LocalRound.begin(request, round_, settings, context, workload or workload_of(settings))
    trained = local.train()
    fraction = settings.residual_fraction
    parameters, server = local.reference.param_spec.parameters, settings.server
    steps: list[UpdateStep] = [AddResidual(local.acknowledged, fraction)]
    keep: UpdateStep = KeepResidual(round_, fraction)
    if server.server_optimizer == "ef21":
        steps = [SubtractDirection(local.acknowledged, server.ef21_momentum, parameters)]
        keep = KeepDirection(round_, parameters)
    if settings.privacy.noise_multiplier:
        steps.append(Clip(clip_norm(settings, local.plugins), local.reference.param_spec))
    send = local.send_masked if request.kind == "secure" else local.send_payload
    reply, outgoing = send(trained, apply_steps(steps, Outgoing(trained.update, local.feedback, local.state.memory)))
    outgoing = keep.apply(outgoing)
    save_state(
        context,
        local.reference,
        feedback=outgoing.feedback if fraction else None,
        memory=outgoing.memory,
        kept=KeptWeights(local.base, request.identity) if settings.downlink.downlink != FULL_WEIGHTS else None,
        plugins=local.plugins.state_bytes(max_bytes=MAX_STATE_BYTES),
        broadcast=local.broadcast,
    )
    return reply


@dataclass(frozen=True)
class TrainedUpdate:
    """Result of local training.

    Attributes:
        update: new weights minus the weights that training started from.
        examples, loss: as reported to the server. Under DP they are not noised, so they are reported as 1 and 0.
        seconds: duration of the local steps; 0 under DP, because it reveals the number of examples.
        exported: the plugins' export.
        accuracy: of the weights before training, on the client's own test data; None without such data.
    """

    update: Weights
    examples: int
    loss: float
    seconds: float
    exported: Export
    accuracy: float | None = None


@dataclass(frozen=True)
class LocalRound:
    """A client's round after it has received the global weights.

    Attributes:
        position: the round, task and client, as plugins receive them.
        reference: the model; its weights are `base` whenever the codec uses it.
        base: the global weights of the round.
        initial: the weights with which the run began.
        feedback: state of error feedback.
        broadcast: bytes of the plugins' broadcast.
        local: the layers that stay on this client.
        data: the client's training data, of this round's task in a run of tasks.
        own_test: its own test data.
        classes: the classes of the task in a multi-head run; None in others.
        compressor: of the update; None in a secure round.
    """

    request: TrainRequest
    round: int
    settings: Settings
    context: Context
    plugins: Plugins
    position: RoundContext
    reference: ReferenceModel
    base: Weights
    initial: Weights
    state: SavedState
    feedback: ErrorFeedback
    broadcast: bytes
    workload: Workload
    local: LocalLayers
    data: Sized
    own_test: Sized
    classes: tuple[int, ...] | None
    compressor: Compressor | None

    @property
    def participant(self) -> Participant:
        """This client in secure rounds."""
        fraction = self.settings.secure.secagg_collusion_fraction
        return participant_of(self.context, self.position.client, fraction)

    @property
    def acknowledged(self) -> int:
        """The last round whose update the server received, as it says.

        In a secure round with identities, all updates that were sent count as received. Otherwise a dishonest server
        could have a vector sent again in a sum whose other members have almost nothing to send.
        """
        if self.request.kind == "secure" and self.participant.identity is not None:
            return self.feedback.sent_round
        return self.request.acknowledged

    @staticmethod
    def begin(
        request: TrainRequest, round_: int, settings: Settings, context: Context, workload: Workload
    ) -> "LocalRound":
        """Open the data, build the model, set up the plugins, load the client's state and receive the weights.

        Raises:
            DataError: the client's images do not fit the model.
            ResyncError: the client lacks the weights or the broadcast that the request refers to.
            TofuError: the request is not usable.
        """
        data = client_data(settings, context, workload)
        if isinstance(data, LabeledImages | LabeledRows):
            check_fit(data, request.shape)  # before anything of the requested size is allocated
        plugins = plugins_of(settings)
        client = client_name(context)
        position = round_context(settings, request.shape, round_, client, group=plugins.group_of(client))
        broadcast = load_bytes(context, "broadcast") if request.kept else request.broadcast
        if request.kept and broadcast_id(broadcast) != request.kept:
            raise ResyncError("this client does not have the plugins' broadcast of this round")
        plugins.load(state=load_bytes(context, "plugins"), broadcast=broadcast, max_bytes=MAX_STATE_BYTES)
        built = workload.build_model(request.shape)
        check_outputs(built, partial(workload.outputs, shape=request.shape), request.outputs, settings.model.model)
        local = LocalLayers(built, settings.training.local_layers)
        reference = ReferenceModel.of(built, request.shape, plugins, position, workload.call(built, request.shape))
        initial = weights_of(reference.model)
        state = load_state(context, reference)
        receive_weights(request, round_, reference, state.kept, downlink_compressor(settings, reference))
        feedback = ErrorFeedback()
        if settings.residual_fraction:
            feedback = state.feedback.aged(round_, settings.codec.residual_half_life)
        secure = request.kind == "secure"
        stream = TaskStream.of(settings.plugins, request.shape.classes, settings.run.seed)
        task = stream.number(position.task, client)
        data = stream.images_of(data, task) if isinstance(data, LabeledImages) else data
        data, own_test = hold_out(data, settings, client)
        return LocalRound(
            request, round_, settings, context, plugins, position, reference, weights_of(reference.model), initial,
            state, feedback, broadcast, workload, local, data, own_test,
            classes=stream.classes_of(task) if settings.plugins.task_heads == "multi" else None,
            compressor=None if secure else uplink_compressor(settings, request.kind, reference),
        )  # fmt: skip

    def train(self) -> TrainedUpdate:
        """Train from the global weights, or with step-ahead from where error feedback points.

        A plugin that restricts steps does so from the global weights, so with one there is no step-ahead.

        Raises:
            RunError: training diverged, or changed a buffer that is not sent.
        """
        settings, model = self.settings, self.reference.model
        step_ahead = 0.0 if self.plugins.restricts_steps else settings.step_ahead_of(self.round)
        start = self.feedback.ahead(
            self.base, self.acknowledged, step_ahead, self.reference.param_spec.parameters,
            fraction=settings.residual_fraction,
        )  # fmt: skip
        load_weights(model, start)
        generator = derive_generator(settings.run.seed, self.round, self.position.client, "train")
        setup = TrainingContext(
            **vars(LocalTrainingConfig.of(settings.training, self.round)), client=self.position.client,
            round=self.round, final=self.position.final, generator=generator, device=open_device(settings.run.device),
        )  # fmt: skip
        self.local.begin(model, load_local(self.context, self.local))
        heads = nullcontext() if self.classes is None else only_classes(model, self.classes)
        constants, frozen = self.local.without(constant_buffers(model)), frozen_parameters(model)
        accuracy = None
        with heads:
            if len(self.own_test):
                predict = self.plugins.predict
                accuracy = self.workload.evaluate(model, self.own_test, predict=predict, device=setup.device).accuracy
            result = self.workload.train(model, self.data, setup, self.plugins)
        check_constant_buffers(model, constants)
        check_frozen(model, frozen)
        exported = self.plugins.export(model)
        if self.local:
            save_local(self.context, self.local.end(model))
        update = difference(weights_of(model), start)
        check_finite(update)
        load_weights(model, self.base)  # the codec differentiates at the global weights
        model.eval()
        noised = bool(settings.privacy.noise_multiplier)
        examples, loss = (1, 0.0) if noised else (len(self.data), result.loss)
        return TrainedUpdate(update, examples, loss, 0.0 if noised else result.seconds, exported, accuracy)

    def send_payload(self, trained: TrainedUpdate, outgoing: Outgoing) -> tuple[bytes, Outgoing]:
        """Return the reply of an open round: the compressed update and its metrics."""
        request, settings, reference = self.request, self.settings, self.reference
        exported = trained.exported
        if settings.privacy.client_multiplier:
            noise = Noise.alone(settings.privacy, clip_norm(settings, self.plugins))
            outgoing = AddNoise(noise, self._report(outgoing)).apply(outgoing)
            exported = Export({**exported.sums, **outgoing.sums}, exported.metrics)
        generator = derive_generator(settings.run.seed, self.round, self.position.client, "encode")
        compressor = self.compressor
        assert compressor is not None
        began = time.perf_counter()
        outgoing = Compress(compressor, reference, generator, uses_memory=request.kind != "fedavg").apply(outgoing)
        parameters = {name: outgoing.update[name] for name in reference.param_spec.parameters}
        reply = TrainReply(
            examples=trained.examples,
            train_loss=trained.loss,
            explained_variance=explained_variance(parameters, outgoing.decoded),
            cosine=cosine(parameters, outgoing.decoded),
            train_seconds=trained.seconds,
            encode_seconds=time.perf_counter() - began,
            payload=Payload(compressor.code, self.round, request.identity, outgoing.body).to_bytes(),
            advert=new_advert(self.context, self.participant) if request.advert else b"",
            exported=self._exported_bytes(exported, trained.accuracy),
        )
        return reply.to_bytes(), outgoing

    def _report(self, outgoing: Outgoing) -> Weights:
        """With an adaptive clip norm, whether the update was clipped, as a sum without its noise."""
        clip = clip_of(self.plugins)
        return clip.report(clipped=outgoing.clipped) if clip else {}

    def _exported_bytes(self, export: Export, accuracy: float | None) -> bytes:
        """Return the plugins' export, and the accuracy on the client's own test data, if it has any."""
        if accuracy is not None and math.isfinite(accuracy):
            export = Export(export.sums, dict(export.metrics) | {CLIENT_ACCURACY: accuracy})
        return export_to_bytes(export) if self.plugins or export.metrics else b""

    def send_masked(self, trained: TrainedUpdate, outgoing: Outgoing) -> tuple[bytes, Outgoing]:
        """Return the reply of a secure round: the masked vector.

        Raises:
            ResyncError: this client's weights or encoding differ from those that all clients of the sum agreed on.
            PayloadError: the server's encoding does not fit this run.
        """
        settings = self.settings
        part = SecurePart.from_bytes(self.request.secure)
        config = EncodingConfig.from_bytes(part.terms)
        if config.nearest_rounding and settings.residual_fraction != 1:
            raise PayloadError("encoding config has nearest_rounding, expected error-feedback 1 and no noise")
        displacement = flat(self.base) - flat(self.initial) if config.fraction < 1 else None
        sums = self.plugins.declare_sums(self.reference.model)
        encoder = RingEncoder(self.reference.param_spec, config, sums, displacement)
        if encoder.digest != config.digest:
            raise ResyncError("this client's weights select other coordinates than the server's")
        participant = self.participant
        session = load_session(self.context, participant)
        if session.purpose != purpose_of(config, self.base, self.broadcast, *settings.meaning(self.round)):
            raise ResyncError(
                "the weights, settings, app or encoding are not those that all clients of this sum agreed on"
            )
        noise = Noise.in_sum(
            settings.privacy, clip_norm(settings, self.plugins), settings.secure, session.topology, session.members,
            levels=encoder.levels, values=encoder.values,
        )  # fmt: skip
        check_noise_grid(noise, encoder.levels, config.unit_weight, config.ranges)
        Policy.of(self.context).check_sum_noise(noise, session, participant)
        seed = derive_bytes(settings.run.seed, self.round, self.position.client, "round")
        exported = {**trained.exported.sums, **self._report(outgoing)}
        step = EncodeInRing(encoder, trained.examples, trained.loss, seed, exported, noise)
        outgoing = step.apply(outgoing)
        assert outgoing.vector is not None
        return mask_once(self.context, session, participant, self.round, outgoing.vector, part.shares), outgoing
