"""Top-k: the largest entries of an update, each with its position and a few bits of its value.

Aji, Heafield, "Sparse Communication for Distributed Gradient SGD", EMNLP 2017, arXiv 1704.05021. Lin, Han, Mao,
Wang, Dally, "Deep Gradient Compression", ICLR 2018, arXiv 1712.01887. Both keep what was not sent for the next round;
here the error feedback around every codec does. Both send values as floats, which is poor use of bytes: at a ratio of
50, on an update of LeNet-5, 32 bits a value explain 0.54 of the variance, 8-bit integers 0.74, 4-bit ones 0.67, and a
sign with one of four magnitudes 0.81 (of two 0.77, of eight 0.80). So values are a sign and one of a few magnitudes,
those of least squared error for the entries at hand (Lloyd's algorithm). With more magnitudes fewer entries fit; how
many, from two on, is the number after which one more bit explains no more of the update.

Own part of the body, little-endian:

    bytes  field
    4      k, the number of entries: as many of the largest as fit
    1      bits of a magnitude's number, b
    2 each 2^b magnitudes, bfloat16
    -      bits: positions (`positions`), k signs (1 is negative), k numbers of magnitudes
"""

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tofu.compression.bitstream import BitReader, Integers, fixed, packed
from tofu.compression.flat import FlatCompressor, checked_length, checked_scales
from tofu.compression.quantize import bfloat16_bytes, bfloat16_from
from tofu.compression.rice import (
    by_magnitude,
    most_that_fit,
    positions_length,
    read_positions,
    write_positions,
)
from tofu.errors import PayloadError
from tofu.weights import ParamSpec

_HEAD = struct.Struct("<IB")
MAX_LEVEL_BITS = 8
LLOYD_STEPS = 50


class TopK(FlatCompressor):
    """The largest entries, with their sign and one of a few magnitudes."""

    name: ClassVar[str] = "topk"
    code: ClassVar[int] = 3

    def _least(self, param_spec: ParamSpec) -> int:
        return least_room(param_spec.parameter_count)

    def _write(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        return write_largest(vector, self._room(param_spec))

    def _read(self, own: bytes, param_spec: ParamSpec) -> Tensor:
        return read_largest(own, param_spec.parameter_count)


def least_room(length: int) -> int:
    """Bytes into which one entry of a vector of this length always fits."""
    one = positions_length(np.array([length - 1])) + 1 + 1
    return _head(1) + (one + 7) // 8


def write_largest(vector: Tensor, room: int) -> bytes:
    """As many of the largest entries of a float vector [d] as explain most of it in at most `room` bytes."""
    order = by_magnitude(vector, most=4 * room)  # an entry takes two bits at least
    best = _entries(vector, order, 1, room)
    for level_bits in range(2, MAX_LEVEL_BITS + 1):
        more = _entries(vector, order, level_bits, room)
        if more.explained <= best.explained:
            break
        best = more
    return best.to_bytes()


def read_largest(data: bytes, length: int) -> Tensor:
    """The inverse of `write_largest`: a float32 vector [length], zero elsewhere.

    Raises:
        PayloadError: the bytes cannot have been written for a vector of this length.
    """
    checked_length(data, _HEAD.size, "largest entries", exactly=False)
    count, level_bits = _HEAD.unpack_from(data)
    if not 1 <= level_bits <= MAX_LEVEL_BITS:
        raise PayloadError(f"largest entries have {level_bits} bits a magnitude, expected 1 to {MAX_LEVEL_BITS}")
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
    """Chosen entries as they are sent: rising positions, signs, numbers of magnitudes, and 2^level_bits magnitudes.

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
    """Bytes ahead of the bits."""
    return _HEAD.size + 2 * (1 << level_bits)


def _entries(vector: Tensor, order: Integers, level_bits: int, room: int) -> _Entries:
    """As many of the first entries of `order` as fit into `room` bytes with 2^level_bits magnitudes."""
    count = most_that_fit(order, value_bits=1 + level_bits, room=8 * (room - _head(level_bits)))
    positions = np.sort(order[:count])
    values = vector[torch.from_numpy(positions)]
    return _Entries(positions, *rounded_values(values, level_bits))


def rounded_values(values: Tensor, level_bits: int) -> tuple[Integers, Integers, bytes, int, float]:
    """Float values [k] as signs (1 is negative), numbers of magnitudes, 2^level_bits magnitudes, level_bits, and how
    much of |x|^2 these explain."""
    magnitudes = bfloat16_bytes(magnitudes_of(values.abs(), 1 << level_bits))
    read = bfloat16_from(magnitudes, "magnitudes")
    codes = torch.bucketize(values.abs(), (read[1:] + read[:-1]) / 2)
    sent = read[codes].double()
    explained = float((sent * (2 * values.abs().double() - sent)).sum())
    negative = (values < 0).numpy().astype(np.int64)
    return negative, codes.numpy(), magnitudes, level_bits, explained


def magnitudes_of(values: Tensor, count: int) -> Tensor:
    """The `count` rising magnitudes of about the least squared error for float values [k] >= 0: Lloyd's algorithm.

    In one dimension a magnitude's values are a stretch of the sorted ones, and its mean a difference of running sums.
    """
    if not values.numel():
        return torch.zeros(count)
    rising = values.double().sort().values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), rising.cumsum(0)])
    levels = rising[((torch.arange(count) + 0.5) / count * rising.numel()).long()]
    for _ in range(LLOYD_STEPS):
        inner = torch.searchsorted(rising, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([torch.tensor([0]), inner, torch.tensor([rising.numel()])])
        shares = ends.diff()
        levels = torch.where(shares > 0, sums[ends].diff() / shares.clamp_min(1), levels)
    return levels
