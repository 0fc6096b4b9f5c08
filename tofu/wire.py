"""The messages between server and client as bytes, and the payload of weights or an update that they carry.

Every further record or array of a Flower message costs hundreds of bytes, as much as a compressed payload. So a message
is one bytes value in one record: a fixed header, then parts of variable length, then the payload, little-endian:

    offset  bytes  field of a payload
    0       4      magic "TOFU"
    4       1      version of this layout
    5       1      code of the compressor that wrote the body (`tofu.compression`)
    6       4      round, unsigned
    10      8      fingerprint of the base weights (of the weights themselves on the downlink)
    18      4      CRC-32 of the body
    22      -      body

The checksum detects accidental damage. Against forgery, a deployment has TLS and authenticated clients.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tofu.bytes_io import ByteReader
from tofu.data import ImageShape
from tofu.errors import PayloadError
from tofu.settings.groups import KINDS
from tofu.weights import FINGERPRINT_BYTES, SKETCH_BYTES, ParamSpec, Weights, split_vector

RECORD = "t"
FIELD = "b"

STAGES = ("advert", "share", "confirm", "reveal")
"""Stages of a secure round that have queries of their own. The position is the number on the wire."""

SECURE = "secure"
"""The action of queries of secure rounds."""

SIGNATURE = "signature"
"""Field of the reply to hello with the signature of `hello_parts`, from clients with an identity."""

CLASSES = "classes"
"""The action of a query that sends the numbering of the run's classes to a client with its own data."""

CLIENT_ACCURACY = "client/accuracy"
"""Metric of a train reply: accuracy (0 to 1) of the weights that the client received, on its own test data."""

RESYNC = 1001
"""Code of the error reply of a client that cannot build the round's weights from the steps that it received."""

CLASSES_LOST = 1002
"""Code of the error reply of a client with its own data that does not know how the run's classes are numbered."""

_REQUEST = struct.Struct(f"<BBi4HHII{FINGERPRINT_BYTES}s{SKETCH_BYTES}s")
_LENGTH = struct.Struct("<I")
_REPLY = struct.Struct("<I5fBI")
_ADVERT_FLAG, _KEPT_FLAG, _OUTPUTS_FLAG = 1, 2, 4
_MAX_FLAGS = _ADVERT_FLAG + _KEPT_FLAG + _OUTPUTS_FLAG
_QUERY = struct.Struct("<BB")
_ADVERT = struct.Struct("<B")


def broadcast_id(broadcast: bytes) -> bytes:
    """Return the 8-byte identifier of a broadcast of the plugins; b"" for none."""
    return hashlib.sha256(broadcast).digest()[:8] if broadcast else b""


def run_name(run_id: int) -> bytes:
    """Return the bytes that bind the keys and signatures of secure rounds to one Flower run, the same on both ends."""
    return run_id.to_bytes(8, "little")


def hello_parts(node: int, name: str) -> tuple[bytes, bytes]:
    """Return the parts that a client with an identity signs in a run: its node and its name."""
    return node.to_bytes(8, "little"), name.encode()


MAGIC = b"TOFU"
VERSION = 1
_HEADER = struct.Struct(f"<4sBBI{FINGERPRINT_BYTES}sI")
HEADER_BYTES = _HEADER.size
WEIGHTS = 0
"""The code of a payload that carries the weights themselves as float32 (compressors count from 1)."""


@dataclass(frozen=True)
class Payload:
    """A header and a body.

    Attributes:
        codec: code of the compressor that wrote the body.
        round: the round that the payload belongs to.
        fingerprint: fingerprint of the weights that the body is relative to.
        body: the compressor's bytes.
    """

    codec: int
    round: int
    fingerprint: bytes
    body: bytes

    def to_bytes(self) -> bytes:
        head = _HEADER.pack(MAGIC, VERSION, self.codec, self.round, self.fingerprint, zlib.crc32(self.body))
        return head + self.body


def read_payload(data: object, *, codec: int, round_: int, fingerprint: bytes | None, max_bytes: int) -> Payload:
    """Parse and check bytes from the network.

    Args:
        codec: code of the compressor that must have written the body.
        round_: the round that the payload must belong to.
        fingerprint: that of the weights that both ends must share; None if the payload carries the weights.
        max_bytes: maximum length; longer data is refused without parsing.

    Raises:
        PayloadError: a field is not as expected; the message names it, its value and the expected value.
    """
    reader = ByteReader(data, "payload", min_bytes=HEADER_BYTES, max_bytes=max_bytes)
    magic, version, codec_, number, base, checksum = reader.unpack(_HEADER)
    if magic != MAGIC:
        raise PayloadError(f"payload starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise PayloadError(f"payload has version {version}, this program reads version {VERSION}")
    if codec_ != codec:
        raise PayloadError(f"payload was written by codec {codec_}, expected {codec}")
    if number != round_:
        raise PayloadError(f"payload belongs to round {number}, expected {round_}")
    if fingerprint is not None and base != fingerprint:
        raise PayloadError(f"payload is relative to weights {base.hex()}, expected {fingerprint.hex()}")
    body = reader.rest()
    if zlib.crc32(body) != checksum:
        raise PayloadError("payload's checksum does not match its body: it was damaged in transit")
    return Payload(codec_, number, base, body)


def float32_bytes(values: Weights, param_spec: ParamSpec) -> bytes:
    """Return all tensors of the param_spec as little-endian float32, in its order."""
    parts = [
        values[name].detach().float().cpu().contiguous().numpy().astype("<f4").tobytes() for name in param_spec.shapes
    ]
    return b"".join(parts)


def float32_from(body: bytes, param_spec: ParamSpec) -> Weights:
    """Invert `float32_bytes`: name -> float32 tensor for parameters and buffers.

    Raises:
        PayloadError: wrong length for this param_spec, or a value that is not finite.
    """
    if len(body) != param_spec.float32_bytes:
        raise PayloadError(f"float32 body has {len(body)} bytes, this model takes {param_spec.float32_bytes}")
    flat = torch.from_numpy(np.frombuffer(body, dtype="<f4").astype(np.float32))
    if not bool(torch.isfinite(flat).all()):
        raise PayloadError("float32 body holds a value that is not finite")
    return split_vector(flat, param_spec.shapes)


@dataclass(frozen=True)
class TrainRequest:
    """A request of the server that a client trains one round.

    Attributes:
        kind: kind of the round, one of `KINDS`.
        acknowledged: the last round in which the server aggregated this client's reply, or -1.
        shape: shape of the network's input and number of its outputs, which the client's data must fit.
        payload: the full global weights, or b"" if the client can compute them.
        steps: payloads of the steps of the missed rounds, oldest first, which convert the client's weights to this
            round's. Empty if the client has these already: all clients start with the initial model.
        identity: identity of this round's weights (`tofu.weights`); the reply is relative to them.
        sketch: sketch of this round's weights (`tofu.weights`).
        advert: whether the reply must carry new public keys for a secure round.
        secure: a `SecurePart` in a secure round, else b"".
        broadcast: the state that the plugins send from the server to all clients (`tofu.plugins`), or b"".
        kept: `broadcast_id` of a broadcast that the client has stored and must use instead, or b"".
        outputs: `output_sketch` of the server's model (`tofu.models.behavior`), or b"" for a built-in model.
    """

    kind: str
    acknowledged: int
    shape: ImageShape
    payload: bytes
    identity: bytes
    steps: tuple[bytes, ...] = ()
    sketch: bytes = bytes(SKETCH_BYTES)
    advert: bool = False
    secure: bytes = b""
    broadcast: bytes = b""
    kept: bytes = b""
    outputs: bytes = b""

    def to_bytes(self) -> bytes:
        s = self.shape
        flags = _ADVERT_FLAG * self.advert + _KEPT_FLAG * bool(self.kept) + _OUTPUTS_FLAG * bool(self.outputs)
        numbers = (KINDS.index(self.kind), flags, self.acknowledged, s.channels, s.height, s.width, s.classes)
        state = self.kept or self.broadcast
        head = _REQUEST.pack(*numbers, len(self.steps), len(self.secure), len(state), self.identity, self.sketch)
        steps = b"".join(_LENGTH.pack(len(step)) + step for step in self.steps)
        return head + self.outputs + self.secure + state + steps + self.payload

    @staticmethod
    def from_bytes(data: object) -> "TrainRequest":
        """Parse a request. Raises PayloadError if the bytes are not one."""
        reader = ByteReader(data, "request", min_bytes=_REQUEST.size)
        kind, flags, acknowledged, *shape, count, secure_bytes, state_bytes, identity, sketch = reader.unpack(_REQUEST)
        if not kind < len(KINDS):
            raise PayloadError(f"request has round kind {kind}, expected below {len(KINDS)}")
        if min(shape) < 1:
            raise PayloadError(f"request has input shape {shape}, expected positive numbers")
        if flags > _MAX_FLAGS:
            raise PayloadError(f"request has flags {flags}, expected at most {_MAX_FLAGS}")
        if bool(secure_bytes) != (KINDS[kind] == "secure"):
            raise PayloadError(f"request of a {KINDS[kind]} round has {secure_bytes} bytes for a secure round")
        outputs = reader.take(2 * SKETCH_BYTES if flags & _OUTPUTS_FLAG else 0, "of the sketches of outputs")
        secure = reader.take(secure_bytes, "of the secure round")
        state, kept = reader.take(state_bytes, "of the broadcast"), bool(flags & _KEPT_FLAG)
        steps = tuple(reader.prefixed(_LENGTH, "of a step") for _ in range(count))
        payload = reader.rest()
        if steps and payload:
            raise PayloadError(
                f"request has {count} steps and {len(payload)} bytes of weights, expected one of the two"
            )
        return TrainRequest(
            KINDS[kind], acknowledged, ImageShape(*shape), payload, identity, steps, sketch,
            bool(flags & _ADVERT_FLAG), secure, b"" if kept else state, state if kept else b"", outputs,
        )  # fmt: skip


MAX_METRIC = 1e30
"""Maximum magnitude of a reported metric, so that sums over many clients stay finite."""


@dataclass(frozen=True)
class TrainReply:
    """A client's reply to a `TrainRequest`.

    Attributes:
        examples: number of training images, the weight of the update in the average.
        train_loss: mean loss over the local steps.
        explained_variance: that of the decoded update, relative to the true update plus error feedback.
        cosine: cosine between the same two.
        train_seconds: seconds of local training.
        encode_seconds: seconds of compression.
        payload: the compressed update.
        advert: new public keys for a secure round (`tofu.secagg`), if requested.
        exported: the plugins' sums and metrics (`tofu.plugins`).
    """

    examples: int
    train_loss: float
    explained_variance: float
    cosine: float
    train_seconds: float
    encode_seconds: float
    payload: bytes
    advert: bytes = b""
    exported: bytes = b""

    def to_bytes(self) -> bytes:
        floats = (self.train_loss, self.explained_variance, self.cosine, self.train_seconds, self.encode_seconds)
        head = _REPLY.pack(self.examples, *floats, len(self.advert), len(self.exported))
        return head + self.advert + self.exported + self.payload

    @staticmethod
    def from_bytes(data: object) -> "TrainReply":
        """Parse a reply. Raises PayloadError if the bytes are not one, or a value is out of range."""
        reader = ByteReader(data, "reply", min_bytes=_REPLY.size)
        examples, *floats, advert_bytes, exported_bytes = reader.unpack(_REPLY)
        if examples < 1:
            raise PayloadError("reply claims training on 0 images, expected at least 1")
        if not all(abs(value) <= MAX_METRIC for value in floats):
            names = ("train_loss", "explained_variance", "cosine", "train_seconds", "encode_seconds")
            wrong = [f"{name}={x:.3g}" for name, x in zip(names, floats, strict=True) if not abs(x) <= MAX_METRIC]
            text = f"reply holds the metrics {', '.join(wrong)}, expected finite ones of at most {MAX_METRIC:g}"
            if not all(abs(value) <= MAX_METRIC for value in floats[:3]):
                text += ": training diverged on this client, and a smaller lr may help"
            raise PayloadError(text)
        advert, exported = reader.take(advert_bytes, "of the advert"), reader.take(exported_bytes, "of plugin exports")
        loss, explained, cosine, train_seconds, encode_seconds = floats
        return TrainReply(
            examples, loss, explained, cosine, train_seconds, encode_seconds, reader.rest(), advert, exported
        )


@dataclass(frozen=True)
class SecurePart:
    """The part of a train request that only secure rounds have. The reply is a masked vector (`tofu.secagg`) alone.

    Attributes:
        terms: how the vector is encoded (`tofu.secagg.encoding`).
        shares: the neighbors' encrypted shares (`tofu.secagg.messages.Shares`).
    """

    terms: bytes
    shares: bytes

    def to_bytes(self) -> bytes:
        return _LENGTH.pack(len(self.terms)) + self.terms + self.shares

    @staticmethod
    def from_bytes(data: object) -> "SecurePart":
        """Parse a secure part. Raises PayloadError if the bytes are not one."""
        reader = ByteReader(data, "secure part")
        return SecurePart(reader.prefixed(_LENGTH, "of the terms"), reader.rest())


@dataclass(frozen=True)
class SecureQuery:
    """A request of the server for one stage of a secure round.

    Attributes:
        stage: one of `STAGES`.
        message: a message of `tofu.secagg.messages`; b"" for an advert.
        advert: whether the answer must carry new public keys for the next secure round.
    """

    stage: str
    message: bytes = b""
    advert: bool = False

    def to_bytes(self) -> bytes:
        return _QUERY.pack(STAGES.index(self.stage), self.advert) + self.message

    @staticmethod
    def from_bytes(data: object) -> "SecureQuery":
        """Parse a query. Raises PayloadError if the bytes are not one."""
        reader = ByteReader(data, "query")
        stage, advert = reader.unpack(_QUERY)
        if not stage < len(STAGES) or advert > 1:
            raise PayloadError(f"query has stage {stage} and advert {advert}, expected below {len(STAGES)} and 2")
        return SecureQuery(STAGES[stage], reader.rest(), bool(advert))


@dataclass(frozen=True)
class SecureAnswer:
    """A client's answer to a `SecureQuery`: its message of `tofu.secagg`, and new public keys if requested."""

    message: bytes
    advert: bytes = b""

    def to_bytes(self) -> bytes:
        return _ADVERT.pack(len(self.advert)) + self.advert + self.message

    @staticmethod
    def from_bytes(data: object) -> "SecureAnswer":
        """Parse an answer. Raises PayloadError if the bytes are not one."""
        reader = ByteReader(data, "answer")
        advert = reader.prefixed(_ADVERT, "of the advert")
        return SecureAnswer(reader.rest(), advert)


_MAX_CLASS_BYTES = 1 << 20


def class_names_to_text(names: Sequence[str]) -> str:
    """Return the names of classes in order, as a message carries them."""
    return json.dumps(list(names))


def class_names_from(value: object) -> tuple[str, ...]:
    """Parse names of classes. Raises PayloadError unless they are different texts of at most 1 MiB together."""
    if not isinstance(value, str) or len(value) > _MAX_CLASS_BYTES:
        size = f"a text of {len(value)} characters" if isinstance(value, str) else type(value).__name__
        raise PayloadError(f"names of classes are {size}, expected a text of at most {_MAX_CLASS_BYTES} characters")
    try:
        names = json.loads(value)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise PayloadError(f"names of classes are {value[:40]!r}, expected a JSON list of texts that are not empty")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PayloadError(f"names of classes have {twice[:40]!r} twice, expected different texts")
    return tuple(names)
