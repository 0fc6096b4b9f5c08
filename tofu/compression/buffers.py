"""Buffers (BatchNorm's statistics) as bytes, in the same format for every compressor so that the cost is the same.

In the order of the param spec, little-endian:

    one row of 8-bit integers with its bfloat16 scale for each float buffer (the differences of means and variances)
    float32 for each integer buffer (the difference of a batch counter)
"""

from functools import cached_property

import numpy as np
import torch

from tofu.compression.quantize import RowCode
from tofu.errors import PayloadError
from tofu.weights import ParamSpec, Weights

BUFFER_BITS = 8


class BufferCode:
    """The byte format of the differences of buffers."""

    def __init__(self, param_spec: ParamSpec) -> None:
        self._shapes = {name: shape for name, shape in param_spec.buffers.items() if name not in param_spec.integers}
        self._integers = [
            (name, param_spec.buffers[name]) for name in param_spec.buffers if name in param_spec.integers
        ]

    @cached_property
    def _rows(self) -> dict[str, RowCode]:
        """The format of each float buffer; one without values takes no bytes."""
        return {name: RowCode(1, n, BUFFER_BITS) for name, shape in self._shapes.items() if (n := shape.numel())}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(row.nbytes for row in self._rows.values()) + 4 * sum(shape.numel() for _, shape in self._integers)

    def write(self, update: Weights) -> bytes:
        """The buffers of an update -> bytes of length `nbytes`."""
        rows = [row.write(update[name]) for name, row in self._rows.items()]
        rows += [update[name].float().numpy().astype("<f4").tobytes() for name, _ in self._integers]
        return b"".join(rows)

    def read(self, data: bytes) -> Weights:
        """The inverse of `write`, every buffer as float32.

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
    """The values of a buffer. Raises PayloadError if one is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise PayloadError(f"buffer {name} holds a value that is not finite")
    return values
