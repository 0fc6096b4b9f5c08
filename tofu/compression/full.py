"""No compression: the update as float32, what FedAvg sends (McMahan et al., AISTATS 2017)."""

from typing import ClassVar

import torch

from tofu.compression.base import Compressed, Compressor
from tofu.payload import float32_bytes, float32_from
from tofu.reference_model import Network
from tofu.weights import Layout, Weights


class Full(Compressor):
    """The update itself, four bytes a number."""

    name: ClassVar[str] = "full"
    code: ClassVar[int] = 1

    def compress(
        self, network: Network, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> Compressed:
        return Compressed(float32_bytes(update, network.layout), dict(update))

    def decompress(self, network: Network, body: bytes) -> Weights:
        return float32_from(body, network.layout)

    def body_bytes(self, layout: Layout) -> int:
        return layout.float32_bytes
