"""STC, sparse ternary compression: the largest entries of an update, all with the same magnitude.

Sattler, Wiedemann, Mueller, Samek, "Robust and Communication-Efficient Federated Learning from Non-IID Data", IEEE
Transactions on Neural Networks and Learning Systems 2020, arXiv 1903.02891. With I the positions of the k largest
entries of x in magnitude,

    mu = 1/k sum_{i in I} |x_i|,    C(x)_i = mu sign(x_i) for i in I, else 0;

mu also minimizes the squared error. Positions are Golomb-coded, as in the paper. The paper fixes k/d; here k minimizes
the squared error among all k whose bytes fit, which maximizes k mu^2. At high ratios that is the largest k that fits;
at low ratios, more entries would lower the common magnitude and increase the error.

Data, little-endian:

    bytes  field
    4      k
    4      mu, float32
    -      bits: positions (`coding.write_positions`), k signs (1 is negative)
"""

import struct

import numpy as np
import torch
from torch import Tensor

from tofu.compression import compressors
from tofu.compression.base import FlatCompressor, checked_length, checked_scales
from tofu.compression.coding import (
    BitReader,
    by_magnitude,
    fixed,
    max_fitting,
    packed,
    positions_length,
    read_positions,
    write_positions,
)
from tofu.weights import ParamSpec

_HEAD = struct.Struct("<If")


@compressors.register("stc")
class Stc(FlatCompressor):
    """The largest entries, with their signs and one magnitude."""

    code = 4

    def _min_bytes(self, param_spec: ParamSpec) -> int:
        one = positions_length(np.array([param_spec.parameter_count - 1])) + 1
        return _HEAD.size + (one + 7) // 8

    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        budget = self._budget(param_spec) - _HEAD.size
        order = by_magnitude(vector, count=4 * budget)  # an entry takes at least two bits
        fitting = max_fitting(order, value_bits=1, budget=8 * budget)
        count, mu = best_count(vector[torch.from_numpy(order[:fitting])].abs())
        positions = np.sort(order[:count])
        values = vector[torch.from_numpy(positions)]
        signs = (values < 0).numpy().astype(np.int64)
        return _HEAD.pack(positions.size, mu) + packed(*write_positions(positions), fixed(signs, 1))

    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(data, _HEAD.size, "ternary entries", exactly=False)
        count, mu = _HEAD.unpack_from(data)
        scale = checked_scales(torch.tensor([mu]), "ternary entries")
        bits = BitReader(data[_HEAD.size :], "ternary entries")
        positions = read_positions(bits, count, param_spec.parameter_count)
        negative = bits.fixed(count, 1)
        bits.finish()
        vector = torch.zeros(param_spec.parameter_count)
        vector[torch.from_numpy(positions)] = scale * torch.from_numpy(1 - 2 * negative)
        return vector


def best_count(descending: Tensor) -> tuple[int, float]:
    """Return the best k and its mu for magnitudes [n] in descending order."""
    if not descending.numel():
        return 0, 0.0
    sums = descending.double().cumsum(0)
    count = int((sums.square() / torch.arange(1, descending.numel() + 1)).argmax()) + 1
    return count, float(sums[count - 1] / count)
