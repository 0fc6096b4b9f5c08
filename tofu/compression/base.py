"""The base class of compressors."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tofu.codec.options import DEFAULTS, CompressorOptions, ProxySettings
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, Weights

if TYPE_CHECKING:
    from tofu.codec.proxies import ProxyData


@dataclass(frozen=True)
class CompressedUpdate:
    """The result of one `Compressor.compress`.

    Attributes:
        body: the bytes to send.
        decoded: what the receiver decodes from them, over all tensors of the param_spec.
        memory: what the compressor needs back at its next call for the same sender (b"" for nothing).
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
        proxy_shape: number of proxies, then the shape of one (of several inputs, all values in a row); (0,) without.
        proxies: the proxies, or None if there are none or no body was given.
        settings: how the proxies decode.
    """

    parts: Mapping[str, int]
    proxy_shape: tuple[int, ...] = (0,)
    proxies: "ProxyData | None" = None
    settings: ProxySettings | None = None


class Compressor(ABC):
    """Turns an update into bytes and back. State is passed in and returned; an instance holds settings only.

    Args:
        reference: a model like those of the run; its param_spec and input shape fix the sizes.
        ratio: float32 bytes of an update over bytes of its payload, header included.
        options: the run's options; a compressor ignores those that it has no use for.

    Attributes:
        name: the name that selects it. The decorator `compressors.register` sets it; otherwise it is the class name in
            lower case.
        code: number in a payload's header. Compressors outside this package share the default.
        has_own_gain: whether the compressor applies over-relaxation itself (`CompressorOptions`).

    Example:
        >>> from tofu.compression.base import CompressedUpdate, Compressor
        >>> from tofu.payload import float32_bytes, float32_from
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
        """Maximum length in bytes of a body for a model with this param_spec."""

    def check(self, reference: ReferenceModel) -> None:  # noqa: B027 (most compressors accept every model)
        """Check before a run that the model allows what compressing needs. Raises SettingError if it does not."""

    def describe(self, body: bytes | None = None) -> PayloadContent | None:
        """What a body consists of, or the largest body without one; None if the compressor cannot tell.

        Raises:
            PayloadError: the body cannot have been written with these settings.
        """
        return None


class OverRelaxed(Compressor):
    """Another compressor, with the parameters of what it decodes to multiplied by `gain` at both ends.

    Buffers are statistics that no residual corrects, so they are not multiplied.
    """

    def __init__(self, compressor: Compressor, gain: float) -> None:
        self._compressor, self._gain = compressor, gain
        self.name, self.code = compressor.name, compressor.code

    def compress(
        self, reference: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> CompressedUpdate:
        compressed = self._compressor.compress(reference, update, generator=generator, memory=memory)
        return dataclasses.replace(compressed, decoded=self._scaled(reference, compressed.decoded))

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        return self._scaled(reference, self._compressor.decompress(reference, body))

    def body_bytes(self, param_spec: ParamSpec) -> int:
        return self._compressor.body_bytes(param_spec)

    def check(self, reference: ReferenceModel) -> None:
        self._compressor.check(reference)

    def describe(self, body: bytes | None = None) -> PayloadContent | None:
        return self._compressor.describe(body)

    def _scaled(self, reference: ReferenceModel, decoded: Weights) -> Weights:
        parameters = reference.param_spec.parameters
        return {name: self._gain * value if name in parameters else value for name, value in decoded.items()}
