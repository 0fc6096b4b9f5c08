"""No compression: the update as float32, as in FedAvg (McMahan et al., AISTATS 2017)."""

import torch

from tofu.compression import compressors
from tofu.compression.base import CompressedUpdate, Compressor
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, Weights
from tofu.wire import float32_bytes, float32_from


@compressors.register("none")
class Uncompressed(Compressor):
    """The update itself, four bytes per value."""

    code = 1
    has_own_gain = True  # there is no compression error to over-relax

    def compress(
        self, reference: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> CompressedUpdate:
        return CompressedUpdate(float32_bytes(update, reference.param_spec), dict(update))

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        return float32_from(body, reference.param_spec)

    def body_bytes(self, param_spec: ParamSpec) -> int:
        return param_spec.float32_bytes
