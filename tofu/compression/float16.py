"""Half precision: the update as float16, a ratio of 2 but for the header; the least that a codec should beat.

Values beyond what a half holds, 65504, are cut to it.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tofu.compression.flat import FlatCompressor, checked_length
from tofu.weights import Layout


class Float16(FlatCompressor):
    """Two bytes a number."""

    name: ClassVar[str] = "float16"
    code: ClassVar[int] = 10

    def _least(self, layout: Layout) -> int:
        return 2 * layout.parameter_count

    def _most(self, layout: Layout) -> int:
        return self._least(layout)

    def _write(self, vector: Tensor, layout: Layout, generator: torch.Generator, memory: bytes) -> bytes:
        top = torch.finfo(torch.float16).max
        return vector.clamp(-top, top).half().numpy().astype("<f2").tobytes()

    def _read(self, own: bytes, layout: Layout) -> Tensor:
        checked_length(own, self._most(layout), "halves")
        return torch.from_numpy(np.frombuffer(own, dtype="<f2").astype(np.float32))
