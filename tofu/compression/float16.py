"""Half precision: the update as float16, a baseline with a ratio of nearly 2.

Values beyond the range of float16, 65504, are clipped.
"""

import numpy as np
import torch
from torch import Tensor

from tofu.compression import compressors
from tofu.compression.base import FlatCompressor, checked_length
from tofu.weights import ParamSpec


@compressors.register("float16")
class Float16(FlatCompressor):
    """Two bytes per value."""

    code = 10

    def _min_bytes(self, param_spec: ParamSpec) -> int:
        return 2 * param_spec.parameter_count

    def _max_bytes(self, param_spec: ParamSpec) -> int:
        return self._min_bytes(param_spec)

    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        top = torch.finfo(torch.float16).max
        return vector.clamp(-top, top).half().numpy().astype("<f2").tobytes()

    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(data, self._max_bytes(param_spec), "halves")
        return torch.from_numpy(np.frombuffer(data, dtype="<f2").astype(np.float32))
