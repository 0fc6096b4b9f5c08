"""Half precision: the update as float16, a ratio of 2 but for the header; the least that a codec should beat.

Values beyond what a half holds, 65504, are cut to it.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tofu.compression.flat import FlatCompressor, checked_length
from tofu.weights import ParamSpec


class Float16(FlatCompressor):
    """Two bytes a number."""

    name: ClassVar[str] = "float16"
    code: ClassVar[int] = 10

    def _least(self, param_spec: ParamSpec) -> int:
        return 2 * param_spec.parameter_count

    def _most(self, param_spec: ParamSpec) -> int:
        return self._least(param_spec)

    def _write(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        top = torch.finfo(torch.float16).max
        return vector.clamp(-top, top).half().numpy().astype("<f2").tobytes()

    def _read(self, own: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(own, self._most(param_spec), "halves")
        return torch.from_numpy(np.frombuffer(own, dtype="<f2").astype(np.float32))
