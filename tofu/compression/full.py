"""No compression: the update as float32, what FedAvg sends (McMahan et al., AISTATS 2017)."""

from typing import ClassVar

import torch

from tofu.compression.base import Compressed, Compressor
from tofu.payload import float32_bytes, float32_from
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, Weights


class Full(Compressor):
    """The update itself, four bytes a number."""

    name: ClassVar[str] = "full"
    code: ClassVar[int] = 1

    def compress(
        self, network: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> Compressed:
        return Compressed(float32_bytes(update, network.param_spec), dict(update))

    def decompress(self, network: ReferenceModel, body: bytes) -> Weights:
        return float32_from(body, network.param_spec)

    def body_bytes(self, param_spec: ParamSpec) -> int:
        return param_spec.float32_bytes
