"""What the server and a client say to each other, as bytes: one value in one record of a Flower message.

Flower spends hundreds of bytes on every further record or array of a message, as much as a whole payload of ours, so a
message is one bytes value: a small fixed head, then the payload (`tofu.payload`).
"""

import math
import struct
from dataclasses import dataclass

from tofu.data import ImageShape
from tofu.errors import PayloadError
from tofu.same_weights import SKETCH_BYTES
from tofu.weights import FINGERPRINT_BYTES

RECORD = "t"
FIELD = "b"

KINDS = ("proxy", "full")
"""Kinds of round. The position is the number on the wire."""

RESYNC = 1001
"""Code of the error reply of a client that cannot build the round's weights from the steps it was sent."""

_REQUEST = struct.Struct(f"<Bi4HH{FINGERPRINT_BYTES}s{SKETCH_BYTES}s")
_LENGTH = struct.Struct("<I")
_REPLY = struct.Struct("<I5f")


@dataclass(frozen=True)
class TrainRequest:
    """The server asks a client to train.

    Attributes:
        kind: of the round, one of `KINDS`.
        acknowledged: the last round whose reply of this client the server added, or -1.
        shape: of the network's input and output, which the client's data must fit.
        payload: the global weights whole, or b"" where the client can build them.
        steps: payloads of the steps of the last rounds, oldest first; they lead from the weights that the client has to
            this round's. None where it has them already: before the first round every client has the initial model.
        identity: of this round's weights (`tofu.same_weights`), which the reply is relative to.
        sketch: of this round's weights.
    """

    kind: str
    acknowledged: int
    shape: ImageShape
    payload: bytes
    identity: bytes
    steps: tuple[bytes, ...] = ()
    sketch: bytes = bytes(SKETCH_BYTES)

    def to_bytes(self) -> bytes:
        s = self.shape
        numbers = (KINDS.index(self.kind), self.acknowledged, s.channels, s.height, s.width, s.classes)
        head = _REQUEST.pack(*numbers, len(self.steps), self.identity, self.sketch)
        return head + b"".join(_LENGTH.pack(len(step)) + step for step in self.steps) + self.payload

    @staticmethod
    def from_bytes(data: object) -> "TrainRequest":
        """Raises PayloadError for bytes that are no request."""
        head, rest = _split(data, _REQUEST, "request")
        kind, acknowledged, *shape, count, identity, sketch = _REQUEST.unpack(head)
        if not kind < len(KINDS):
            raise PayloadError(f"request has round kind {kind}, expected below {len(KINDS)}")
        if min(shape) < 1:
            raise PayloadError(f"request has input shape {shape}, expected positive numbers")
        steps, at = [], 0
        for _ in range(count):
            if len(rest) < at + _LENGTH.size:
                raise PayloadError(f"request's step has {len(rest) - at} bytes, expected at least {_LENGTH.size}")
            at += _LENGTH.size
            end = at + _LENGTH.unpack_from(rest, at - _LENGTH.size)[0]
            if end > len(rest):
                raise PayloadError(f"request's step has {len(rest) - at} bytes, expected {end - at}")
            steps.append(rest[at:end])
            at = end
        rest = rest[at:]
        if steps and rest:
            raise PayloadError(f"request has {count} steps and {len(rest)} bytes of weights, expected one of the two")
        return TrainRequest(KINDS[kind], acknowledged, ImageShape(*shape), rest, identity, tuple(steps), sketch)


@dataclass(frozen=True)
class TrainReply:
    """A client's answer.

    Attributes:
        examples: number of images that it trained on, its weight in the average.
        train_loss: mean loss over its local steps.
        explained_variance: of the decoded against the true update (with what error feedback added).
        cosine: of the same two.
        train_seconds: spent on local steps.
        encode_seconds: spent on compressing.
        payload: the compressed update.
    """

    examples: int
    train_loss: float
    explained_variance: float
    cosine: float
    train_seconds: float
    encode_seconds: float
    payload: bytes

    def to_bytes(self) -> bytes:
        floats = (self.train_loss, self.explained_variance, self.cosine, self.train_seconds, self.encode_seconds)
        return _REPLY.pack(self.examples, *floats) + self.payload

    @staticmethod
    def from_bytes(data: object) -> "TrainReply":
        """Raises PayloadError for bytes that are no reply, or numbers that cannot be right."""
        head, payload = _split(data, _REPLY, "reply")
        examples, *floats = _REPLY.unpack(head)
        if examples < 1:
            raise PayloadError("reply says it trained on 0 images, expected at least 1")
        if not all(math.isfinite(value) for value in floats):
            raise PayloadError("reply holds a metric that is not finite")
        loss, explained, cosine, train_seconds, encode_seconds = floats
        return TrainReply(examples, loss, explained, cosine, train_seconds, encode_seconds, payload)


def _split(data: object, head: struct.Struct, what: str) -> tuple[bytes, bytes]:
    if not isinstance(data, bytes) or len(data) < head.size:
        size = len(data) if isinstance(data, bytes) else 0
        raise PayloadError(f"{what} has {size} bytes, expected at least {head.size}")
    return data[: head.size], data[head.size :]
