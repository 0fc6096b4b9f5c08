"""The client's part of secure sums for Flower apps: a mod that masks what the app's train function returns.

`tofu.flower.secure` has the server's part. All stages of the protocol travel as train messages, because Flower calls
mods only around functions that the app has registered.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from tofu.arguments import check_options
from tofu.compression.error_feedback import ErrorFeedback
from tofu.errors import PayloadError
from tofu.flower.agreement import named_differences
from tofu.flower.client_state import load_feedback, save_feedback
from tofu.flower.policy import Policy
from tofu.flower.secure_options import VERSION, SecureOptions
from tofu.flower.secure_session import answer_query, load_session, mask_once, participant_of, session_name
from tofu.flower.update_codec import ArrayNames, UpdateCodec, tensors_of
from tofu.flower.wrapper import TrainMod, only_arrays
from tofu.imports import code_digest
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
from tofu.secagg.encoding import EncodingConfig, RingEncoder, purpose_of
from tofu.secagg.fixed_point import COUNT_BITS
from tofu.secagg.participant import Participant
from tofu.settings import python_call
from tofu.wire import FIELD, SecurePart, SecureQuery
from tofu.wire import RECORD as STAGE

RECORD = "tofu-secure"
"""Key of the `ConfigRecord` that the strategy adds to a train message, and the mod to its reply."""


@python_call
def secure(**options: Any) -> "SecureMod":
    """Return a mod that masks what a client sends; the strategy must be wrapped
    in `SecureAggregation` with equal options.

    It should be the first of the app's mods, so that others see plain messages.

    Args:
        options: of `SecureOptions`.

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> app = ClientApp(mods=[secure()])
    """
    check_options(options, SecureOptions, secure)
    return SecureMod(SecureOptions(**options))


class SecureMod(TrainMod):
    """The client's part. `tofu.flower.secure_session` lists the entries of its node config."""

    name = "tofu.secure"

    def __init__(self, options: SecureOptions, codec: UpdateCodec | None = None) -> None:
        self._options, self._codec = options, codec

    def check_later(self, context: Context, *, identified: bool) -> None:
        """Check, in an earlier round, what keeps this client from the secure rounds to come.

        Args:
            identified: whether the server knows the clients' identities.

        Raises:
            SettingError: an entry of the node config is not usable.
            PayloadError: only one of this client and the server uses identities.
            PolicyError: the client's policy refuses such rounds.
        """
        participant = self._participant(context)
        self._check_policy(Policy.of(context), participant)
        if participant.identity is not None and not identified:
            raise PayloadError("this client has an identity: pass identities= to tofu.Hybrid")
        if participant.identity is None and identified:
            raise PayloadError("this client has no identity, which tofu.Hybrid(identities=...) needs: add identity and "
                               "identities to its node config")  # fmt: skip

    def _participant(self, context: Context) -> Participant:
        return participant_of(context, session_name(context), self._options.collusion)

    def _check_policy(self, policy: Policy, participant: Participant) -> None:
        policy.check_round("secure", self._options.noise_multiplier)
        policy.check_identity(identified=participant.identity is not None)

    def train(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer a stage of the protocol, or call the app and mask what it returns.

        Raises:
            PayloadError: the server's message is not one of `SecureAggregation`, or asks for something unsafe.
            PolicyError: the client's policy refuses such rounds.
        """
        options = self._options
        participant = self._participant(context)
        stage = message.content.config_records.get(STAGE)
        if stage is not None:
            answer = answer_query(SecureQuery.from_bytes(stage.get(FIELD)), context, participant)
            return Message(RecordDict({STAGE: ConfigRecord({FIELD: answer.to_bytes()})}), reply_to=message)
        policy = Policy.of(context)
        self._check_policy(policy, participant)
        request = _SecureRequest.of(message, options, self._codec)
        encoder = request.encoder
        session = load_session(context, participant)
        if session.purpose != request.purpose:
            raise PayloadError(
                "this client was sent other arrays, records or ranges than all clients of this sum agreed on, or has "
                "other code of tofu-fl than the server"
            )
        noise = options.noise_in_sum(session.topology, session.members, encoder, request.clip_norm)
        check_noise_grid(noise, encoder.levels, request.config.unit_weight, request.config.ranges)
        policy.check_sum_noise(noise, session, participant)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        trained = _Trained.of(reply, request, options)
        spec, kept = request.names.param_spec, bool(options.error_feedback)
        feedback, memory = load_feedback(context, spec, request.training) if kept else (ErrorFeedback(), b"")
        # Otherwise a dishonest server could have a vector sent again in a sum whose other members send almost nothing.
        acknowledged = request.acknowledged if participant.identity is None else feedback.sent_round
        steps: list[UpdateStep] = [AddResidual(acknowledged, options.error_feedback)]
        if noise:
            steps.append(Clip(request.clip_norm, spec))
        outgoing = apply_steps(steps, Outgoing(trained.update, feedback, memory))
        clip, sums = options.clip(request.clip_norm), options.metric_sums(trained.values)
        sums |= clip.report(clipped=outgoing.clipped) if clip else {}
        seed = derive_bytes(0, request.round, participant.name, "round")
        steps = [EncodeInRing(encoder, trained.examples, 0.0, seed, sums, noise)]
        steps.append(KeepResidual(request.round, options.error_feedback))
        outgoing = apply_steps(steps, outgoing)
        assert outgoing.vector is not None
        try:
            masked = mask_once(context, session, participant, request.round, outgoing.vector, request.shares)
        except ValueError as error:
            raise PayloadError(f"this client's model differs from the server's: {error}") from error
        if kept:
            save_feedback(context, spec, request.training, outgoing.feedback, outgoing.memory)
        record = ConfigRecord({"masked": masked, "metrics": trained.names})
        return Message(RecordDict({RECORD: record}), reply_to=message)


@dataclass(frozen=True)
class _SecureRequest:
    """The strategy's record in a train message, which is removed from it, and what the reply is relative to."""

    round: int
    acknowledged: int
    weight_key: str
    clip_norm: float
    base: dict[str, Tensor]
    names: ArrayNames
    config: EncodingConfig
    shares: bytes
    encoder: RingEncoder
    purpose: bytes
    training: bytes

    @staticmethod
    def of(message: Message, options: SecureOptions, codec: UpdateCodec | None) -> "_SecureRequest":
        """Raises PayloadError if the server does not use `SecureAggregation`, or uses it with other options."""
        record = message.content.config_records.get(RECORD)
        if record is None:
            raise PayloadError(
                "this client sends masked updates only, but the server's strategy is not tofu.SecureAggregation"
            )
        if record.get("version") != VERSION or record.get("digest") != joint_digest(options, codec):
            named = named_differences(
                joint_text(options, codec), record.get("arguments"), codec.defaults() if codec else options.defaults()
            )
            raise PayloadError(
                f"tofu.secure and tofu.SecureAggregation have different options ({named}): pass the same to both"
            )
        round_, acknowledged, key = record.get("round"), record.get("acknowledged"), record.get("weight-key")
        norm = record.get("clip-norm")
        if not isinstance(round_, int) or not isinstance(acknowledged, int) or not isinstance(key, str):
            raise PayloadError("the server's record lacks round, acknowledged or weight-key")
        if not isinstance(norm, float) or not (options.clip_quantile or norm == options.clip_norm):
            raise PayloadError(f"clip norm is {norm!r:.40}, expected {options.clip_norm:g}")
        part = SecurePart.from_bytes(record.get("part"))
        del message.content[RECORD]
        _, arrays = only_arrays(message.content, "the server's train message")
        base, config = tensors_of(arrays), EncodingConfig.from_bytes(part.terms)
        if config.fraction < 1 or (config.nearest_rounding and options.error_feedback != 1):
            raise PayloadError("encoding config omits or rounds values that this client would not send later")
        names = codec.reference(base) if codec else ArrayNames.of(base)
        encoder = RingEncoder(names.param_spec, config, options.declared(norm))
        content = content_digest(message.content, key)
        purpose = purpose_of(config, base, content, *meaning(round_, options, codec, norm))
        training = record.get("training")
        return _SecureRequest(
            round_, acknowledged, key, norm, base, names, config, part.shares, encoder, purpose,
            training if isinstance(training, bytes) else b"",
        )  # fmt: skip


@dataclass(frozen=True)
class _Trained:
    """An app's train reply, as it enters the sums.

    Attributes:
        update: returned minus received arrays, float32.
        examples: its weight in steps (`SecureOptions.weight_step`), 1 with noise.
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
        weight = _steps_of(metrics.pop(request.weight_key, None), request.weight_key, options)
        if options.noise_multiplier:
            return _Trained(update, 1, [], "[]")
        named, values = [], list[float]()
        for name in sorted(metrics):
            value = metrics[name]
            named.append([name, len(value) if isinstance(value, list) else -1])
            values += [float(part) * weight for part in (value if isinstance(value, list) else [value])]
        if len(values) > options.metrics or not all(options.fits(value) for value in values):
            return _Trained(update, weight, [], "")
        return _Trained(update, weight, values, json.dumps(named))


def _steps_of(weight: object, key: str, options: SecureOptions) -> int:
    """Return a client's weight in steps of `weight_step`; 1 with noise, which no weight may be without."""
    step = 1.0 if options.noise_multiplier else options.weight_step
    steps = weight / step if isinstance(weight, int | float) and 0 < weight < math.inf else 0.0
    whole = steps == int(steps) or step < 1
    if not whole or not 1 <= round(steps) < 2**COUNT_BITS:
        largest = f"{step * (2**COUNT_BITS - 1):g}"
        accepted = f"a whole number from 1 to {largest}, or weight_step=1e-6 at both ends for other numbers"
        if step < 1:
            accepted = f"a number from weight_step={step:g} to {largest}"
        raise PayloadError(f"metric {key}={weight} is not usable: expected {accepted}")
    return 1 if options.noise_multiplier else round(steps)


def joint_digest(options: SecureOptions, codec: UpdateCodec | None) -> bytes:
    """Identifies what both ends must have in common."""
    return options.digest + (codec.digest if codec else b"")


def joint_text(options: SecureOptions, codec: UpdateCodec | None) -> str:
    """Return what both ends must have in common, as far as it is not the default, for error messages."""
    return codec.text if codec else options.text


def meaning(round_: int, options: SecureOptions, codec: UpdateCodec | None, norm: float) -> tuple[bytes, ...]:
    """Round, clip norm, options, and code of Tofu and the app: what clients compare besides encoding and message."""
    code = code_digest("tofu", *options.packages)
    return struct.pack("<qd", round_, norm), joint_digest(options, codec), code


def content_digest(content: RecordDict, weight_key: str) -> bytes:
    """Return the digest of the key of a message's arrays and of all its other records, 32 bytes."""
    digest = hashlib.sha256(repr(weight_key).encode())
    for key, record in sorted(content.items()):
        values = [] if isinstance(record, ArrayRecord) else sorted(record.items())
        digest.update(repr((key, type(record).__name__, values)).encode())
    return digest.digest()
