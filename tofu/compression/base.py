"""The base that every compressor of updates stands on."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, Weights


@dataclass(frozen=True)
class Compressed:
    """The outcome of one `compress`.

    Attributes:
        body: the bytes to send.
        decoded: what the receiver will decode from them, over all tensors of the param_spec.
        memory: what the compressor wants back at its next call for the same sender (b"" for nothing).
        max_evals: how often an iterative encoder evaluated its objective (0 for others).
    """

    body: bytes
    decoded: Weights
    memory: bytes = b""
    max_evals: int = field(default=0)


class Compressor(ABC):
    """Turns an update into bytes and back. State is passed in and out; an instance holds settings only.

    Attributes:
        name: how a user selects it.
        code: its number in a payload's header.
    """

    name: ClassVar[str]
    code: ClassVar[int]

    @abstractmethod
    def compress(
        self, network: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> Compressed:
        """Compress an update of `network`'s trainable parameters and buffers (float32, by state-dict name).

        Args:
            generator: the only source of randomness.
            memory: `Compressed.memory` of the sender's last call, or b"". What cannot be used is ignored.
        """

    @abstractmethod
    def decompress(self, network: ReferenceModel, body: bytes) -> Weights:
        """The update that `body` stands for, over all tensors of the param_spec; deterministic.

        Raises:
            PayloadError: the body cannot have been written for this network and these settings.
        """

    @abstractmethod
    def body_bytes(self, param_spec: ParamSpec) -> int:
        """Largest length in bytes of a body for a model with this param_spec."""
