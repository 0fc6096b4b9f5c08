"""The payload of a message: a versioned header and a body, with every field checked on read.

    offset  bytes  field
    0       4      magic "TOFU"
    4       1      version of this layout
    5       1      code of the compressor that wrote the body (`tofu.compression`)
    6       4      round, unsigned, little-endian
    10      8      fingerprint of the base weights (of the weights themselves on the downlink)
    18      4      CRC-32 of the body
    22      -      body

The checksum detects accidental damage. Against forgery, a deployment has TLS and authenticated clients.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tofu.bytes_io import ByteReader
from tofu.errors import PayloadError
from tofu.weights import FINGERPRINT_BYTES, ParamSpec, Weights

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
        fingerprint: of the weights that both ends must share; None if the payload carries the weights themselves.
        max_bytes: longer data is refused unread.

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
    """All tensors of the param_spec as little-endian float32, in its order."""
    parts = [
        values[name].detach().float().cpu().contiguous().numpy().astype("<f4").tobytes() for name in param_spec.shapes
    ]
    return b"".join(parts)


def float32_from(body: bytes, param_spec: ParamSpec) -> Weights:
    """The inverse of `float32_bytes`: name -> float32 tensor for parameters and buffers.

    Raises:
        PayloadError: wrong length for this param_spec, or a value that is not finite.
    """
    if len(body) != param_spec.float32_bytes:
        raise PayloadError(f"float32 body has {len(body)} bytes, this model takes {param_spec.float32_bytes}")
    flat = torch.from_numpy(np.frombuffer(body, dtype="<f4").astype(np.float32))
    if not bool(torch.isfinite(flat).all()):
        raise PayloadError("float32 body holds a value that is not finite")
    pieces: tuple[Tensor, ...] = torch.split(flat, [shape.numel() for shape in param_spec.shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(param_spec.shapes.items(), pieces, strict=True)}
