"""Top-k: the largest entries of an update, each with its position and a few bits of its value.

Aji, Heafield, "Sparse Communication for Distributed Gradient SGD", EMNLP 2017, arXiv 1704.05021. Lin, Han, Mao, Wang,
Dally, "Deep Gradient Compression", ICLR 2018, arXiv 1712.01887. Both accumulate the entries that are not sent; here
error feedback does that. Both send values as floats. At a ratio of 50, on an update of LeNet-5, float32 values explain
0.54 of the variance, 8-bit integers 0.74, 4-bit integers 0.67, and a sign with one of four magnitudes 0.81 (of two
0.77, of eight 0.80). So a value is sent as a sign and one of a few magnitudes, which minimize the squared error
(Lloyd's algorithm). The number of magnitudes is doubled from two as long as that explains more of the update; with more
magnitudes fewer entries fit.

Data, little-endian:

    bytes  field
    4      k, the number of entries; as many of the largest as fit
    1      bits of a magnitude's index, b
    2 each 2^b magnitudes, bfloat16
    -      bits: positions (`coding.write_positions`), k signs (1 is negative), k indices of magnitudes
"""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tofu.compression import compressors
from tofu.compression.base import FlatCompressor, checked_length, checked_scales
from tofu.compression.coding import (
    BitReader,
    Integers,
    bfloat16_bytes,
    bfloat16_from,
    by_magnitude,
    fixed,
    max_fitting,
    packed,
    positions_length,
    read_positions,
    write_positions,
)
from tofu.errors import PayloadError
from tofu.weights import ParamSpec

_HEAD = struct.Struct("<IB")
MAX_LEVEL_BITS = 8
LLOYD_STEPS = 50


@compressors.register("topk")
class TopK(FlatCompressor):
    """The largest entries, with their signs and one of a few magnitudes each."""

    code = 3

    def _min_bytes(self, param_spec: ParamSpec) -> int:
        return min_bytes(param_spec.parameter_count)

    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        return write_largest(vector, self._budget(param_spec))

    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        return read_largest(data, param_spec.parameter_count)


def min_bytes(length: int) -> int:
    """Return the number of bytes in which one entry of a vector of this length always fits."""
    one = positions_length(np.array([length - 1])) + 1 + 1
    return _head(1) + (one + 7) // 8


def write_largest(vector: Tensor, budget: int) -> bytes:
    """Encode the largest entries of a float vector [d] in at most `budget` bytes."""
    order = by_magnitude(vector, count=4 * budget)  # an entry takes at least two bits
    best = _entries(vector, order, 1, budget)
    for level_bits in range(2, MAX_LEVEL_BITS + 1):
        more = _entries(vector, order, level_bits, budget)
        if more.explained <= best.explained:
            break
        best = more
    return best.to_bytes()


def read_largest(data: bytes, length: int) -> Tensor:
    """Invert `write_largest`: a float32 vector [length], zero elsewhere.

    Raises:
        PayloadError: the bytes cannot have been written for a vector of this length.
    """
    checked_length(data, _HEAD.size, "largest entries", exactly=False)
    count, level_bits = _HEAD.unpack_from(data)
    if not 1 <= level_bits <= MAX_LEVEL_BITS:
        raise PayloadError(f"largest entries have {level_bits} bits per magnitude, expected 1 to {MAX_LEVEL_BITS}")
    split = _head(level_bits)
    checked_length(data, split, "largest entries", exactly=False)
    magnitudes = checked_scales(bfloat16_from(data[_HEAD.size : split], "magnitudes"), "magnitudes")
    bits = BitReader(data[split:], "largest entries")
    positions = read_positions(bits, count, length)
    signs = torch.from_numpy(1 - 2 * bits.fixed(count, 1))
    codes = torch.from_numpy(bits.fixed(count, level_bits))
    bits.finish()
    vector = torch.zeros(length)
    vector[torch.from_numpy(positions)] = magnitudes[codes] * signs
    return vector


@dataclass(frozen=True)
class _Entries:
    """Selected entries: increasing positions, signs, indices of magnitudes, and 2^level_bits magnitudes.

    `explained` is |x|^2 - |x - C(x)|^2.
    """

    positions: Integers
    negative: Integers
    codes: Integers
    magnitudes: bytes
    level_bits: int
    explained: float

    def to_bytes(self) -> bytes:
        bits = packed(*write_positions(self.positions), fixed(self.negative, 1), fixed(self.codes, self.level_bits))
        return _HEAD.pack(self.positions.size, self.level_bits) + self.magnitudes + bits


def _head(level_bits: int) -> int:
    """Return the number of bytes before the bits."""
    return _HEAD.size + 2 * (1 << level_bits)


def _entries(vector: Tensor, order: Integers, level_bits: int, budget: int) -> _Entries:
    """Return as many of the first entries of `order` as fit into `budget` bytes with 2^level_bits magnitudes."""
    count = max_fitting(order, value_bits=1 + level_bits, budget=8 * (budget - _head(level_bits)))
    positions = np.sort(order[:count])
    values = vector[torch.from_numpy(positions)]
    return _Entries(positions, *quantize_values(values, level_bits))


def quantize_values(values: Tensor, level_bits: int) -> tuple[Integers, Integers, bytes, int, float]:
    """Quantize float values [k].

    Returns:
        Signs (1 is negative), indices of magnitudes, 2^level_bits magnitudes, level_bits, and the explained part of
        |x|^2.
    """
    magnitudes = bfloat16_bytes(lloyd_magnitudes(values.abs(), 1 << level_bits))
    read = bfloat16_from(magnitudes, "magnitudes")
    codes = torch.bucketize(values.abs(), (read[1:] + read[:-1]) / 2)
    sent = read[codes].double()
    explained = float((sent * (2 * values.abs().double() - sent)).sum())
    negative = (values < 0).numpy().astype(np.int64)
    return negative, codes.numpy(), magnitudes, level_bits, explained


def lloyd_magnitudes(values: Tensor, count: int) -> Tensor:
    """Return the `count` increasing magnitudes that nearly minimize the squared error
    for float values [k] >= 0 (Lloyd).

    The values are sorted, so those that share a magnitude are consecutive and their mean is a difference of cumulative
    sums.
    """
    if not values.numel():
        return torch.zeros(count)
    ascending = values.double().sort().values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ascending.cumsum(0)])
    levels = ascending[((torch.arange(count) + 0.5) / count * ascending.numel()).long()]
    for _ in range(LLOYD_STEPS):
        inner = torch.searchsorted(ascending, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([torch.tensor([0]), inner, torch.tensor([ascending.numel()])])
        counts = ends.diff()
        levels = torch.where(counts > 0, sums[ends].diff() / counts.clamp_min(1), levels)
    return levels
