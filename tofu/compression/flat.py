"""What codecs that see an update as one vector have in common: sizes, buffers, and checks at both ends.

The vector is all trainable parameters, flattened, in the param_spec's order. A body is the codec's own bytes followed by
the buffers (`BufferCode`). The codec's own bytes may use

    float32 bytes of the update / ratio - the payload's header - the buffers.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from tofu.compression.base import Compressed, Compressor
from tofu.compression.buffers import BufferCode
from tofu.errors import PayloadError, RunError, SettingError
from tofu.payload import HEADER_BYTES
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, Weights

LARGEST = 1e30
"""Entries are cut to this magnitude before they are coded. No update is near it, and below it no scale, sum or rotation
of a codec can overflow float32 or bfloat16."""


class FlatCompressor(Compressor):
    """A codec of one vector.

    Args:
        network_like: any network of the run.
        ratio: payload wanted, as float32 bytes of the update over bytes of the payload with its header.

    Raises:
        SettingError: the codec cannot reach that ratio for this model.
    """

    def __init__(self, network_like: ReferenceModel, *, ratio: float) -> None:
        self._ratio = ratio
        param_spec = network_like.param_spec
        if self._room(param_spec) < self._least(param_spec):
            size = HEADER_BYTES + self._least(param_spec) + BufferCode(param_spec).nbytes
            reach = math.floor(100 * param_spec.float32_bytes / size) / 100  # rounded down, so that it can be asked for
            raise SettingError("ratio", ratio, f"at most {reach:.2f} for this model with {self.name}")

    def compress(
        self, network: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> Compressed:
        """See `Compressor.compress`.

        Raises:
            RunError: the update holds a value that is not finite.
        """
        param_spec = network.param_spec
        vector = torch.cat([update[name].detach().float().flatten() for name in param_spec.parameters])
        if not bool(torch.isfinite(vector).all()):
            raise RunError("the update holds a value that is not finite: local training diverged")
        own = self._write(vector.clamp(-LARGEST, LARGEST), param_spec, generator, memory)
        body = own + BufferCode(param_spec).write(update)
        return Compressed(body, self.decompress(network, body), self._memory(own))

    def decompress(self, network: ReferenceModel, body: bytes) -> Weights:
        param_spec = network.param_spec
        buffers = BufferCode(param_spec)
        if not buffers.nbytes <= len(body) <= self.body_bytes(param_spec):
            expected = f"{buffers.nbytes} to {self.body_bytes(param_spec)}"
            raise PayloadError(f"{self.name} body has {len(body)} bytes, expected {expected}")
        split = len(body) - buffers.nbytes
        vector = self._read(body[:split], param_spec)
        if not bool(torch.isfinite(vector).all()):
            raise PayloadError(f"{self.name} body decodes to a value that is not finite")
        pieces: tuple[Tensor, ...] = torch.split(vector, [shape.numel() for shape in param_spec.parameters.values()])
        parameters = {n: piece.view(s) for (n, s), piece in zip(param_spec.parameters.items(), pieces, strict=True)}
        return parameters | buffers.read(body[split:])

    def body_bytes(self, param_spec: ParamSpec) -> int:
        return self._most(param_spec) + BufferCode(param_spec).nbytes

    def _room(self, param_spec: ParamSpec) -> int:
        """Bytes that the ratio leaves for the codec's own part of a body."""
        return int(param_spec.float32_bytes / self._ratio) - HEADER_BYTES - BufferCode(param_spec).nbytes

    def _most(self, param_spec: ParamSpec) -> int:
        """Most bytes of the codec's own part."""
        return self._room(param_spec)

    def _memory(self, own: bytes) -> bytes:
        """What to remember of a body's own part for the sender's next call."""
        return b""

    @abstractmethod
    def _least(self, param_spec: ParamSpec) -> int:
        """Bytes of the own part that the codec needs to send anything at all."""

    @abstractmethod
    def _write(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        """A finite float32 vector [d] -> the codec's own bytes, at most `_most` of them."""

    @abstractmethod
    def _read(self, own: bytes, param_spec: ParamSpec) -> Tensor:
        """The inverse of `_write`, float32 [d].

        Raises:
            PayloadError: the bytes cannot have been written for this param_spec and ratio.
        """


def checked_scales(scales: Tensor, what: str) -> Tensor:
    """The scales, where all are finite and none is negative.

    Raises:
        PayloadError: one is not.
    """
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise PayloadError(f"{what} hold a scale that is negative or not finite")
    return scales


def checked_length(own: bytes, expected: int, what: str, *, exactly: bool = True) -> None:
    """Raises PayloadError where the own part is not (or, not `exactly`, less than) `expected` bytes long."""
    if len(own) < expected or (exactly and len(own) > expected):
        raise PayloadError(f"{what} take {len(own)} bytes, expected {'' if exactly else 'at least '}{expected}")
