"""QSGD: stochastic rounding to multiples of a step, and a variable-length code of the levels.

Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
NeurIPS 2017, arXiv 1610.02132. With u_i uniform on [0, 1) (the dither) and a step s,

    l_i = sign(x_i) floor(|x_i| / s + u_i),    E[s l] = x.

The paper's step is |x|_2 over an integer number of levels. Here it is as fine as the bytes allow: with fixed dither, a
coarser step lowers every level, which takes no more bits, so bisection finds it.

At high ratios the variance of s l is many times |x|^2, and error feedback would diverge. Therefore the unit that is
sent with the levels is not s but <x, l> / <l, l>, which minimizes the squared error and makes C a contraction.

Data, little-endian:

    bytes  field
    4      k, number of nonzero levels
    4      the unit, float32
    -      bits: positions (`coding.write_positions`), magnitudes (Elias gamma code), signs (1 is negative)
"""

import struct

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.compression import compressors
from tofu.compression.base import FlatCompressor, checked_length, checked_scales
from tofu.compression.coding import (
    BitReader,
    Integers,
    fixed,
    gamma,
    gamma_length,
    packed,
    positions_length,
    read_positions,
    write_positions,
)
from tofu.weights import ParamSpec

_HEAD = struct.Struct("<If")
MIN_STEP = 2.0**-24
"""Smallest step, relative to the largest entry: the resolution of float32."""

BISECTIONS = 12


@compressors.register("qsgd")
class Qsgd(FlatCompressor):
    """Stochastically rounded levels."""

    code = 8

    def _min_bytes(self, param_spec: ParamSpec) -> int:
        one = _length(np.array([param_spec.parameter_count - 1]), np.array([1]))
        return _HEAD.size + (one + 7) // 8

    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        x = vector.double().numpy()
        dither = torch.rand(x.size, generator=generator, dtype=torch.float64).numpy()
        largest = float(np.abs(x).max(initial=0.0))
        if largest == 0:
            return _HEAD.pack(0, 0.0) + packed(*write_positions(np.zeros(0, dtype=np.int64)))
        relative = np.abs(x) / largest
        step = _finest_step(relative, dither, 8 * (self._budget(param_spec) - _HEAD.size))
        levels = _levels(relative, dither, step)
        positions = np.flatnonzero(levels)
        nonzero, power = levels[positions], float(np.square(levels.astype(np.float64)).sum())
        best = float(relative[positions] @ nonzero) / power if power else 0.0
        unit = largest * best
        negative = (x[positions] < 0).astype(np.int64)
        return _HEAD.pack(nonzero.size, unit) + packed(*write_positions(positions), gamma(nonzero), fixed(negative, 1))

    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(data, _HEAD.size, "levels", exactly=False)
        count, unit = _HEAD.unpack_from(data)
        scale = checked_scales(torch.tensor([unit]), "levels")
        bits = BitReader(data[_HEAD.size :], "levels")
        positions = read_positions(bits, count, param_spec.parameter_count)
        magnitudes = bits.gamma(count)
        levels = magnitudes * (1 - 2 * bits.fixed(count, 1))
        bits.finish()
        vector = torch.zeros(param_spec.parameter_count)
        vector[torch.from_numpy(positions)] = scale * torch.from_numpy(levels)
        return vector


def _levels(relative: npt.NDArray[np.float64], dither: npt.NDArray[np.float64], step: float) -> Integers:
    """Magnitudes of the levels; |x| and the step are relative to the largest entry."""
    return (relative / step + dither).astype(np.int64)


def _length(positions: Integers, levels: Integers) -> int:
    """Return the number of bits of nonzero levels."""
    return positions_length(positions) + gamma_length(levels) + levels.size


def _finest_step(relative: npt.NDArray[np.float64], dither: npt.NDArray[np.float64], budget: int) -> float:
    """Return the finest step whose levels fit into `budget` bits, to a relative precision of 2^-`BISECTIONS`.

    Args:
        relative: |x| over the largest entry.
    """

    def fits(step: float) -> bool:
        levels = _levels(relative, dither, step)
        positions = np.flatnonzero(levels)
        return _length(positions, levels[positions]) <= budget

    step = 1.0
    while not fits(step):
        step *= 2
    while step > MIN_STEP and fits(step / 2):
        step /= 2
    if step <= MIN_STEP:
        return step
    coarse, fine = step, step / 2
    for _ in range(BISECTIONS):
        middle = (coarse + fine) / 2
        coarse, fine = (middle, fine) if fits(middle) else (coarse, middle)
    return coarse
