"""The base class of compressors that treat an update as one vector: sizes, buffers, and checks at both ends.

The vector is all trainable parameters, flattened, in the order of the param spec. A body is the compressor's own data
followed by the buffers (`BufferCode`). The data may take

    float32 bytes of the update / ratio - the payload's header - the buffers.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from tofu.codec.options import DEFAULTS, CompressorOptions
from tofu.compression.base import CompressedUpdate, Compressor
from tofu.compression.buffers import BufferCode
from tofu.errors import PayloadError, RunError, SettingError
from tofu.payload import HEADER_BYTES
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, Weights

MAX_MAGNITUDE = 1e30
"""Entries are clipped to this magnitude before encoding. No update comes near it, and below it no scale, sum or
rotation of a compressor can overflow float32 or bfloat16."""


class FlatCompressor(Compressor):
    """A compressor of one vector.

    Args:
        reference: a model like those of the run.
        ratio: float32 bytes of the update over bytes of the payload, header included.
        options: unused.

    Raises:
        SettingError: the compressor cannot reach that ratio for this model.
    """

    def __init__(self, reference: ReferenceModel, *, ratio: float, options: CompressorOptions = DEFAULTS) -> None:
        self._ratio = ratio
        param_spec = reference.param_spec
        if self._budget(param_spec) < self._min_bytes(param_spec):
            size = HEADER_BYTES + self._min_bytes(param_spec) + BufferCode(param_spec).nbytes
            reach = math.floor(100 * param_spec.float32_bytes / size) / 100  # rounded down, so that it is usable
            raise SettingError("ratio", ratio, f"at most {reach:.2f} for this model with {self.name}")

    def compress(
        self, reference: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> CompressedUpdate:
        param_spec = reference.param_spec
        check_finite({name: update[name] for name in param_spec.parameters})
        vector = torch.cat([update[name].detach().float().flatten() for name in param_spec.parameters])
        data = self._encode(vector.clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE), param_spec, generator, memory)
        body = data + BufferCode(param_spec).write(update)
        return CompressedUpdate(body, self.decompress(reference, body), self._memory(data))

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        param_spec = reference.param_spec
        buffers = BufferCode(param_spec)
        if not buffers.nbytes <= len(body) <= self.body_bytes(param_spec):
            expected = f"{buffers.nbytes} to {self.body_bytes(param_spec)}"
            raise PayloadError(f"{self.name} body has {len(body)} bytes, expected {expected}")
        split = len(body) - buffers.nbytes
        vector = self._decode(body[:split], param_spec)
        if not bool(torch.isfinite(vector).all()):
            raise PayloadError(f"{self.name} body decodes to a value that is not finite")
        pieces: tuple[Tensor, ...] = torch.split(vector, [shape.numel() for shape in param_spec.parameters.values()])
        parameters = {n: piece.view(s) for (n, s), piece in zip(param_spec.parameters.items(), pieces, strict=True)}
        return parameters | buffers.read(body[split:])

    def body_bytes(self, param_spec: ParamSpec) -> int:
        return self._max_bytes(param_spec) + BufferCode(param_spec).nbytes

    def _budget(self, param_spec: ParamSpec) -> int:
        """Bytes that the ratio allows for the compressor's own data."""
        return int(param_spec.float32_bytes / self._ratio) - HEADER_BYTES - BufferCode(param_spec).nbytes

    def _max_bytes(self, param_spec: ParamSpec) -> int:
        """Maximum length of the compressor's own data."""
        return self._budget(param_spec)

    def _memory(self, data: bytes) -> bytes:
        """What to remember of a body's data for the sender's next call."""
        return b""

    @abstractmethod
    def _min_bytes(self, param_spec: ParamSpec) -> int:
        """Length of the data that the compressor needs to send anything at all."""

    @abstractmethod
    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        """A finite float32 vector [d] as bytes, at most `_max_bytes` of them."""

    @abstractmethod
    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        """The inverse of `_encode`, float32 [d].

        Raises:
            PayloadError: the bytes cannot have been written for this param_spec and ratio.
        """


def check_finite(update: Weights) -> None:
    """Raises RunError if a value of an update is not finite."""
    if not all(bool(torch.isfinite(value).all()) for value in update.values()):
        raise RunError("the update holds a value that is not finite: local training diverged")


def checked_scales(scales: Tensor, what: str) -> Tensor:
    """The scales, if all are finite and none is negative.

    Raises:
        PayloadError: one is not.
    """
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise PayloadError(f"{what} hold a scale that is negative or not finite")
    return scales


def checked_length(data: bytes, expected: int, what: str, *, exactly: bool = True) -> None:
    """Raises PayloadError if the data is not exactly (or, with exactly=False, at least) `expected` bytes long."""
    if len(data) < expected or (exactly and len(data) > expected):
        raise PayloadError(f"{what} take {len(data)} bytes, expected {'' if exactly else 'at least '}{expected}")
