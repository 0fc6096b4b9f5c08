"""What the server and a client say to each other, as bytes: one value in one record of a Flower message.

Flower spends hundreds of bytes on every further record or array of a message, as much as a whole payload of ours, so a
message is one bytes value: a small fixed head, then the payload (`tofu.payload`).
"""

import hashlib
import math
import struct
from dataclasses import dataclass

from tofu.data import ImageShape
from tofu.errors import PayloadError
from tofu.fingerprint import SKETCH_BYTES
from tofu.weights import FINGERPRINT_BYTES

RECORD = "t"
FIELD = "b"

KINDS = ("proxy", "full", "secure")
"""Kinds of round. The position is the number on the wire."""

STAGES = ("advert", "share", "confirm", "reveal")
"""What a client is asked for in a secure round besides its masked vector. The position is the number on the wire."""

SECURE = "secure"
"""The action of these queries."""

RESYNC = 1001
"""Code of the error reply of a client that cannot build the round's weights from the steps it was sent."""

_REQUEST = struct.Struct(f"<BBi4HHII{FINGERPRINT_BYTES}s{SKETCH_BYTES}s")
_LENGTH = struct.Struct("<I")
_REPLY = struct.Struct("<I5fBI")
_ADVERT_FLAG, _KEPT_FLAG = 1, 2
_QUERY = struct.Struct("<BB")
_ADVERT = struct.Struct("<B")


def broadcast_id(broadcast: bytes) -> bytes:
    """Names a broadcast of the plugins, in 8 bytes; b"" for none."""
    return hashlib.sha256(broadcast).digest()[:8] if broadcast else b""


def run_name(run_id: int) -> bytes:
    """What tells a Flower run from others in the keys and signatures of secure rounds, the same on both ends."""
    return run_id.to_bytes(8, "little")


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
        identity: of this round's weights (`tofu.fingerprint`), which the reply is relative to.
        sketch: of this round's weights.
        advert: whether the reply shall carry fresh keys for a secure round.
        secure: the part of a secure round, b"" in others.
        broadcast: the state that the plugins' server halves give to all clients (`tofu.plugins`), or b"".
        kept: instead, `broadcast_id` of the one that the client has kept and is to use.
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

    def to_bytes(self) -> bytes:
        s = self.shape
        flags = _ADVERT_FLAG * self.advert + _KEPT_FLAG * bool(self.kept)
        numbers = (KINDS.index(self.kind), flags, self.acknowledged, s.channels, s.height, s.width, s.classes)
        state = self.kept or self.broadcast
        head = _REQUEST.pack(*numbers, len(self.steps), len(self.secure), len(state), self.identity, self.sketch)
        steps = b"".join(_LENGTH.pack(len(step)) + step for step in self.steps)
        return head + self.secure + state + steps + self.payload

    @staticmethod
    def from_bytes(data: object) -> "TrainRequest":
        """Raises PayloadError for bytes that are no request."""
        head, rest = _split(data, _REQUEST, "request")
        kind, flags, acknowledged, *shape, count, length, broadcasts, identity, sketch = _REQUEST.unpack(head)
        if not kind < len(KINDS):
            raise PayloadError(f"request has round kind {kind}, expected below {len(KINDS)}")
        if min(shape) < 1:
            raise PayloadError(f"request has input shape {shape}, expected positive numbers")
        if flags > _ADVERT_FLAG + _KEPT_FLAG:
            raise PayloadError(f"request has flags {flags}, expected at most {_ADVERT_FLAG + _KEPT_FLAG}")
        if length > len(rest) or bool(length) != (KINDS[kind] == "secure"):
            raise PayloadError(f"request of a {KINDS[kind]} round has {length} bytes for a secure one")
        if length + broadcasts > len(rest):
            raise PayloadError(f"request has {len(rest) - length} bytes, expected a broadcast of {broadcasts}")
        secure, state = rest[:length], rest[length : length + broadcasts]
        kept = bool(flags & _KEPT_FLAG)
        steps, at = [], length + broadcasts
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
        return TrainRequest(
            KINDS[kind], acknowledged, ImageShape(*shape), rest, identity, tuple(steps), sketch,
            bool(flags & _ADVERT_FLAG), secure, b"" if kept else state, state if kept else b"",
        )  # fmt: skip


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
        advert: fresh keys for a secure round (`tofu.secagg`), where they were asked for.
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
        """Raises PayloadError for bytes that are no reply, or numbers that cannot be right."""
        head, rest = _split(data, _REPLY, "reply")
        examples, *floats, advert, exported = _REPLY.unpack(head)
        if examples < 1:
            raise PayloadError("reply says it trained on 0 images, expected at least 1")
        if not all(math.isfinite(value) for value in floats):
            raise PayloadError("reply holds a metric that is not finite")
        if advert + exported > len(rest):
            raise PayloadError(f"reply has {len(rest)} bytes, expected an advert of {advert} and exports of {exported}")
        loss, explained, cosine, train_seconds, encode_seconds = floats
        return TrainReply(
            examples, loss, explained, cosine, train_seconds, encode_seconds,
            rest[advert + exported :], rest[:advert], rest[advert : advert + exported],
        )  # fmt: skip


@dataclass(frozen=True)
class SecurePart:
    """What a train request carries in a secure round. The reply to it is a masked vector (`tofu.secagg`) and no more.

    Attributes:
        terms: of the vector (`tofu.secagg.encoding`).
        shares: the neighbors' sealed shares (`tofu.secagg.messages.Shares`).
    """

    terms: bytes
    shares: bytes

    def to_bytes(self) -> bytes:
        return _LENGTH.pack(len(self.terms)) + self.terms + self.shares

    @staticmethod
    def from_bytes(data: object) -> "SecurePart":
        """Raises PayloadError for bytes that are no such part."""
        head, rest = _split(data, _LENGTH, "secure part")
        (length,) = _LENGTH.unpack(head)
        if length > len(rest):
            raise PayloadError(f"secure part has {len(rest)} bytes, expected terms of {length}")
        return SecurePart(rest[:length], rest[length:])


@dataclass(frozen=True)
class SecureQuery:
    """The server asks for one stage of a secure round.

    Attributes:
        stage: one of `STAGES`.
        message: of `tofu.secagg`; b"" for an advert.
        advert: whether the answer shall carry fresh keys for the next secure round.
    """

    stage: str
    message: bytes = b""
    advert: bool = False

    def to_bytes(self) -> bytes:
        return _QUERY.pack(STAGES.index(self.stage), self.advert) + self.message

    @staticmethod
    def from_bytes(data: object) -> "SecureQuery":
        """Raises PayloadError for bytes that are no query."""
        head, message = _split(data, _QUERY, "query")
        stage, advert = _QUERY.unpack(head)
        if not stage < len(STAGES) or advert > 1:
            raise PayloadError(f"query has stage {stage} and advert {advert}, expected below {len(STAGES)} and 2")
        return SecureQuery(STAGES[stage], message, bool(advert))


@dataclass(frozen=True)
class SecureAnswer:
    """A client's answer to a `SecureQuery`: its message of `tofu.secagg`, and fresh keys where they were asked for."""

    message: bytes
    advert: bytes = b""

    def to_bytes(self) -> bytes:
        return _ADVERT.pack(len(self.advert)) + self.advert + self.message

    @staticmethod
    def from_bytes(data: object) -> "SecureAnswer":
        """Raises PayloadError for bytes that are no answer."""
        head, rest = _split(data, _ADVERT, "answer")
        (length,) = _ADVERT.unpack(head)
        if length > len(rest):
            raise PayloadError(f"answer has {len(rest)} bytes, expected an advert of {length}")
        return SecureAnswer(rest[length:], rest[:length])


def _split(data: object, head: struct.Struct, what: str) -> tuple[bytes, bytes]:
    if not isinstance(data, bytes) or len(data) < head.size:
        size = len(data) if isinstance(data, bytes) else 0
        raise PayloadError(f"{what} has {size} bytes, expected at least {head.size}")
    return data[: head.size], data[head.size :]
