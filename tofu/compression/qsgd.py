"""QSGD: stochastic rounding to whole multiples of a step, and a code for which zeros and ones are cheap.

Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
NeurIPS 2017, arXiv 1610.02132. With u_i uniform on [0, 1) (the dither) and a step s,

    l_i = sign(x_i) floor(|x_i| / s + u_i),    E[s l] = x.

The paper's step is |x|_2 over a whole number of levels. Here it is as fine as the bytes allow: with the dither held, a
coarser step lowers every level, which costs no more bits, so bisection finds it.

At high ratios the variance of s l is many times |x|^2, and error feedback around it would diverge. So the unit sent
with the levels is not s but that of least squared error, <x, l> / <l, l>, which makes it a contraction; `unbiased`
sends s.

Own part of the body, little-endian:

    bytes  field
    4      k, how many levels are not zero
    4      the unit, float32
    -      bits: their positions (`positions`), their magnitudes (Elias' gamma code), their signs (1 is negative)
"""

import struct
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tofu.compression.bitstream import BitReader, Integers, fixed, gamma, gamma_length, packed
from tofu.compression.flat import FlatCompressor, checked_length, checked_scales
from tofu.compression.rice import positions_length, read_positions, write_positions
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec

_HEAD = struct.Struct("<If")
FINEST = 2.0**-24
"""Of the largest entry: a finer step would tell nothing that float32 holds."""

BISECTIONS = 12


class Qsgd(FlatCompressor):
    """Stochastic levels.

    Args:
        unbiased: send the step itself, so that the mean over dithers is exact, in place of the best unit.
    """

    name: ClassVar[str] = "qsgd"
    code: ClassVar[int] = 8

    def __init__(self, network_like: ReferenceModel, *, ratio: float, unbiased: bool = False) -> None:
        super().__init__(network_like, ratio=ratio)
        self._unbiased = unbiased

    def _least(self, param_spec: ParamSpec) -> int:
        one = _length(np.array([param_spec.parameter_count - 1]), np.array([1]))
        return _HEAD.size + (one + 7) // 8

    def _write(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        x = vector.double().numpy()
        dither = torch.rand(x.size, generator=generator, dtype=torch.float64).numpy()
        largest = float(np.abs(x).max(initial=0.0))
        if largest == 0:
            return _HEAD.pack(0, 0.0) + packed(*write_positions(np.zeros(0, dtype=np.int64)))
        shares = np.abs(x) / largest
        step = _finest_step(shares, dither, 8 * (self._room(param_spec) - _HEAD.size))
        levels = _levels(shares, dither, step)
        positions = np.flatnonzero(levels)
        kept, power = levels[positions], float(np.square(levels.astype(np.float64)).sum())
        best = float(shares[positions] @ kept) / power if power else 0.0
        unit = largest * (step if self._unbiased else best)
        negative = (x[positions] < 0).astype(np.int64)
        return _HEAD.pack(kept.size, unit) + packed(*write_positions(positions), gamma(kept), fixed(negative, 1))

    def _read(self, own: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(own, _HEAD.size, "levels", exactly=False)
        count, unit = _HEAD.unpack_from(own)
        scale = checked_scales(torch.tensor([unit]), "levels")
        bits = BitReader(own[_HEAD.size :], "levels")
        positions = read_positions(bits, count, param_spec.parameter_count)
        magnitudes = bits.gamma(count)
        levels = magnitudes * (1 - 2 * bits.fixed(count, 1))
        bits.finish()
        vector = torch.zeros(param_spec.parameter_count)
        vector[torch.from_numpy(positions)] = scale * torch.from_numpy(levels)
        return vector


def _levels(shares: npt.NDArray[np.float64], dither: npt.NDArray[np.float64], step: float) -> Integers:
    """Magnitudes of the levels for |x| in any unit and a step in the same."""
    return (shares / step + dither).astype(np.int64)


def _length(positions: Integers, levels: Integers) -> int:
    """Bits of levels that are not zero."""
    return positions_length(positions) + gamma_length(levels) + levels.size


def _finest_step(shares: npt.NDArray[np.float64], dither: npt.NDArray[np.float64], room: int) -> float:
    """The finest step whose levels fit into `room` bits, to a part in 2^`BISECTIONS`; shares are at most 1."""

    def fits(step: float) -> bool:
        levels = _levels(shares, dither, step)
        positions = np.flatnonzero(levels)
        return _length(positions, levels[positions]) <= room

    step = 1.0
    while not fits(step):
        step *= 2
    while step > FINEST and fits(step / 2):
        step /= 2
    if step <= FINEST:
        return step
    coarse, fine = step, step / 2
    for _ in range(BISECTIONS):
        middle = (coarse + fine) / 2
        coarse, fine = (middle, fine) if fits(middle) else (coarse, middle)
    return coarse
