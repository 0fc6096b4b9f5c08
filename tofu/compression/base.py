"""Base classes of compressors, the byte format of buffers, and checks that several compressors share."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tofu.codec.options import AUTOMATIC, DEFAULTS, CompressorOptions, ProxySettings, automatic_gain
from tofu.compression.coding import RowCode
from tofu.errors import PayloadError, SettingError
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, Weights, check_finite, explained_variance, split_vector
from tofu.wire import HEADER_BYTES

if TYPE_CHECKING:
    from tofu.codec.proxies import ProxyData


@dataclass(frozen=True)
class CompressedUpdate:
    """The result of one `Compressor.compress`.

    Attributes:
        body: the bytes to send.
        decoded: the update that the receiver decodes, over all tensors of the param_spec.
        memory: state that the compressor needs in its next call for the same sender (b"" for none).
        evals: number of evaluations of an iterative encoder's objective (0 for others).
    """

    body: bytes
    decoded: Weights
    memory: bytes = b""
    evals: int = 0


@dataclass(frozen=True)
class PayloadContent:
    """The content of a body, for reports and attacks.

    Attributes:
        parts: name of each part -> its bytes, in the order of the body.
        proxy_shape: number of proxies, then the shape of one (`ProxyCode.shape`); (0,) without proxies.
        proxies: the proxies, or None if there are none or no body was given.
        settings: how to decode the proxies.
        note: what a user should know about all payloads of this model and ratio, in one line; "" for nothing.
    """

    parts: Mapping[str, int]
    proxy_shape: tuple[int, ...] = (0,)
    proxies: "ProxyData | None" = None
    settings: ProxySettings | None = None
    note: str = ""


class Compressor(ABC):
    """Encodes updates as bytes and decodes them. An instance holds settings only; state is passed in and returned.

    Args:
        reference: the run's model, or one with equal shapes.
        ratio: float32 bytes of an update over bytes of its payload, header included.
        options: the run's options; a compressor ignores those that it does not need.

    Attributes:
        name: the name that selects it, set by `compressors.register`; by default the class name in lower case.
        code: number in a payload's header. Compressors outside this package share the default.
        has_own_gain: whether the compressor applies over-relaxation itself (`CompressorOptions`).

    Example:
        >>> from tofu.compression.base import CompressedUpdate, Compressor
        >>> from tofu.wire import float32_bytes, float32_from
        >>> class Rounded(Compressor):
        ...     '''Three decimals as float32: a compressor that does not compress.'''
        ...
        ...     def compress(self, reference, update, *, generator, memory=b""):
        ...         decoded = {name: value.round(decimals=3) for name, value in update.items()}
        ...         return CompressedUpdate(float32_bytes(decoded, reference.param_spec), decoded)
        ...
        ...     def decompress(self, reference, body):
        ...         return float32_from(body, reference.param_spec)
        ...
        ...     def body_bytes(self, param_spec):
        ...         return param_spec.float32_bytes
        >>> Rounded.name, Rounded.code
        ('rounded', 255)
    """

    name: str
    code: int = 255
    has_own_gain: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = cls.__name__.lower()

    def __init__(  # noqa: B027 (a subclass without settings needs none)
        self, reference: ReferenceModel, *, ratio: float, options: CompressorOptions = DEFAULTS
    ) -> None:
        pass

    @abstractmethod
    def compress(
        self, reference: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> CompressedUpdate:
        """Compress an update of the reference's trainable parameters and buffers (float32, by state-dict name).

        Args:
            generator: the only source of randomness.
            memory: `CompressedUpdate.memory` of the sender's last call, or b"". Unusable memory is ignored.

        Raises:
            RunError: the update holds a value that is not finite.
        """

    @abstractmethod
    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        """Decode a body to an update, over all tensors of the param_spec; deterministic.

        Raises:
            PayloadError: the body cannot have been written for this reference and these settings.
        """

    @abstractmethod
    def body_bytes(self, param_spec: ParamSpec) -> int:
        """Return the maximum length in bytes of a body for a model with this param_spec."""

    def check(self, reference: ReferenceModel) -> None:  # noqa: B027 (most compressors accept every model)
        """Check before a run that the model supports this compressor. Raises SettingError if it does not."""

    def describe(self, body: bytes | None = None) -> PayloadContent | None:
        """Return the content of a body, or of the largest possible body without one; None if this is not implemented.

        Raises:
            PayloadError: the body cannot have been written with these settings.
        """
        return None


class Checked(Compressor):
    """Wraps a compressor outside this package, and checks the updates that it returns.

    Args:
        shown: the compressor as the settings name it, for errors.
    """

    def __init__(self, compressor: Compressor, shown: str) -> None:
        self._compressor, self._shown = compressor, shown
        self.name, self.code, self.has_own_gain = compressor.name, compressor.code, compressor.has_own_gain

    def compress(
        self, reference: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> CompressedUpdate:
        check_finite(update)
        made = self._compressor.compress(reference, update, generator=generator, memory=memory)
        if not isinstance(made, CompressedUpdate) or not isinstance(made.body, bytes):
            found = type(made.body if isinstance(made, CompressedUpdate) else made).__name__
            raise self._error("compress()", f"CompressedUpdate(body, decoded) with bytes as body (found {found})")
        if not isinstance(made.memory, bytes):
            raise self._error("compress()", f"bytes as memory (found {type(made.memory).__name__})")
        if problem := _problem(made.decoded, reference.param_spec):
            raise self._error("compress()", f"a `decoded` as decompress() returns it ({problem})")
        return made

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        decoded = self._compressor.decompress(reference, body)
        if problem := _problem(decoded, reference.param_spec):
            raise PayloadError(f"decompress() of compressor {self._shown} returns no update of this model: {problem}")
        return decoded

    def body_bytes(self, param_spec: ParamSpec) -> int:
        size = self._compressor.body_bytes(param_spec)
        if not isinstance(size, int) or size < 0:
            found = size if isinstance(size, int | float) else type(size).__name__
            raise self._error("body_bytes()", f"a whole number of bytes (found {found})")
        return size

    def check(self, reference: ReferenceModel) -> None:
        self._compressor.check(reference)

    def describe(self, body: bytes | None = None) -> PayloadContent | None:
        return self._compressor.describe(body)

    def _error(self, method: str, accepted: str) -> SettingError:
        return SettingError("compressor", self._shown, f"a class whose {method} returns {accepted}")


def _problem(update: object, spec: ParamSpec) -> str:
    """Return why a value is no update over all tensors of the param_spec, or ""."""
    if not isinstance(update, Mapping):
        return f"found {type(update).__name__}, expected a dict of tensors by name"
    if update.keys() != spec.shapes.keys():
        name = min(update.keys() ^ spec.shapes.keys(), key=str)
        return f"{name} is {'unknown' if name in update else 'missing'}"
    for name, value in update.items():
        wanted = f"torch.float32 {list(spec.shapes[name])}"
        kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        if kind != wanted:
            return f"{name} is {kind}, expected {wanted}"
        if not value.isfinite().all():
            return f"{name} has values that are not finite"
    return ""


class OverRelaxed(Compressor):
    """Wraps a compressor; both ends multiply the parameters of its decoded updates by a gain w.

    Buffers are not multiplied, because they are statistics without a residual. An automatic gain is written as the last
    byte b of the body, w = 1 + b / 256.

    Args:
        gain: w, or AUTOMATIC.
    """

    def __init__(self, compressor: Compressor, gain: float) -> None:
        self._compressor, self._gain = compressor, gain
        self.name, self.code = compressor.name, compressor.code

    def compress(
        self, reference: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> CompressedUpdate:
        compressed = self._compressor.compress(reference, update, generator=generator, memory=memory)
        gain, body, decoded = self._gain, compressed.body, compressed.decoded
        if gain == AUTOMATIC:
            parameters = {name: update[name] for name in reference.param_spec.parameters}
            gain = automatic_gain(explained_variance(parameters, decoded))
            body += bytes([round(256 * (gain - 1))])
        return dataclasses.replace(compressed, body=body, decoded=self._scaled(reference, decoded, gain))

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        gain = self._gain
        if gain == AUTOMATIC:
            if not body:
                raise PayloadError(f"{self.name} body has 0 bytes, expected at least 1")
            gain, body = 1 + body[-1] / 256, body[:-1]
        return self._scaled(reference, self._compressor.decompress(reference, body), gain)

    def body_bytes(self, param_spec: ParamSpec) -> int:
        return self._compressor.body_bytes(param_spec) + (self._gain == AUTOMATIC)

    def check(self, reference: ReferenceModel) -> None:
        self._compressor.check(reference)

    def describe(self, body: bytes | None = None) -> PayloadContent | None:
        return self._compressor.describe(body[:-1] if body and self._gain == AUTOMATIC else body)

    def _scaled(self, reference: ReferenceModel, decoded: Weights, gain: float) -> Weights:
        parameters = reference.param_spec.parameters
        return {name: gain * value if name in parameters else value for name, value in decoded.items()}


BUFFER_BITS = 8


class BufferCode:
    """The byte format of the differences of buffers, which all compressors use.

    In the order of the param spec: one row of 8-bit integers with its bfloat16 scale for each float buffer (differences
    of means and variances), little-endian float32 for each integer buffer (the difference of a batch counter).
    """

    def __init__(self, param_spec: ParamSpec) -> None:
        self._shapes = {name: shape for name, shape in param_spec.buffers.items() if name not in param_spec.integers}
        self._integers = [
            (name, param_spec.buffers[name]) for name in param_spec.buffers if name in param_spec.integers
        ]

    @cached_property
    def _rows(self) -> dict[str, RowCode]:
        """The format of each float buffer; empty ones are left out."""
        return {name: RowCode(1, n, BUFFER_BITS) for name, shape in self._shapes.items() if (n := shape.numel())}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(row.nbytes for row in self._rows.values()) + 4 * sum(shape.numel() for _, shape in self._integers)

    def write(self, update: Weights) -> bytes:
        """Encode the buffers of an update as bytes of length `nbytes`."""
        rows = [row.write(update[name]) for name, row in self._rows.items()]
        rows += [update[name].float().numpy().astype("<f4").tobytes() for name, _ in self._integers]
        return b"".join(rows)

    def read(self, data: bytes) -> Weights:
        """Invert `write`, every buffer as float32.

        Raises:
            PayloadError: wrong length, or a value that is not finite.
        """
        if len(data) != self.nbytes:
            raise PayloadError(f"buffers take {len(data)} bytes, expected {self.nbytes}")
        buffers: Weights = {}
        start = 0
        for name, shape in self._shapes.items():
            if name not in self._rows:
                buffers[name] = torch.zeros(shape)
                continue
            row = self._rows[name]
            values = row.read(data[start : start + row.nbytes], f"buffer {name}")  # a finite scale times 127 may be inf
            buffers[name] = _finite(values, name).view(shape)
            start += row.nbytes
        for name, shape in self._integers:
            end = start + 4 * shape.numel()
            values = torch.from_numpy(np.frombuffer(data[start:end], dtype="<f4").astype(np.float32))
            buffers[name] = _finite(values, name).view(shape)
            start = end
        return buffers


def _finite(values: torch.Tensor, name: str) -> torch.Tensor:
    """Return the values of a buffer. Raises PayloadError if one is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise PayloadError(f"buffer {name} holds a value that is not finite")
    return values


MAX_MAGNITUDE = 1e30
"""Entries are clipped to this magnitude before encoding, so that no scale, sum or rotation of a compressor overflows
float32 or bfloat16. Usable updates are far below it."""


class FlatCompressor(Compressor):
    """A compressor of one vector: all trainable parameters, flattened, in the order of the param spec.

    A body is the compressor's own data followed by the buffers (`BufferCode`). The data may take

        float32 bytes of the update / ratio - the payload's header - the buffers,

    and one byte less if over-relaxation is automatic.

    Args:
        reference: the run's model, or one with equal shapes.
        ratio: float32 bytes of the update over bytes of the payload, header included.
        options: only `gain` is used.

    Raises:
        SettingError: the compressor cannot reach that ratio for this model.
    """

    def __init__(self, reference: ReferenceModel, *, ratio: float, options: CompressorOptions = DEFAULTS) -> None:
        self._ratio, self._gain_bytes = ratio, int(options.gain == AUTOMATIC)
        param_spec = reference.param_spec
        if self._budget(param_spec) < self._min_bytes(param_spec):
            size = HEADER_BYTES + self._min_bytes(param_spec) + BufferCode(param_spec).nbytes + self._gain_bytes
            reach = math.floor(100 * param_spec.float32_bytes / size) / 100  # rounded down, so that it is usable
            accepted = f"at most {reach:.2f} for this model" if reach >= 1 else "a model larger than its payload"
            raise SettingError("ratio", ratio, f"{accepted} with {self.name}")

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
        return split_vector(vector, param_spec.parameters) | buffers.read(body[split:])

    def body_bytes(self, param_spec: ParamSpec) -> int:
        return self._max_bytes(param_spec) + BufferCode(param_spec).nbytes

    def _budget(self, param_spec: ParamSpec) -> int:
        """Return the number of bytes that the ratio allows for the compressor's own data."""
        used = HEADER_BYTES + BufferCode(param_spec).nbytes + self._gain_bytes
        return int(param_spec.float32_bytes / self._ratio) - used

    def _max_bytes(self, param_spec: ParamSpec) -> int:
        """Return the maximum length of the compressor's own data."""
        return self._budget(param_spec)

    def _memory(self, data: bytes) -> bytes:
        """Return the memory for the sender's next call, from the data of a body."""
        return b""

    @abstractmethod
    def _min_bytes(self, param_spec: ParamSpec) -> int:
        """Return the minimum length of the compressor's own data."""

    @abstractmethod
    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        """Encode a finite float32 vector [d] in at most `_max_bytes` bytes."""

    @abstractmethod
    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        """Invert `_encode`, float32 [d].

        Raises:
            PayloadError: the bytes cannot have been written for this param_spec and ratio.
        """


def checked_scales(scales: Tensor, what: str) -> Tensor:
    """Return the scales. Raises PayloadError if one is negative or not finite."""
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise PayloadError(f"{what} hold a scale that is negative or not finite")
    return scales


def checked_length(data: bytes, expected: int, what: str, *, exactly: bool = True) -> None:
    """Raises PayloadError if the data is not exactly (or, with exactly=False, at least) `expected` bytes long."""
    if len(data) < expected or (exactly and len(data) > expected):
        raise PayloadError(f"{what} take {len(data)} bytes, expected {'' if exactly else 'at least '}{expected}")
