"""STC, sparse ternary compression: the largest entries of an update, all with the same magnitude.

Sattler, Wiedemann, Mueller, Samek, "Robust and Communication-Efficient Federated Learning from Non-IID Data", IEEE
Transactions on Neural Networks and Learning Systems 2019, arXiv 1903.02891. With I the positions of the k largest
entries of x in magnitude,

    mu = 1/k sum_{i in I} |x_i|,    C(x)_i = mu sign(x_i) for i in I, else 0;

mu is also the magnitude of least squared error. Positions are Golomb-coded, as in the paper. The paper fixes k/d; here
k is, of those whose bytes fit, the one that misses least of |x|^2, which is that of the largest k mu^2. At high ratios
it is the largest that fits; at low ones, more entries would only pull the one magnitude away from the others.

Own part of the body, little-endian:

    bytes  field
    4      k
    4      mu, float32
    -      bits: positions (`positions`), k signs (1 is negative)
"""

import struct
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tofu.compression.bitstream import BitReader, fixed, packed
from tofu.compression.flat import FlatCompressor, checked_length, checked_scales
from tofu.compression.rice import by_magnitude, most_that_fit, positions_length, read_positions, write_positions
from tofu.weights import ParamSpec

_HEAD = struct.Struct("<If")


class Stc(FlatCompressor):
    """The largest entries, with their sign and one magnitude."""

    name: ClassVar[str] = "stc"
    code: ClassVar[int] = 4

    def _least(self, param_spec: ParamSpec) -> int:
        one = positions_length(np.array([param_spec.parameter_count - 1])) + 1
        return _HEAD.size + (one + 7) // 8

    def _write(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        room = self._room(param_spec) - _HEAD.size
        order = by_magnitude(vector, most=4 * room)  # an entry takes two bits at least
        most = most_that_fit(order, value_bits=1, room=8 * room)
        count, mu = best_count(vector[torch.from_numpy(order[:most])].abs())
        positions = np.sort(order[:count])
        values = vector[torch.from_numpy(positions)]
        signs = (values < 0).numpy().astype(np.int64)
        return _HEAD.pack(positions.size, mu) + packed(*write_positions(positions), fixed(signs, 1))

    def _read(self, own: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(own, _HEAD.size, "ternary entries", exactly=False)
        count, mu = _HEAD.unpack_from(own)
        scale = checked_scales(torch.tensor([mu]), "ternary entries")
        bits = BitReader(own[_HEAD.size :], "ternary entries")
        positions = read_positions(bits, count, param_spec.parameter_count)
        negative = bits.fixed(count, 1)
        bits.finish()
        vector = torch.zeros(param_spec.parameter_count)
        vector[torch.from_numpy(positions)] = scale * torch.from_numpy(1 - 2 * negative)
        return vector


def best_count(falling: Tensor) -> tuple[int, float]:
    """k and mu for falling magnitudes [n] to choose the first k of."""
    if not falling.numel():
        return 0, 0.0
    sums = falling.double().cumsum(0)
    count = int((sums.square() / torch.arange(1, falling.numel() + 1)).argmax()) + 1
    return count, float(sums[count - 1] / count)
