"""EDEN and DRIVE: a random rotation, then the best few-bit values for what is normal after it.

Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher, "DRIVE: One-bit Distributed Mean Estimation",
NeurIPS 2021, arXiv 2105.08339, and "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for Federated
Learning", ICML 2022, arXiv 2108.08842. Rotated by R, any x looks like a sample of a normal distribution, so with
z = R x, n entries, and Q the nearest centroid of Lloyd's and Max's quantizer of the standard normal,

    q = Q(z sqrt(n) / |x|),    C(x) = s R^T q.

s is by default the scale of least squared error, <z, q> / <q, q>, which error feedback wants: at 1 bit a share
1 - 2/pi of |x|^2 is missed. The papers' scale for averaging without feedback, |x|^2 / <z, q>, makes C unbiased for a
uniform rotation, and nearly so for this one, and misses pi/2 - 1.

Any number of bits a coordinate, also a fraction: a random subset of the rotated coordinates has one bit more than the
others, which below one bit means that the others have none and count as zero.

Own part of the body, little-endian:

    bytes  field
    8      seed of the signs and of the subset
    2 each scale of each piece of the rotation, bfloat16
    -      bits: the subset's centroids, then the others'
"""

import math
import struct
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from tofu.compression.bitstream import BitReader, fixed, packed
from tofu.compression.flat import FlatCompressor, checked_length, checked_scales
from tofu.compression.hadamard import pieces, random_signs, rotated, rotated_back
from tofu.compression.quantize import bfloat16_bytes, bfloat16_from
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec

_SEED = struct.Struct("<Q")
MAX_BITS = 8
"""Of a coordinate: at 8 bits some 0.00004 of |x|^2 is missed, and more would serve nobody."""

LLOYD_STEPS = 1000


class Eden(FlatCompressor):
    """Rotated and quantized.

    Args:
        unbiased: take the scale that makes the mean over seeds exact, in place of that of least squared error.
    """

    name: ClassVar[str] = "eden"
    code: ClassVar[int] = 6

    def __init__(self, network_like: ReferenceModel, *, ratio: float, unbiased: bool = False) -> None:
        super().__init__(network_like, ratio=ratio)
        self._unbiased = unbiased

    def _least(self, param_spec: ParamSpec) -> int:
        return _head(param_spec) + 1

    def _most(self, param_spec: ParamSpec) -> int:
        bits, more = self._bits(param_spec)
        return _head(param_spec) + (sum(pieces(param_spec.parameter_count)) * bits + more + 7) // 8

    def _bits(self, param_spec: ParamSpec) -> tuple[int, int]:
        """Bits that every rotated coordinate has, and how many coordinates have one more."""
        length = sum(pieces(param_spec.parameter_count))
        bits, more = divmod(8 * (self._room(param_spec) - _head(param_spec)), length)
        return (bits, more) if bits < MAX_BITS else (MAX_BITS, 0)

    def _write(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        seed = int(torch.randint(0, 2**63 - 1, (1,), generator=generator))
        bits, more = self._bits(param_spec)
        cut = list(pieces(vector.numel()))
        signs, subset = _drawn(seed, sum(cut), more)
        z = rotated(torch.cat([vector, torch.zeros(sum(cut) - vector.numel())]), signs)
        unit = torch.cat([_normal(piece) for piece in torch.split(z, cut)])
        finer, others = _nearest(unit[subset], bits + 1), _nearest(unit[~subset], bits)
        q = _values(finer, others, subset, bits)
        scales = [self._scale(*pair) for pair in zip(torch.split(z, cut), torch.split(q, cut), strict=True)]
        stream = packed(fixed(finer.numpy(), bits + 1), fixed(others.numpy(), bits))
        return _SEED.pack(seed) + bfloat16_bytes(torch.tensor(scales)) + stream

    def _read(self, own: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(own, self._most(param_spec), "rotated entries")
        (seed,) = _SEED.unpack_from(own)
        bits, more = self._bits(param_spec)
        cut = pieces(param_spec.parameter_count)
        split = _head(param_spec)
        scales = checked_scales(bfloat16_from(own[_SEED.size : split], "scales"), "rotated entries")
        stream = BitReader(own[split:], "rotated entries")
        signs, subset = _drawn(seed, sum(cut), more)
        finer, others = stream.fixed(more, bits + 1), stream.fixed(sum(cut) - more, bits)
        stream.finish()
        q = _values(torch.from_numpy(finer), torch.from_numpy(others), subset, bits)
        q *= scales.repeat_interleave(torch.tensor(cut, dtype=torch.int64))
        return rotated_back(q, signs)[: param_spec.parameter_count]

    def _scale(self, z: Tensor, q: Tensor) -> float:
        z, q = z.double(), q.double()
        top, bottom = (z @ z, z @ q) if self._unbiased else (z @ q, q @ q)
        return float(top / bottom) if bottom > 0 else 0.0


def _head(param_spec: ParamSpec) -> int:
    """Bytes ahead of the bits."""
    return _SEED.size + 2 * len(pieces(param_spec.parameter_count))


def _drawn(seed: int, length: int, more: int) -> tuple[Tensor, Tensor]:
    """What both ends draw from the seed: the signs, and the subset of `more` coordinates as bool [length]."""
    generator = torch.Generator().manual_seed(seed)
    signs = random_signs(length, generator)
    subset = torch.zeros(length, dtype=torch.bool)
    subset[torch.randperm(length, generator=generator)[:more]] = True
    return signs, subset


def _values(finer: Tensor, others: Tensor, subset: Tensor, bits: int) -> Tensor:
    """q from the numbers of the subset's centroids and of the others'."""
    q = torch.empty(subset.numel())
    q[subset], q[~subset] = centroids(bits + 1)[finer], centroids(bits)[others]
    return q


def _normal(piece: Tensor) -> Tensor:
    """The piece in units of its root mean square."""
    square = float(piece.double().square().mean())
    return piece / math.sqrt(square) if square > 0 else piece


def _nearest(values: Tensor, bits: int) -> Tensor:
    """Number of the nearest centroid."""
    levels = centroids(bits)
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)


@cache
def centroids(bits: int) -> Tensor:
    """The 2^bits rising values of least squared error for the standard normal (Max 1960; Lloyd 1982), float32.

    Lloyd's algorithm from the quantiles of a normal distribution three times as wide in variance, which is what is best
    for many levels (Panter, Dite 1951).
    """
    count = 1 << bits
    levels = math.sqrt(3) * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(LLOYD_STEPS if count > 1 else 0):
        ends = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
        density = torch.exp(-ends.square() / 2) / math.sqrt(2 * math.pi)
        levels = -density.diff() / torch.special.ndtr(ends).diff()
    result: Tensor = levels.float()
    return result
