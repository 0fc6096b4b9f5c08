"""EF-signSGD: the signs of an update, with one magnitude per tensor.

Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019,
arXiv 1901.09847: for a tensor x of d entries

    C(x) = |x|_1 / d sign(x),    |x - C(x)|^2 = (1 - |x|_1^2 / (d |x|_2^2)) |x|_2^2.

The error feedback is that of all compressors. With one bit per value the ratio is near 32, even if a lower one is set.

Data: the magnitude of each tensor as bfloat16, then the signs (1 is negative).
"""

import numpy as np
import torch
from torch import Tensor

from tofu.compression import compressors
from tofu.compression.base import FlatCompressor, checked_length, checked_scales
from tofu.compression.coding import BitReader, bfloat16_bytes, bfloat16_from, fixed, packed
from tofu.weights import ParamSpec


@compressors.register("signsgd")
class SignSgd(FlatCompressor):
    """One bit per value."""

    code = 7

    def _min_bytes(self, param_spec: ParamSpec) -> int:
        return 2 * len(param_spec.parameters) + (param_spec.parameter_count + 7) // 8

    def _max_bytes(self, param_spec: ParamSpec) -> int:
        return self._min_bytes(param_spec)

    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        tensors = torch.split(vector, _lengths(param_spec))
        magnitudes = [float(t.double().abs().mean()) if t.numel() else 0.0 for t in tensors]
        negative = (vector < 0).numpy().astype(np.int64)
        return bfloat16_bytes(torch.tensor(magnitudes)) + packed(fixed(negative, 1))

    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(data, self._max_bytes(param_spec), "signs")
        split = 2 * len(param_spec.parameters)
        magnitudes = checked_scales(bfloat16_from(data[:split], "magnitudes"), "magnitudes")
        bits = BitReader(data[split:], "signs")
        signs = 1 - 2 * torch.from_numpy(bits.fixed(param_spec.parameter_count, 1))
        bits.finish()
        return magnitudes.repeat_interleave(torch.tensor(_lengths(param_spec))) * signs


def _lengths(param_spec: ParamSpec) -> list[int]:
    return [shape.numel() for shape in param_spec.parameters.values()]
