"""PowerSGD: each matrix of an update as a product of two factors of low rank.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", NeurIPS
2019, arXiv 1905.13727. A tensor is taken as a matrix M [m, n], m its first dimension. One step of subspace iteration
from the sender's last Q [n, r] (normal noise at first) gives

    P = orthonormalized(M Q),    Q = M^T P,    M ~ P Q^T.

The factors are quantized, so Q is fitted to P as the receiver reads it: Q^T is the least-squares solution of P Q^T = M,
which equals M^T P if P is orthonormal. In the paper the clients' P and Q are averaged between the two halves of a step,
which takes two exchanges per round and a shared Q; here each client sends its own factors in its one reply.

Vectors, and matrices that the factors would not make smaller, are sent in full, with the bits of the factors.

Rank and bits follow from the ratio: 16 bits at full rank if that fits; else the highest rank (the same for all
matrices, limited by their own) that fits at 8 bits; else rank 1 with the largest of 6 to 2 bits that fits.

Data: for each tensor P^T and Q^T, or the tensor itself, as few-bit integers with a bfloat16 scale for each
column of a factor (RowCode).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tofu.codec.options import DEFAULTS, CompressorOptions
from tofu.compression import compressors
from tofu.compression.base import FlatCompressor, checked_length
from tofu.compression.coding import RowCode
from tofu.errors import PayloadError
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, split_vector

DEFAULT_BITS = 8
SMALL_BITS = (6, 5, 4, 3, 2)


@compressors.register("powersgd")
class PowerSgd(FlatCompressor):
    """Low-rank factors of each matrix.

    Attributes:
        rank: rank of the factors.
        bits: bits of their entries.
    """

    code = 5

    def __init__(self, reference: ReferenceModel, *, ratio: float, options: CompressorOptions = DEFAULTS) -> None:
        super().__init__(reference, ratio=ratio, options=options)
        self.rank, self.bits = _rank_and_bits(reference.param_spec, self._budget(reference.param_spec))

    def _min_bytes(self, param_spec: ParamSpec) -> int:
        return _size(param_spec, 1, SMALL_BITS[-1])

    def _max_bytes(self, param_spec: ParamSpec) -> int:
        return _size(param_spec, self.rank, self.bits)

    def _memory(self, data: bytes) -> bytes:
        return data

    def _encode(self, vector: Tensor, param_spec: ParamSpec, generator: torch.Generator, memory: bytes) -> bytes:
        start = self._read_memory(memory, param_spec)
        parts = []
        for name, tensor in split_vector(vector, param_spec.parameters).items():
            codes = _codes(tensor.shape, self.rank, self.bits)
            if len(codes) == 2:
                noise = torch.randn(codes[1].columns, codes[1].rows, generator=generator)
                parts += _factors(tensor.flatten(1), start.get(name, noise), noise, *codes)
            else:
                parts += [code.write(tensor) for code in codes]
        return b"".join(parts)

    def _decode(self, data: bytes, param_spec: ParamSpec) -> Tensor:
        checked_length(data, self._max_bytes(param_spec), "factors")
        return torch.cat([_product(matrices) for _, matrices in self._matrices(data, param_spec)])

    def _matrices(self, data: bytes, param_spec: ParamSpec) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield for each tensor its name, and P^T and Q^T, the tensor itself, or nothing if it is empty."""
        begin = 0
        for name, shape in param_spec.parameters.items():
            matrices = []
            for code in _codes(shape, self.rank, self.bits):
                matrices.append(code.read(data[begin : begin + code.nbytes], f"factors of {name}"))
                begin += code.nbytes
            yield name, matrices

    def _read_memory(self, memory: bytes, param_spec: ParamSpec) -> dict[str, Tensor]:
        """Return the last Q of each matrix, by name."""
        if len(memory) != self._max_bytes(param_spec):  # none, or written for another ratio or model
            return {}
        try:
            return {name: m[1].T for name, m in self._matrices(memory, param_spec) if len(m) == 2}
        except PayloadError:
            return {}


def _factors(matrix: Tensor, last: Tensor, noise: Tensor, left: RowCode, right: RowCode) -> list[bytes]:
    """Return bytes of P^T and Q^T for a matrix [m, n], from the last Q [n, r]."""
    unit = float(matrix.abs().max()) or 1.0  # products of large entries stay finite
    size = last.norm(dim=0)
    q = torch.where(size.isfinite() & (size > 0), last, noise)  # an unused column has no direction
    p, _ = torch.linalg.qr(matrix / unit @ (q / q.norm(dim=0)))
    written = left.write(p.T)
    read = left.read(written, "factors").T
    return [written, right.write(unit * (torch.linalg.pinv(read) @ (matrix / unit)))]


def _product(matrices: list[Tensor]) -> Tensor:
    if len(matrices) == 2:
        return (matrices[0].T @ matrices[1]).flatten()
    return matrices[0].flatten() if matrices else torch.zeros(0)


def _codes(shape: torch.Size, rank: int, bits: int) -> tuple[RowCode, ...]:
    """Return the formats of a tensor: P^T and Q^T, or the tensor itself, or none if it is empty."""
    size = shape.numel()
    if not size:
        return ()
    rows, columns = (shape[0], size // shape[0]) if shape else (1, 1)
    rank = min(rank, rows, columns)
    if len(shape) < 2 or rank * (rows + columns) >= size:
        return (RowCode(1, size, bits),)
    return RowCode(rank, rows, bits), RowCode(rank, columns, bits)


def _size(param_spec: ParamSpec, rank: int, bits: int) -> int:
    return sum(code.nbytes for shape in param_spec.parameters.values() for code in _codes(shape, rank, bits))


def _rank_and_bits(param_spec: ParamSpec, budget: int) -> tuple[int, int]:
    matrices = [shape for shape in param_spec.parameters.values() if len(shape) > 1 and shape.numel()]
    full_rank = max((min(shape[0], shape.numel() // shape[0]) for shape in matrices), default=1)
    if _size(param_spec, full_rank, 16) <= budget:
        return full_rank, 16
    for rank in range(full_rank, 0, -1):
        if _size(param_spec, rank, DEFAULT_BITS) <= budget:
            return rank, DEFAULT_BITS
    return 1, next(bits for bits in SMALL_BITS if _size(param_spec, 1, bits) <= budget)
