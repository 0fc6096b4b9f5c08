"""EDEN and DRIVE: a random rotation, then the optimal few-bit quantizer of a normal distribution.

Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher, "DRIVE: One-bit Distributed Mean Estimation",
NeurIPS 2021, arXiv 2105.08339, and "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for Federated
Learning", ICML 2022, arXiv 2108.08842. After a random rotation R the entries of any x are nearly normally distributed.
With z = R x of n entries and Q the nearest centroid of the Lloyd-Max quantizer of the standard normal distribution,

    q = Q(z sqrt(n) / |x|),    C(x) = s R^T q.

The scale s = <z, q> / <q, q> minimizes the squared error, as error feedback requires: at 1 bit a fraction 1 - 2/pi of
|x|^2 is missed. (The papers' scale for averaging without feedback, |x|^2 / <z, q>, makes C nearly unbiased and misses
pi/2 - 1.)

The number of bits per coordinate can be a fraction: a random subset of the rotated coordinates has one bit more than
the others. Below one bit, the others have none and count as zero.

Data, little-endian:

    bytes  field
    8      seed of the signs and of the subset
    2 each scale of each piece of the rotation, bfloat16
    -      bits: the subset's centroids, then the others'
"""

import math
import struct
from functools import cache

import torch
from torch import Tensor

from tofu.compression import compressors
from tofu.compression.base import FlatCompressor, checked_length, checked_scales
from tofu.compression.coding import BitReader, bfloat16_bytes, bfloat16_from, fixed, packed
from tofu.compression.hadamard import pieces, random_signs, rotate, rotate_back
from tofu.weights import ParamSpec

_SEED = struct.Struct("<Q")
MAX_BITS = 8
"""Maximum number of bits per coordinate; the error at 8 bits is 0.00004 |x|^2."""

LLOYD_STEPS = 1000


@compressors.register("eden")
class Eden(FlatCompressor):
    """Rotated and quantized entries."""

    code = 6

    def _min_bytes(self, param_spec: ParamSpec) -> int:
        return _head(param_spec) + 1

    def _max_bytes(self, param_spec: ParamSpec) -> int:
        bits, more = self._bits(param_spec)
        return _head(param_spec) + (sum(pieces(param_spec.parameter_count)) * bits + more + 7) // 8

    def _bits(self, param_spec: ParamSpec) -> tuple[int, int]:
        """Return the bits that every rotated coordinate has, and the number of coordinates that have one more."""
        length = sum(pieces(param_spec.parameter_count))
        bits, more = divmod(8 * (self._budget(param_spec) - _head(param_spec)), length)
        return (bits, more) if bits < MAX_BITS else (MAX_BITS, 0)

    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        seed = int(torch.randint(0, 2**63 - 1, (1,), generator=generator))
        bits, more = self._bits(param_spec)
        lengths = list(pieces(vector.numel()))
        signs, subset = _draw(seed, sum(lengths), more)
        z = rotate(torch.cat([vector, torch.zeros(sum(lengths) - vector.numel())]), signs)
        unit = torch.cat([_normal(piece) for piece in torch.split(z, lengths)])
        finer, others = _nearest(unit[subset], bits + 1), _nearest(unit[~subset], bits)
        q = _values(finer, others, subset, bits)
        scales = [_scale(*pair) for pair in zip(torch.split(z, lengths), torch.split(q, lengths), strict=True)]
        stream = packed(fixed(finer.numpy(), bits + 1), fixed(others.numpy(), bits))
        return _SEED.pack(seed) + bfloat16_bytes(torch.tensor(scales)) + stream

    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(data, self._max_bytes(param_spec), "rotated entries")
        (seed,) = _SEED.unpack_from(data)
        bits, more = self._bits(param_spec)
        lengths = pieces(param_spec.parameter_count)
        split = _head(param_spec)
        scales = checked_scales(bfloat16_from(data[_SEED.size : split], "scales"), "rotated entries")
        stream = BitReader(data[split:], "rotated entries")
        signs, subset = _draw(seed, sum(lengths), more)
        finer, others = stream.fixed(more, bits + 1), stream.fixed(sum(lengths) - more, bits)
        stream.finish()
        q = _values(torch.from_numpy(finer), torch.from_numpy(others), subset, bits)
        q *= scales.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        return rotate_back(q, signs)[: param_spec.parameter_count]


def _scale(z: Tensor, q: Tensor) -> float:
    z, q = z.double(), q.double()
    power = q @ q
    return float(z @ q / power) if power > 0 else 0.0


def _head(param_spec: ParamSpec) -> int:
    """Return the number of bytes before the bits."""
    return _SEED.size + 2 * len(pieces(param_spec.parameter_count))


def _draw(seed: int, length: int, more: int) -> tuple[Tensor, Tensor]:
    """Draw, at both ends, the signs and a subset of `more` coordinates, bool [length], from the seed."""
    generator = torch.Generator().manual_seed(seed)
    signs = random_signs(length, generator)
    subset = torch.zeros(length, dtype=torch.bool)
    subset[torch.randperm(length, generator=generator)[:more]] = True
    return signs, subset


def _values(finer: Tensor, others: Tensor, subset: Tensor, bits: int) -> Tensor:
    """q from the indices of the centroids of the subset and of the others."""
    q = torch.empty(subset.numel())
    q[subset], q[~subset] = centroids(bits + 1)[finer], centroids(bits)[others]
    return q


def _normal(piece: Tensor) -> Tensor:
    """Return the piece divided by its root mean square."""
    square = float(piece.double().square().mean())
    return piece / math.sqrt(square) if square > 0 else piece


def _nearest(values: Tensor, bits: int) -> Tensor:
    """Return the index of the nearest centroid."""
    levels = centroids(bits)
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)


@cache
def centroids(bits: int) -> Tensor:
    """Return the centroids of the Lloyd-Max quantizer of the standard normal: 2^bits increasing values, float32.

    They minimize the squared error (Max 1960; Lloyd 1982). Lloyd's algorithm starts at the quantiles of a normal
    distribution with three times the variance, which are optimal for many levels (Panter, Dite 1951).
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
